"""A store that an older version left is taken over without loss.

``data/store_v2.tar.gz`` was written by the code before rows had checksums and killed with everything still in its
log; ``data/store_v2.json`` is what that code said was in it.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from chiron.store.port import ENDED
from store_calls import LIMITS, MODEL, Site, check, content, lines, result, upload
from store_sites import sqlite_site

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(DATA / "store_v2.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def known() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((DATA / "store_v2.json").read_text())
    for batch in value["batches"]:
        batch.setdefault("usage", [0, 0, 0, 0])  # Nobody counted then.
    return value


async def found(site: Site) -> dict[str, Any]:
    async with site.store() as store:
        batches = [asdict(batch) for batch in await store.list_batches(None, limit=100)]
        files = {
            file.id: asdict(file) | {"content": (await content(store, file.id)).decode()}
            for file in await store.list_files(None)
        }
    value: dict[str, Any] = json.loads(json.dumps({"batches": batches, "files": files}))
    return value


def test_all_that_an_older_store_held_is_there(old: Path) -> None:
    site = sqlite_site(old)
    for _ in range(2):
        assert asyncio.run(found(site)) == known()
    assert not (old / "lost+found").exists()


def test_its_work_goes_on(old: Path) -> None:
    async def run(site: Site) -> None:
        async with site.store() as store:
            for batch in await store.unvalidated():
                await store.validate(batch.id, check, LIMITS)
            leased = [*await store.lease(MODEL, 100), *await store.lease("other", 100)]
            assert sorted(item.custom_id for item in leased if item.attempts) == ["mix-3"]
            await store.finish([result(item) for item in leased], site.now_s + 100)
            for batch in await store.list_batches(None, limit=100):
                assert batch.status in ENDED
                output = len(await lines(store, batch.output_file_id)) if batch.output_file_id else 0
                errors = len(await lines(store, batch.error_file_id)) if batch.error_file_id else 0
                assert (output, errors) == (batch.completed, batch.failed)
            new = await upload(store, b"x")
            assert new.id not in known()["files"]
        site.now_s += 31 * 86_400.0
        async with site.store() as store:
            await store.sweep(site.now_s)
            assert (await store.list_batches(None), await store.list_files(None)) == ([], [])
        assert not list((old / "files").iterdir())

    asyncio.run(run(sqlite_site(old)))


def test_one_that_is_older_still_is_taken_over_as_well(old: Path) -> None:
    with sqlite3.connect(old / "batch.sqlite3") as db:
        db.executescript(
            "DROP INDEX files_by_expiry; ALTER TABLE files DROP COLUMN expires_s;"
            "ALTER TABLE batches DROP COLUMN output_expires_after_s; PRAGMA user_version = 1"
        )
    db.close()
    expected = known()
    for file in expected["files"].values():
        file["expires_s"] = None
    site = sqlite_site(old)
    assert asyncio.run(found(site)) == expected

    async def go_on() -> None:
        async with site.store() as store:
            file = await upload(store, b"x", expires_after_s=3600.0)
            assert (await store.get_file(file.id, None)).expires_s == site.now_s + 3600

    asyncio.run(go_on())


def test_damage_in_the_log_of_an_older_store_is_told_and_deletes_nothing(old: Path) -> None:
    log = old / "batch.sqlite3-wal"
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)
    uploads = sorted(path.read_bytes() for path in (old / "files").iterdir())
    site = sqlite_site(old)
    for _ in range(2):
        batches = asyncio.run(found(site))["batches"]
        assert 0 < len(batches) < len(known()["batches"])
        assert all(batch["id"] in [one["id"] for one in known()["batches"]] for batch in batches)
    assert "log is damaged" in (old / "damage.jsonl").read_text()
    assert (old / "lost+found" / "damaged" / log.name).read_bytes() == data
    there = [*(old / "files").iterdir(), *(old / "lost+found").glob("file-*")]
    assert sorted(path.read_bytes() for path in there) == uploads
