"""The content of uploads: blocks of a fixed size in the database.

Blocks come in as the upload does, unknown to all until the file's row is committed. What is left of uploads that were
cut off goes with the holder that took them; the blocks of deleted files go in small steps, beside other work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from io import RawIOBase
from itertools import groupby
from typing import Any, Final
from zlib import crc32

from chiron.store.jobs.database import Database, Transaction
from chiron.store.jobs.items import Leased, with_body
from chiron.store.port import Item, StoreClosed, StoreDamaged, StoredFile, StoreError, StoreFull, TooLarge
from chiron.store.sums import BLOCK_BYTES, BlockSums, Row, unpack

FLUSH_BLOCKS: Final = 4
REMOVE_STEP: Final = 32
"""Blocks removed in one step."""

Query = Callable[[Database], Any]


class BlockUpload:
    """Implements ``Upload``. ``run`` runs a query on a thread, and commits it; ``insert`` commits the row."""

    def __init__(
        self,
        *,
        file: StoredFile,
        bytes_max: int,
        limit: str,
        holder: int,
        run: Callable[[Query], Awaitable[Any]],
        insert: Callable[[StoredFile, float | None, bytes], Awaitable[StoredFile]],
        on_end: Callable[[BlockUpload], None],
    ) -> None:
        """``limit``: what to say of a file that is larger."""
        self.purpose = file.purpose
        self.expires_after_s: float | None = None
        self._file = file
        self._bytes_max = bytes_max
        self._limit = limit
        self._holder = holder
        self._run = run
        self._insert = insert
        self._on_end = on_end
        self._buffer = bytearray()
        self._bytes = 0
        self._blocks = 0
        self._sums = BlockSums()
        self._ended = False
        self._failed = False
        self._known = False
        """Its row is written, or being written: its content stays."""

    async def write(self, data: bytes) -> None:
        self._require_open()
        if self._bytes + len(data) > self._bytes_max:
            self._failed = True
            raise TooLarge(f"{self._file.filename!r}: {self._limit}")
        self._bytes += len(data)
        self._buffer += data
        if len(self._buffer) >= FLUSH_BLOCKS * BLOCK_BYTES:
            await self._flush(len(self._buffer) // BLOCK_BYTES * BLOCK_BYTES)

    async def commit(self) -> StoredFile:
        self._require_open()
        await self._flush(len(self._buffer))
        self._require_open()
        file = StoredFile(
            id=self._file.id,
            purpose=self.purpose,
            filename=self._file.filename,
            bytes=self._bytes,
            created_s=self._file.created_s,
            owner=self._file.owner,
        )
        self._known = True
        try:
            file = await self._insert(file, self.expires_after_s, self._sums.packed())
        except StoreError:
            self._known, self._failed = False, True
            raise
        self._end()
        return file

    async def abort(self) -> None:
        if self._ended or self._known:
            return
        self._end()
        if self._blocks:
            id = self._file.id

            def forget(db: Database) -> None:
                db.execute("INSERT INTO removals(id) SELECT id FROM uploads WHERE id = ?", (id,))
                db.execute("DELETE FROM uploads WHERE id = ?", (id,))

            await self._run(forget)

    def _require_open(self) -> None:
        self._require_not_ended()
        if self._failed:
            raise StoreClosed(f"{self._file.filename!r}: the upload has failed")

    def _require_not_ended(self) -> None:
        if self._ended:
            raise StoreClosed(f"{self._file.filename!r}: the upload has ended")

    def _end(self) -> None:
        self._ended = True
        self._buffer.clear()
        self._on_end(self)

    async def _flush(self, size: int) -> None:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._sums.add(data)
        first, self._blocks = self._blocks, self._blocks + -(-size // BLOCK_BYTES)
        self._failed = True

        def write(db: Database) -> None:
            # The last commit of an upload, of its row, waits for the disk, and so for all before it.
            db.execute("SET LOCAL synchronous_commit = off")
            if first == 0:
                db.execute(
                    "INSERT INTO uploads(id, holder) SELECT ?, no FROM holders WHERE no = ?",
                    (self._file.id, self._holder),
                )
            known = db.execute("SELECT 1 AS one FROM uploads WHERE id = ? FOR SHARE", (self._file.id,)).fetchone()
            if known is None:
                raise _lost(self._file)
            for number, start in enumerate(range(0, size, BLOCK_BYTES), first):
                block = data[start : start + BLOCK_BYTES]
                db.execute("INSERT INTO blocks(id, number, data) VALUES(?, ?, ?)", (self._file.id, number, block))

        try:
            await self._run(write)
        except StoreError:
            self._require_not_ended()  # It was aborted meanwhile, and what there was of it is gone.
            raise
        self._failed = False


def require_room(db: Database, database_bytes_max: int) -> None:
    """Raises StoreFull."""
    row = db.execute("SELECT pg_database_size(current_database()) AS size").fetchone()
    if row["size"] > database_bytes_max:
        raise StoreFull(
            f"the database has {row['size'] >> 20} MiB, and store.database_bytes_max is {database_bytes_max >> 20} MiB"
        )


def take_upload(transaction: Transaction, file: StoredFile) -> None:
    """An upload is whole and becomes a file. Raises StoreError if its content is not all there: the server crashed, or
    this gateway was taken for dead, while it came in."""
    db = transaction.db
    known = db.execute("DELETE FROM uploads WHERE id = ? RETURNING id", (file.id,)).fetchone()
    row = db.execute(
        "SELECT count(*) AS blocks, CAST(coalesce(sum(octet_length(data)), 0) AS BIGINT) AS size FROM blocks"
        " WHERE id = ?",
        (file.id,),
    ).fetchone()
    if known is None or (row["blocks"], row["size"]) != (-(-file.bytes // BLOCK_BYTES), file.bytes):
        raise _lost(file)


def _lost(file: StoredFile) -> StoreError:
    return StoreError(f"{file.filename!r}: the connection to the server was lost during the upload; send it again")


def remove_step(transaction: Transaction) -> None:
    """A chore: remove some of the content that is to go."""
    db = transaction.db
    row = db.execute("SELECT id FROM removals LIMIT 1").fetchone()
    if row is None:
        return
    transaction.has_chores = True
    gone = db.execute(
        "DELETE FROM blocks WHERE id = ? AND number IN (SELECT number FROM blocks WHERE id = ? LIMIT ?)",
        (row["id"], row["id"], REMOVE_STEP),
    )
    if gone.rowcount < REMOVE_STEP:
        db.execute("DELETE FROM removals WHERE id = ?", (row["id"],))


def read_block(db: Database, file: Row, number: int) -> bytes:
    """A block of an upload, checked; empty behind the last. Raises StoreDamaged, FileNotFoundError if none is there."""
    begin = number * BLOCK_BYTES
    expected = min(BLOCK_BYTES, file["bytes"] - begin)
    row = db.execute("SELECT data FROM blocks WHERE id = ? AND number = ?", (file["id"], number)).fetchone()
    if expected <= 0:
        if row is not None:
            raise StoreDamaged(f"file {file['id']!r} is longer than the {file['bytes']} bytes that were uploaded")
        return b""
    if row is None and not db.execute("SELECT 1 AS one FROM blocks WHERE id = ? LIMIT 1", (file["id"],)).fetchone():
        raise FileNotFoundError(0, "its content is gone from the database")
    if row is None or len(row["data"]) < expected:
        have = begin + (0 if row is None else len(row["data"]))
        raise StoreDamaged(f"file {file['id']!r} is damaged: it ends after {have} of {file['bytes']} bytes")
    block: bytes = row["data"]
    if file["block_sums"] is not None and crc32(block) != unpack(file["block_sums"])[number]:
        where = f"between the bytes {begin} and {begin + len(block)}"
        raise StoreDamaged(f"file {file['id']!r} is damaged: {where} it is no longer what was uploaded")
    return block


class BlockStream(RawIOBase):
    """An upload's content, for a thread that validates it."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        super().__init__()
        self._read_block = read
        self._number = 0
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block:
            self._block = memoryview(self._read_block(self._number))
            self._number += 1
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._block))
        view[:count] = self._block[:count]
        self._block = self._block[count:]
        return count


