"""Messages that may wait share a timer, however many urgent ones take them along."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import Wire
from chiron.net.memory import MemoryNetwork

RIDE_S = 3600.0
"""So long that no timer fires."""


class CountingLoop(asyncio.SelectorEventLoop):
    armed = 0

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, **more: Any) -> asyncio.TimerHandle:
        self.armed += delay == RIDE_S
        return super().call_later(delay, callback, *args, **more)


def test_many_messages_arm_one_timer_and_all_arrive() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)
        network, got = MemoryNetwork(loop.call_soon), list[Any]()

        def end(received: Callable[[Sequence[Any]], object]) -> Wire:
            return Wire(name="x", kind=m.Up, opened=int, received=received, closed=lambda why: None, ride_s=RIDE_S)  # type: ignore[arg-type]

        there, here = end(got.extend), end(len)
        network.listen("there", lambda: there)
        network.connect("there", lambda: here)
        while not here.up:
            await asyncio.sleep(0)
        for number in range(1, 11):
            here.post(m.Spoke(number, 0))
            here.send(m.Left(number, 0))
            await asyncio.sleep(0)
        async with asyncio.timeout(60.0):
            while len(got) < 20:
                await asyncio.sleep(0)
        assert [each.run for each in got if isinstance(each, m.Spoke)] == list(range(1, 11))
        assert loop.armed == 1
        here.close("done")

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        runner.run(main())
