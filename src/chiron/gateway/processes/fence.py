"""Until when a process may lead, by this machine's clock: that of the lease's keeper cannot be asked each time.

The clock runs on while the machine sleeps. Whoever is stopped and goes on after the end reads the time before it does
anything (``LiveClock.post``), and ends there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

OVER = 75
"""Exit status of a brain that may decide nothing any more."""
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def machine_s() -> float:
    """Seconds; the same in each process of this machine."""
    return time.clock_gettime(_CLOCK)


class Fence:
    """``over`` ends the process, and does not return."""

    def __init__(self, over: Callable[[], None], now: Callable[[], float] = machine_s) -> None:
        self.until_s = -inf
        """From then on nothing may be decided here."""
        self._over = over
        self._now = now

    def time_s(self) -> float:
        """For ``LiveClock``."""
        if self._now() >= self.until_s:
            self._over()
        return time.monotonic()
