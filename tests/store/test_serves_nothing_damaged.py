"""What no longer fits its checksum is named and not served; everything beside it is."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from chiron.store.port import Batch, BatchStore, StoreDamaged
from chiron.store.settings import StoreSettings
from store_calls import LIMITS, MODEL, check, content, line_of, lines, lines_of, result, start, submit, upload
from store_sites import sqlite_site

MEBIBYTE = 1 << 20
UNCHECKED = StoreSettings(reserve_bytes=0, check_bytes_max=0)
"""As a large database is opened: what is not touched is not looked at."""


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def tamper(directory: Path, statement: str, *values: object) -> None:
    """Change a row behind the store's back, as a damaged page would show it."""
    with sqlite3.connect(directory / "batch.sqlite3") as db:
        assert db.execute(statement, values).rowcount == 1
    db.close()


async def finished(directory: Path, count: int = 5) -> Batch:
    site = sqlite_site(directory)
    async with site.store() as store:
        batch = await start(site, store, count)
        await store.finish([result(item, item.index % 2 == 0) for item in await store.lease(MODEL, count)], site.now_s)
        return await store.get_batch(batch.id, None)


def test_a_damaged_result_is_named_by_batch_file_and_line(tmp_path: Path) -> None:
    async def run() -> None:
        batch = await finished(tmp_path)
        tamper(tmp_path, "UPDATE results SET line = CAST(replace(line, '2', '3') AS BLOB) WHERE key & 0xffffffff = 2")
        async with sqlite_site(tmp_path, UNCHECKED).store() as store:
            for _ in range(2):
                with pytest.raises(StoreDamaged) as raised:
                    [block async for block in store.read_file(str(batch.output_file_id), None)]
                for name in (batch.id, batch.output_file_id, "line 2", "request 3"):
                    assert str(name) in str(raised.value)
            assert [line["index"] for line in await lines(store, batch.error_file_id)] == [1, 3]
            assert (await content(store, batch.input_file_id)) == lines_of(5)
        assert batch.id in (tmp_path / "damage.jsonl").read_text()

    asyncio.run(run())


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM results WHERE key & 0xffffffff = 2",
        "UPDATE items SET state = 0 WHERE key & 0xffffffff = 2",
        "UPDATE items SET state = 2 WHERE key & 0xffffffff = 2",
    ],
)
def test_a_line_that_is_gone_or_in_the_other_file_is_missed(statement: str, tmp_path: Path) -> None:
    async def run() -> None:
        batch = await finished(tmp_path)
        tamper(tmp_path, statement)
        async with sqlite_site(tmp_path, UNCHECKED).store() as store:
            with pytest.raises(StoreDamaged, match=batch.id):
                await content(store, batch.output_file_id)

    asyncio.run(run())


def test_an_upload_is_not_served_beyond_the_bytes_that_were_uploaded(tmp_path: Path) -> None:
    async def run() -> None:
        data = lines_of(60_000)
        assert len(data) > 3 * MEBIBYTE
        async with sqlite_site(tmp_path).store() as store:
            damaged, fine = await upload(store, data), await upload(store, data)
        path = tmp_path / "files" / damaged.id
        flip(path, len(data) - 5)
        async with sqlite_site(tmp_path).store() as store:
            with pytest.raises(StoreDamaged, match=rf"{damaged.id}.*bytes \d+ and {len(data)}"):
                await anext(aiter(store.read_file(damaged.id, None)))
            assert await content(store, fine.id) == data
            flip(path, len(data) - 5)
            assert await content(store, damaged.id) == data, "it was only told, and nothing was taken away"
            flip(path, 5)
            with pytest.raises(StoreDamaged):  # It was whole once, and is looked at again all the same.
                await content(store, damaged.id)
        for change, words in ((data[:-1], "it ends after"), (data + b"x", "longer")):
            path.write_bytes(change)
            async with sqlite_site(tmp_path).store() as store:
                with pytest.raises(StoreDamaged, match=words):
                    await content(store, damaged.id)
        path.unlink()
        async with sqlite_site(tmp_path).store() as store:
            with pytest.raises(StoreDamaged, match="gone"):
                await content(store, damaged.id)

    asyncio.run(run())