def read_bodies(db: Database, leased: Sequence[Leased]) -> tuple[list[Item], list[str]]:
    """The items with their bodies, and the ids of batches whose input file does not hold them any more."""
    parts = _parts(db, leased)
    found: list[Item] = []
    lost: list[str] = []
    for batch_id, group in groupby(leased, key=lambda item: item.batch_id):
        several = list(group)
        bodies = [_body(parts, item) for item in several]
        if any(len(body) != item.bytes for body, item in zip(bodies, several, strict=True)):
            lost.append(batch_id)
        else:
            found += [with_body(item, body) for item, body in zip(several, bodies, strict=True)]
    return found, lost


_Place = tuple[str, int]
_Parts = dict[_Place, tuple[int, bytes]]
"""By file and block: where a part of it begins, and that part."""


def _parts(db: Database, leased: Sequence[Leased]) -> _Parts:
    """Of each block the part that the items need; most need all of it, since they lie side by side."""
    spans: dict[_Place, tuple[int, int]] = {}
    for item in leased:
        for number in _blocks(item):
            begin = max(0, item.offset - number * BLOCK_BYTES)
            end = min(BLOCK_BYTES, item.offset + item.bytes - number * BLOCK_BYTES)
            known = spans.get((item.input_file_id, number), (begin, end))
            spans[item.input_file_id, number] = (min(begin, known[0]), max(end, known[1]))
    if not spans:
        return {}
    rows = db.execute(
        "SELECT part.id, part.number, substring(data FROM part.start FOR part.size) AS data"
        " FROM unnest(CAST(? AS TEXT[]), CAST(? AS BIGINT[]), CAST(? AS INT[]), CAST(? AS INT[]))"
        " AS part(id, number, start, size) JOIN blocks ON blocks.id = part.id AND blocks.number = part.number",
        (
            [id for id, _ in spans],
            [number for _, number in spans],
            [begin + 1 for begin, _ in spans.values()],
            [end - begin for begin, end in spans.values()],
        ),
    )
    return {(row["id"], row["number"]): (spans[row["id"], row["number"]][0], row["data"]) for row in rows.fetchall()}


def _blocks(item: Leased) -> range:
    return range(item.offset // BLOCK_BYTES, -(-(item.offset + item.bytes) // BLOCK_BYTES))


def _body(parts: _Parts, item: Leased) -> bytes:
    pieces = []
    for number in _blocks(item):
        start, data = parts.get((item.input_file_id, number), (0, b""))
        begin = max(0, item.offset - number * BLOCK_BYTES) - start
        end = min(BLOCK_BYTES, item.offset + item.bytes - number * BLOCK_BYTES) - start
        pieces.append(data[begin:end])
    return b"".join(pieces)
