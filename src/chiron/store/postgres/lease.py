"""Who leads, in a row of the database, by the server's clock.

It has a connection of its own: a leader renews also while others wait for their turn to write, and a lost connection
costs one answer, not the lease. A row rather than an advisory lock: the lock would be lost with the connection, and
kept for as long as the server believes that a machine that is gone is there.

The server's clock may be set. So a gateway that has seen a lease counts by its own clock for how long that lasts unless
it is renewed; only of one that it has not seen it believes what the server's clock says, and not that it lasts for
longer than any can. One that was renewed since it was last seen, by a server whose clock has been set forward since,
lasts as if it had been renewed this moment: one that was given back says so by its end (``GIVEN_BACK``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf
from typing import TypeVar
from zlib import crc32

import psycopg

from chiron.store.lease import Held, Leads, check_name, relays_of, relays_text
from chiron.store.port import StoreError, StoreUnavailable
from chiron.store.postgres.connection import Connection, Patience, Row, connect, is_lost, store_error, where
from chiron.store.postgres.leases import ALIVE
from chiron.store.postgres.schema import prepare
from chiron.store.postgres.settings import PostgresSettings

T = TypeVar("T")

ANSWER_MAX_S = 5.0
"""A server that says nothing for so long has to be asked anew."""
SET_FORWARD_S = 0.05
"""A server's clock that gets ahead of ours by more between two looks was set, or the first answer was slow."""
GIVEN_BACK = "to_timestamp(0)"
"""In place of a lease's end. Not the time at which it was given back: that may be an end as good as another."""


def writer_name(leads: Leads, schema: str) -> str:
    """What the server calls the connection over which a leader writes."""
    return f"writer {_of_schema(schema)} {leads.token}"


def cut_off_older(db: Connection, leads: Leads, schema: str) -> None:
    """Cut connections of leaders before: one that was stopped in the middle of a transaction would hold up all."""
    own = "datname = current_database() AND usename = current_user AND pid != pg_backend_pid()"
    db.execute(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {own} AND application_name LIKE ?"
        " AND CAST(substring(application_name FROM '[0-9]{1,18}$') AS BIGINT) < ?",
        (f"chiron writer {_of_schema(schema)} %", leads.token),
    )


def require_lead(db: Connection, leads: Leads) -> None:
    """Raises StoreError. To be asked by who has the turn to write: another one may lead from now on, but writes only
    after this turn, and finds what was done in it. The row is not locked: freeing what a leader before has may take
    longer than a lease, which has to be renewed meanwhile."""
    row = db.execute(
        "SELECT 1 AS leads FROM leaders WHERE name = ? AND holder = ? AND token = ?",
        (leads.name, leads.holder, leads.token),
    ).fetchone()
    if row is None:
        raise StoreError("another gateway leads, or has led since: nothing more is written here")


def elected_name(name: str) -> str:
    """Of the row that a leader of this name keeps which is elected elsewhere (``terms``)."""
    return f"{name}/elected"


def read_holder(db: Connection, name: str) -> Held | None:
    """Who has this lease now, or leads in its place."""
    row = _read(db, name)
    return None if row is None else _held(row)


def _held(row: Row) -> Held:
    return Held(holder=row["holder"], token=row["token"], left_s=row["left_s"])


def _read(db: Connection, name: str) -> Row | None:
    return db.execute(
        "SELECT name, holder, token, CAST(until AS TEXT) AS until,"
        " CAST(extract(epoch FROM until - clock_timestamp()) AS FLOAT8) AS left_s,"
        " CAST(extract(epoch FROM clock_timestamp()) AS FLOAT8) AS now_s"
        f" FROM leaders WHERE name IN (?, ?) AND {ALIVE} ORDER BY name",
        (name, elected_name(name)),
    ).fetchone()


def _of_schema(schema: str) -> str:
    return f"{crc32(schema.encode()):08x}"


