"""No room: a clear error, nothing changed, and the same call works once there is room."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from chiron.store.port import StoreFull
from chiron.store.settings import StoreSettings
from store_calls import (
    LIMITS,
    MODEL,
    Site,
    check,
    content,
    indices,
    keys,
    line_of,
    result,
    results,
    start,
    submit,
    upload,
)
from store_sites import sqlite_site


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def fill_with_results(site: Site) -> tuple[str, int]:
    """Finish items of a batch until there is no room; returns its id and how many results were accepted."""
    async with site.store() as store:
        batch = await start(site, store, 3000)
        done, leased = 0, await store.lease(MODEL, 100)

        async def go_on() -> None:
            nonlocal done, leased
            while leased:
                await store.finish([result(item, text=os.urandom(2000).hex()) for item in leased], site.now_s)
                done += len(leased)
                leased = await store.lease(MODEL, 100)

        with pytest.raises(StoreFull, match=r"batch\.sqlite3: no room"):
            await go_on()
        assert (await store.get_batch(batch.id, None)).completed == done
        # What could not be kept is still leased: its holder may try again, and does.
        with pytest.raises(StoreFull):
            await store.finish([result(item, text=os.urandom(2000).hex()) for item in leased], site.now_s)
        assert sum(work.items for work in await store.pending()) == 3000 - done - len(leased)
        return batch.id, done


async def finish_the_rest(site: Site, batch_id: str) -> None:
    async with site.store() as store:
        while leased := await store.lease(MODEL, 500):
            await store.finish([result(item) for item in leased], site.now_s)
        assert (await store.get_batch(batch_id, None)).status == "completed"
        assert await results(store, batch_id, True) == list(range(3000))


def test_a_full_quota_loses_nothing(tmp_path: Path) -> None:
    small = StoreSettings(reserve_bytes=0, database_bytes_max=4 << 20)
    batch_id, done = asyncio.run(fill_with_results(sqlite_site(tmp_path, small)))
    assert done > 300
    asyncio.run(finish_the_rest(sqlite_site(tmp_path), batch_id))


def test_validation_stops_when_it_is_full_and_starts_over_later(tmp_path: Path) -> None:
    async def run() -> None:
        small = sqlite_site(tmp_path, StoreSettings(reserve_bytes=0, database_bytes_max=1 << 20))
        async with small.store() as store:
            batch = await submit(small, store, b"".join(line_of(f"{index:0100}") + b"\n" for index in range(15_000)))
            with pytest.raises(StoreFull):
                await store.validate(batch.id, check, LIMITS)
            assert await store.unvalidated() == [batch]
            cancelled = await store.cancel_batch(batch.id, small.now_s)
            assert cancelled.status == "cancelled"
            # Its rows go in small steps, and then there is room again.
            for _ in range(30):
                await store.expire(small.now_s)
            assert (await start(small, store, 3000)).status == "in_progress"

    asyncio.run(run())


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path: Path) -> None:
    async def run() -> None:
        site = sqlite_site(tmp_path)
        async with site.store() as store:
            batch = await start(site, store, 3000)
            leased = await store.lease(MODEL, 500)
            ended = [result(item, text="x" * 4000) for item in leased]
            with file_size_limit(1 << 20):
                with pytest.raises(StoreFull):
                    await store.finish(ended, site.now_s)
                with pytest.raises(StoreFull, match="no room"):
                    await upload(store, bytes(3 << 20))
            with file_size_limit(1), pytest.raises(StoreFull):
                await store.release(keys(leased), True)
            assert min(indices(await store.lease(MODEL, 500))) == 500, "still leased, and leased again"
            await store.finish(ended, site.now_s)
            assert (await store.get_batch(batch.id, None)).completed == 500
        await finish_the_rest(site, batch.id)

    asyncio.run(run())


def test_uploads_leave_room_for_results(tmp_path: Path) -> None:
    async def run() -> None:
        site = sqlite_site(tmp_path, StoreSettings(reserve_bytes=1 << 60))
        async with site.store() as store:
            incoming = await store.begin_file("batch", "x", "", 1 << 30)
            with pytest.raises(StoreFull, match="kept for results"):
                await incoming.write(bytes(2 << 20))
            await incoming.abort()
        assert list((tmp_path / "files").iterdir()) == []

    asyncio.run(run())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB, where we may make one."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(path)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if made.returncode:
        pytest.skip("may not mount a file system")
    yield path
    gc.collect()  # A traceback may still hold a connection.
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    site = sqlite_site(small_disk / "data")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(4 << 20))
    batch_id, done = asyncio.run(fill_with_results(site))
    assert done > 100

    async def upload_fails() -> None:
        async with site.store() as store:
            with pytest.raises(StoreFull):
                await upload(store, bytes(9 << 20))
            assert len(await store.list_files(None)) == 1

    asyncio.run(upload_fails())
    filler.unlink()
    asyncio.run(finish_the_rest(site, batch_id))


def test_opening_on_a_full_disk_says_that_it_is_full(small_disk: Path) -> None:
    async def opened() -> None:
        async with sqlite_site(small_disk / "data").store():
            pass

    asyncio.run(opened())
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(16 << 20))
    with pytest.raises(StoreFull, match="no room"):
        asyncio.run(opened())
    filler.unlink()
    asyncio.run(opened())


def test_one_operation_without_room_does_not_fail_its_neighbours(tmp_path: Path) -> None:
    async def run() -> None:
        site = sqlite_site(tmp_path, StoreSettings(reserve_bytes=0, database_bytes_max=1 << 20))
        async with site.store() as store:
            batch = await start(site, store, 20)
            items = await store.lease(MODEL, 20)
            calls = [
                store.finish([replace(result(item), line=b"x" * (3 << 20 if item.index == 7 else 10))], site.now_s)
                for item in items
            ]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [
                StoreFull if item.index == 7 else type(None) for item in items
            ]
            assert (await store.get_batch(batch.id, None)).completed == 19
            await store.finish([result(items[7])], site.now_s)
            batch = await store.get_batch(batch.id, None)
            assert batch.status == "completed"
            assert (await content(store, batch.output_file_id)).count(b"\n") == 20

    asyncio.run(run())