def test_of_a_damaged_input_only_what_is_damaged_does_not_run(tmp_path: Path) -> None:
    async def run() -> None:
        site = sqlite_site(tmp_path)
        async with site.store() as store:
            batch = await start(site, store, 9)
            # Still JSON, and still a request: without a checksum it would run.
            path = tmp_path / "files" / batch.input_file_id
            path.write_bytes(path.read_bytes().replace(b'"id-3"', b'"id-8"').replace(b'hello"}}\n', b'hellp"}}\n', 1))
            leased = await store.lease(MODEL, 9)
            assert [item.index for item in leased if item.damage] == [0, 3]
            for item in leased:
                assert item.body == (b"" if item.damage else line_of(f"id-{item.index}"))
            damage = leased[3].damage
            assert batch.input_file_id in damage
            assert re.search(rf"{3 * len(line_of('id-0') + b'?')} to ", damage)

    asyncio.run(run())


def test_a_damaged_input_is_not_validated_but_its_line_is_named(tmp_path: Path) -> None:
    async def run() -> None:
        site = sqlite_site(tmp_path)
        async with site.store() as store:
            data = lines_of(9_000)
            batch = await submit(site, store, data)
            path = tmp_path / "files" / batch.input_file_id
            path.write_bytes(data[:-100])
            refused = await store.validate(batch.id, check, LIMITS)
            assert (refused.status, [error.code for error in refused.errors]) == ("failed", ["input_file_damaged"])
            line = refused.errors[0].line
            assert line is not None
            assert 1 < line <= 9_000
            assert batch.input_file_id in refused.errors[0].message

    asyncio.run(run())


Ask = Callable[[BatchStore, Batch], Awaitable[object]]


@pytest.mark.parametrize(
    ("statement", "ask", "name"),
    [
        (
            "UPDATE batches SET owner = 'somebody else'",
            lambda store, batch: store.get_batch(batch.id, None),
            "batch",
        ),
        ("UPDATE batches SET completed = completed + 1", lambda store, batch: store.list_batches(None), "batch"),
        (
            "UPDATE files SET bytes = bytes + 1 WHERE batch_id IS NULL",
            lambda store, batch: store.list_files(None),
            "file",
        ),
        (
            "UPDATE files SET purpose = 'vision' WHERE batch_id IS NULL",
            lambda store, batch: store.get_file(batch.input_file_id, None),
            "file",
        ),
    ],
)
def test_a_damaged_row_is_an_error_and_no_answer(statement: str, ask: Ask, name: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with sqlite_site(tmp_path).store() as store:
            batch = await start(sqlite_site(tmp_path), store, 2)
            tamper(tmp_path, statement)
            with pytest.raises(StoreDamaged, match=rf"{name} '.*damaged"):
                await ask(store, batch)

    asyncio.run(run())


def test_a_damaged_row_deletes_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        batch = await finished(tmp_path)
        site = sqlite_site(tmp_path)
        async with site.store() as store:
            tamper(tmp_path, "UPDATE batches SET completed_s = 1")
            tamper(tmp_path, "UPDATE files SET created_s = 1 WHERE batch_id IS NULL")
            swept = await store.sweep(site.now_s + 60)
            assert (swept.batches, swept.files) == (0, 0)
            assert (tmp_path / "files" / batch.input_file_id).read_bytes() == lines_of(5)

    asyncio.run(run())


def test_what_was_learned_and_is_damaged_is_not_loaded(tmp_path: Path) -> None:
    async def run() -> None:
        async with sqlite_site(tmp_path).store() as store:
            await store.save_learned("control", b"step times")
            path = tmp_path / "learned.control"
            path.write_bytes(path.read_bytes().replace(b"times", b"tides"))
            with pytest.raises(StoreDamaged, match=r"learned\.control"):
                await store.load_learned("control")
            await store.save_learned("control", b"anew")
            assert await store.load_learned("control") == b"anew"

    asyncio.run(run())
