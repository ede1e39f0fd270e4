"""Large jobs: memory stays bounded, and who reads or uploads much does not hold up who writes little."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import tracemalloc
from math import inf
from pathlib import Path

import pytest

import store_job
from chiron.store.port import ItemSpec, LineError
from chiron.store.sqlite.database import open_for_reading
from chiron.store.sqlite.items import lease
from chiron.store.sqlite.leases import Leases
from store_calls import LIMITS, MODEL, check, line_of, result, start, submit
from store_job import whole_job
from store_sites import sqlite_site

JOB = store_job.__file__


@pytest.mark.slow
def test_a_slow_reader_holds_up_neither_writers_nor_the_log(tmp_path: Path) -> None:
    async def run() -> None:
        site = sqlite_site(tmp_path)
        async with site.store() as store:
            batch = await start(site, store, 500)
            readers = []
            for _ in range(50):
                leased = await store.lease(MODEL, 10)
                await store.finish([result(item, text="x" * 100_000) for item in leased], site.now_s)
                readers.append(aiter(store.read_results(batch.id, True)))
                await anext(readers[-1])
            # The log is copied into the database all the while, or it would hold all 50 MB.
            assert (tmp_path / "batch.sqlite3-wal").stat().st_size < 25e6
            lines = 0
            async for block in readers[0]:
                lines += block.count(b"\n")
            assert 490 <= lines < 500

    asyncio.run(run())


def test_the_few_items_of_a_rare_model_are_looked_for_once(tmp_path: Path) -> None:
    async def fill() -> None:
        site = sqlite_site(tmp_path)
        async with site.store() as store:
            data = b"".join(line_of(f"{index}", MODEL if index % 2000 else "rare") + b"\n" for index in range(10_000))
            assert (await store.validate((await submit(site, store, data)).id, check, LIMITS)).total == 10_000

    asyncio.run(fill())
    db = open_for_reading(tmp_path)
    leases = Leases()
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    db.set_progress_handler(count, 100)
    assert [item.index for item in lease(db, leases, "rare", 512, None, inf)] == [0, 2000, 4000, 6000, 8000]
    assert steps > 100
    steps = 0
    lane = db.execute("SELECT batch, lane FROM work WHERE model = 'rare'").fetchone()
    assert leases.release(lane["batch"], lane["lane"], 4000, [])
    assert [item.index for item in lease(db, leases, "rare", 512, None, inf)] == [4000]
    assert steps < 10
    db.close()


@pytest.mark.slow
def test_small_work_gets_in_between_large_work(tmp_path: Path) -> None:
    async def run() -> None:
        site = sqlite_site(tmp_path)
        looked_at, half_way, small_work_done = 0, threading.Event(), threading.Event()

        def slow_check(line: bytes) -> ItemSpec | LineError:
            """The large one stops half-way until small work is done, however quick or slow a thread may be."""
            nonlocal looked_at
            looked_at += 1
            if looked_at == 10_000:
                half_way.set()
                assert small_work_done.wait(60.0), "small work waits for the large one"
            return check(line)

        async with site.store() as store:
            small = await start(site, store, 100)
            large = await submit(site, store, b"".join(line_of(f"{index}") + b"\n" for index in range(20_000)))
            validation = asyncio.create_task(store.validate(large.id, slow_check, LIMITS))
            await asyncio.to_thread(half_way.wait, 60.0)
            for item in await store.lease(MODEL, 10):
                await store.finish([result(item)], site.now_s)
            assert (await store.get_batch(small.id, None)).completed == 10
            assert not validation.done()
            small_work_done.set()
            assert (await validation).total == 20_000

    asyncio.run(run())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_job(tmp_path: Path) -> None:
    peaks = []
    for items in (300, 1_500):
        gc.collect()
        tracemalloc.start()
        asyncio.run(whole_job(tmp_path / f"{items}", items))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 1,200 more items of 3 KB each are 3.6 MB.
    assert peaks[1] < peaks[0] + 1_000_000, peaks


@pytest.mark.slow
def test_three_hundred_thousand_items_fit_into_little_memory(tmp_path: Path) -> None:
    # In a process of its own: the most that this one ever had may be more.
    job = subprocess.run([sys.executable, JOB, tmp_path, "300000"], capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stderr
    assert 0 < int(job.stdout) < 150 * 1024
