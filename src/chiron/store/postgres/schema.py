"""The tables, and how those of an older version become those of this one.

They are SQLite's (``sqlite.database``), with the same sums, and besides: the content of uploads in blocks, and who
leases what. Leases are no data: they have no sums, and are gone with the gateway that has them.
"""

from __future__ import annotations

from typing import Final

import psycopg
from psycopg import sql as quoting

from chiron.store.jobs.database import Database
from chiron.store.jobs.rows import write_row
from chiron.store.port import StoreError
from chiron.store.postgres.connection import Connection, store_error, where
from chiron.store.postgres.settings import PostgresSettings
from chiron.store.sums import BLOCK_BYTES, COLUMNS, Row, check_row

_FIRST: Final = """
CREATE TABLE meta(
  no BIGINT PRIMARY KEY, schema BIGINT NOT NULL, commits BIGINT NOT NULL, seen_s DOUBLE PRECISION,
  trusted_s DOUBLE PRECISION, doubt_s DOUBLE PRECISION NOT NULL, sum BIGINT NOT NULL
);
CREATE TABLE files(
  no BIGSERIAL PRIMARY KEY, id TEXT NOT NULL UNIQUE, purpose TEXT NOT NULL, filename TEXT NOT NULL,
  bytes BIGINT NOT NULL, created_s DOUBLE PRECISION NOT NULL, owner TEXT NOT NULL,
  batch_id TEXT, state BIGINT, expires_s DOUBLE PRECISION, block_sums BYTEA, sum BIGINT NOT NULL
);
CREATE TABLE batches(
  no BIGSERIAL PRIMARY KEY, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, input_file_id TEXT NOT NULL,
  endpoint TEXT NOT NULL, completion_window TEXT NOT NULL, status TEXT NOT NULL, metadata TEXT NOT NULL,
  created_s DOUBLE PRECISION NOT NULL, expires_s DOUBLE PRECISION NOT NULL, in_progress_s DOUBLE PRECISION,
  finalizing_s DOUBLE PRECISION, completed_s DOUBLE PRECISION, failed_s DOUBLE PRECISION, expired_s DOUBLE PRECISION,
  cancelling_s DOUBLE PRECISION, cancelled_s DOUBLE PRECISION,
  total BIGINT NOT NULL, completed BIGINT NOT NULL, failed BIGINT NOT NULL,
  errors TEXT NOT NULL, output_file_id TEXT, error_file_id TEXT, model TEXT, recent TEXT NOT NULL,
  output_bytes BIGINT NOT NULL, error_bytes BIGINT NOT NULL, output_expires_after_s DOUBLE PRECISION,
  lanes TEXT NOT NULL, incomplete BIGINT NOT NULL, usage TEXT NOT NULL, sum BIGINT NOT NULL
) WITH (fillfactor = 50);
CREATE TABLE work(
  batch BIGINT NOT NULL, lane BIGINT NOT NULL, model TEXT NOT NULL, items BIGINT NOT NULL,
  input_bytes BIGINT NOT NULL, input_bytes_square BIGINT NOT NULL, id_bytes BIGINT NOT NULL, sum BIGINT NOT NULL,
  PRIMARY KEY(batch, lane)
) WITH (fillfactor = 50);
CREATE TABLE items(
  key BIGINT PRIMARY KEY, state BIGINT NOT NULL, lane BIGINT NOT NULL, attempts BIGINT NOT NULL,
  "offset" BIGINT NOT NULL, bytes BIGINT NOT NULL, input_bytes BIGINT NOT NULL, custom_id BYTEA NOT NULL,
  body_sum BIGINT, sum BIGINT NOT NULL, holder BIGINT
) WITH (fillfactor = 70);
CREATE TABLE results(key BIGINT PRIMARY KEY, line BYTEA NOT NULL, sum BIGINT NOT NULL);
CREATE TABLE purges(
  no BIGSERIAL PRIMARY KEY, batch BIGINT NOT NULL, state BIGINT, next_key BIGINT NOT NULL, sum BIGINT NOT NULL
);
CREATE TABLE removals(id TEXT NOT NULL);
CREATE TABLE blocks(id TEXT NOT NULL, number BIGINT NOT NULL, data BYTEA NOT NULL, PRIMARY KEY(id, number));
ALTER TABLE blocks ALTER COLUMN data SET STORAGE EXTERNAL;
CREATE TABLE holders(
  no BIGSERIAL PRIMARY KEY, name TEXT NOT NULL, until TIMESTAMPTZ NOT NULL, commits BIGINT NOT NULL
) WITH (fillfactor = 20);
CREATE TABLE validations(batch TEXT PRIMARY KEY, holder BIGINT NOT NULL);
CREATE TABLE uploads(id TEXT PRIMARY KEY, holder BIGINT NOT NULL);
CREATE TABLE leased(
  batch BIGINT NOT NULL, lane BIGINT NOT NULL, holder BIGINT NOT NULL, items BIGINT NOT NULL,
  input_bytes BIGINT NOT NULL, input_bytes_square BIGINT NOT NULL, PRIMARY KEY(batch, lane, holder)
) WITH (fillfactor = 20);
CREATE TABLE returned(key BIGINT PRIMARY KEY, lane BIGINT NOT NULL);
CREATE TABLE learned(name TEXT PRIMARY KEY, data BYTEA NOT NULL, sum BIGINT NOT NULL);
CREATE TABLE leaders(name TEXT PRIMARY KEY, holder TEXT NOT NULL, token BIGINT NOT NULL, until TIMESTAMPTZ NOT NULL);
CREATE INDEX files_by_batch ON files(batch_id);
CREATE INDEX files_by_expiry ON files(expires_s) WHERE expires_s IS NOT NULL;
CREATE INDEX batches_by_status ON batches(status, expires_s);
CREATE INDEX batches_by_input ON batches(input_file_id);
"""
"""``items.holder``: NULL: nobody had it yet; 0: it came back and is in ``returned``; else who has it. ``uploads``:
files on their way in. ``validations``: who validates what. ``leased``: sums over what each holder has. A block has
``BLOCK_BYTES`` but for the last."""

