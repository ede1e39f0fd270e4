"""What was learned, read also by gateways that do not lead and have no store open."""

from __future__ import annotations

from chiron.store.jobs.database import Database
from chiron.store.learned import check_learned, learned_sum
from chiron.store.port import StoreDamaged
from chiron.store.postgres.lease import Asked
from chiron.store.postgres.settings import PostgresSettings


def read_learned(db: Database, name: str, but: int | None = None) -> bytes | None:
    """None: there is none, or its sum is ``but``. Raises StoreDamaged."""
    row = db.execute("SELECT data, sum FROM learned WHERE name = ? AND sum != ?", (name, -1 if but is None else but))
    found = row.fetchone()
    if found is None:
        return None
    data: bytes = found["data"]
    if learned_sum(name, data) != found["sum"]:
        raise StoreDamaged(f"what was learned as {name!r} is damaged in the database")
    return data


class PostgresLearned:
    """One piece. ``close`` lets go of the connection."""

    def __init__(self, settings: PostgresSettings, name: str) -> None:
        check_learned(name)
        self._asked = Asked(settings)
        self._name = name
        self._sum: int | None = None

    async def load(self) -> bytes | None:
        """None: there is none, or it is what was read the last time. Raises StoreError."""
        data = await self._asked.ask(lambda db: read_learned(db, self._name, self._sum))
        if data is not None:
            self._sum = learned_sum(self._name, data)
        return data

    async def close(self) -> None:
        await self._asked.close()
