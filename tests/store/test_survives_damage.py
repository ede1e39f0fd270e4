"""Flipped bits and cut ends, anywhere in a store: never a wrong answer, never anything deleted, always a word, and all
that is not damaged is served.

A store with every kind of file, batch and row is made once, as it is after it was closed and as a kill leaves it, with
all of it in the log. Each trial damages a copy of it at random, opens it, reads everything, runs what is left to run,
and compares with what the store had been told. What may be lost is what lay on a page that was touched, no more.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

import pytest

from chiron.store.jobs.rows import copied, item_index
from chiron.store.port import ENDED, Batch, BatchStore, Ended, StoreDamaged, StoredFile
from chiron.store.settings import StoreSettings
from chiron.store.sqlite.database import PAGE_BYTES
from chiron.store.sqlite.pages import Pages
from chiron.store.sqlite.store import SqliteStore
from chiron.store.sqlite.wal import FRAME_BYTES, HEADER_BYTES, Frame, Log, read_log
from store_calls import LIMITS, MODEL, check, keys, line_of, lines_of, start, submit, upload
from store_sites import sqlite_site

DATABASE, LOG = "batch.sqlite3", "batch.sqlite3-wal"
SETTINGS = StoreSettings(reserve_bytes=0)
RAN_IN_TIME = 30
"""Items of the batch that expired."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Rows that may be missing."""

    rows: frozenset[tuple[str, int]]
    anything: bool
    """The end of a file is gone, and with it whatever was there."""

    def may_lose(self, table: str, number: int) -> bool:
        return self.anything or (table, number) in self.rows


@dataclass(slots=True)
class Truth:
    """What the store was told and said."""

    files: dict[str, tuple[StoredFile, bytes]] = field(default_factory=dict)
    """Uploads."""
    batches: dict[str, Batch] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    """Of batches and files in the database, by id."""
    bodies: dict[str, list[bytes]] = field(default_factory=dict)


def body_of(batch: int, index: int) -> bytes:
    return line_of(f"b{batch}-{index}", text="word " * (index % 7))


def outcome(custom_id: str, batch_id: str, index: int) -> Ended:
    """The same for an item whenever it runs. Some lines are longer than a page of the database."""
    text = custom_id * (3000 if index % 11 == 5 else index % 40)
    line = json.dumps({"custom_id": custom_id, "text": text}).encode()
    return Ended(batch_id=batch_id, index=index, ok=index % 5 != 3, line=line)


