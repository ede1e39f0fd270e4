"""The batch store on SQLite, in one directory, for one process.

Its threads keep the event loop free: one writes (``writer``), a few read, a few take uploads, one validates.
Readers have connections of their own; under the write-ahead log they and the writer do not wait for each other.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import RawIOBase
from math import inf
from pathlib import Path
from threading import local
from typing import Any, Literal, TypeVar

from chiron.store.damage import Damage
from chiron.store.directory import DATABASE, disk_error, file_path, lock, remove_files
from chiron.store.jobs import batches, lists
from chiron.store.jobs.database import Database, Operation, Transaction
from chiron.store.jobs.downloads import WholeFiles, read_lines
from chiron.store.jobs.items import Leased
from chiron.store.jobs.items import finish as finish_items
from chiron.store.jobs.rows import FAILED, OK
from chiron.store.jobs.validation import Validation
from chiron.store.learned import check_learned
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
    StoreUnavailable,
    Swept,
)
from chiron.store.settings import StoreSettings
from chiron.store.sqlite import items
from chiron.store.sqlite.content import CheckedFile, check_content
from chiron.store.sqlite.database import SQLITE_ERRORS, Connection, open_for_reading, store_error
from chiron.store.sqlite.learned import load_learned, save_learned
from chiron.store.sqlite.leases import Leases
from chiron.store.sqlite.lost import LostFound
from chiron.store.sqlite.moved import require_not_moved
from chiron.store.sqlite.opening import Opening
from chiron.store.sqlite.upload import FileUpload
from chiron.store.sqlite.writer import Writer
from chiron.store.sums import Row
from chiron.store.trusted_clock import ClockMarks

T = TypeVar("T")

log = logging.getLogger("chiron.store")


@dataclass(slots=True)
class _Opened:
    """What exists while the store is open."""

    lock: int
    writer: Writer
    readers: ThreadPoolExecutor
    uploaders: ThreadPoolExecutor
    validator: ThreadPoolExecutor
    places: asyncio.Semaphore
    whole: WholeFiles
    learning: asyncio.Lock = field(default_factory=asyncio.Lock)
    connections: list[Connection] = field(default_factory=list)
    uploads: set[FileUpload] = field(default_factory=set)
    validating: set[str] = field(default_factory=set)


class SqliteStore:
    """Implements ``BatchStore``. ``wall`` tells the time, in seconds since the epoch, where no caller does."""

    def __init__(self, directory: Path, *, wall: Callable[[], float], settings: StoreSettings | None = None) -> None:
        self.directory = directory
        self.settings = settings or StoreSettings()
        self._wall = wall
        self._path = directory / DATABASE
        self.lost = LostFound(directory, self.settings)
        self.damage = Damage(directory, wall)
        self._leases = Leases()
        self._of_thread = local()
        self._now: _Opened | None = None
        self.lost_holds = (0, 0)
        """Files in ``lost+found`` and their bytes, as of the start."""
        self.unavailable = ""
        """Why it is not open although it is wanted; whoever opens it says so."""

    async def open(self) -> None:
        if self._now is not None:
            raise Conflict(f"{self.directory}: open already")
        self._now = await asyncio.to_thread(self._open)
        self.unavailable = ""

    def _open(self) -> _Opened:
        held = lock(self.directory)
        try:
            require_not_moved(self.directory)
            opening = Opening(self.directory, self.settings, lost=self.lost, damage=self.damage)
            db, meta, acknowledged = opening.database()
        except SQLITE_ERRORS as error:
            os.close(held)
            raise store_error(error, self._path) from error
        except BaseException:
            os.close(held)
            raise
        self.lost_holds = self.lost.holds()
        self._leases = Leases()
        self._of_thread = local()
        return _Opened(
            lock=held,
            writer=Writer(db, self._path, self.settings.group_max, batches.purge_step, meta, acknowledged),
            readers=ThreadPoolExecutor(self.settings.read_threads, thread_name_prefix="store-reader"),
            uploaders=ThreadPoolExecutor(self.settings.upload_threads, thread_name_prefix="store-uploader"),
            validator=ThreadPoolExecutor(1, thread_name_prefix="store-validator"),
            places=asyncio.Semaphore(self.settings.operations_max),
            whole=WholeFiles(self.settings.check_first_bytes_max),
        )

    def hurry(self, within_s: float) -> None:
        """There is no server."""

    def on_news(self, tell: Callable[[], None]) -> None:
        """Nobody else has the directory."""

    def report(self) -> Mapping[str, Any]:
        files, size = self.lost_holds
        return {
            "kind": "sqlite",
            "at": str(self.directory),
            "unavailable": self.unavailable,
            "damage": self.damage.notes,
            "lost_and_found": {"path": str(self.lost.path), "files": files, "bytes": size},
        }

    async def close(self) -> None:
        if self._now is not None:
            for upload in list(self._now.uploads):
                await upload.abort()
        now, self._now = self._now, None
        if now is not None:
            await asyncio.to_thread(_close, now)

    @property
    def _opened(self) -> _Opened:
        if self._now is None and self.unavailable:
            raise StoreUnavailable(self.unavailable)
        if self._now is None:
            raise StoreClosed(f"{self.directory}: the store is not open")
        return self._now

    # Threads.

    async def _write(self, operation: Operation[T], reads: bool = False) -> T:
        """Run it on the writer's thread; answered after its commit. Being cancelled does not undo it."""
        now = self._opened
        async with now.places:
            with self._noting_damage():
                return await asyncio.shield(asyncio.wrap_future(now.writer.submit(operation, reads)))

    @contextmanager
    def _noting_damage(self) -> Iterator[None]:
        try:
            yield
        except (StoreDamaged, StoreCorrupt) as error:
            self.damage.note(str(error))
            raise

    async def _in_thread(self, run: Callable[[], T]) -> T:
        with self._noting_damage():
            return await asyncio.get_running_loop().run_in_executor(self._opened.readers, run)

    async def _read(self, query: Callable[[Database], T]) -> T:
        """Run a query on a reader's thread, in one snapshot."""
        now = self._opened

        def run() -> T:
            try:
                db: Connection | None = getattr(self._of_thread, "db", None)
                if db is None:
                    db = self._of_thread.db = open_for_reading(self.directory)
                    now.connections.append(db)
                db.execute("BEGIN")
                try:
                    return query(db)
                finally:
                    db.execute("ROLLBACK")
            except SQLITE_ERRORS as error:
                raise store_error(error, self._path) from error

        return await self._in_thread(run)

    # Files.

    async def begin_file(self, purpose: str, filename: str, owner: str, bytes_max: int) -> FileUpload:
        now = self._opened

        async def insert(file: StoredFile, expires_after_s: float | None, block_sums: bytes) -> StoredFile:
            created_s = self._wall()
            kept_s = self._kept_s(expires_after_s)
            file = replace(file, created_s=created_s, expires_s=None if kept_s is None else created_s + kept_s)
            await self._write(lambda transaction: batches.insert_file(transaction.db, file, block_sums=block_sums))
            return file

        upload = FileUpload(
            directory=self.directory,
            file=StoredFile(
                id=batches.new_file_id(),
                purpose=batches.storable(purpose),
                filename=batches.storable(filename),
                bytes=0,
                created_s=self._wall(),
                owner=owner,
            ),
            bytes_max=bytes_max,
            settings=self.settings,
            in_thread=lambda run: asyncio.get_running_loop().run_in_executor(now.uploaders, run),
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
        await self._remove([file_id])

    async def _remove(self, file_ids: list[str]) -> None:
        """The content of files that are deleted."""
        if file_ids:
            await self._in_thread(lambda: remove_files(self.directory, file_ids))
            await self._write(lambda transaction: batches.forget_removals(transaction, file_ids))

    async def read_file(self, file_id: str, owner: str | None) -> AsyncIterator[bytes]:
        row = await self._read(lambda db: batches.find_file(db, file_id, owner))
        if row["batch_id"] is not None:
            blocks = self._read_lines(row["batch_id"], row["state"], owner)
        else:
            blocks = self._read_upload(row)
        async for block in blocks:
            yield block

    async def _read_upload(self, row: Row) -> AsyncIterator[bytes]:
        path = file_path(self.directory, row["id"])
        try:
            if self._opened.whole.is_unchecked(row["id"], row["bytes"]):
                await self._in_thread(lambda: check_content(path, row))
                self._opened.whole.add(row["id"])
            # A file that is deleted while it is read can be read to its end.
            stream = await self._in_thread(lambda: CheckedFile(path, row))
            try:
                while block := await self._in_thread(lambda: stream.read(self.settings.block_bytes)):
                    yield block
            finally:
                stream.close()
        except FileNotFoundError as error:
            # It may have been deleted since.
            await self.get_file(row["id"], None)
            message = f"file {row['id']!r} is damaged: its content is gone from the server's disk"
            self.damage.note(message)
            raise StoreDamaged(message) from error
        except OSError as error:
            raise disk_error(error, path) from error

    async def read_results(self, batch_id: str, ok: bool, owner: str | None = None) -> AsyncIterator[bytes]:
        async for block in self._read_lines(batch_id, OK if ok else FAILED, owner):
            yield block

    def _read_lines(self, batch_id: str, state: int, owner: str | None) -> AsyncIterator[bytes]:
        return read_lines(self._read, self._opened.whole, batch_id, state, owner, self.settings.block_bytes)

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

        def submit(operation: Operation[bool]) -> Future[bool]:
            return now.writer.submit(operation)

        def ask(operation: Operation[T]) -> Future[T]:
            return now.writer.submit(operation, reads=True)

        path = file_path(self.directory, batch.input_file_id)

        def open_input(file: Row) -> RawIOBase:
            try:
                return CheckedFile(path, file)
            except FileNotFoundError:
                raise
            except OSError as error:
                # The file is there; that too many are open, say, passes.
                raise disk_error(error, path) from error

        validation = Validation(batch_id, open_input, check, limits, submit, ask, self._wall)

        def run() -> None:
            try:
                validation.run()
            finally:
                now.validating.discard(batch_id)

        now.validating.add(batch_id)
        await asyncio.get_running_loop().run_in_executor(now.validator, run)
        return await self.get_batch(batch_id, None)

    async def unvalidated(self) -> list[Batch]:
        return await self._read(lists.unvalidated)

    async def get_batch(self, batch_id: str, owner: str | None) -> Batch:
        return await self._read(lambda db: batches.read_batch(batches.find_batch(db, batch_id, owner)))

    async def list_batches(self, owner: str | None, after: str | None = None, limit: int = 20) -> list[Batch]:
        return await self._read(lambda db: lists.list_batches(db, owner, after, limit))

    async def cancel_batch(self, batch_id: str, now_s: float, owner: str | None = None) -> Batch:
        return await self._write(
            lambda transaction: batches.cancel_batch(transaction, self._leases, batch_id, now_s, owner)
        )

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
        async with now.places:
            future = now.writer.submit(
                lambda transaction: items.lease(
                    transaction.db,
                    self._leases,
                    model,
                    limit,
                    before_deadline_s,
                    inf if bytes_max is None else bytes_max,
                    self.damage.note,
                    besides,
                ),
                reads=True,
            )
            try:
                leased = await asyncio.shield(asyncio.wrap_future(future))
                found, lost = await self._in_thread(lambda: items.read_bodies(self.directory, leased))
                for batch_id in lost:
                    await self._lose_input(batch_id)
            except BaseException:
                # Whoever asked has gone or hears of an error; nobody else would ever give these back.
                future.add_done_callback(lambda done: self._give_back(now.writer, done))
                raise
            return found

    async def _lose_input(self, batch_id: str) -> None:
        now_s = self._wall()
        # A part of a lease, which has its place already: to wait for another could be for ever.
        lost = self._opened.writer.submit(
            lambda transaction: batches.lose_input(transaction, self._leases, batch_id, now_s)
        )
        await asyncio.shield(asyncio.wrap_future(lost))

    def _give_back(self, writer: Writer, done: Future[list[Leased]]) -> None:
        if not done.cancelled() and done.exception() is None:
            keys = [(item.batch_id, item.index) for item in done.result()]
            writer.submit(lambda transaction: items.release(transaction, self._leases, keys, False))

    async def finish(self, ended: Sequence[Ended], now_s: float) -> None:
        await self._write(lambda transaction: finish_items(transaction, self._leases, ended, now_s))

    async def release(self, items_: Sequence[tuple[str, int]], failed_attempt: bool) -> None:
        await self._write(lambda transaction: items.release(transaction, self._leases, items_, failed_attempt))

    async def pending(self) -> list[PendingWork]:
        return await self._write(lambda transaction: items.pending(transaction.db, self._leases), reads=True)

    # Time.

    async def clock_marks(self) -> ClockMarks:
        return await self._write(
            lambda transaction: batches.clock_marks(transaction.db, transaction.meta.marks), reads=True
        )

    async def keep_clock_marks(self, marks: ClockMarks) -> None:
        def keep(transaction: Transaction) -> None:
            transaction.meta = replace(transaction.meta, marks=marks)

        await self._write(keep)

    async def expire(self, now_s: float) -> list[str]:
        late, files = await self._write(
            lambda transaction: (
                batches.expire(transaction, self._leases, now_s),
                batches.expire_files(transaction, now_s),
            )
        )
        await self._remove(files)
        return late

    async def sweep(self, now_s: float) -> Swept:
        count, files = await self._write(
            lambda transaction: batches.sweep(transaction, now_s - self.settings.retention_s)
        )
        await self._remove(files)
        return Swept(batches=count, files=len(files))

    # What was learned.

    async def save_learned(self, name: str, data: bytes) -> None:
        check_learned(name, data)
        async with self._opened.learning:
            await self._in_thread(lambda: save_learned(self.directory, name, data))

    async def load_learned(self, name: str) -> bytes | None:
        check_learned(name)
        return await self._in_thread(lambda: load_learned(self.directory, name))


def _close(now: _Opened) -> None:
    now.writer.close()
    # A validation under way ends at its next block.
    now.validator.shutdown(wait=True, cancel_futures=True)
    now.uploaders.shutdown(wait=True)
    now.readers.shutdown(wait=True, cancel_futures=True)
    for connection in now.connections:
        connection.close()
    os.close(now.lock)
