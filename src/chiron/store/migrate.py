"""A SQLite store moved into PostgreSQL, with the batches that are open.

Rows are copied as they are, with their sums: each is checked as it is read, and again as it is read back. A file is
there once its row is, a batch too, and each row is committed after all that belongs to it has been read back; so a
migration that was cut off goes on where it was. The old store is only read, and marked as moved at the very end: from
then on no gateway opens it by mistake.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import psycopg

from chiron.store.directory import DATABASE, disk_error, file_path
from chiron.store.jobs.batches import checked_batch, checked_file
from chiron.store.jobs.rows import item_key, write_row
from chiron.store.learned import learned_sum
from chiron.store.port import Conflict, StoreCorrupt, StoreDamaged, StoreError
from chiron.store.postgres.connection import connect, store_error, where
from chiron.store.postgres.leases import ALIVE
from chiron.store.postgres.schema import prepare, read_meta
from chiron.store.postgres.settings import PostgresSettings
from chiron.store.settings import StoreSettings
from chiron.store.sqlite.database import SQLITE_ERRORS, open_for_reading
from chiron.store.sqlite.database import read_meta as read_old_meta
from chiron.store.sqlite.learned import learned_names, load_learned
from chiron.store.sqlite.moved import mark_moved
from chiron.store.sqlite.store import SqliteStore
from chiron.store.sums import BLOCK_BYTES, COLUMNS, ITEM_COLUMNS, Row, check_row, item_fits, result_fits, unpack

ROWS: Final = 2_000
"""Rows copied in one transaction."""
BLOCKS: Final = 16
LOCK: Final = 0x43484952_4D4F5645
"""Whoever moves a store has it."""


@dataclass(slots=True)
class Moved:
    """What was moved, or was there already."""

    files: int = 0
    bytes: int = 0
    batches: int = 0
    open_batches: int = 0
    items: int = 0
    results: int = 0
    damaged: int = 0
    """Files whose content was damaged before; it is copied as it is, and still found to be damaged."""


async def migrate(
    directory: Path, settings: PostgresSettings, *, wall: Callable[[], float], tell: Callable[[str], None]
) -> Moved:
    """Raises StoreError; what was copied by then stays, and the same call goes on. ``tell`` hears of progress."""
    if not (directory / DATABASE).is_file():
        raise StoreError(f"{directory}: there is no store here ({DATABASE})")
    store = SqliteStore(directory, wall=wall, settings=StoreSettings(retention_s=float("inf")))
    await store.open()  # It has the lock; and it mends what is damaged, and upgrades what is old.
    try:
        return await asyncio.to_thread(lambda: _Migration(directory, settings, wall, tell).run())
    finally:
        await store.close()


class _Migration:
    def __init__(
        self, directory: Path, settings: PostgresSettings, wall: Callable[[], float], tell: Callable[[str], None]
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._wall = wall
        self._tell = tell
        self._moved = Moved()

    def run(self) -> Moved:
        self._new = connect(self._settings, "migrate")
        try:
            self._old = open_for_reading(self._directory)
            try:
                self._run()
            finally:
                self._old.close()
        except psycopg.Error as error:
            raise store_error(error, self._settings) from error
        except SQLITE_ERRORS as error:
            raise StoreError(f"{self._directory / DATABASE}: {error}") from error
        except OSError as error:
            raise disk_error(error, self._directory) from error
        finally:
            self._new.close()
        return self._moved

    def _run(self) -> None:
        old, new = self._old, self._new
        prepare(new, self._settings)
        if not _one(new.execute("SELECT pg_try_advisory_lock(?) AS mine", (LOCK,)))["mine"]:
            raise Conflict(f"{where(self._settings)}: another migration into it is under way")
        files = [checked_file(row) for row in old.execute("SELECT * FROM files ORDER BY no")]
        batches = [checked_batch(row) for row in old.execute("SELECT * FROM batches ORDER BY no")]
        self._require_ours(files, batches)
        for row in files:
            if row["batch_id"] is None:
                self._move_upload(row)
        for row in batches:
            self._move_batch(row, [file for file in files if file["batch_id"] == row["id"]])
        self._move_rest({row["no"] for row in batches})
        self._verify(files, batches)
        mark_moved(self._directory, where(self._settings), self._settings.schema, self._wall())

    def _require_ours(self, files: Sequence[Row], batches: Sequence[Row]) -> None:
        """The new store is empty, but for what an earlier try left."""
        new, at = self._new, where(self._settings)
        live = new.execute(f"SELECT name FROM holders WHERE {ALIVE}").fetchall()
        if live:
            raise Conflict(f"{at}: a gateway runs on it ({live[0]['name']}): stop it first")
        for table, rows in (("files", files), ("batches", batches)):
            known = {row["id"]: row["sum"] for row in rows}
            for row in new.execute(f"SELECT id, sum FROM {table}").fetchall():
                if row["id"] not in known:
                    raise Conflict(
                        f"{at}: it has a store already ({row['id']}); choose another database or store.schema"
                    )
                if row["sum"] != known[row["id"]]:
                    raise Conflict(f"{at}: {row['id']} is there already, and has changed since")

    # Uploads.

    def _move_upload(self, row: Row) -> None:
        self._moved.files += 1
        self._moved.bytes += row["bytes"]
        if self._is_there("files", row):
            return
        new, file_id = self._new, row["id"]
        new.execute("DELETE FROM blocks WHERE id = ?", (file_id,))
        sums: list[int] = []
        batch: list[tuple[str, int, bytes]] = []
        for number, block in enumerate(self._content(row)):
            sums.append(crc32(block))
            batch.append((file_id, number, block))
            if len(batch) == BLOCKS:
                self._write_blocks(batch)
                batch = []
        self._write_blocks(batch)
        self._check_blocks(file_id, sums)
        if row["block_sums"] is not None and unpack(row["block_sums"]) != sums:
            self._moved.damaged += 1
            self._tell(f"file {file_id}: damaged on the disk; it is copied as it is")
        with self._transaction():
            self._copy_row("files", row)

    def _content(self, row: Row) -> Iterator[bytes]:
        """What is there of it."""
        path = file_path(self._directory, row["id"])
        if not path.exists():
            return
        with open(path, "rb") as stream:
            left = row["bytes"]
            while left > 0 and (block := stream.read(min(BLOCK_BYTES, left))):
                left -= len(block)
                yield block

    def _write_blocks(self, blocks: Sequence[tuple[str, int, bytes]]) -> None:
        with self._transaction():
            for block in blocks:
                self._new.execute("INSERT INTO blocks(id, number, data) VALUES(?, ?, ?)", block)

    def _check_blocks(self, file_id: str, sums: Sequence[int]) -> None:
        for number, expected in enumerate(sums):
            row = self._new.execute("SELECT data FROM blocks WHERE id = ? AND number = ?", (file_id, number)).fetchone()
            if row is None or crc32(row["data"]) != expected:
                raise _changed(f"block {number} of file {file_id!r}")

    # Batches.

    def _move_batch(self, row: Row, outputs: Sequence[Row]) -> None:
        no = row["no"]
        begin, end = item_key(no, 0), item_key(no + 1, 0)
        there = self._is_there("batches", row)
        items = self._copy_keys("items", (*ITEM_COLUMNS, "sum"), begin, end, _check_item, there)
        results = self._copy_keys("results", ("key", "line", "sum"), begin, end, self._check_result, there)
        work = [
            check_row("work", each, f"the open items of batch {row['id']!r}")
            for each in self._old.execute("SELECT * FROM work WHERE batch = ?", (no,))
        ]
        if not there:
            with self._transaction():
                for each in work:
                    self._copy_row("work", each)
                for each in outputs:
                    self._copy_row("files", each)
                self._copy_row("batches", row)
            self._tell(f"batch {row['id']}: {row['status']}, {items} items, {results} results")
        moved = self._moved
        moved.files += len(outputs)
        moved.batches += 1
        moved.open_batches += bool(work) or row["status"] == "validating"
        moved.items += items
        moved.results += results

    def _copy_keys(
        self,
        table: str,
        names: Sequence[str],
        begin: int,
        end: int,
        check: Callable[[Any], None],
        there: bool,
    ) -> int:
        """Copy rows from ``begin`` on, from where an earlier try came to; then read them back. Returns how many."""
        columns = ", ".join(f'"{name}"' for name in names)
        page = f"SELECT {columns} FROM {table} WHERE key >= ? AND key < ? ORDER BY key LIMIT ?"
        next_key = begin
        if not there:
            last = self._new.execute(f"SELECT max(key) AS key FROM {table} WHERE key >= ? AND key < ?", (begin, end))
            known = _one(last)["key"]
            next_key = begin if known is None else known + 1
        while not there and (rows := self._old.execute(page, (next_key, end, ROWS)).fetchall()):
            for row in rows:
                check(row)
            with self._transaction():
                self._new.insert_rows(table, names, [tuple(row) for row in rows], False)
            next_key = rows[-1]["key"] + 1
        return self._compare_keys(table, page, begin, end, check)

    def _compare_keys(self, table: str, page: str, begin: int, end: int, check: Callable[[Any], None]) -> int:
        count, next_key = 0, begin
        while True:
            old = self._old.execute(page, (next_key, end, ROWS)).fetchall()
            new = self._new.execute(page, (next_key, end, ROWS)).fetchall()
            if [tuple(row) for row in old] != [tuple(row) for row in new]:
                raise _changed(f"{table} from {next_key} on")
            if not old:
                return count
            for row in new:
                check(row)
            count += len(old)
            next_key = old[-1]["key"] + 1

    def _check_result(self, row: Any) -> None:
        item = self._old.execute("SELECT state FROM items WHERE key = ?", (row["key"],)).fetchone()
        if item is None or not result_fits(row["key"], item["state"], row["line"], row["sum"]):
            raise _damaged("a result", row["key"])

    # The rest.

    def _move_rest(self, batches: set[int]) -> None:
        with self._transaction():
            marks = read_old_meta(self._old)
            values = {name: read_meta(self._new)[name] for name in ("no", "schema", "commits")}
            write_row(self._new, "meta", values | {name: marks[name] for name in ("seen_s", "trusted_s", "doubt_s")})
            for row in self._old.execute("SELECT * FROM purges"):
                if row["batch"] in batches:
                    self._copy_row("purges", check_row("purges", row, "what is to be removed"))
            for name in learned_names(self._directory):
                data = load_learned(self._directory, name) or b""
                self._new.insert_rows("learned", ("name", "data", "sum"), [(name, data, learned_sum(name, data))], True)
            for table in ("files", "batches", "purges"):
                # Numbers are not given twice, also those of rows that are gone.
                given = self._old.execute("SELECT max(seq) AS seq FROM sqlite_sequence WHERE name = ?", (table,))
                highest = _one(self._new.execute(f"SELECT coalesce(max(no), 0) AS no FROM {table}"))["no"]
                number = max(1, highest, _one(given)["seq"] or 0)
                self._new.execute("SELECT setval(pg_get_serial_sequence(?, 'no'), ?)", (table, number))

    def _verify(self, files: Sequence[Row], batches: Sequence[Row]) -> None:
        """Counts and sums of the rows that are not read back one by one."""
        for table, rows in (("files", files), ("batches", batches)):
            found = [tuple(row) for row in self._new.execute(f"SELECT * FROM {table} ORDER BY no").fetchall()]
            if found != [tuple(row) for row in rows]:
                raise _changed(table)
        total = "SELECT count(*) AS rows, CAST(coalesce(sum(sum), 0) AS BIGINT) AS sum FROM work"
        if tuple(_one(self._old.execute(total))) != tuple(_one(self._new.execute(total))):
            raise _changed("the open work")

    def _is_there(self, table: str, row: Row) -> bool:
        found = self._new.execute(f"SELECT sum FROM {table} WHERE id = ?", (row["id"],)).fetchone()
        return found is not None and bool(found["sum"] == row["sum"])

    def _copy_row(self, table: str, row: Row) -> None:
        self._new.insert_rows(table, (*COLUMNS[table], "sum"), [tuple(row)], True)

    def _transaction(self) -> psycopg.Transaction:
        return self._new.raw.transaction()  # type: ignore[return-value]


def _check_item(row: Any) -> None:
    if not item_fits(row):
        raise _damaged("an item", row["key"])


def _damaged(what: str, key: int) -> StoreCorrupt:
    return StoreCorrupt(f"{what} (key {key}) is damaged; a start of the gateway on the old store repairs it")


def _changed(what: str) -> StoreDamaged:
    return StoreDamaged(f"{what} came back as something else than was written; the old store is not marked as moved")


def _one(rows: Any) -> Any:
    row = rows.fetchone()
    assert row is not None
    return row