async def fill(directory: Path, truth: Truth) -> SqliteStore:
    """A store that is still open."""
    site = sqlite_site(directory, SETTINGS)
    store = SqliteStore(directory, wall=lambda: site.now_s, settings=SETTINGS)
    await store.open()

    async def finish(count: int) -> None:
        leased = await store.lease(MODEL, count)
        await store.finish([outcome(item.custom_id, item.batch_id, item.index) for item in leased], site.now_s)

    sizes = [60, RAN_IN_TIME + 10, 30, 25]
    made = []
    for number, size in enumerate(sizes):
        lines = [body_of(number, index) for index in range(size)]
        batch = await submit(
            site, store, b"".join(line + b"\n" for line in lines), window_s=60.0 if number == 1 else 1e6
        )
        truth.bodies[batch.id] = lines
        made.append(batch.id)
        await store.validate(batch.id, check, LIMITS)
        if number == 0:
            await finish(size)
        if number == 1:
            await finish(RAN_IN_TIME)
            await store.expire(site.now_s + 61)
        if number == 2:
            await finish(size // 2)
        if number == 3:
            taken = await store.lease(MODEL, 3, before_deadline_s=None)
            await store.release(keys(taken), True)
    bad = await submit(site, store, line_of("x") + b"\n{oops\n")
    await store.validate(bad.id, check, LIMITS)
    gone = await start(site, store, 5)
    truth.bodies[gone.id] = lines_of(5).splitlines()
    await store.cancel_batch(gone.id, site.now_s)
    waiting = await submit(site, store, b"".join(body_of(9, index) + b"\n" for index in range(12)), window_s=1e6)
    truth.bodies[waiting.id] = [body_of(9, index) for index in range(12)]
    await upload(store, Random("plain").randbytes(600_000))
    await upload(store, b"")
    for file in await store.list_files(None, purpose="batch"):
        truth.files[file.id] = (file, (directory / "files" / file.id).read_bytes())
    truth.batches = {batch.id: batch for batch in await store.list_batches(None, limit=100)}
    for table in ("files", "batches"):
        rows = await store._read(lambda db: db.execute(f"SELECT id, no FROM {table}").fetchall())  # noqa: B023
        truth.numbers |= {row["id"]: row["no"] for row in rows}
    return store


@dataclass(slots=True)
class Originals:
    truth: Truth
    places: dict[str, Path]
    """By how the store was left."""


@pytest.fixture(scope="module")
def originals() -> Iterator[Originals]:
    with ExitStack() as stack:
        # In memory where there is such a place: a thousand stores are made durable otherwise.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory)))
        truth = Truth()

        async def make() -> None:
            store = await fill(place / "closed", truth)
            shutil.copytree(place / "closed", place / "killed")
            await store.close()

        asyncio.run(make())
        yield Originals(truth, {name: place / name for name in ("closed", "killed")})


# What a trial does to it.


def targets(directory: Path) -> list[Path]:
    """Files that hold data, the database and its log twice as likely as one upload."""
    found = [directory / "acknowledged", *sorted((directory / "files").iterdir())]
    for name in (DATABASE, LOG):
        path = directory / name
        if path.exists() and path.stat().st_size:
            found += [path] * len(found)
    return [path for path in found if path.stat().st_size]


def flip(random: Random, path: Path) -> list[int]:
    """1 to 16 bits, near one another or anywhere. Returns the offsets."""
    data = bytearray(path.read_bytes())
    count = random.randint(1, 16)
    if random.random() < 0.5:
        begin = random.randrange(len(data))
        offsets = [min(len(data) - 1, begin + random.randrange(64)) for _ in range(count)]
    else:
        offsets = [random.randrange(len(data)) for _ in range(count)]
    for offset in offsets:
        data[offset] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    return offsets


def cut(random: Random, path: Path) -> list[int]:
    size = random.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(size)
    return []


@dataclass(frozen=True, slots=True)
class Places:
    """Where the rows of an original lie."""

    log: Log
    newest: dict[int, Frame]
    """The frame that counts, by page."""
    rows: dict[int, frozenset[tuple[str, int]]]
    """By page."""
    long: frozenset[tuple[str, int]]
    """Rows that go on on pages which have none of their own."""


@cache
def places(original: Path) -> Places:
    log = read_log(original / LOG)
    pages = Pages(original / DATABASE, original / LOG, log)
    found = {number: list(pages.rows_on(number)) for number in range(1, pages.count + 1)}
    return Places(
        log,
        {frame.page: frame for frame in log.frames},
        {number: frozenset((row.table, row.key) for row in rows) for number, rows in found.items()},
        frozenset(
            (row.table, row.key)
            for rows in found.values()
            for row in rows
            if row.table == "results" and len(row.values[1]) > 4000
        ),
    )


def losses(original: Path, path: Path, offsets: list[int], was_cut: bool) -> Lost:
    """What may be gone for good: rows on the pages that were touched, and the long ones if such a page has none."""
    if path.name not in (DATABASE, LOG):
        return Lost(frozenset(), False)
    known = places(original)
    touched = set()
    for offset in offsets:
        if path.name == DATABASE:
            touched.add(offset // PAGE_BYTES + 1)
        elif offset >= HEADER_BYTES:
            frame = known.log.frames[(offset - HEADER_BYTES) // FRAME_BYTES]
            if known.newest[frame.page] is frame:
                touched.add(frame.page)
    rows = {row for number in touched for row in known.rows[number] or known.long}
    twice = {copied(key) for table, key in rows if table == "copies"}
    return Lost(frozenset(row for row in rows if row[0] not in ("batches", "files") or row in twice), was_cut)


# What must be true afterwards.


async def read(store: BatchStore, file_id: str) -> bytes | None:
    """None: an error named the file, as it must."""
    try:
        return b"".join([block async for block in store.read_file(file_id, None)])
    except StoreDamaged as error:
        if file_id not in str(error):
            raise
        return None


async def look_through(directory: Path, truth: Truth, damaged_file: str, lost: Lost) -> None:
    site = sqlite_site(directory, SETTINGS)
    store = SqliteStore(directory, wall=lambda: site.now_s, settings=SETTINGS)
    await store.open()
    try:
        notes = store.damage.notes
        files = {file.id: file for file in await store.list_files(None, limit=10_000)}
        missing_files = {id for id in truth.files if id not in files}
        for id, (file, content) in truth.files.items():
            if id in missing_files:
                assert lost.may_lose("files", truth.numbers[id])
                assert notes
                continue
            assert files[id] == file
            found = await read(store, id)
            assert found == content or (found is None and id == damaged_file)
        batches = {batch.id: batch for batch in await store.list_batches(None, limit=100)}
        assert batches.keys() <= truth.batches.keys()
        for id in truth.batches.keys() - batches.keys():
            assert lost.may_lose("batches", truth.numbers[id])
            assert notes
        for batch in await store.unvalidated():
            await store.validate(batch.id, check, LIMITS)
        while leased := await store.lease(MODEL, 100):
            for item in leased:
                expected = truth.bodies[item.batch_id][item.index]
                assert item.body == expected or (item.damage and not item.body)
                if item.damage:
                    assert damaged_file in item.damage
            ended = [outcome(item.custom_id, item.batch_id, item.index) for item in leased]
            await store.finish(ended, site.now_s)
        for id in batches:
            await look_at(store, truth, await store.get_batch(id, None), lost, damaged_file)
    finally:
        await store.close()


async def look_at(store: SqliteStore, truth: Truth, batch: Batch, lost: Lost, damaged_file: str) -> None:
    before = truth.batches[batch.id]
    assert (batch.owner, batch.input_file_id, batch.created_s) == (before.owner, before.input_file_id, before.created_s)
    older = lost.may_lose("batches", truth.numbers[batch.id])
    """Its row may be one from before its last change."""
    if batch.id not in truth.bodies or batch.status == "failed":
        if batch.id in truth.bodies:
            assert batch.input_file_id == damaged_file or store.damage.notes
        else:
            assert older or batch.status == before.status
        return
    assert batch.status in ENDED
    assert older or before.status not in ENDED or batch.status == before.status
    bodies = truth.bodies[batch.id]
    assert batch.total == len(bodies)
    seen: set[int] = set()
    for file_id, ok, count in (
        (batch.output_file_id, True, batch.completed),
        (batch.error_file_id, False, batch.failed),
    ):
        content = b"" if file_id is None else await read(store, file_id)
        assert content is not None
        lines = content.splitlines()
        assert len(lines) == count
        if file_id is not None:
            assert (await store.get_file(file_id, None)).bytes == len(content)
        for line in lines:
            value = json.loads(line)
            code = (value.get("error") or {}).get("code")
            index = int(value["id"][-8:], 16) if code else int(value["custom_id"].rpartition("-")[2])
            assert index not in seen, "two lines for one item"
            seen.add(index)
            if code is None:
                expected = outcome(json.loads(bodies[index])["custom_id"], batch.id, index)
                assert (line, ok) == (expected.line, expected.ok), "a wrong answer"
            else:
                check_lost(store, truth, batch, index, code, value["custom_id"], lost, damaged_file)
    assert seen == set(range(len(bodies))), "each item has a line"


def check_lost(
    store: SqliteStore,
    truth: Truth,
    batch: Batch,
    index: int,
    code: str,
    custom_id: str,
    lost: Lost,
    damaged_file: str,
) -> None:
    before = truth.batches[batch.id]
    name = json.loads(truth.bodies[batch.id][index])["custom_id"]
    assert custom_id in (name, "")
    never_ran = before.status == "cancelled" or (before.status == "expired" and index >= RAN_IN_TIME)
    if never_ran and code == f"batch_{before.status}":
        assert custom_id == name
        return
    assert code in ("result_damaged", "batch_expired", "batch_cancelled")
    key = truth.numbers[batch.id] << 32 | index
    assert item_index(key) == index
    assert lost.may_lose("results", key) or lost.may_lose("items", key) or batch.input_file_id == damaged_file
    assert store.damage.notes


def kept(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in directory.rglob("*") if path.is_file()]


def trial(originals: Originals, seed: str, how: str) -> None:
    random = Random(seed)
    original = originals.places[random.choice(sorted(originals.places))]
    directory = original.with_name("trial")
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(original, directory)
    (directory / "batch.sqlite3-shm").unlink(missing_ok=True)
    path = random.choice(targets(directory))
    offsets = flip(random, path) if how == "flips" else cut(random, path)
    damaged = [file.read_bytes() for file in (directory / "files").iterdir()]
    of_database = (directory / DATABASE).read_bytes()
    print(f"seed {seed!r}: {path.relative_to(directory)} of {original.name}, {offsets or path.stat().st_size}")
    lost = losses(original, path, offsets, how == "cuts" and path.name in (DATABASE, LOG))
    damaged_file = path.name if path.parent.name == "files" else ""
    asyncio.run(look_through(directory, originals.truth, damaged_file, lost))
    there = kept(directory / "files") + kept(directory / "lost+found")
    for content in damaged:
        assert content in there, "an upload was deleted"
    if (directory / "lost+found" / "damaged").exists():
        assert of_database in there, "a damaged database was deleted"
    # What a database has in its log it need not have itself.
    if how == "cuts" and (path.name in (LOG, "acknowledged") or (path.name == DATABASE and original.name == "closed")):
        assert (directory / "damage.jsonl").exists(), "nothing was said"


@pytest.mark.parametrize(("how", "count"), [("flips", 12), ("cuts", 5)])
def test_damage_anywhere(originals: Originals, how: str, count: int) -> None:
    for number in range(count):
        trial(originals, f"store:{how}:{number}", how)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "count"), [("flips", 500), ("cuts", 100)])
def test_damage_anywhere_a_thousand_times(originals: Originals, how: str, count: int) -> None:
    for number in range(count):
        trial(originals, f"store:{how}:many:{number}", how)
