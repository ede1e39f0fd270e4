"""For the first model of a cascade a client waits as long as ``first_wait`` says, and has something left of its SLO."""

from __future__ import annotations

import asyncio

import pytest

from cascade_outliving import CascadeSite
from virtual_loop import run_virtual


@pytest.mark.parametrize(("first_wait_s", "waits_s"), [(0.25, 0.25), (None, 1.0)])
def test_the_second_model_is_asked_in_time(first_wait_s: float | None, waits_s: float) -> None:
    """The only place is taken: the TTFT SLO is 2 s, of which half is waited where nothing else is said."""

    async def main() -> None:
        site = CascadeSite(engines=1, slots=1, first_wait_s=first_wait_s)
        brain = await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 80)
        await asyncio.sleep(0.3)
        site.ask(2, 1, model="c")
        await asyncio.sleep(waits_s - 0.05)
        waiting = [each for each in brain.gateway.desk.open.values() if each.instance is None]
        assert [each.cls.ttft_s for each in waiting] == [2.0]
        await asyncio.sleep(0.1)
        waiting = [each for each in brain.gateway.desk.open.values() if each.instance is None]
        assert [each.cls.ttft_s for each in waiting] == [2.0 - waits_s]
        await site.close()

    run_virtual(main())
