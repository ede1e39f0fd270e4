"""Opening a directory: one process at a time, nothing half-made left, and damage is told, not met later."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from chiron.store.jobs.rows import write_row
from chiron.store.port import StoreCorrupt, StoredFile, StoreError, StoreLocked
from chiron.store.settings import StoreSettings
from chiron.store.sqlite.database import connect_to, read_meta
from chiron.store.sqlite.store import SqliteStore
from store_calls import LIMITS, Site, check, lines_of, start, submit, upload
from store_sites import sqlite_site

HOLD = """
import asyncio, sys, time
from pathlib import Path
from chiron.store.sqlite.store import SqliteStore
async def main():
    await SqliteStore(Path(sys.argv[1]), wall=time.time).open()
    print("open", flush=True)
    sys.stdin.read()
    import os; os._exit(0)
asyncio.run(main())
"""


def opened(directory: Path, settings: StoreSettings | None = None) -> SqliteStore:
    async def run() -> SqliteStore:
        async with sqlite_site(directory, settings).store() as store:
            assert isinstance(store, SqliteStore)
            await store.pending()
            return store

    return asyncio.run(run())


def test_a_directory_has_one_process_at_a_time(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(StoreLocked, match=rf"{tmp_path}.*pid {holder.pid}"):
            opened(tmp_path)
        holder.kill()
        holder.wait(60)
        opened(tmp_path)


def test_only_its_owner_can_read_prompts_and_answers(tmp_path: Path) -> None:
    asyncio.run(filled(tmp_path / "data"))
    modes = modes_of(tmp_path / "data")
    assert len(modes) >= 5
    assert set(modes.values()) == {0o600, 0o700}, modes


def test_a_directory_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    data = tmp_path / "data"
    asyncio.run(filled(data))
    outside = tmp_path / "outside"
    outside.write_text("not ours")
    (data / "link").symlink_to(outside)
    outside.chmod(0o644)
    for path in (data, *data.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
    opened(data)
    assert set(modes_of(data).values()) == {0o600, 0o700}
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644


def modes_of(directory: Path) -> dict[str, int]:
    paths = [path for path in (directory, *directory.rglob("*")) if not path.is_symlink()]
    return {str(path): stat.S_IMODE(path.stat().st_mode) for path in paths}


async def filled(directory: Path) -> None:
    async with sqlite_site(directory).store() as store:
        await upload(store, lines_of(3))


def test_a_store_that_failed_to_open_can_be_opened_later(tmp_path: Path) -> None:
    database = tmp_path / "batch.sqlite3"
    database.write_bytes(b"not a database at all" * 100)
    for _ in range(2):
        with pytest.raises(StoreCorrupt, match=r"batch\.sqlite3.*not a database"):
            opened(tmp_path)
    database.unlink()
    opened(tmp_path)


def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "batch.sqlite3") as db:
        db.execute("CREATE TABLE theirs(x)")
    db.close()
    before = (tmp_path / "batch.sqlite3").read_bytes()
    with pytest.raises(StoreCorrupt, match="another program"):
        opened(tmp_path)
    assert (tmp_path / "batch.sqlite3").read_bytes() == before


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    opened(tmp_path)
    with connect_to(tmp_path / "batch.sqlite3") as db:
        db.execute("PRAGMA user_version = 99")
        write_row(db, "meta", dict(read_meta(db)) | {"schema": 99})
    db.close()
    with pytest.raises(StoreError, match="schema 99"):
        opened(tmp_path)


def test_files_whose_time_is_over_leave_the_disk(tmp_path: Path) -> None:
    async def main(site: Site) -> None:
        async with site.store() as store:
            for _ in range(3):
                await upload(store, b"x", expires_after_s=3600.0)
            await store.expire(site.now_s + 3600)
            assert not list(tmp_path.rglob("file-*"))

    asyncio.run(main(sqlite_site(tmp_path)))


def test_damage_is_found_when_opening(tmp_path: Path) -> None:
    async def fill() -> None:
        site = sqlite_site(tmp_path)
        async with site.store() as store:
            await start(site, store, 3000)

    asyncio.run(fill())
    database = tmp_path / "batch.sqlite3"
    content = bytearray(database.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20_000] = os.urandom(20_000)
    database.write_bytes(content)
    store = opened(tmp_path)
    assert re.search(r"rows of \d+ of its 3000 requests were damaged", store.damage.notes[1])
    assert (tmp_path / "lost+found" / "damaged" / "batch.sqlite3").read_bytes() == content
    assert "lost+found" in (tmp_path / "damage.jsonl").read_text()


def test_damage_is_not_mended_where_the_damaged_files_could_not_be_kept(tmp_path: Path) -> None:
    asyncio.run(filled(tmp_path))
    database = tmp_path / "batch.sqlite3"
    content = bytearray(database.read_bytes())
    content[-100] ^= 1
    content[8192] ^= 8
    database.write_bytes(content)
    with pytest.raises(StoreCorrupt, match=r"not repaired.*store\.lost_files_max"):
        opened(tmp_path, StoreSettings(reserve_bytes=0, lost_files_max=0))
    assert database.read_bytes() == content
    assert [file.filename for file in asyncio.run(listed(tmp_path))] == ["in.jsonl"]


async def listed(directory: Path) -> list[StoredFile]:
    async with sqlite_site(directory).store() as store:
        return await store.list_files(None)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        opened(tmp_path / "file" / "data")


def test_files_of_cut_off_uploads_are_removed(tmp_path: Path) -> None:
    async def run() -> None:
        site = sqlite_site(tmp_path)
        async with site.store() as store:
            kept = await upload(store, lines_of(3))
            cut = await store.begin_file("batch", "x", "", 1 << 30)
            await cut.write(bytes(2 << 20))
            (part,) = (tmp_path / "files").glob("*.part")
            half = part.read_bytes()
        part.write_bytes(half)  # As a kill would have left it.
        async with site.store() as store:
            assert await store.list_files(None) == [kept]
        assert [path.name for path in (tmp_path / "files").iterdir()] == [kept.id]
        assert not (tmp_path / "lost+found").exists()

    asyncio.run(run())


@pytest.mark.parametrize("operations_max", [1, 1000])
def test_a_batch_whose_input_was_taken_away_ends_with_a_reason(operations_max: int, tmp_path: Path) -> None:
    async def run() -> None:
        site = sqlite_site(tmp_path, StoreSettings(reserve_bytes=0, operations_max=operations_max))
        async with site.store() as store:
            lost = await start(site, store, 5)
            fine = await start(site, store, 2)
            (tmp_path / "files" / lost.input_file_id).write_bytes(lines_of(2))
            leased = await asyncio.wait_for(store.lease("llama-3.1-8b", 10), 60)
            assert [(item.batch_id, item.index) for item in leased] == [(fine.id, 0), (fine.id, 1)]
            lost = await store.get_batch(lost.id, None)
            assert (lost.status, lost.failed, lost.errors[0].code) == ("failed", 5, "input_file_missing")
            assert [work.batch_id for work in await store.pending()] == []

    asyncio.run(run())


def test_a_batch_whose_input_cannot_be_opened_for_now_is_validated_later(tmp_path: Path) -> None:
    async def run() -> None:
        site = sqlite_site(tmp_path)
        async with site.store() as store:
            batch = await submit(site, store, lines_of(5))
            path = tmp_path / "files" / batch.input_file_id
            content = path.read_bytes()
            path.unlink()
            path.mkdir()
            with pytest.raises(StoreError, match="directory"):
                await store.validate(batch.id, check, LIMITS)
            assert await store.unvalidated() == [batch]
            path.rmdir()
            path.write_bytes(content)
            assert (await store.validate(batch.id, check, LIMITS)).total == 5

    asyncio.run(run())


@pytest.mark.parametrize("name", ["retention_s", "operations_max", "block_bytes", "database_bytes_max", "read_threads"])
def test_settings_that_make_no_sense_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        StoreSettings(**{name: -1})
