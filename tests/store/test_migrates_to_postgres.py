"""A SQLite store with open batches is moved into PostgreSQL whole, once, and never while a gateway runs on it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chiron.store.port import BatchStore, Conflict, StoreDamaged, StoreError, StoreLocked
from store_calls import LIMITS, MODEL, Site, check, content, keys, line_of, lines_of, result, start, submit, upload
from store_sites import PostgresSite, sqlite_site

Place = Callable[[], PostgresSite]


async def fill(site: Site) -> None:
    """Batches in every state, with results, failed attempts, leases, files that are unused and gone."""
    async with site.store() as store:
        running = await start(site, store, 320)
        leased = await store.lease(MODEL, 160)
        await store.finish([result(item, ok=item.index % 7 > 0) for item in leased[:110]], site.now_s)
        await store.release(keys(leased[110:120]), True)
        done = await start(site, store, 5, owner="me", window_s=60)
        await store.finish([result(item) for item in await store.lease(MODEL, 5)], site.now_s)
        cancelled = await start(site, store, 4)
        await store.cancel_batch(cancelled.id, site.now_s)
        failed = await submit(site, store, b"oops")
        await store.validate(failed.id, check, LIMITS)
        await submit(site, store, lines_of(30))
        mixed = b"".join(line_of(f"odd-\0-{index}", "ab"[index % 2]) + b"\n" for index in range(10))
        await store.validate((await submit(site, store, mixed)).id, check, LIMITS)
        await upload(store, bytes(range(256)) * 3000, filename="unused ü")
        gone = await upload(store, b"gone")
        await store.delete_file(gone.id, None)
        output = (await store.get_batch(done.id, None)).output_file_id
        assert output is not None
        await store.delete_file((await store.get_batch(cancelled.id, None)).error_file_id or "", None)
        await store.save_learned("control", b"step times")
        assert (await store.get_batch(running.id, None)).status == "in_progress"


async def all_of(store: BatchStore) -> dict[str, Any]:
    files = await store.list_files(None, limit=1000)
    batches = await store.list_batches(None, limit=1000)
    so_far = {}
    for batch in batches:
        for ok in (True, False):
            try:
                so_far[batch.id, ok] = b"".join([block async for block in store.read_results(batch.id, ok)])
            except StoreError as error:
                so_far[batch.id, ok] = str(error)
    return {
        "files": files,
        "batches": batches,
        "content": {file.id: await content(store, file.id) for file in files},
        "results": so_far,
        "pending": await store.pending(),
        "unvalidated": await store.unvalidated(),
        "learned": await store.load_learned("control"),
    }


@pytest.mark.slow
def test_all_of_a_store_is_moved_and_its_work_goes_on(postgres_place: Place, tmp_path: Path) -> None:
    from chiron.store.migrate import migrate

    old, new = sqlite_site(tmp_path / "data"), postgres_place()

    async def run() -> None:
        await fill(old)
        async with old.store() as store:
            before = await all_of(store)
            with pytest.raises(StoreLocked):
                await migrate(tmp_path / "data", new.settings, wall=lambda: old.now_s, tell=print)
        moved = await migrate(tmp_path / "data", new.settings, wall=lambda: old.now_s, tell=print)
        assert (moved.batches, moved.files, moved.damaged) == (6, len(before["files"]), 0)
        assert moved.open_batches == 3
        async with new.gateway() as store:
            assert await all_of(store) == before
            again = [*await store.lease(MODEL, 1000), *await store.lease("a", 9), *await store.lease("b", 9)]
            assert sum(item.attempts for item in again) == 10
            assert len(again) == 210 + 10
            assert {item.custom_id[:6] for item in again if item.model == "a"} == {"odd-\0-"}
            await store.finish([result(item) for item in again], old.now_s)
            for batch in await store.unvalidated():
                await store.validate(batch.id, check, LIMITS)
            await store.finish([result(item) for item in await store.lease(MODEL, 100)], old.now_s)
            for batch in await store.list_batches(None):
                assert batch.status in ("completed", "failed", "cancelled")
                lines = [file and (await content(store, file)).count(b"\n") for file in (batch.output_file_id,)]
                assert lines == [batch.completed or None]
            fresh = await start(old, store, 3)
            assert fresh.id not in {batch.id for batch in before["batches"]}
        with pytest.raises(StoreError, match="moved to postgresql://127"):
            async with old.store():
                pass
        with pytest.raises(StoreError, match="moved"):
            await migrate(tmp_path / "data", new.settings, wall=lambda: old.now_s, tell=print)
        (tmp_path / "data" / "moved.json").unlink()
        async with old.store() as store:
            assert await all_of(store) == before, "the old store is only read"

    asyncio.run(run())


@pytest.mark.slow
def test_a_move_that_was_cut_off_goes_on(postgres_place: Place, tmp_path: Path) -> None:
    from chiron.store import migrate as moving

    class CutError(Exception):
        pass

    old, new = sqlite_site(tmp_path / "data"), postgres_place()

    async def run() -> None:
        async with old.store() as store:
            for size in (3, 4, 5):
                await start(old, store, size)
            before = await all_of(store)
        told: list[str] = []

        def cut(line: str) -> None:
            told.append(line)
            if len(told) in (1, 2):
                raise CutError

        for _ in range(2):
            with pytest.raises(CutError):
                await moving.migrate(tmp_path / "data", new.settings, wall=lambda: old.now_s, tell=cut)
            assert not (tmp_path / "data" / "moved.json").exists()
        await moving.migrate(tmp_path / "data", new.settings, wall=lambda: old.now_s, tell=cut)
        assert len(told) == 3, "what was there already is not copied again"
        assert json.loads((tmp_path / "data" / "moved.json").read_text())["to"].startswith("postgresql://127")
        async with new.gateway() as store:
            assert await all_of(store) == before

    asyncio.run(run())


@pytest.mark.slow
def test_what_came_back_as_something_else_is_not_moved(postgres_place: Place, tmp_path: Path) -> None:
    from chiron.store.migrate import migrate

    old, new = sqlite_site(tmp_path / "data"), postgres_place()

    async def run() -> None:
        async with old.store() as store:
            batch = await start(old, store, 3)

        def damage(line: str) -> None:
            from chiron.store.postgres.connection import connect

            assert batch.id in line
            db = connect(new.settings, "test")
            db.execute("UPDATE work SET items = items + 1, sum = sum + 1")
            db.close()

        with pytest.raises(StoreDamaged, match="not marked"):
            await migrate(tmp_path / "data", new.settings, wall=lambda: old.now_s, tell=damage)
        assert not (tmp_path / "data" / "moved.json").exists()

    asyncio.run(run())


@pytest.mark.slow
def test_a_store_that_is_used_is_no_place_to_move_to(postgres_place: Place, tmp_path: Path) -> None:
    from chiron.store.migrate import migrate

    old, new = sqlite_site(tmp_path / "data"), postgres_place()

    async def run() -> None:
        async with old.store() as store:
            await upload(store, b"x")
        async with new.gateway() as store:
            with pytest.raises(Conflict, match="a gateway runs on it"):
                await migrate(tmp_path / "data", new.settings, wall=lambda: old.now_s, tell=print)
            await upload(store, b"y")
        with pytest.raises(Conflict, match="has a store already"):
            await migrate(tmp_path / "data", new.settings, wall=lambda: old.now_s, tell=print)
        with pytest.raises(StoreError, match="no store here"):
            await migrate(tmp_path / "other", new.settings, wall=lambda: old.now_s, tell=print)

    asyncio.run(run())
