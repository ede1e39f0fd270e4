"""The batch store on PostgreSQL, for one gateway or several.

Like SQLite's (``sqlite.store``) it keeps the event loop free: one thread writes (``writer``), a few read and take
uploads, one validates, one listens for what other gateways did. Operations are those of ``jobs``; what is PostgreSQL's
own is how a transaction is made, who has which item (``leases``) and where uploads are (``content``).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import RawIOBase
from math import inf
from pathlib import Path
from threading import Event, Thread, local
from typing import Any, Final, Literal, TypeVar
from uuid import uuid4

import psycopg

from chiron.store.damage import Damage
from chiron.store.directory import disk_error, hold
from chiron.store.jobs import batches, lists
from chiron.store.jobs.database import Database, Operation, Transaction
from chiron.store.jobs.downloads import WholeFiles, read_lines
from chiron.store.jobs.items import Leased
from chiron.store.jobs.rows import FAILED, OK, write_row
from chiron.store.jobs.validation import Validation
from chiron.store.learned import check_learned, learned_sum
from chiron.store.lease import Leads
from chiron.store.port import (
    Batch,
    Check,
    Conflict,
    Ended,
    InputLimits,
    Item,
    PendingWork,
    StoreClosed,
    StoreCorrupt,
    StoreDamaged,
    StoredFile,
    StoreError,
    StoreUnavailable,
    Swept,
)
from chiron.store.postgres import leases
from chiron.store.postgres.connection import Connection, connect, is_lost, patience_of, store_error, where
from chiron.store.postgres.content import (
    BlockStream,
    BlockUpload,
    read_block,
    read_bodies,
    require_room,
    take_upload,
)
from chiron.store.postgres.learned import read_learned
from chiron.store.postgres.schema import read_meta
from chiron.store.postgres.settings import PostgresSettings
from chiron.store.postgres.writer import CHANNEL, Writer
from chiron.store.sums import Row
from chiron.store.trusted_clock import ClockMarks

T = TypeVar("T")

log = logging.getLogger("chiron.store")

LISTEN_AGAIN_S: Final = 5.0
COMMIT_WAIT_S: Final = 3.0
"""For so long the answer of a commit is waited for while the server is away."""
LOOK_S: Final = 0.5
_READ: Final = "BEGIN READ ONLY"
_SNAPSHOT: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
NAME: Final = "gateway-name"
_NAME_FORM: Final = re.compile(r"[A-Za-z0-9._-]{13,80}")


@dataclass(slots=True)
class _Opened:
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


class PostgresStore:
    """Implements ``BatchStore``. ``wall`` tells the time, in seconds since the epoch, where no caller does. Gateways
    with one ``name`` do not run at the same time; each new one frees what the last one had leased."""

    def __init__(
        self,
        directory: Path,
        *,
        wall: Callable[[], float],
        settings: PostgresSettings,
        name: str | None = None,
        leads: Leads | None = None,
    ) -> None:
        """``directory`` gets the reports of damage, and has the gateway's name if none is given. Whoever gives one
        sees to it that no two gateways have the same. ``leads``: one of several gateways, of which only the leader
        has the store open; all have one name."""
        self.settings = settings
        self.directory = directory
        self._given_name = name if leads is None else f"leader:{leads.name}"
        self._leads = leads
        self._patience = patience_of(settings)
        self.damage = Damage(directory, wall)
        self._wall = wall
        self._of_thread = local()
        self._now: _Opened | None = None
        self._news: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.unavailable = ""
        """Why it is not open although it is wanted, or cannot be used for now."""

    async def open(self) -> None:
        if self._now is not None:
            raise Conflict(f"{where(self.settings)}: open already")
        self._loop = asyncio.get_running_loop()
        held, writer = await asyncio.to_thread(self._open)
        end = Event()
        listener = Thread(target=self._listen, args=(end,), name="store-listener", daemon=True)
        self._of_thread = local()
        self._now = _Opened(
            held=held,
            writer=writer,
            readers=ThreadPoolExecutor(self.settings.connections_max, thread_name_prefix="store-reader"),
            validator=ThreadPoolExecutor(1, thread_name_prefix="store-validator"),
            places=asyncio.Semaphore(self.settings.operations_max),
            whole=WholeFiles(self.settings.check_first_bytes_max),
            listener=listener,
            end=end,
        )
        self.unavailable = ""
        listener.start()

    def _open(self) -> tuple[int | None, Writer]:
        given = self._given_name
        if given is not None:
            return None, Writer(
                self.settings, given, self._tell, lambda: _unique_name(given), self._leads, self._patience
            )
        held = hold(self.directory)
        try:
            name = _name_of(self.directory)
            return held, Writer(
                self.settings, name, self._tell, lambda: _new_name(self.directory), patience=self._patience
            )
        except BaseException:
            os.close(held)
            raise

    async def close(self) -> None:
        if self._now is not None:
            for upload in list(self._now.uploads):
                try:
                    await upload.abort()
                except StoreError as error:
                    log.debug("an upload is forgotten later: %s", error)
        now, self._now = self._now, None
        if now is not None:
            await asyncio.to_thread(_close, now)

    def hurry(self, within_s: float) -> None:
        self._patience.until_s = time.monotonic() + within_s

    def on_news(self, tell: Callable[[], None]) -> None:
        self._news = tell

    def report(self) -> Mapping[str, Any]:
        return {
            "kind": "postgresql",
            "at": where(self.settings),
            "unavailable": self.unavailable,
            "damage": self.damage.notes,
        }

    def _tell(self, why: str) -> None:
        self.unavailable = why

    @property
    def _opened(self) -> _Opened:
        if self.unavailable:
            raise StoreUnavailable(self.unavailable)
        if self._now is None:
            raise StoreClosed(f"{where(self.settings)}: the store is not open")
        return self._now

    # Threads.

    def _listen(self, end: Event) -> None:
        """On a thread of its own: other gateways say when there is work. Without it work is found by looking."""
        while not end.is_set():
            try:
                db = connect(self.settings, "listener", self._patience)
                try:
                    db.execute(f"LISTEN {CHANNEL}")
                    while not end.is_set():
                        for told in db.raw.notifies(timeout=0.5, stop_after=1):
                            if told.payload == self.settings.schema and self._loop is not None:
                                self._loop.call_soon_threadsafe(self._news)
                finally:
                    db.close()
            except (StoreError, psycopg.Error, RuntimeError) as error:
                log.debug("not listening for news: %s", error)
                end.wait(LISTEN_AGAIN_S)

    async def _write(self, operation: Operation[T]) -> T:
        """Run it on the writer's thread; answered after its commit. Being cancelled does not undo it.
        Whoever asked does not wait for a server that went away in the middle of the commit."""
        now = self._opened
        async with now.places:
            with self._noting_damage():
                asked = asyncio.wrap_future(now.writer.submit(operation))
                asked.add_done_callback(_look_at)
                away_s = 0.0
                while not (await asyncio.wait((asked,), timeout=LOOK_S))[0]:
                    away_s = away_s + LOOK_S if self.unavailable else 0.0
                    if away_s >= COMMIT_WAIT_S:
                        raise StoreUnavailable(f"{self.unavailable}; whether it was done meanwhile is not known")
                return asked.result()

    @contextmanager
    def _noting_damage(self) -> Iterator[None]:
        try:
            yield
        except (StoreDamaged, StoreCorrupt) as error:
            self.damage.note(str(error))
            raise

    async def _read(self, query: Callable[[Database], T], begin: str = _READ) -> T:
        """Run a query on a reader's thread, in a transaction."""
        now = self._opened
        with self._noting_damage():
            return await asyncio.get_running_loop().run_in_executor(now.readers, lambda: self._query(now, query, begin))

    async def _change(self, query: Callable[[Database], T]) -> T:
        """The same for what no other operation minds."""
        return await self._read(query, "BEGIN")

    async def _snapshot(self, query: Callable[[Database], T]) -> T:
        """The same for several statements that must see the same."""
        return await self._read(query, _SNAPSHOT)

    def _query(self, now: _Opened, query: Callable[[Database], T], begin: str) -> T:
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
                    raise store_error(error, self.settings) from error
                # The server may have restarted since: once more with a new connection, if that changes nothing.
                db.close()
                now.connections.remove(db)
                self._of_thread.db = None
                if last or begin not in (_READ, _SNAPSHOT):
                    now.writer.look()
                    raise StoreUnavailable(f"{where(self.settings)}: {error}") from error
        raise AssertionError

    def _connect_reader(self, now: _Opened) -> Connection:
        try:
            db = connect(self.settings, "reader", self._patience)
        except StoreUnavailable:
            now.writer.look()
            raise
        now.connections.append(db)
        return db

    # Files.

    async def begin_file(self, purpose: str, filename: str, owner: str, bytes_max: int) -> BlockUpload:
        now = self._opened
        await self._read(lambda db: require_room(db, self.settings.database_bytes_max))
        most = min(bytes_max, self.settings.file_bytes_max)
        limit = f"larger than {most} bytes"
        if most < bytes_max:
            limit += " (store.file_bytes_max: this store keeps files in the database)"

        async def insert(file: StoredFile, expires_after_s: float | None, block_sums: bytes) -> StoredFile:
            created_s = self._wall()
            kept_s = self._kept_s(expires_after_s)
            file = replace(file, created_s=created_s, expires_s=None if kept_s is None else created_s + kept_s)

            def known(transaction: Transaction) -> None:
                take_upload(transaction, file)
                batches.insert_file(transaction.db, file, block_sums=block_sums)

            await self._write(known)
            return file

        upload = BlockUpload(
            file=StoredFile(
                id=batches.new_file_id(),
                purpose=batches.storable(purpose),
                filename=batches.storable(filename),
                bytes=0,
                created_s=self._wall(),
                owner=owner,
            ),
            bytes_max=most,
            limit=limit,
            holder=now.writer.holder.no,
            run=self._change,
            insert=insert,
            on_end=now.uploads.discard,
        )
        now.uploads.add(upload)
        return upload

    def _kept_s(self, expires_after_s: float | None) -> float | None:
        """How long a file stays that is to go by itself."""
        return None if expires_after_s is None else min(expires_after_s, self.settings.retention_s)

    async def get_file(self, file_id: str, owner: str | None) -> StoredFile:
        return await self._read(lambda db: batches.read_file_row(batches.find_file(db, file_id, owner)))

    async def list_files(
        self,
        owner: str | None,
        after: str | None = None,
        limit: int = 100,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> list[StoredFile]:
        return await self._read(lambda db: lists.list_files(db, owner, after, limit, order, purpose))

    async def delete_file(self, file_id: str, owner: str | None) -> None:
        await self._write(lambda transaction: batches.delete_file(transaction, file_id, owner))

    async def read_file(self, file_id: str, owner: str | None) -> AsyncIterator[bytes]:
        row = await self._read(lambda db: batches.find_file(db, file_id, owner))
        if row["batch_id"] is not None:
            blocks = self._read_lines(row["batch_id"], row["state"], owner)
        else:
            blocks = self._read_upload(row)
        async for block in blocks:
            yield block

    async def _read_upload(self, row: Row) -> AsyncIterator[bytes]:
        if self._opened.whole.is_unchecked(row["id"], row["bytes"]):
            async for _ in self._blocks(row):
                pass
            self._opened.whole.add(row["id"])
        async for block in self._blocks(row):
            yield block

    async def _blocks(self, row: Row) -> AsyncIterator[bytes]:
        number = 0
        while True:

            def query(db: Database, number: int = number) -> bytes:
                try:
                    return read_block(db, row, number)
                except (FileNotFoundError, StoreDamaged) as error:
                    batches.find_file(db, row["id"])  # It may have been deleted since.
                    if isinstance(error, StoreDamaged):
                        raise
                    message = f"file {row['id']!r} is damaged: {error.strerror}"
                    raise StoreDamaged(message) from error

            block = await self._read(query)
            if not block:
                return
            yield block
            number += 1

    async def read_results(self, batch_id: str, ok: bool, owner: str | None = None) -> AsyncIterator[bytes]:
        async for block in self._read_lines(batch_id, OK if ok else FAILED, owner):
            yield block

    def _read_lines(self, batch_id: str, state: int, owner: str | None) -> AsyncIterator[bytes]:
        return read_lines(self._snapshot, self._opened.whole, batch_id, state, owner, self.settings.block_bytes)

    # Batches.

    async def create_batch(
        self,
        *,
        owner: str,
        input_file_id: str,
        endpoint: str,
        completion_window: str,
        deadline_s: float,
        metadata: Mapping[str, str],
        now_s: float,
        output_expires_after_s: float | None = None,
    ) -> Batch:
        await self._read(lambda db: require_room(db, self.settings.database_bytes_max))
        return await self._write(
            lambda transaction: batches.create_batch(
                transaction,
                owner=owner,
                input_file_id=input_file_id,
                endpoint=endpoint,
                completion_window=completion_window,
                deadline_s=deadline_s,
                metadata=metadata,
                now_s=now_s,
                output_expires_after_s=self._kept_s(output_expires_after_s),
            )
        )

    async def validate(self, batch_id: str, check: Check, limits: InputLimits) -> Batch:
        now = self._opened
        batch = await self.get_batch(batch_id, None)
        incomplete = await self._read(lambda db: batches.find_batch(db, batch_id)["incomplete"])
        if batch.status != "validating" and not incomplete:
            return batch
        if batch_id in now.validating:
            raise Conflict(f"batch {batch_id!r} is being validated")

        def ask(operation: Operation[Any]) -> Future[Any]:
            # On the validator's thread, which would wait for the answer anyway.
            answer: Future[Any] = Future()
            answer.set_result(
                now.readers.submit(lambda: self._query(now, lambda db: _ask(db, operation), _READ)).result()
            )
            return answer

        def open_input(file: Row) -> RawIOBase:
            def read(number: int) -> bytes:
                return now.readers.submit(
                    lambda: self._query(now, lambda db: read_block(db, file, number), _READ)
                ).result()

            return BlockStream(read)

        validation = Validation(batch_id, open_input, check, limits, now.writer.submit, ask, self._wall)

        def run() -> None:
            try:
                validation.run()
            finally:
                now.validating.discard(batch_id)

        now.validating.add(batch_id)
        holder = now.writer.holder
        try:
            if not await self._write(lambda transaction: leases.begin_validation(transaction, holder, batch_id)):
                raise Conflict(f"batch {batch_id!r} is being validated by another gateway")
        except BaseException:
            now.validating.discard(batch_id)
            raise
        try:
            await asyncio.get_running_loop().run_in_executor(now.validator, run)
        finally:
            # Nobody waits for it: what stays goes with this gateway.
            now.writer.submit(lambda transaction: leases.end_validation(transaction, holder, batch_id))
        return await self.get_batch(batch_id, None)

    async def unvalidated(self) -> list[Batch]:
        holder = self._opened.writer.holder

        def query(db: Database) -> list[Batch]:
            others = leases.validated_by_others(db, holder)
            return [batch for batch in lists.unvalidated(db) if batch.id not in others]

        return await self._read(query)

    async def get_batch(self, batch_id: str, owner: str | None) -> Batch:
        return await self._read(lambda db: batches.read_batch(batches.find_batch(db, batch_id, owner)))

    async def list_batches(self, owner: str | None, after: str | None = None, limit: int = 20) -> list[Batch]:
        return await self._read(lambda db: lists.list_batches(db, owner, after, limit))

    async def cancel_batch(self, batch_id: str, now_s: float, owner: str | None = None) -> Batch:
        holder = self._opened.writer.holder
        return await self._write(lambda transaction: batches.cancel_batch(transaction, holder, batch_id, now_s, owner))

    # Items.

    async def lease(
        self,
        model: str,
        limit: int,
        before_deadline_s: float | None = None,
        bytes_max: int | None = None,
        besides: Collection[str] = (),
    ) -> list[Item]:
        now = self._opened
        if limit <= 0 or bytes_max == 0:
            return []
        async with now.places:
            self._give_back_owed(now)
            future = now.writer.submit(
                lambda transaction: leases.lease(
                    transaction.db,
                    now.writer.holder,
                    model,
                    limit,
                    before_deadline_s,
                    inf if bytes_max is None else bytes_max,
                    self.damage.note,
                    besides,
                    time.monotonic(),
                ),
                alone=True,
            )
            try:
                with self._noting_damage():
                    leased = await asyncio.shield(asyncio.wrap_future(future))
                found, lost = await self._read(lambda db: read_bodies(db, leased))
                for batch_id in lost:
                    await self._lose_input(now, batch_id)
            except BaseException:
                # Whoever asked has gone or hears of an error; nobody else would ever give these back.
                future.add_done_callback(lambda done: self._give_back_leased(now, done))
                raise
            return found

    async def _lose_input(self, now: _Opened, batch_id: str) -> None:
        now_s = self._wall()
        # A part of a lease, which has its place already: to wait for another could be for ever.
        lost = now.writer.submit(
            lambda transaction: batches.lose_input(transaction, now.writer.holder, batch_id, now_s)
        )
        await asyncio.shield(asyncio.wrap_future(lost))

    def _give_back_leased(self, now: _Opened, done: Future[list[Leased]]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._give_back(now, [(item.batch_id, item.index) for item in done.result()])

    def _give_back_owed(self, now: _Opened) -> None:
        if keys := [now.owed.popleft() for _ in range(len(now.owed))]:
            self._give_back(now, keys)

    def _give_back(self, now: _Opened, keys: list[tuple[str, int]]) -> None:
        """Now, or as soon as the server is there."""

        def given(done: Future[None]) -> None:
            if done.cancelled() or done.exception() is not None:
                now.owed.extend(keys)

        released = now.writer.submit(lambda transaction: leases.release(transaction, now.writer.holder, keys, False))
        released.add_done_callback(given)

    async def finish(self, ended: Sequence[Ended], now_s: float) -> None:
        now = self._opened
        async with now.places:
            with self._noting_damage():
                await asyncio.shield(asyncio.wrap_future(now.writer.finish(ended, now_s)))

    async def release(self, items: Sequence[tuple[str, int]], failed_attempt: bool) -> None:
        holder = self._opened.writer.holder
        await self._write(lambda transaction: leases.release(transaction, holder, items, failed_attempt))

    async def pending(self) -> list[PendingWork]:
        now = self._opened
        async with now.places:
            asked = now.writer.submit(lambda transaction: leases.pending(transaction.db), reads=True)
            return await asyncio.shield(asyncio.wrap_future(asked))

    # Time.

    async def clock_marks(self) -> ClockMarks:
        def query(db: Database) -> ClockMarks:
            row = read_meta(db)
            marks = ClockMarks(seen_s=row["seen_s"], trusted_s=row["trusted_s"], doubt_s=row["doubt_s"])
            return batches.clock_marks(db, marks)

        return await self._read(query)

    async def keep_clock_marks(self, marks: ClockMarks) -> None:
        def keep(transaction: Transaction) -> None:
            row = read_meta(transaction.db)
            values = {name: row[name] for name in ("no", "schema", "commits")}
            told = {"seen_s": marks.seen_s, "trusted_s": marks.trusted_s, "doubt_s": marks.doubt_s}
            write_row(transaction.db, "meta", values | told)

        await self._write(keep)

    async def expire(self, now_s: float) -> list[str]:
        now = self._opened
        holder = now.writer.holder
        self._give_back_owed(now)

        def run(transaction: Transaction) -> list[str]:
            for name in leases.free_over(transaction, holder.no):
                log.warning("%s has not been heard of for longer than store.lease: its items are leased again", name)
            late = batches.expire(transaction, holder, now_s)
            batches.expire_files(transaction, now_s)
            return late

        return await self._write(run)

    async def sweep(self, now_s: float) -> Swept:
        count, files = await self._write(
            lambda transaction: batches.sweep(transaction, now_s - self.settings.retention_s)
        )
        return Swept(batches=count, files=len(files))

    # What was learned.

    async def save_learned(self, name: str, data: bytes) -> None:
        check_learned(name, data)
        await self._write(
            lambda transaction: transaction.db.insert_rows(
                "learned", ("name", "data", "sum"), [(name, data, learned_sum(name, data))], True
            )
        )

    async def load_learned(self, name: str) -> bytes | None:
        check_learned(name)

        return await self._read(lambda db: read_learned(db, name))


def _name_of(directory: Path) -> str:
    """The name of the gateway that has this directory, the same at each start: so its next process knows at once that
    the last one is over. Raises StoreError."""
    path = directory / NAME
    try:
        known = path.read_text().strip()
    except FileNotFoundError:
        known = ""
    except OSError as error:
        raise disk_error(error, path) from error
    return known if _NAME_FORM.fullmatch(known) else _new_name(directory)


def _new_name(directory: Path) -> str:
    """It is that of the directory from now on."""
    name, path = _unique_name(socket.gethostname()), directory / NAME
    try:
        part = path.with_name(f"{NAME}.part")
        part.write_text(f"{name}\n")
        part.rename(path)
    except OSError as error:
        raise disk_error(error, path) from error
    return name


def _unique_name(like: str) -> str:
    return f"{like[:60]}-{uuid4().hex[:12]}"


def _ask(db: Database, operation: Operation[T]) -> T:
    from chiron.store.jobs.database import Meta

    return operation(Transaction(db, Meta()))


def _look_at(asked: asyncio.Future[Any]) -> None:
    """Nobody may be there any more to hear of its error."""
    if not asked.cancelled():
        asked.exception()


def _close(now: _Opened) -> None:
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
