"""A loop that counts whole milliseconds wakes the clock when its timer is due, and not over and over before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from chiron.net.clock import LiveClock


class MillisecondLoop:
    """As uvloop: a wait is rounded to milliseconds, and one of none is over on the next turn."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.waits: list[tuple[float, Callable[[], None]]] = []
        self.woken = 0

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Any:
        self.waits.append((round(delay_s * 1000) / 1000, callback))
        return asyncio.Handle(callback, (), self)  # type: ignore[arg-type]

    def get_debug(self) -> bool:
        return False

    def turn(self) -> None:
        delay_s, callback = self.waits.pop(0)
        self.woken += 1
        self.now_s += max(delay_s, 0.00001)
        callback()


@pytest.mark.parametrize("due_s", [0.0001, 0.0004, 0.0006, 0.0104, 0.0995])
def test_a_timer_wakes_the_loop_once(due_s: float) -> None:
    loop, fired = MillisecondLoop(), list[float]()
    clock = LiveClock(loop, wall_s=0.0, time_s=lambda: loop.now_s)  # type: ignore[arg-type]
    clock.post(lambda: clock.call_later(due_s, lambda: fired.append(loop.now_s)))
    while not fired:
        loop.turn()
    assert loop.woken == 1
    assert due_s <= fired[0] < due_s + 0.0011
