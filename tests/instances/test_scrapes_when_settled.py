"""When the gateway looks at its engines, after it was held up itself."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from chiron.gateway.instances.scraper import Scraper
from chiron.net.clock import LiveClock


def looks(wakes_s: list[float]) -> list[float]:
    """When samples are taken by a gateway, scraping once a second, that gets to run at these times only."""
    taken: list[float] = []

    async def body() -> None:
        now_s = 0.0
        clock = LiveClock(asyncio.get_running_loop(), time_s=lambda: now_s)
        plane: Any = SimpleNamespace(sampled=lambda samples: taken.append(clock.now_s))
        scraper = Scraper(
            clock=clock,
            samples=plane,
            engines={},
            period_s=1.0,
            capacity_told=lambda engine, tokens: None,
            context_told=lambda engine: None,
        )
        clock.post(scraper.begin)
        for now_s in wakes_s:  # noqa: B007
            clock.post(lambda: None)
            for _ in range(3):
                await asyncio.sleep(0)
        clock.stop()

    asyncio.run(body())
    return taken


@pytest.mark.parametrize(
    ("wakes_s", "taken_s"),
    [
        pytest.param([1.0, 2.0, 3.1, 4.2], [1.0, 2.0, 3.1, 4.2], id="in-time"),
        pytest.param([1.0, 2.7, 3.0, 4.0], [1.0, 3.0, 4.0], id="late"),
        pytest.param([1.0, 2.9, 3.0, 4.0], [1.0, 4.0], id="late-and-the-next-one-is-near"),
        pytest.param([1.0, 7.1, 8.0, 9.0], [1.0, 8.0, 9.0], id="rounds-missed"),
        pytest.param([1.0, 2.5, 3.5, 4.5, 5.5, 6.5], [1.0, 3.5, 5.5], id="always-late"),
    ],
)
def test_a_gateway_that_was_held_up_reads_what_has_come_before_it_looks(
    wakes_s: list[float], taken_s: list[float]
) -> None:
    assert looks(wakes_s) == taken_s
