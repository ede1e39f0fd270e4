"""A look at a server before a gateway uses it, for ``chiron doctor``. Changes nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psycopg

from chiron.store.lease import LEADER, Held
from chiron.store.postgres.connection import connect, store_error, where
from chiron.store.postgres.lease import read_holder
from chiron.store.postgres.leases import ALIVE
from chiron.store.postgres.schema import SCHEMA_VERSION, read_version
from chiron.store.postgres.settings import PostgresSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    at: str
    server: str
    """Version."""
    encrypted: bool
    schema: int
    """Version of the tables; 0: there are none yet."""
    schema_known: int = SCHEMA_VERSION
    may_create: bool
    """Whether the schema is there, or this user may make it."""
    round_trip_s: float
    clock_ahead_s: float
    """Of the server's clock, before this machine's."""
    holders: tuple[str, ...]
    """Gateways that use it now."""
    leader: Held | None
    """Of several gateways, the one that leads now."""
    size_bytes: int
    file_bytes_max: int


def look(settings: PostgresSettings) -> Look:
    """Raises StoreError."""
    db = connect(settings, "doctor")
    try:
        version = read_version(db)
        began_s = time.perf_counter()
        db.execute("SELECT 1 AS one").fetchone()
        round_trip_s = time.perf_counter() - began_s
        row = db.execute(
            "SELECT current_setting('server_version') AS server, CAST(extract(epoch FROM clock_timestamp()) AS FLOAT8)"
            " AS now_s, pg_database_size(current_database()) AS size, to_regnamespace(?) IS NOT NULL OR"
            " has_database_privilege(current_database(), 'CREATE') AS may_create",
            (settings.schema,),
        ).fetchone()
        assert row is not None
        ahead_s = row["now_s"] - time.time()
        names, leader = (), None
        if version == SCHEMA_VERSION:
            rows = db.execute(f"SELECT name FROM holders WHERE {ALIVE} ORDER BY no").fetchall()
            names = tuple(each["name"] for each in rows)
            leader = read_holder(db, LEADER)
        return Look(
            at=where(settings),
            server=row["server"],
            encrypted=db.raw.pgconn.ssl_in_use,
            schema=version,
            may_create=row["may_create"],
            round_trip_s=round_trip_s,
            clock_ahead_s=ahead_s,
            holders=names,
            leader=leader,
            size_bytes=row["size"],
            file_bytes_max=settings.file_bytes_max,
        )
    except psycopg.Error as error:
        raise store_error(error, settings) from error
    finally:
        db.close()
