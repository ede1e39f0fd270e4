"""An asyncio loop whose time jumps from timer to timer: hours of a live component in seconds, and to the bit."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` is exactly what the timer that fires was set for."""

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self._now_s

    @property
    def _clock_resolution(self) -> float:
        """A timer fires at its time and not a nanosecond before."""
        return math.ulp(self._now_s)

    @_clock_resolution.setter
    def _clock_resolution(self, value: float) -> None:
        pass

    def jump(self) -> None:
        scheduled = self._scheduled  # type: ignore[attr-defined]
        if scheduled:
            self._now_s = max(self._now_s, scheduled[0].when())


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "nothing will ever happen: deadlock"
        ready = super().select(0)
        if not ready and timeout > 0:
            self._loop.jump()
        return ready


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
