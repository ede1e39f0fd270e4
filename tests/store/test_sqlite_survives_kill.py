"""Killed at random moments: what was acknowledged is there, and each item ends with exactly one result."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from store_calls import content
from store_sites import sqlite_site
from store_worker import ITEMS

WORKER = Path(__file__).parents[1] / "support" / "store" / "store_worker.py"


def run_worker(directory: Path, acknowledged: Path, seed: str, batches: int, kill_after_s: float) -> bool:
    """Whether it got to its end."""
    command = [sys.executable, str(WORKER), str(directory), str(acknowledged), seed, str(batches), str(kill_after_s)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert ended.returncode in (0, -signal.SIGPROF)
    return ended.stdout == "done\n"


async def read_all(directory: Path) -> dict[tuple[str, int], tuple[bool, str]]:
    """Every result of every batch, and the batches that have ended; a doubled one fails."""
    found: dict[tuple[str, int], tuple[bool, str]] = {}
    async with sqlite_site(directory).store() as store:
        for batch in await store.list_batches(None, limit=100):
            assert (batch.status, batch.total, batch.completed + batch.failed) == ("completed", ITEMS, ITEMS)
            for file_id, ok in ((batch.output_file_id, True), (batch.error_file_id, False)):
                for line in (await content(store, file_id)).splitlines():
                    value = json.loads(line)
                    key = (batch.id, value["index"])
                    assert key not in found, "two lines for one item"
                    found[key] = (ok, value["token"])
        assert {path.name for path in (directory / "files").iterdir()} == {
            file.id for file in await store.list_files(None, purpose="batch", limit=1000)
        }
    return found


@pytest.mark.parametrize(("kills", "batches"), [(4, 4), pytest.param(60, 20, marks=pytest.mark.slow)])
def test_each_item_ends_with_one_result(kills: int, batches: int, tmp_path: Path) -> None:
    random = Random(f"store:kill:{kills}")
    directory, acknowledged = tmp_path / "data", tmp_path / "acknowledged"
    ends = [
        run_worker(directory, acknowledged, f"{number}", batches, random.uniform(0.0, 0.4)) for number in range(kills)
    ]
    assert not all(ends), "nothing was killed"
    assert run_worker(directory, acknowledged, "last", batches, 0.0)
    found = asyncio.run(read_all(directory))
    assert not (directory / "damage.jsonl").exists(), "a torn tail is no damage"
    assert not (directory / "lost+found" / "damaged").exists()
    assert len(found) == batches * ITEMS
    notes = [line.split() for line in acknowledged.read_text().splitlines()]
    created = {words[1] for words in notes if words[0] == "batch" and len(words) == 2}
    assert created <= {batch_id for batch_id, _ in found}
    for words in notes:
        if words[0] == "result" and len(words) == 5 and words[3] in ("True", "False"):
            _, batch_id, index, ok, token = words
            assert found[batch_id, int(index)] == (ok == "True", token), "an acknowledged result was lost or changed"
