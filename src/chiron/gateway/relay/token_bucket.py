"""Rate limits that allow a minute's worth at once."""

from __future__ import annotations

from math import inf
from typing import Final

PERIOD_S: Final = 60.0


class TokenBucket:
    """May go into debt. A limit of inf never empties."""

    __slots__ = ("at_s", "level", "size")

    def __init__(self, per_minute: float) -> None:
        self.size = per_minute
        self.level = per_minute
        self.at_s = 0.0

    def wait_s(self, now_s: float, amount: float) -> float:
        """Seconds until it holds ``amount`` (or is full); 0: now."""
        if self.size == inf:
            return 0.0
        self._fill(now_s)
        # At least one fits a full bucket, also when less than one a minute is allowed.
        missing = (amount if amount < self.size else self.size) - self.level
        return missing * PERIOD_S / self.size if missing > 1e-9 else 0.0

    def take(self, now_s: float, amount: float) -> None:
        """However little is left."""
        if self.size != inf:
            self._fill(now_s)
        self.level -= amount

    def spares(self, now_s: float, amount: float) -> bool:
        """Whether half of it is left after ``amount``, or it is full."""
        if self.size == inf:
            return True
        self._fill(now_s)
        return self.level + 1e-9 >= min(self.size, self.size / 2.0 + amount)

    def _fill(self, now_s: float) -> None:
        passed_s = now_s - self.at_s
        if passed_s > 0.0:  # Whoever asks may look at the clock a little earlier than whoever asked before.
            level = self.level + passed_s * self.size / PERIOD_S
            self.level = level if level < self.size else self.size
            self.at_s = now_s


class KeyLimits:
    """The two limits of one API key: requests and tokens a minute."""

    __slots__ = ("requests", "tokens")

    def __init__(self, requests_per_minute: float, tokens_per_minute: float) -> None:
        self.requests = TokenBucket(requests_per_minute)
        self.tokens = TokenBucket(tokens_per_minute)

    def take(self, now_s: float, tokens: float) -> float:
        """Count one request with so many tokens. Above 0: seconds until it may come; then nothing is counted."""
        requests_s, tokens_s = self.requests.wait_s(now_s, 1.0), self.tokens.wait_s(now_s, tokens)
        if requests_s > 0.0 or tokens_s > 0.0:
            return max(requests_s, tokens_s)
        self.requests.level -= 1.0
        self.tokens.level -= tokens
        return 0.0

    def take_spare(self, now_s: float, tokens: float) -> bool:
        """The same, if half a minute's worth of both is left. False, and then nothing is counted."""
        if not (self.requests.spares(now_s, 1.0) and self.tokens.spares(now_s, tokens)):
            return False
        self.requests.level -= 1.0
        self.tokens.level -= tokens
        return True

    def count(self, now_s: float, tokens: float) -> None:
        """However little is left."""
        self.requests.take(now_s, 1.0)
        self.tokens.take(now_s, tokens)

    def bound_debts(self) -> None:
        for bucket in (self.requests, self.tokens):
            bucket.level = max(bucket.level, -bucket.size)

    def give_back(self, tokens: float) -> None:
        self.requests.level = min(self.requests.size, self.requests.level + 1.0)
        self.tokens.level = min(self.tokens.size, self.tokens.level + tokens)

    def charge(self, tokens: float) -> None:
        self.tokens.level -= tokens
