"""Places with a SQLite store, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from chiron.store.port import BatchStore
from chiron.store.settings import StoreSettings
from chiron.store.sqlite.store import SqliteStore
from store_contract import Site


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
