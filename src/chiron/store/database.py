"""The SQLite database: its tables, how it is opened, and what its errors mean.

An item is a row that points into the uploaded file, so that input is on disk once. Items and results have one key,
``batch number << 32 | index``: both tables lie on disk in the order of the input, and the primary key of ``results``
is what makes a second result for an item impossible.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from chiron.store.port import StoreCorrupt, StoreError, StoreFull
from chiron.store.settings import StoreSettings

DATABASE = "batch.sqlite3"
APPLICATION_ID = 0x43484952  # "CHIR"
SCHEMA_VERSION = 2
SQLITE_MIN = (3, 35, 0)
"""The first with ``RETURNING``."""

OPEN, OK, FAILED = 0, 1, 2
"""States of an item: no result yet, a line in the output file, a line in the error file."""

SCHEMA = f"""
CREATE TABLE files(
  no INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, purpose TEXT NOT NULL, filename TEXT NOT NULL,
  bytes INTEGER NOT NULL, created_s REAL NOT NULL, owner TEXT NOT NULL,
  batch_id TEXT, state INTEGER, expires_s REAL
);
CREATE INDEX files_by_batch ON files(batch_id);
CREATE INDEX files_by_expiry ON files(expires_s) WHERE expires_s IS NOT NULL;
CREATE TABLE batches(
  no INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, input_file_id TEXT NOT NULL,
  endpoint TEXT NOT NULL, completion_window TEXT NOT NULL, status TEXT NOT NULL, metadata TEXT NOT NULL,
  created_s REAL NOT NULL, expires_s REAL NOT NULL, in_progress_s REAL, finalizing_s REAL, completed_s REAL,
  failed_s REAL, expired_s REAL, cancelling_s REAL, cancelled_s REAL,
  total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
  errors TEXT NOT NULL DEFAULT '[]', output_file_id TEXT, error_file_id TEXT, model TEXT,
  recent TEXT NOT NULL DEFAULT '[]',
  output_bytes INTEGER NOT NULL DEFAULT 0, error_bytes INTEGER NOT NULL DEFAULT 0, output_expires_after_s REAL
);
CREATE INDEX batches_by_status ON batches(status, expires_s);
CREATE INDEX batches_by_input ON batches(input_file_id);
-- One row per model of a running batch: sums over its items without a result.
CREATE TABLE work(
  batch INTEGER NOT NULL, lane INTEGER NOT NULL, model TEXT NOT NULL, items INTEGER NOT NULL,
  input_bytes INTEGER NOT NULL, input_bytes_square INTEGER NOT NULL, id_bytes INTEGER NOT NULL,
  PRIMARY KEY(batch, lane)
) WITHOUT ROWID;
CREATE TABLE items(
  key INTEGER PRIMARY KEY, state INTEGER NOT NULL, lane INTEGER NOT NULL, attempts INTEGER NOT NULL,
  offset INTEGER NOT NULL, bytes INTEGER NOT NULL, input_bytes INTEGER NOT NULL, custom_id TEXT NOT NULL
);
CREATE TABLE results(key INTEGER PRIMARY KEY, line BLOB NOT NULL);
-- Rows of batches that are to go, in small steps beside other work. state: the results of items in that state;
-- NULL: everything.
CREATE TABLE purges(batch INTEGER NOT NULL, state INTEGER, next_key INTEGER NOT NULL);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""


UPGRADES = {
    1: """
ALTER TABLE files ADD COLUMN expires_s REAL;
CREATE INDEX files_by_expiry ON files(expires_s) WHERE expires_s IS NOT NULL;
ALTER TABLE batches ADD COLUMN output_expires_after_s REAL;
PRAGMA user_version = 2;
""",
}
"""From each older version to the next."""

INDEX_MAX = (1 << 32) - 1
"""No item has it: an input file holds fewer lines."""


def item_key(batch: int, index: int) -> int:
    assert 0 <= index <= INDEX_MAX, index
    return batch << 32 | index


def item_index(key: int) -> int:
    return key & INDEX_MAX


def connect(directory: Path) -> sqlite3.Connection:
    """A connection that leaves transactions to us; whichever thread has it uses it alone."""
    db = sqlite3.connect(directory / DATABASE, isolation_level=None, check_same_thread=False, timeout=10.0)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = OFF")
    return db


def open_for_writing(directory: Path, settings: StoreSettings) -> sqlite3.Connection:
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
    except sqlite3.Error as error:
        raise store_error(error, path) from error
    return db


def open_for_reading(directory: Path) -> sqlite3.Connection:
    db = connect(directory)
    db.execute("PRAGMA query_only = ON")
    return db


def _prepare(db: sqlite3.Connection, path: Path, settings: StoreSettings) -> None:
    found, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if empty:
        # Results of about a kilobyte fill large pages better than small ones.
        db.execute("PRAGMA page_size = 8192")
    elif found != APPLICATION_ID:
        raise StoreCorrupt(f"{path}: a database of another program")
    elif version != SCHEMA_VERSION and version not in UPGRADES:
        raise StoreError(f"{path}: schema {version}, this version of Chiron reads {SCHEMA_VERSION}")
    db.execute("PRAGMA journal_mode = WAL")
    page = db.execute("PRAGMA page_size").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {settings.database_bytes_max // page}")
    db.execute(f"PRAGMA wal_autocheckpoint = {(16 << 20) // page}")
    db.execute(f"PRAGMA journal_size_limit = {64 << 20}")
    db.execute("PRAGMA cache_size = -32768")
    if empty:
        db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
    elif path.stat().st_size <= settings.check_bytes_max:
        report = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if report != "ok":
            raise StoreCorrupt(f"{path}: damaged ({report}); restore a copy, or move it away to start empty")
    for step in range(SCHEMA_VERSION if empty else version, SCHEMA_VERSION):
        db.executescript(f"BEGIN IMMEDIATE; {UPGRADES[step]} COMMIT;")


def store_error(error: sqlite3.Error, path: Path) -> StoreError:
    """What an error of SQLite means to callers."""
    code = getattr(error, "sqlite_errorcode", None) or 0
    # A quota or a limit on file sizes shows as a failed write, not as a full disk; at the start also a full disk does.
    if code & 0xFF == sqlite3.SQLITE_FULL or code in (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE):
        return StoreFull(f"{path}: no room for more on the disk or in the quota ({error})")
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreCorrupt(f"{path}: damaged ({error}); restore a copy, or move it away to start empty")
    return StoreError(f"{path}: {error}")
