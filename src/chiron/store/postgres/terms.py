"""Numbers leaders that are elected elsewhere, one after the other: what they write is refused as soon as another one
has begun.

The number that is in force is read before the election is asked once more, and raised only if it is still the same. So
one that was elected, and then stopped for so long that others were elected after it, cannot begin any more, whatever
the election's own numbers are: those of a cluster that was restored from a copy begin again.

While such a leader can reach the database it is named in a row of its own, so that none is elected in the database
beside it where gateways are about to change from one way to the other; and the other way round none begins while one
leads that the database has elected.
"""

from __future__ import annotations

from typing import Final

from chiron.store.lease import LEADER, Held
from chiron.store.postgres.connection import Connection
from chiron.store.postgres.lease import Asked, elected_name, read_holder
from chiron.store.postgres.leases import ALIVE
from chiron.store.postgres.settings import PostgresSettings

ELECTED: Final = elected_name(LEADER)


class PostgresTerms:
    """``close`` lets go of the connection."""

    def __init__(self, settings: PostgresSettings) -> None:
        self._asked = Asked(settings)

    async def last(self) -> int:
        """The term of the last leader; 0: there was none."""

        def read(db: Connection) -> int:
            row = db.execute("SELECT token FROM leaders WHERE name = ?", (LEADER,)).fetchone()
            return 0 if row is None else int(row["token"])

        return await self._asked.ask(read)

    async def holder(self) -> Held | None:
        """Who leads by election of the database."""
        return await self._asked.ask(lambda db: read_holder(db, LEADER))

    async def begin(self, holder: str, after: int, lease_s: float) -> int | None:
        """The term of a leader who has been elected after ``last`` was read. None: somebody has begun since, or leads
        by election of the database."""

        def number(db: Connection) -> int | None:
            with db.raw.transaction():
                db.execute(
                    "INSERT INTO leaders(name, holder, token, until) VALUES(?, ?, 1, clock_timestamp())"
                    " ON CONFLICT (name) DO UPDATE SET"
                    " holder = excluded.holder, token = leaders.token + 1, until = excluded.until"
                    f" WHERE leaders.token = ? AND (leaders.holder = excluded.holder OR NOT (leaders.{ALIVE}))",
                    (LEADER, holder, after),
                )
                if not _is(db, holder, after + 1):
                    return None
                db.execute(
                    "INSERT INTO leaders(name, holder, token, until)"
                    " VALUES(?, ?, ?, clock_timestamp() + make_interval(secs => ?)) ON CONFLICT (name) DO UPDATE SET"
                    " holder = excluded.holder, token = excluded.token, until = excluded.until",
                    (ELECTED, holder, after + 1, lease_s),
                )
            return after + 1

        return await self._asked.ask(number)

    async def keep(self, holder: str, term: int, lease_s: float) -> bool:
        """It leads still. False: somebody has begun since."""

        def extend(db: Connection) -> bool:
            db.execute(
                "UPDATE leaders SET until = clock_timestamp() + make_interval(secs => ?)"
                " WHERE name = ? AND holder = ? AND token = ?",
                (lease_s, ELECTED, holder, term),
            )
            return _is(db, holder, term)

        return await self._asked.ask(extend)

    async def end(self, holder: str) -> None:
        """It leads no more."""
        await self._asked.ask(
            lambda db: db.execute(
                "UPDATE leaders SET until = clock_timestamp() WHERE name = ? AND holder = ?", (ELECTED, holder)
            )
        )

    async def close(self) -> None:
        await self._asked.close()


def _is(db: Connection, holder: str, term: int) -> bool:
    """Whether the last who has begun is this one."""
    row = db.execute(
        "SELECT 1 AS leads FROM leaders WHERE name = ? AND holder = ? AND token = ?", (LEADER, holder, term)
    ).fetchone()
    return row is not None