MIGRATIONS: Final = (_FIRST,)
"""From each version to the next, beginning with an empty schema."""
SCHEMA_VERSION: Final = len(MIGRATIONS)
MIGRATION_LOCK: Final = 0x43484952_4D494752
"""Whoever migrates has it, so that gateways that start at once do it once."""
assert BLOCK_BYTES == 256 << 10, "blocks in existing databases have this size"


def prepare(db: Connection, settings: PostgresSettings) -> None:
    """Make the tables, or bring them up to date. Raises StoreError."""
    try:
        db.execute("SELECT pg_advisory_lock(?)", (MIGRATION_LOCK,))
        try:
            _migrate(db, settings)
        finally:
            if not db.raw.closed:
                db.execute("SELECT pg_advisory_unlock(?)", (MIGRATION_LOCK,))
    except psycopg.Error as error:
        raise store_error(error, settings) from error


def _migrate(db: Connection, settings: PostgresSettings) -> None:
    version = read_version(db)
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{where(settings)}: schema {version}, this version of Chiron reads up to {SCHEMA_VERSION}; "
            "a newer Chiron has used it"
        )
    for step in range(version, SCHEMA_VERSION):
        db.execute("BEGIN")
        try:
            if step == 0:
                db.raw.execute(
                    quoting.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(quoting.Identifier(settings.schema))
                )
            db.raw.execute(MIGRATIONS[step].encode())
            before = (1, 0, 0, None, None, 0.0) if step == 0 else [*read_meta(db)][:-1]
            meta = dict(zip(COLUMNS["meta"], before, strict=True))
            write_row(db, "meta", meta | {"schema": step + 1})
            db.execute("COMMIT")
        except BaseException:
            if not db.raw.closed:
                db.execute("ROLLBACK")
            raise


def read_version(db: Connection) -> int:
    """0: there are no tables yet."""
    found = db.execute("SELECT to_regclass('meta') IS NOT NULL AS found").fetchone()
    return int(read_meta(db)["schema"]) if found is not None and found["found"] else 0


def read_meta(db: Database) -> Row:
    """Raises StoreDamaged."""
    row = db.execute("SELECT * FROM meta WHERE no = 1").fetchone()
    if row is None:
        raise StoreError("the row of meta is missing")
    return check_row("meta", row, "meta")
