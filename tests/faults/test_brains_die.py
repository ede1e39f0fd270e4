"""One gateway of several processes, its store SQLite's, under interactive requests and a batch, while its brain is
killed: each request has its whole answer, each item one line, and no relay ends."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest

from fault_site import Api, FaultSite, item
from gateway_pair import Pair, talk, until_done, until_ready
from serve_trial import PROFILE, emulated_fleet

pytestmark = pytest.mark.slow
ITEMS, KILLS = 300, 4


async def relays(site: FaultSite) -> list[int]:
    async with Api(site.url) as api:
        return sorted(relay["pid"] for relay in (await api.get("/chiron/status"))["relays"])


def test_all_answers_are_whole_and_each_item_has_one_line(tmp_path: Path) -> None:
    async def main(pair: Pair, site: FaultSite) -> None:
        await until_ready(pair, "one")
        before, verdicts, over = await relays(site), Counter[str](), asyncio.Event()
        async with Api(site.url) as api:
            batch = await api.submit([item(f"i{number}", 200) for number in range(ITEMS)])
        talking = [asyncio.create_task(talk(pair, "one", verdicts, over)) for _ in range(4)]
        for _ in range(KILLS):
            _, brain = await asyncio.to_thread(pair.leader)
            brain.kill()
            await asyncio.to_thread(pair.leader, brain)
            await until_ready(pair, "one")
            await asyncio.sleep(0.5)
        over.set()
        await asyncio.gather(*talking)
        assert set(verdicts) == {"complete"}, verdicts
        assert Counter(await until_done(pair, batch)) == Counter(f"i{number}" for number in range(ITEMS))
        assert await relays(site) == before
        assert "Traceback" not in site.log.read_text()

    with emulated_fleet(2, "--speedup", "4") as urls:
        text = f'[models.m]\nengine = "emulated"\nendpoints = {json.dumps(urls)}\nprofile = "{PROFILE}"\n'
        with FaultSite(tmp_path, text + "max_num_seqs = 16\n", "--workers", "2") as site:
            asyncio.run(main(Pair({"one": site}), site))
