"""The store that the settings ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chiron.store.lease import Leads
from chiron.store.port import BatchStore
from chiron.store.postgres.settings import PostgresSettings
from chiron.store.settings import StoreSettings
from chiron.store.sqlite.store import SqliteStore


def make_store(
    settings: StoreSettings | PostgresSettings,
    directory: Path,
    wall: Callable[[], float],
    leads: Leads | None = None,
) -> BatchStore:
    """Not yet open. ``directory``: the gateway's own. ``leads``: it is one of several, and leads them."""
    if isinstance(settings, StoreSettings):
        assert leads is None
        return SqliteStore(directory, wall=wall, settings=settings)
    from chiron.store.postgres.store import PostgresStore  # An extra: not everybody has psycopg.

    return PostgresStore(directory, wall=wall, settings=settings, leads=leads)
