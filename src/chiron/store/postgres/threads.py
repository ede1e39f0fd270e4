"""Where the operations of the store on PostgreSQL run: one thread writes, a few read and take uploads, one validates,
one listens for what other gateways did. The event loop is free meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread, local
from typing import Any, Final, TypeVar

import psycopg

from chiron.store.damage import Damage
from chiron.store.directory import hold
from chiron.store.jobs.database import Database, Operation
from chiron.store.jobs.downloads import WholeFiles
from chiron.store.lease import Leads
from chiron.store.port import Conflict, StoreClosed, StoreCorrupt, StoreDamaged, StoreError, StoreUnavailable
from chiron.store.postgres.connection import Connection, connect, is_lost, patience_of, store_error, where
from chiron.store.postgres.content import BlockUpload
from chiron.store.postgres.names import name_of, new_name, unique_name
from chiron.store.postgres.settings import PostgresSettings
from chiron.store.postgres.writer import CHANNEL, Writer

T = TypeVar("T")

log = logging.getLogger("chiron.store")

LISTEN_AGAIN_S: Final = 5.0
COMMIT_WAIT_S: Final = 3.0
"""For so long the answer of a commit is waited for while the server is away."""
LOOK_S: Final = 0.5
READ: Final = "BEGIN READ ONLY"
SNAPSHOT: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"


@dataclass(slots=True)
class Opened:
    """What exists while the store is open."""

    held: int | None
    """The lock of the directory."""
    writer: Writer
    readers: ThreadPoolExecutor
    validator: ThreadPoolExecutor
    places: asyncio.Semaphore
    whole: WholeFiles
    listener: Thread
    end: Event = field(default_factory=Event)
    connections: list[Connection] = field(default_factory=list)
    uploads: set[BlockUpload] = field(default_factory=set)
    validating: set[str] = field(default_factory=set)
    owed: deque[tuple[str, int]] = field(default_factory=deque)
    """Items that are leased for nobody, because the server was away when they were to be given back."""


class Threads:
    """Of one store; they exist while it is open."""

    def __init__(
        self, directory: Path, *, settings: PostgresSettings, name: str | None, leads: Leads | None, damage: Damage
    ) -> None:
        """As ``PostgresStore``."""
        self.patience = patience_of(settings)
        self.unavailable = ""
        """Why the store is not open although it is wanted, or cannot be used for now."""
        self.news: Callable[[], None] = lambda: None
        """Told when another gateway says that there is work."""
        self._directory = directory
        self._settings = settings
        self._given_name = name if leads is None else f"leader:{leads.name}"
        self._leads = leads
        self._damage = damage
        self._of_thread = local()
        self._now: Opened | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self) -> None:
        if self._now is not None:
            raise Conflict(f"{where(self._settings)}: open already")
        self._loop = asyncio.get_running_loop()
        held, writer = await asyncio.to_thread(self._open)
        end = Event()
        listener = Thread(target=self._listen, args=(end,), name="store-listener", daemon=True)
        self._of_thread = local()
        self._now = Opened(
            held=held,
            writer=writer,
            readers=ThreadPoolExecutor(self._settings.connections_max, thread_name_prefix="store-reader"),
            validator=ThreadPoolExecutor(1, thread_name_prefix="store-validator"),
            places=asyncio.Semaphore(self._settings.operations_max),
            whole=WholeFiles(self._settings.check_first_bytes_max),
            listener=listener,
            end=end,
        )
        self.unavailable = ""
        listener.start()

    def _open(self) -> tuple[int | None, Writer]:
        given = self._given_name
        if given is not None:
            return None, Writer(
                self._settings, given, self._tell, lambda: unique_name(given), self._leads, self.patience
            )
        held = hold(self._directory)
        try:
            name = name_of(self._directory)
            return held, Writer(
                self._settings, name, self._tell, lambda: new_name(self._directory), patience=self.patience
            )
        except BaseException:
            os.close(held)
            raise

    async def close(self) -> None:
        now, self._now = self._now, None
        if now is not None:
            await asyncio.to_thread(_close, now)

    def _tell(self, why: str) -> None:
        self.unavailable = why

    @property
    def uploads(self) -> list[BlockUpload]:
        """Those under way."""
        return list(self._now.uploads) if self._now is not None else []

    @property
    def opened(self) -> Opened:
        """Raises StoreError where it cannot be used."""
        if self.unavailable:
            raise StoreUnavailable(self.unavailable)
        if self._now is None:
            raise StoreClosed(f"{where(self._settings)}: the store is not open")
        return self._now

    def _listen(self, end: Event) -> None:
        """On a thread of its own: other gateways say when there is work. Without it work is found by looking."""
        while not end.is_set():
            try:
                db = connect(self._settings, "listener", self.patience)
                try:
                    db.execute(f"LISTEN {CHANNEL}")
                    while not end.is_set():
                        for told in db.raw.notifies(timeout=0.5, stop_after=1):
                            if told.payload == self._settings.schema and self._loop is not None:
                                self._loop.call_soon_threadsafe(self.news)
                finally:
                    db.close()
            except (StoreError, psycopg.Error, RuntimeError) as error:
                log.debug("not listening for news: %s", error)
                end.wait(LISTEN_AGAIN_S)

    async def write(self, operation: Operation[T]) -> T:
        """Run it on the writer's thread; answered after its commit. Being cancelled does not undo it.
        Whoever asked does not wait for a server that went away in the middle of the commit."""
        now = self.opened
        async with now.places:
            with self.noting_damage():
                asked = asyncio.wrap_future(now.writer.submit(operation))
                asked.add_done_callback(_look_at)
                away_s = 0.0
                while not (await asyncio.wait((asked,), timeout=LOOK_S))[0]:
                    away_s = away_s + LOOK_S if self.unavailable else 0.0
                    if away_s >= COMMIT_WAIT_S:
                        raise StoreUnavailable(f"{self.unavailable}; whether it was done meanwhile is not known")
                return asked.result()

    @contextmanager
    def noting_damage(self) -> Iterator[None]:
        try:
            yield
        except (StoreDamaged, StoreCorrupt) as error:
            self._damage.note(str(error))
            raise

    async def read(self, query: Callable[[Database], T], begin: str = READ) -> T:
        """Run a query on a reader's thread, in a transaction."""
        now = self.opened
        with self.noting_damage():
            return await asyncio.get_running_loop().run_in_executor(now.readers, lambda: self.query(now, query, begin))

    async def change(self, query: Callable[[Database], T]) -> T:
        """The same for what no other operation minds."""
        return await self.read(query, "BEGIN")

    async def snapshot(self, query: Callable[[Database], T]) -> T:
        """The same for several statements that must see the same."""
        return await self.read(query, SNAPSHOT)

    def query(self, now: Opened, query: Callable[[Database], T], begin: str) -> T:
        for last in (False, True):
            db: Connection | None = getattr(self._of_thread, "db", None)
            try:
                if db is None:
                    db = self._of_thread.db = self._connect_reader(now)
                    last = True
                db.execute(begin)
                try:
                    found = query(db)
                    db.execute("COMMIT")
                    return found
                except BaseException:
                    if not is_lost(db.raw):
                        db.execute("ROLLBACK")
                    raise
            except psycopg.Error as error:
                if db is None or not is_lost(db.raw):
                    raise store_error(error, self._settings) from error
                # The server may have restarted since: once more with a new connection, if that changes nothing.
                db.close()
                now.connections.remove(db)
                self._of_thread.db = None
                if last or begin not in (READ, SNAPSHOT):
                    now.writer.look()
                    raise StoreUnavailable(f"{where(self._settings)}: {error}") from error
        raise AssertionError

    def _connect_reader(self, now: Opened) -> Connection:
        try:
            db = connect(self._settings, "reader", self.patience)
        except StoreUnavailable:
            now.writer.look()
            raise
        now.connections.append(db)
        return db


def _look_at(asked: asyncio.Future[Any]) -> None:
    """Nobody may be there any more to hear of its error."""
    if not asked.cancelled():
        asked.exception()


def _close(now: Opened) -> None:
    now.end.set()
    now.writer.close()
    # A validation under way ends at its next block.
    now.validator.shutdown(wait=True, cancel_futures=True)
    now.readers.shutdown(wait=True)  # Uploads are written there too, and whoever does hears how it ended.
    for connection in now.connections:
        connection.close()
    now.listener.join()
    if now.held is not None:
        os.close(now.held)