class Asked:
    """A connection of its own, and a thread that asks over it."""

    def __init__(self, settings: PostgresSettings) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-lease")
        self._db: Connection | None = None

    async def close(self) -> None:
        await asyncio.to_thread(lambda: self._thread.shutdown(wait=True))
        if self._db is not None:
            self._db.close()

    async def ask(self, query: Callable[[Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._query(query))

    def _query(self, query: Callable[[Connection], T]) -> T:
        """All of them may be asked twice: with a connection that was lost unnoticed it is asked again."""
        for last in (False, True):
            fresh = self._db is None
            if self._db is None:
                self._db = connect(self._settings, "lease", Patience(ANSWER_MAX_S))
                prepare(self._db, self._settings)
            try:
                return query(self._db)
            except psycopg.Error as error:
                if not is_lost(self._db.raw):
                    raise store_error(error, self._settings) from error
                self._db = None
                if last or fresh:
                    raise StoreUnavailable(f"{where(self._settings)}: {error}") from error
        raise AssertionError


class PostgresLease:
    """Implements ``LeaderLease``. ``close`` lets go of the connection, not of the lease."""

    def __init__(
        self,
        settings: PostgresSettings,
        *,
        name: str,
        holder: str,
        lease_s: float,
        time_s: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0.1 <= lease_s <= 3600:
            raise ValueError(f"lease_s: {lease_s!r} must be between 0.1 s and an hour")
        self._asked = Asked(settings)
        self._name = check_name("name", name)
        self._holder = check_name("holder", holder)
        self._lease_s = lease_s
        self._time_s = time_s
        self._told: frozenset[str] | None = None
        """Relays, as last written."""
        self._seen: tuple[int, str] = (0, "")
        """Token and end of another one's lease, as last read."""
        self._seen_until_s = 0.0
        """Its end by our own clock."""
        self._ahead_s = inf
        """How far the server's clock was ahead of ours, as last read."""

    async def try_take(self) -> Held | None:
        lasts = self._time_s() < self._seen_until_s

        def take(db: Connection) -> Held | None:
            # The token grows also if it was ours and was over: somebody may have acted meanwhile.
            row = db.execute(
                "INSERT INTO leaders(name, holder, token, until)"
                " SELECT ?, ?, 1, clock_timestamp() + make_interval(secs => ?)"
                f" WHERE NOT EXISTS (SELECT 1 FROM leaders WHERE name = ? AND holder != ? AND {ALIVE})"
                " ON CONFLICT (name) DO UPDATE SET"
                f" token = leaders.token + CASE WHEN leaders.holder = excluded.holder AND leaders.{ALIVE}"
                "  THEN 0 ELSE 1 END,"
                " holder = excluded.holder, until = excluded.until"
                " WHERE leaders.holder = excluded.holder OR NOT CASE"
                f"  WHEN leaders.until = {GIVEN_BACK} THEN FALSE"
                "  WHEN leaders.token = ? AND CAST(leaders.until AS TEXT) = ? THEN ?"
                "  WHEN leaders.token = ? THEN TRUE"
                f"  ELSE leaders.{ALIVE} END"
                " RETURNING token",
                (
                    *(self._name, self._holder, self._lease_s),
                    *(elected_name(self._name), self._holder),
                    *self._seen,
                    lasts,
                    self._seen[0],
                ),
            ).fetchone()
            if row is None:
                self._see_renewed(db)
                return None
            return Held(
                holder=self._holder,
                token=row["token"],
                left_s=self._lease_s,
                relays=self._read_relays(db, row["token"]),
            )

        return await self._asked.ask(take)

    def _see_renewed(self, db: Connection) -> None:
        """One that is over by the server's clock is not read by ``holder``."""
        row = db.execute(
            f"SELECT token, CAST(until AS TEXT) AS until FROM leaders WHERE name = ? AND holder != ? AND NOT ({ALIVE})",
            (self._name, self._holder),
        ).fetchone()
        if row is not None and row["token"] == self._seen[0] and row["until"] != self._seen[1]:
            self._seen, self._seen_until_s = (row["token"], row["until"]), self._time_s() + self._lease_s

    async def renew(self, relays: frozenset[str] | None = None) -> bool:
        def extend(db: Connection) -> bool:
            done = db.execute(
                "UPDATE leaders SET until = clock_timestamp() + make_interval(secs => ?)"
                " WHERE name = ? AND holder = ? AND until > clock_timestamp()",
                (self._lease_s, self._name, self._holder),
            )
            if done.rowcount == 1 and relays is not None and relays != self._told:
                self._write_relays(db, relays)
            return done.rowcount == 1

        return await self._asked.ask(extend)

    async def release(self) -> None:
        await self._asked.ask(
            lambda db: db.execute(
                f"UPDATE leaders SET until = {GIVEN_BACK} WHERE name = ? AND holder = ? AND until > clock_timestamp()",
                (self._name, self._holder),
            )
        )

    async def holder(self) -> Held | None:
        row = await self._asked.ask(lambda db: _read(db, self._name))
        if row is None:
            return None
        held = _held(row)
        if row["name"] != self._name or held.holder == self._holder:
            return held
        now_s = self._time_s()
        self._ahead_s, before_s = row["now_s"] - now_s, self._ahead_s
        if (seen := (held.token, row["until"])) != self._seen:
            left_s = held.left_s
            if held.token == self._seen[0] and self._ahead_s - before_s > SET_FORWARD_S:
                left_s = max(left_s, self._lease_s)
            self._seen, self._seen_until_s = seen, now_s + left_s
        left_s = self._seen_until_s - self._time_s()
        return replace(held, left_s=left_s) if left_s > 0.0 else None

    def _read_relays(self, db: Connection, token: int) -> frozenset[str]:
        """As the leader just before this one told. What an earlier one told is too old: one in between may have been of
        a version that tells nothing, or have died too soon."""
        row = db.execute(
            "SELECT holder FROM leaders WHERE name = ? AND token >= ?", (self._relays_name, token - 1)
        ).fetchone()
        return relays_of(row["holder"]) if row is not None else frozenset()

    def _write_relays(self, db: Connection, relays: frozenset[str]) -> None:
        db.execute(
            "INSERT INTO leaders(name, holder, token, until) SELECT ?, ?, token, until FROM leaders"
            " WHERE name = ? AND holder = ? AND until > clock_timestamp()"
            " ON CONFLICT (name) DO UPDATE SET"
            " holder = excluded.holder, token = excluded.token, until = excluded.until"
            " WHERE leaders.token <= excluded.token",
            (self._relays_name, relays_text(relays), self._name, self._holder),
        )
        self._told = relays

    @property
    def _relays_name(self) -> str:
        """In a row of their own, which those that know nothing of it do not read."""
        return f"{self._name}/relays"

    async def close(self) -> None:
        await self._asked.close()
