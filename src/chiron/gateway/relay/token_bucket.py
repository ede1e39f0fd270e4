"""A rate limit that allows a minute's worth at once."""

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
