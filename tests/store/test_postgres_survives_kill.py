"""Two gateways on one PostgreSQL, killed at random moments: what was acknowledged is there, and each item ends once."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from store_calls import content
from store_sites import PostgresSite
from store_worker import ITEMS

WORKER = Path(__file__).parents[1] / "support" / "store" / "store_worker.py"
BATCHES = 3


def begin(site: PostgresSite, name: str, seed: str, kill_after_s: float) -> subprocess.Popen[str]:
    settings = site.settings
    place = f"{settings.url} {settings.schema} {settings.password_file} {site.directory} {name}"
    acknowledged = site.directory / f"acknowledged-{name}"
    command = [sys.executable, str(WORKER), place, str(acknowledged), seed, str(BATCHES), str(kill_after_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> bool:
    """Whether it got to its end."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGPROF)
    return said == "done\n"


async def read_all(site: PostgresSite) -> dict[tuple[str, int], tuple[bool, str]]:
    found: dict[tuple[str, int], tuple[bool, str]] = {}
    async with site.gateway() as store:
        for batch in await store.list_batches(None, limit=100):
            assert (batch.status, batch.total, batch.completed + batch.failed) == ("completed", ITEMS, ITEMS)
            for file_id, ok in ((batch.output_file_id, True), (batch.error_file_id, False)):
                for line in (await content(store, file_id)).splitlines():
                    value = json.loads(line)
                    key = (batch.id, value["index"])
                    assert key not in found, "two lines for one item"
                    found[key] = (ok, value["token"])
    return found


@pytest.mark.slow
def test_each_item_ends_with_one_result(postgres_place: Callable[[], PostgresSite]) -> None:
    site, random = postgres_place(), Random("postgres:gateways")
    ends = []
    for number in range(8):
        both = [begin(site, name, f"{number}{name}", random.uniform(0.05, 0.8)) for name in ("a", "b")]
        ends += [end(process) for process in both]
    assert not all(ends), "nothing was killed"
    last = [begin(site, name, f"last{name}", 0.0) for name in ("a", "b")]
    assert [end(process) for process in last] == [True, True]
    found = asyncio.run(read_all(site))
    created: set[str] = set()
    acknowledged = 0
    for name in ("a", "b"):
        for line in (site.directory / f"acknowledged-{name}").read_text().splitlines():
            words = line.split()
            if words[0] == "batch" and len(words) == 2:
                created.add(words[1])
            if words[0] == "result" and len(words) == 5:
                _, batch_id, index, ok, token = words
                acknowledged += 1
                assert found[batch_id, int(index)] == (ok == "True", token), (
                    "an acknowledged result was lost or changed"
                )
    batches = {batch_id for batch_id, _ in found}
    assert created <= batches
    assert len(found) == len(batches) * ITEMS
    assert acknowledged > 0.5 * len(found)
    assert not (site.directory / "damage.jsonl").exists()
