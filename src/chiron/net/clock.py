"""The heap of timers, drained by asyncio.

The simulator jumps from timer to timer; here the loop's time decides. Timers still fire in the heap's total order and
each sees ``now_s`` equal to the time it was set for, however late the loop is, so the control plane takes the same
decisions as in a simulation with the same inputs at the same times.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from math import ceil, inf

from chiron.core.clock import Callback, VirtualClock
from chiron.core.mypyc import mypyc_attr

log = logging.getLogger("chiron.clock")


@mypyc_attr(allow_interpreted_subclasses=True)  # The one that is logged is one.
class LiveClock(VirtualClock):
    """``now_s`` is seconds since the clock was made, and ``ahead_s``. All from outside comes in through ``post``."""

    __slots__ = (
        "_armed_s",
        "_by_milliseconds",
        "_error",
        "_handle",
        "_loop",
        "_origin_s",
        "_posting",
        "_stopped",
        "_time",
        "wall_origin_s",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        on_error: Callable[[BaseException], None] | None = None,
        wall_s: float | None = None,
        time_s: Callable[[], float] | None = None,
        ahead_s: float = 0.0,
    ) -> None:
        """``time_s`` is a finer clock than the loop's own, of the same rate: uvloop's time goes in milliseconds and
        stands still for a turn of the loop. Default: the loop's. ``ahead_s``: what it shows now, so that it has times
        for what happened before it was made."""
        super().__init__(ahead_s)
        self._loop = loop
        self._by_milliseconds = not isinstance(loop, asyncio.BaseEventLoop)
        """It rounds what it waits to them, as uvloop does."""
        self._time = time_s or loop.time
        self._origin_s = self._time() - ahead_s
        self.wall_origin_s = time.time() - ahead_s if wall_s is None else wall_s
        """Unix time at ``now_s == 0``."""
        self._error = on_error or _log_error
        self._handle: asyncio.TimerHandle | None = None
        self._armed_s = inf
        self._posting = False
        self._stopped = False

    def elapsed_s(self) -> float:
        """What ``now_s`` would be if something were posted now."""
        return self._time() - self._origin_s

    def wall_s(self, when_s: float) -> float:
        """Unix time of a moment of this clock."""
        return self.wall_origin_s + when_s

    def from_wall_s(self, wall_s: float) -> float:
        """The moment of this clock at a Unix time."""
        return wall_s - self.wall_origin_s

    def post(self, callback: Callback) -> None:
        """Catch up with real time, then call. Calls from inside a callback run at once, at the same ``now_s``.

        What the callback raises reaches the caller; what timers raise is reported and the others still fire.
        """
        if self._posting:
            callback()
            return
        self._posting = True
        try:
            self._catch_up()
            callback()
        finally:
            self._posting = False
            self._arm()

    def stop(self) -> None:
        """Fire no more timers."""
        self._stopped = True
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _catch_up(self) -> None:
        """Fire what is due, in order; a faulty callback must not take the rest with it."""
        now_s = self._time() - self._origin_s
        while True:
            try:
                self.run_until(max(now_s, self.now_s))
                return
            except Exception as error:
                self._error(error)

    def _wake(self) -> None:
        self._handle = None
        self._armed_s = inf
        self._posting = True
        try:
            self._catch_up()
        finally:
            self._posting = False
            self._arm()

    def _arm(self) -> None:
        """See to it that the loop calls when the earliest timer is due."""
        heap = self._heap
        if not heap or self._stopped:
            return
        due_s = heap[0][0]
        if due_s >= self._armed_s:
            return
        if self._handle is not None:
            self._handle.cancel()
        self._armed_s = due_s
        if self._time == self._loop.time:
            self._handle = self._loop.call_at(self._origin_s + due_s, self._wake)
        else:
            wait_s = max(0.0, due_s - self.elapsed_s())
            if self._by_milliseconds:
                # Woken before a timer is due, such a loop would be woken again and again until it is.
                wait_s = ceil(wait_s * 1000.0) / 1000.0
            self._handle = self._loop.call_later(wait_s, self._wake)


def _log_error(error: BaseException) -> None:
    log.error("a timer failed", exc_info=error)
