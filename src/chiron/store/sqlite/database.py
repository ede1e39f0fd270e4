"""The SQLite database: its tables, how it is opened, and what its errors mean.

Every row carries a checksum (``sums``). Rows of files and batches are kept twice: ``copies`` has each as it was at its
last change of status, on other pages, since all that belongs to a batch is worth nothing without its row.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from chiron.store.directory import DATABASE
from chiron.store.jobs.rows import BATCH_DEFAULTS, keep_copy, write_row
from chiron.store.port import StoreCorrupt, StoreDamaged, StoreError, StoreFull
from chiron.store.settings import StoreSettings
from chiron.store.sums import COLUMNS, Row, check_row, item_sum, result_sum

APPLICATION_ID = 0x43484952  # "CHIR"
SCHEMA_VERSION = 3
SQLITE_MIN = (3, 35, 0)
"""The first with ``RETURNING``."""
PAGE_BYTES = 8192
"""Results of about a kilobyte fill large pages better than small ones."""

TABLES = {
    "meta": """CREATE TABLE meta(
  no INTEGER PRIMARY KEY, schema INTEGER NOT NULL, commits INTEGER NOT NULL, seen_s REAL, trusted_s REAL,
  doubt_s REAL NOT NULL, sum INTEGER NOT NULL
)""",
    "files": """CREATE TABLE files(
  no INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, purpose TEXT NOT NULL, filename TEXT NOT NULL,
  bytes INTEGER NOT NULL, created_s REAL NOT NULL, owner TEXT NOT NULL,
  batch_id TEXT, state INTEGER, expires_s REAL, block_sums BLOB, sum INTEGER NOT NULL
)""",
    "batches": """CREATE TABLE batches(
  no INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, input_file_id TEXT NOT NULL,
  endpoint TEXT NOT NULL, completion_window TEXT NOT NULL, status TEXT NOT NULL, metadata TEXT NOT NULL,
  created_s REAL NOT NULL, expires_s REAL NOT NULL, in_progress_s REAL, finalizing_s REAL, completed_s REAL,
  failed_s REAL, expired_s REAL, cancelling_s REAL, cancelled_s REAL,
  total INTEGER NOT NULL, completed INTEGER NOT NULL, failed INTEGER NOT NULL,
  errors TEXT NOT NULL, output_file_id TEXT, error_file_id TEXT, model TEXT,
  recent TEXT NOT NULL,
  output_bytes INTEGER NOT NULL, error_bytes INTEGER NOT NULL, output_expires_after_s REAL,
  lanes TEXT NOT NULL, incomplete INTEGER NOT NULL, usage TEXT NOT NULL, sum INTEGER NOT NULL
)""",
    "work": """CREATE TABLE work(
  batch INTEGER NOT NULL, lane INTEGER NOT NULL, model TEXT NOT NULL, items INTEGER NOT NULL,
  input_bytes INTEGER NOT NULL, input_bytes_square INTEGER NOT NULL, id_bytes INTEGER NOT NULL, sum INTEGER NOT NULL,
  PRIMARY KEY(batch, lane)
) WITHOUT ROWID""",
    "items": """CREATE TABLE items(
  key INTEGER PRIMARY KEY, state INTEGER NOT NULL, lane INTEGER NOT NULL, attempts INTEGER NOT NULL,
  offset INTEGER NOT NULL, bytes INTEGER NOT NULL, input_bytes INTEGER NOT NULL, custom_id TEXT NOT NULL,
  body_sum INTEGER, sum INTEGER NOT NULL
)""",
    "results": """CREATE TABLE results(key INTEGER PRIMARY KEY, line BLOB NOT NULL, sum INTEGER NOT NULL)""",
    "purges": """CREATE TABLE purges(
  no INTEGER PRIMARY KEY, batch INTEGER NOT NULL, state INTEGER, next_key INTEGER NOT NULL, sum INTEGER NOT NULL
)""",
    "removals": """CREATE TABLE removals(id TEXT NOT NULL)""",
    "copies": """CREATE TABLE copies(no INTEGER PRIMARY KEY, row TEXT NOT NULL, sum INTEGER NOT NULL)""",
}
"""``work``: one row per model of a running batch, sums over its items without a result. ``purges``: rows of batches
that are to go, in small steps beside other work; state: the results of items in that state, NULL: everything.
``removals``: uploads that were deleted and whose content may still be there. ``meta`` has one row."""

INDEXES = {
    "files_by_batch": "CREATE INDEX files_by_batch ON files(batch_id)",
    "files_by_expiry": "CREATE INDEX files_by_expiry ON files(expires_s) WHERE expires_s IS NOT NULL",
    "batches_by_status": "CREATE INDEX batches_by_status ON batches(status, expires_s)",
    "batches_by_input": "CREATE INDEX batches_by_input ON batches(input_file_id)",
}

SCHEMA = ";\n".join([*TABLES.values(), *INDEXES.values()]) + ";\n"
MARKS = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
META = (1, SCHEMA_VERSION, 0, None, None, 0.0)
"""The row of ``meta`` in a new database."""


def read_meta(db: Connection) -> Row:
    """Raises StoreDamaged."""
    row: Row | None = db.execute("SELECT * FROM meta").fetchone()
    if row is None:
        raise StoreDamaged("the row of meta is missing")
    return check_row("meta", row, "meta")


# Opening.


class Connection(sqlite3.Connection):
    """Implements ``Database``."""

    keeps_copies = True

    def insert_rows(self, table: str, names: Sequence[str], rows: Collection[Sequence[Any]], replace: bool) -> None:
        verb = "INSERT OR REPLACE" if replace else "INSERT"
        columns = ", ".join(f'"{name}"' for name in names)
        self.executemany(f"{verb} INTO {table}({columns}) VALUES({', '.join('?' * len(names))})", rows)

    def page(self, sql: str, values: Sequence[Any], block_bytes: int) -> sqlite3.Cursor:
        return self.execute(sql, values)  # Rows are read off the disk as they are asked for.


def connect(directory: Path) -> Connection:
    """A connection that leaves transactions to us; whichever thread has it uses it alone."""
    db = connect_to(directory / DATABASE, check_same_thread=False, timeout=10.0)
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = OFF")
    # What was deleted is deleted; and a search for rows in a damaged file finds no old ones.
    db.execute("PRAGMA secure_delete = ON")
    return db


def connect_to(path: Path, *, check_same_thread: bool = True, timeout: float = 5.0) -> Connection:
    db = sqlite3.connect(
        path, isolation_level=None, check_same_thread=check_same_thread, timeout=timeout, factory=Connection
    )
    db.row_factory = sqlite3.Row
    return db


def open_for_writing(directory: Path, settings: StoreSettings) -> Connection:
    """The one connection that writes; makes the tables in an empty database. Raises ``StoreCorrupt``."""
    if sqlite3.sqlite_version_info < SQLITE_MIN:
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old: {'.'.join(map(str, SQLITE_MIN))} is needed")
    path = directory / DATABASE
    try:
        db = connect(directory)
        try:
            _prepare(db, path, settings)
        except BaseException:
            db.close()
            raise
    except SQLITE_ERRORS as error:
        raise store_error(error, path) from error
    return db


def open_for_reading(directory: Path) -> Connection:
    db = connect(directory)
    db.execute("PRAGMA query_only = ON")
    return db


def _prepare(db: Connection, path: Path, settings: StoreSettings) -> None:
    found, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if empty:
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    elif found != APPLICATION_ID:
        raise StoreCorrupt(f"{path}: a database of another program")
    elif version != SCHEMA_VERSION and version not in _UPGRADES:
        raise StoreError(f"{path}: schema {version}, this version of Chiron reads {SCHEMA_VERSION}")
    db.execute("PRAGMA journal_mode = WAL")
    page = db.execute("PRAGMA page_size").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {settings.database_bytes_max // page}")
    db.execute(f"PRAGMA wal_autocheckpoint = {(16 << 20) // page}")
    db.execute(f"PRAGMA journal_size_limit = {64 << 20}")
    db.execute("PRAGMA cache_size = -32768")
    if empty:
        db.execute("BEGIN IMMEDIATE")
        make_tables(db)
        db.execute("COMMIT")
        return
    if version != SCHEMA_VERSION and path.stat().st_size <= settings.check_bytes_max:
        report = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if report != "ok":
            raise damaged(path, report)
    for step in range(version, SCHEMA_VERSION):
        db.execute("BEGIN IMMEDIATE")
        _UPGRADES[step](db)
        db.execute(f"PRAGMA user_version = {step + 1}")
        db.execute("COMMIT")


def make_tables(db: Connection) -> None:
    """In an empty database, inside a transaction."""
    _run(db, SCHEMA)
    _run(db, MARKS)
    write_row(db, "meta", dict(zip(COLUMNS["meta"], META, strict=True)))


def _run(db: Connection, script: str) -> None:
    """Several statements, without the COMMIT that ``executescript`` begins with."""
    for statement in script.split(";"):
        if statement.strip():
            db.execute(statement)


def _upgrade_1(db: Connection) -> None:
    _run(
        db,
        "ALTER TABLE files ADD COLUMN expires_s REAL;"
        "CREATE INDEX files_by_expiry ON files(expires_s) WHERE expires_s IS NOT NULL;"
        "ALTER TABLE batches ADD COLUMN output_expires_after_s REAL;",
    )


def _upgrade_2(db: Connection) -> None:
    """Every row gets its sum. The bytes of old uploads were never summed and stay without."""
    old = ("files", "batches", "work", "items", "results", "purges")
    for table in old:
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    for index in INDEXES:
        db.execute(f"DROP INDEX {index}")
    make_tables(db)
    db.create_function("item_sum", 9, item_sum, deterministic=True)
    db.create_function("result_sum", 3, result_sum, deterministic=True)
    columns = "key, state, lane, attempts, offset, bytes, input_bytes, custom_id"
    db.execute(f"INSERT INTO items SELECT {columns}, NULL, item_sum({columns}, NULL) FROM old_items")
    db.execute(
        "INSERT INTO results SELECT key, line, result_sum(key, state, line) FROM old_results JOIN old_items USING(key)"
    )
    for row in db.execute("SELECT * FROM old_work").fetchall():
        write_row(db, "work", dict(row))
    for row in db.execute("SELECT rowid AS no, * FROM old_purges").fetchall():
        write_row(db, "purges", dict(row))
    for row in db.execute("SELECT * FROM old_files").fetchall():
        values = dict(row) | {"block_sums": None}
        write_row(db, "files", values)
        keep_copy(db, "files", values)
    for row in db.execute("SELECT * FROM old_batches").fetchall():
        lanes = db.execute("SELECT model FROM old_work WHERE batch = ? ORDER BY lane", (row["no"],)).fetchall()
        values = BATCH_DEFAULTS | dict(row) | {"lanes": json.dumps([lane["model"] for lane in lanes])}
        write_row(db, "batches", values)
        keep_copy(db, "batches", values)
    for table in ("files", "batches"):
        # Numbers are not given twice, also those of rows that are gone.
        last = db.execute("SELECT max(seq) FROM sqlite_sequence WHERE name IN (?, ?)", (table, f"old_{table}"))
        if (seq := last.fetchone()[0]) is not None:
            db.execute("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
            db.execute("INSERT INTO sqlite_sequence(name, seq) VALUES(?, ?)", (table, seq))
    for table in old:
        db.execute(f"DROP TABLE old_{table}")


_UPGRADES = {1: _upgrade_1, 2: _upgrade_2}
"""From each older version to the next."""


def damaged(path: Path, what: str) -> StoreCorrupt:
    return StoreCorrupt(f"{path}: damaged ({what}); restore a copy, or move it away to start empty")


SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises; its words may quote a damaged schema, which is then no text."""


def store_error(error: Exception, path: Path) -> StoreError:
    """What an error of SQLite means to callers."""
    code = getattr(error, "sqlite_errorcode", None) or 0
    # A quota or a limit on file sizes shows as a failed write, not as a full disk; at the start also a full disk does.
    if code & 0xFF == sqlite3.SQLITE_FULL or code in (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE):
        return StoreFull(f"{path}: no room for more on the disk or in the quota ({error})")
    no_text = isinstance(error, UnicodeDecodeError) or str(error).startswith("Could not decode")
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or no_text:
        return damaged(path, str(error))
    return StoreError(f"{path}: {error}")
