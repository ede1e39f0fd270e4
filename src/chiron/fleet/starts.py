"""When an instance of a kind may start, given how the last starts went.

A kind whose instances fail to start, or die soon after, is tried again after a pause that doubles, one instance at a
time: fifty engines that cannot load their model must not try so together, again and again. Failures of starts that
were under way together count once. A start that succeeds lets the others follow; the count goes back to zero when an
instance has lasted.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from chiron.core.backoff import doubled_s
from chiron.fleet.health import require_positive
from chiron.fleet.waiting import heard


@dataclass(frozen=True, slots=True, kw_only=True)
class BackoffSettings:
    """Pauses between starts of a kind that keeps failing."""

    backoff_first_s: float = 1.0
    """Seconds after the first failure; doubled with each further one."""
    backoff_max_s: float = 60.0
    """Longest pause, seconds."""
    stable_after_s: float = 60.0
    """An instance that has been ready for so long proves its kind sound; one that dies earlier counts as a failed
    start."""
    crash_loop_starts: int = 5
    """Failures in a row after which the kind counts as crash-looping: longest pause, and shown as such."""
    start_wait_s: float = 120.0
    """Longest that a start waits for its turn, or for devices, before it is reported as failed, seconds."""

    def __post_init__(self) -> None:
        require_positive(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartStatus:
    """How the starts of a kind go."""

    state: Literal["ok", "backing-off", "crash-looping"]
    failures: int
    """In a row, as counted for the pause."""
    failures_total: int
    """Instances that failed, at the start or later, since the fleet was made."""
    next_start_in_s: float
    """Seconds until the next start may begin."""
    reason: str
    """Of the last failure, with the last lines that the engine printed; empty if there was none."""


def backoff_s(settings: BackoffSettings, failures: int) -> float:
    """The pause after ``failures`` failures in a row."""
    if failures == 0:
        return 0.0
    if failures >= settings.crash_loop_starts:
        return settings.backoff_max_s
    return doubled_s(settings.backoff_first_s, settings.backoff_max_s, failures - 1)


class StartDelayedError(Exception):
    """A start waited for its turn in vain; the message says what for."""


class Starts:
    """Of one kind. Times are the event loop's."""

    def __init__(self, settings: BackoffSettings) -> None:
        self.failures = 0
        self.failures_total = 0
        self.reason = ""
        self._settings = settings
        self._last_failure_s = -1.0
        self._not_before_s = 0.0
        self._open = True
        """Whether starts may go side by side."""
        self._trial: object | None = None
        """The one start under way while they may not."""
        self._waiting: list[object] = []
        """First come, first served."""
        self._changed = asyncio.Event()

    async def turn(self, start: object) -> None:
        """Wait until ``start`` may begin. Raises StartDelayedError after ``start_wait_s``."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._settings.start_wait_s
        self._waiting.append(start)
        try:
            while not self._open:
                now_s = loop.time()
                is_next = self._trial is None and self._waiting[0] is start
                if is_next and now_s >= self._not_before_s:
                    self._trial = start
                    return
                if now_s >= until_s:
                    raise StartDelayedError(f"it waited {self._settings.start_wait_s:g} s for its turn: {self.reason}")
                await heard(self._changed, (min(self._not_before_s, until_s) if is_next else until_s) - now_s)
        finally:
            self._waiting.remove(start)
            self._wake()

    def succeeded(self, start: object) -> None:
        """It is ready; if it was the trial, the others may follow."""
        if self._trial is start:
            self._trial = None
            self._open = True
            self._wake()

    def lasted(self) -> None:
        """It has been ready for ``stable_after_s``."""
        self.failures = 0
        self._open = True
        self._wake()

    def failed(self, *, began_s: float, ready_s: float | None, reason: str) -> None:
        """An instance whose start began at ``began_s`` is gone; ``ready_s`` if it was ready before."""
        now_s = asyncio.get_running_loop().time()
        self.failures_total += 1
        self.reason = reason
        lasted = ready_s is not None and now_s - ready_s >= self._settings.stable_after_s
        if lasted or began_s < self._last_failure_s:
            return
        self._last_failure_s = now_s
        self.failures += 1
        self._not_before_s = now_s + backoff_s(self._settings, self.failures)
        self._open = False

    def over(self, start: object) -> None:
        """It has ended in some way and no longer stands in the way of others."""
        if self._trial is start:
            self._trial = None
            self._wake()

    def status(self) -> StartStatus:
        looping = self.failures >= self._settings.crash_loop_starts
        wait_s = 0.0 if self._open else self._not_before_s - asyncio.get_running_loop().time()
        return StartStatus(
            state="crash-looping" if looping else "backing-off" if self.failures else "ok",
            failures=self.failures,
            failures_total=self.failures_total,
            next_start_in_s=max(0.0, wait_s),
            reason=self.reason,
        )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
