"""Places with a store, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiron.store.port import BatchStore
from chiron.store.settings import StoreSettings
from chiron.store.sqlite.store import SqliteStore
from store_calls import Site

if TYPE_CHECKING:
    from chiron.store.postgres.settings import PostgresSettings
    from chiron.store.postgres.store import PostgresStore
    from postgres_server import Server


def sqlite_site(directory: Path, settings: StoreSettings | None = None) -> Site:
    settings = settings or StoreSettings(reserve_bytes=0)

    @asynccontextmanager
    async def store() -> AsyncIterator[BatchStore]:
        opened = SqliteStore(directory, wall=lambda: site.now_s, settings=settings)
        await opened.open()
        try:
            yield opened
        finally:
            await opened.close()

    site = Site(store=store, retention_s=settings.retention_s)
    return site


@dataclass
class PostgresSite(Site):
    directory: Path = Path()
    settings: PostgresSettings = None  # type: ignore[assignment]

    def make(self, name: str = "one") -> PostgresStore:
        """Not yet open; ``name`` is the gateway's."""
        from chiron.store.postgres.store import PostgresStore

        return PostgresStore(self.directory, wall=lambda: self.now_s, settings=self.settings, name=name)

    @asynccontextmanager
    async def gateway(self, name: str = "one") -> AsyncIterator[PostgresStore]:
        opened = self.make(name)
        await opened.open()
        try:
            yield opened
        finally:
            await opened.close()


def postgres_site(server: Server, schema: str, directory: Path, **settings: Any) -> PostgresSite:
    from chiron.store.postgres.settings import PostgresSettings

    password = directory / "password"
    password.write_text(f"{server.password}\n")
    values = {"url": server.url, "schema": schema, "password_file": str(password)} | settings
    chosen = PostgresSettings(**values)
    site = PostgresSite(
        store=lambda: site.gateway(), retention_s=chosen.retention_s, directory=directory, settings=chosen
    )
    return site


async def end_lease(store: PostgresStore, name: str, left: str = "0") -> None:
    """As if nothing had been heard of a gateway for longer than its lease; ``left``: or as if the server's clock had
    been set back by so much."""
    ended = await store._threads.change(
        lambda db: (
            db.execute(
                "UPDATE holders SET until = clock_timestamp() + CAST(? AS INTERVAL) WHERE name = ?", (left, name)
            ).rowcount
        )
    )
    assert ended == 1
