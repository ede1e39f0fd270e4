"""A damaged database rebuilt from the rows that can still be found.

The rows are read off the pages (``pages``), of the database and of its log, and written into a new database; what is
known twice is taken from where it is whole, what can be reckoned is reckoned, and what is lost is said so where a user
looks for it: a result that is gone is an error line (``result_damaged``), or its item runs again where its batch is not
over. The damaged files are kept in ``lost+found``; without room for them nothing is touched.

The new database gets its place in steps that a crash may part: it is written under one name, and takes another once it
is whole; the next start finishes what is left to do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chiron.store.directory import DATABASE, disk_error, sync_directory
from chiron.store.jobs.batches import ended_s
from chiron.store.jobs.recount import keys_of, recounted, set_state, settle_files, write_item
from chiron.store.jobs.rows import FAILED, LOST, OK, OPEN, copied, item_index, keep_copy, read_copy, write_row
from chiron.store.port import ENDED, RUNNING, LineError, StoreCorrupt
from chiron.store.sqlite.acknowledged import read_acknowledged
from chiron.store.sqlite.database import PAGE_BYTES, SQLITE_ERRORS, Connection, connect_to, make_tables, store_error
from chiron.store.sqlite.lost import LostFound
from chiron.store.sqlite.pages import Found, Pages
from chiron.store.sqlite.wal import read_log
from chiron.store.sums import COLUMNS, item_sum, result_sum

BUILDING, READY = DATABASE + ".building", DATABASE + ".mended"
PARTS = ("", "-wal", "-shm")
"""What a database consists of, by the ends of the names."""
ERRORS_MAX = 100
_LINES_TOLD = 20
_RANKS = {"validating": 0, "in_progress": 1, "finalizing": 2, "cancelling": 2}
"""How far a status is; those at the end are the furthest."""


def mend(directory: Path, lost: LostFound, note: Callable[[str], None], why: str) -> None:
    """Raises StoreCorrupt if the damaged files cannot be put aside, StoreFull and StoreError."""
    path = directory / DATABASE
    building = directory / BUILDING
    try:
        building.unlink(missing_ok=True)
        _require_room(directory, lost, path, why)
        db = connect_to(building)
        try:
            words = _Mending(db, directory).run(path)
        finally:
            db.close()
        _sync(building)
        building.rename(directory / READY)
        sync_directory(directory)
        place = finish(directory, lost)
    except SQLITE_ERRORS as error:
        raise store_error(error, building) from error
    except OSError as error:
        raise disk_error(error, building) from error
    note(f"the database was damaged ({why}); it was rebuilt, and the damaged files are in {place}")
    for word in words:
        note(word)


def finish(directory: Path, lost: LostFound) -> Path | None:
    """Put a mended database into its place, if there is one; returns where the damaged one is now."""
    ready = directory / READY
    (directory / BUILDING).unlink(missing_ok=True)
    if not ready.exists():
        return None
    old = [path for end in PARTS if (path := directory / (DATABASE + end)).exists()]
    place = lost.folder("damaged") if old else lost.path
    # The log first: with it gone the database alone is not taken for the mended one, which has a name of its own.
    for path in reversed(old):
        path.rename(place / path.name)
    ready.rename(directory / DATABASE)
    sync_directory(directory)
    return place


def _require_room(directory: Path, lost: LostFound, path: Path, why: str) -> None:
    old = [part for end in PARTS if (part := directory / (DATABASE + end)).exists()]
    if not lost.room_for(len(old), sum(part.stat().st_size for part in old)):
        raise StoreCorrupt(
            f"{path}: damaged ({why}); it is not repaired, because the damaged files would not fit into lost+found: "
            f"{lost.limit()}"
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o600)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Mending:
    """One go at it, in a new database."""

    def __init__(self, db: Connection, directory: Path) -> None:
        self._db = db
        self._directory = directory
        self._rows: dict[str, dict[int, dict[str, Any]]] = {"files": {}, "batches": {}, "purges": {}, "meta": {}}
        self._copies: dict[str, dict[int, dict[str, Any]]] = {"files": {}, "batches": {}}
        self._words: list[str] = []

    def run(self, path: Path) -> list[str]:
        """What to tell."""
        db = self._db
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA secure_delete = ON")
        db.execute("BEGIN IMMEDIATE")
        make_tables(db)
        db.execute("CREATE TEMP TABLE states(key INTEGER PRIMARY KEY, state INTEGER NOT NULL)")
        log_path = path.with_name(DATABASE + "-wal")
        count = 0
        for found in Pages(path, log_path, read_log(log_path)).rows():
            self._take(found)
            count += 1
        if not count:
            self._words.append(
                "not one row of it could be found: it starts empty, and all uploads are moved to lost+found"
            )
        self._write_meta()
        batches, files = self._merged("batches"), self._merged("files")
        for values in files.values():
            write_row(db, "files", values)
            keep_copy(db, "files", values)
        for values in batches.values():
            write_row(db, "batches", values)
        self._drop_strangers()
        for no in sorted(batches):
            self._settle(batches[no])
        for table in ("files", "batches"):
            self._set_sequence(table)
        db.execute("COMMIT")
        return self._words

    def _take(self, found: Found) -> None:
        db, table = self._db, found.table
        if table == "items":
            # Of several states of a row the one that is further counts: states and attempts only grow.
            db.execute(
                "INSERT INTO items VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(key) DO UPDATE SET"
                " state = excluded.state, attempts = excluded.attempts, sum = excluded.sum"
                " WHERE excluded.state > state OR (excluded.state = state AND excluded.attempts > attempts)",
                (*found.values, item_sum(*found.values)),
            )
        elif table == "results":
            key, line, state = found.values
            db.execute("INSERT OR IGNORE INTO results VALUES(?, ?, ?)", (key, line, result_sum(key, state, line)))
            db.execute("INSERT OR IGNORE INTO states VALUES(?, ?)", (key, state))
        elif table == "copies":
            of_table, no = copied(found.key)
            try:
                values = read_copy(of_table, found.values[1])
            except ValueError:
                return
            _keep_further(self._copies[of_table], of_table, no, values)
        else:
            values = dict(zip(COLUMNS[table], found.values, strict=True))
            _keep_further(self._rows[table], table, found.key, values)

    def _write_meta(self) -> None:
        meta = self._rows["meta"].get(1)
        acknowledged = read_acknowledged(self._directory) or 0
        if meta is None:
            self._words.append("the store's record of its clock is lost; it starts again")
            meta = {"seen_s": None, "trusted_s": None, "doubt_s": 0.0, "commits": 0}
        # Commits that are lost are told of below, by what was in them; they are not to be missed again.
        meta = meta | {"no": 1, "schema": 3, "commits": max(meta["commits"], acknowledged)}
        write_row(self._db, "meta", meta)

    def _merged(self, table: str) -> dict[int, dict[str, Any]]:
        """The rows that were found, and those of which only the copy was."""
        rows = self._rows[table]
        for no, values in self._copies[table].items():
            # A row that is behind its copy is from before its last change of status.
            if no not in rows or _rank(table, values)[:1] > _rank(table, rows[no])[:1]:
                rows[no] = values
                name = "batch" if table == "batches" else "file"
                self._words.append(f"the row of {name} {values['id']!r} was damaged and is taken from its copy")
        return rows

    def _drop_strangers(self) -> None:
        """Items and results of batches whose row and copy are both lost: nobody could ask for them. They stay in the
        damaged files."""
        db = self._db
        known = {*self._rows["batches"]}
        purged: dict[int, dict[str, Any]] = {}
        for values in self._rows["purges"].values():
            # A purge of a batch that is still there is of its output or its errors, or an old state of the page.
            if values["batch"] not in known:
                purged[values["batch"]] = values
        for table in ("items", "results"):
            numbers = [row[0] for row in db.execute(f"SELECT DISTINCT key >> 32 FROM {table}")]
            for no in numbers:
                if no in known or no in purged:
                    continue
                count = db.execute(f"DELETE FROM {table} WHERE key BETWEEN ? AND ?", keys_of(no)).rowcount
                self._words.append(
                    f"the row of batch number {no} is lost, with its copy: {count} of its {table} are only in the "
                    "damaged files"
                )
        for values in purged.values():
            write_row(db, "purges", values)

    def _settle(self, batch: dict[str, Any]) -> None:
        """Make the parts of a batch agree, and say what of it is lost."""
        db, status = self._db, batch["status"]
        if status == "validating" or not batch["total"]:
            keep_copy(db, "batches", batch)
            return
        served = self._served(batch)
        self._take_states(batch)
        gone = self._lost_results(batch, served)
        after = recounted(db, batch, served)
        counted = db.execute("SELECT count(*) FROM items WHERE key BETWEEN ? AND ?", keys_of(batch["no"])).fetchone()
        missing = after["total"] - counted[0]
        if gone:
            self._tell_lost(after, gone)
        if missing:
            self._words.append(
                f"batch {batch['id']!r}: the rows of {missing} of its {batch['total']} requests were damaged; they are "
                f"read again from {batch['input_file_id']!r}"
            )
        if status in ENDED:
            settle_files(db, after, served)
        elif not missing and after["completed"] + after["failed"] == after["total"]:
            # Its last result came with a commit of which the rest is lost.
            end = "cancelled" if status == "cancelling" else "completed"
            now_s = ended_s(after)
            after |= {"status": end, f"{end}_s": now_s, "finalizing_s": after["finalizing_s"] or now_s, "recent": "[]"}
            settle_files(db, after)
            db.execute("DELETE FROM work WHERE batch = ?", (batch["no"],))
        write_row(db, "batches", after)
        keep_copy(db, "batches", after)

    def _served(self, batch: dict[str, Any]) -> frozenset[int]:
        """Of an ended batch: whose lines are still there. A file whose row is lost is there if lines of it are; one
        whose lines are lost, if its row is."""
        if batch["status"] not in ENDED:
            return frozenset({OK, FAILED})
        found = set()
        for state, name in ((OK, "output_file_id"), (FAILED, "error_file_id")):
            row = self._db.execute("SELECT 1 FROM files WHERE id = ?", (batch[name],)).fetchone()
            lines = self._db.execute(
                "SELECT 1 FROM states WHERE key BETWEEN ? AND ? AND state = ? LIMIT 1", (*keys_of(batch["no"]), state)
            ).fetchone()
            if row is not None or (lines is not None and batch[name] is not None) or batch[name] is None:
                found.add(state)
        return frozenset(found)

    def _take_states(self, batch: dict[str, Any]) -> None:
        """An item with a result has ended as the result says, also if the row of the item is lost."""
        db = self._db
        rows = db.execute(
            "SELECT key, states.state AS told, items.state AS had FROM states LEFT JOIN items USING(key)"
            " WHERE key BETWEEN ? AND ? AND (items.state IS NULL OR items.state != states.state)",
            keys_of(batch["no"]),
        ).fetchall()
        for row in rows:
            if row["had"] is None:
                write_item(db, row["key"], row["told"], 0, 0, 0, 0, 0, "", None)
            else:
                set_state(db, row["key"], row["told"])

    def _lost_results(self, batch: dict[str, Any], served: frozenset[int]) -> list[int]:
        """Indices of the items that had a result and have none. Where the batch runs they are open again."""
        db = self._db
        rows = db.execute(
            f"SELECT key, state FROM items WHERE key BETWEEN ? AND ? AND state IN ({OK}, {FAILED})"
            " AND NOT EXISTS (SELECT 1 FROM results WHERE results.key = items.key)",
            keys_of(batch["no"]),
        ).fetchall()
        gone = [row["key"] for row in rows if row["state"] in served]
        state = OPEN if batch["status"] in RUNNING else LOST
        for key in gone:
            set_state(db, key, state)
        return [item_index(key) for key in gone]

    def _tell_lost(self, batch: dict[str, Any], gone: list[int]) -> None:
        shown = ", ".join(str(index + 1) for index in gone[:_LINES_TOLD]) + (" ..." if len(gone) > _LINES_TOLD else "")
        what = (
            f"the results of {len(gone)} of its {batch['total']} requests were damaged (requests {shown} of the input)"
        )
        if batch["status"] in RUNNING:
            self._words.append(f"batch {batch['id']!r}: {what}; these run again")
            return
        self._words.append(f"batch {batch['id']!r}: {what}; they have lines in its error file")
        errors = json.loads(batch["errors"])[: ERRORS_MAX - 1]
        said = LineError(code="result_damaged", message=f"On the server's disk {what}; see the error file.")
        batch["errors"] = json.dumps([*errors, asdict(said)])

    def _set_sequence(self, table: str) -> None:
        """Numbers are not given twice."""
        db = self._db
        numbers = [db.execute(f"SELECT coalesce(max(no), 0) FROM {table}").fetchone()[0]]
        if table == "batches":
            highest = "SELECT coalesce(max(key), 0) >> 32 FROM"
            numbers += [db.execute(f"{highest} {name}").fetchone()[0] for name in ("items", "results")]
            numbers += [values["batch"] for values in self._rows["purges"].values()]
        numbers += [*self._copies[table]]
        db.execute("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
        db.execute("INSERT INTO sqlite_sequence(name, seq) VALUES(?, ?)", (table, max(numbers)))


def _keep_further(rows: dict[int, dict[str, Any]], table: str, no: int, values: dict[str, Any]) -> None:
    known = rows.get(no)
    if known is None or _rank(table, values) > _rank(table, known):
        rows[no] = values


def _rank(table: str, values: dict[str, Any]) -> tuple[float, ...]:
    """Of two states of a row the later one has the higher rank."""
    if table == "batches":
        return _RANKS.get(values["status"], 3), values["completed"] + values["failed"], len(values["errors"])
    if table == "meta":
        return (values["commits"],)
    return (values["next_key"],) if table == "purges" else (0,)
