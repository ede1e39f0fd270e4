"""The batch store on PostgreSQL, for one gateway or several.

Like SQLite's (``sqlite.store``) it keeps the event loop free: one thread writes (``writer``), a few read and take
uploads, one validates, one listens for what other gateways did. Operations are those of ``jobs``; what is PostgreSQL's
own is how a transaction is made, who has which item (``leases``) and where uploads are (``content``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from io import RawIOBase
from math import inf
from pathlib import Path
from typing import Any, Literal, TypeVar

from chiron.store.damage import Damage
from chiron.store.jobs import batches, lists
from chiron.store.jobs.database import Database, Operation, Transaction
from chiron.store.jobs.downloads import read_lines
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
    StoreDamaged,
    StoredFile,
    StoreError,
    Swept,
)
from chiron.store.postgres import leases
from chiron.store.postgres.connection import where
from chiron.store.postgres.content import BlockStream, BlockUpload, read_block, read_bodies, require_room, take_upload
from chiron.store.postgres.learned import read_learned
from chiron.store.postgres.schema import read_meta
from chiron.store.postgres.settings import PostgresSettings
from chiron.store.postgres.threads import READ, Opened, Threads
from chiron.store.sums import Row
from chiron.store.trusted_clock import ClockMarks

T = TypeVar("T")

log = logging.getLogger("chiron.store")


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
        self.damage = Damage(directory, wall)
        self._wall = wall
        self._threads = Threads(directory, settings=settings, name=name, leads=leads, damage=self.damage)

    async def open(self) -> None:
        await self._threads.open()

    async def close(self) -> None:
        for upload in self._threads.uploads:
            try:
                await upload.abort()
            except StoreError as error:
                log.debug("an upload is forgotten later: %s", error)
        await self._threads.close()

    @property
    def unavailable(self) -> str:
        """Why it is not open although it is wanted, or cannot be used for now."""
        return self._threads.unavailable

    @unavailable.setter
    def unavailable(self, why: str) -> None:
        self._threads.unavailable = why

    def hurry(self, within_s: float) -> None:
        self._threads.patience.until_s = time.monotonic() + within_s

    def on_news(self, tell: Callable[[], None]) -> None:
        self._threads.news = tell

    def report(self) -> Mapping[str, Any]:
        return {
            "kind": "postgresql",
            "at": where(self.settings),
            "unavailable": self._threads.unavailable,
            "damage": self.damage.notes,
        }

    # Files.

    async def begin_file(self, purpose: str, filename: str, owner: str, bytes_max: int) -> BlockUpload:
        now = self._threads.opened
        await self._threads.read(lambda db: require_room(db, self.settings.database_bytes_max))
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

            await self._threads.write(known)
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
            run=self._threads.change,
            insert=insert,
            on_end=now.uploads.discard,
        )
        now.uploads.add(upload)
        return upload

    def _kept_s(self, expires_after_s: float | None) -> float | None:
        """How long a file stays that is to go by itself."""
        return None if expires_after_s is None else min(expires_after_s, self.settings.retention_s)

    async def get_file(self, file_id: str, owner: str | None) -> StoredFile:
        return await self._threads.read(lambda db: batches.read_file_row(batches.find_file(db, file_id, owner)))

    async def list_files(
        self,
        owner: str | None,
        after: str | None = None,
        limit: int = 100,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> list[StoredFile]:
        return await self._threads.read(lambda db: lists.list_files(db, owner, after, limit, order, purpose))

    async def delete_file(self, file_id: str, owner: str | None) -> None:
        await self._threads.write(lambda transaction: batches.delete_file(transaction, file_id, owner))

    async def read_file(self, file_id: str, owner: str | None) -> AsyncIterator[bytes]:
        row = await self._threads.read(lambda db: batches.find_file(db, file_id, owner))
        if row["batch_id"] is not None:
            blocks = self._read_lines(row["batch_id"], row["state"], owner)
        else:
            blocks = self._read_upload(row)
        async for block in blocks:
            yield block

    async def _read_upload(self, row: Row) -> AsyncIterator[bytes]:
        if self._threads.opened.whole.is_unchecked(row["id"], row["bytes"]):
            async for _ in self._blocks(row):
                pass
            self._threads.opened.whole.add(row["id"])
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

            block = await self._threads.read(query)
            if not block:
                return
            yield block
            number += 1

    async def read_results(self, batch_id: str, ok: bool, owner: str | None = None) -> AsyncIterator[bytes]:
        async for block in self._read_lines(batch_id, OK if ok else FAILED, owner):
            yield block

    def _read_lines(self, batch_id: str, state: int, owner: str | None) -> AsyncIterator[bytes]:
        return read_lines(
            self._threads.snapshot, self._threads.opened.whole, batch_id, state, owner, self.settings.block_bytes
        )

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
        await self._threads.read(lambda db: require_room(db, self.settings.database_bytes_max))
        return await self._threads.write(
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
        now = self._threads.opened
        batch = await self.get_batch(batch_id, None)
        incomplete = await self._threads.read(lambda db: batches.find_batch(db, batch_id)["incomplete"])
        if batch.status != "validating" and not incomplete:
            return batch
        if batch_id in now.validating:
            raise Conflict(f"batch {batch_id!r} is being validated")

        def ask(operation: Operation[Any]) -> Future[Any]:
            # On the validator's thread, which would wait for the answer anyway.
            answer: Future[Any] = Future()
            answer.set_result(
                now.readers.submit(lambda: self._threads.query(now, lambda db: _ask(db, operation), READ)).result()
            )
            return answer

        def open_input(file: Row) -> RawIOBase:
            def read(number: int) -> bytes:
                return now.readers.submit(
                    lambda: self._threads.query(now, lambda db: read_block(db, file, number), READ)
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
            if not await self._threads.write(
                lambda transaction: leases.begin_validation(transaction, holder, batch_id)
            ):
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
        holder = self._threads.opened.writer.holder

        def query(db: Database) -> list[Batch]:
            others = leases.validated_by_others(db, holder)
            return [batch for batch in lists.unvalidated(db) if batch.id not in others]

        return await self._threads.read(query)

    async def get_batch(self, batch_id: str, owner: str | None) -> Batch:
        return await self._threads.read(lambda db: batches.read_batch(batches.find_batch(db, batch_id, owner)))

    async def list_batches(self, owner: str | None, after: str | None = None, limit: int = 20) -> list[Batch]:
        return await self._threads.read(lambda db: lists.list_batches(db, owner, after, limit))

    async def cancel_batch(self, batch_id: str, now_s: float, owner: str | None = None) -> Batch:
        holder = self._threads.opened.writer.holder
        return await self._threads.write(
            lambda transaction: batches.cancel_batch(transaction, holder, batch_id, now_s, owner)
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
        now = self._threads.opened
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
                with self._threads.noting_damage():
                    leased = await asyncio.shield(asyncio.wrap_future(future))
                found, lost = await self._threads.read(lambda db: read_bodies(db, leased))
                for batch_id in lost:
                    await self._lose_input(now, batch_id)
            except BaseException:
                # Whoever asked has gone or hears of an error; nobody else would ever give these back.
                future.add_done_callback(lambda done: self._give_back_leased(now, done))
                raise
            return found

    async def _lose_input(self, now: Opened, batch_id: str) -> None:
        now_s = self._wall()
        # A part of a lease, which has its place already: to wait for another could be for ever.
        lost = now.writer.submit(
            lambda transaction: batches.lose_input(transaction, now.writer.holder, batch_id, now_s)
        )
        await asyncio.shield(asyncio.wrap_future(lost))

    def _give_back_leased(self, now: Opened, done: Future[list[Leased]]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._give_back(now, [(item.batch_id, item.index) for item in done.result()])

    def _give_back_owed(self, now: Opened) -> None:
        if keys := [now.owed.popleft() for _ in range(len(now.owed))]:
            self._give_back(now, keys)

    def _give_back(self, now: Opened, keys: list[tuple[str, int]]) -> None:
        """Now, or as soon as the server is there."""

        def given(done: Future[None]) -> None:
            if done.cancelled() or done.exception() is not None:
                now.owed.extend(keys)

        released = now.writer.submit(lambda transaction: leases.release(transaction, now.writer.holder, keys, False))
        released.add_done_callback(given)

    async def finish(self, ended: Sequence[Ended], now_s: float) -> None:
        now = self._threads.opened
        async with now.places:
            with self._threads.noting_damage():
                await asyncio.shield(asyncio.wrap_future(now.writer.finish(ended, now_s)))

    async def release(self, items: Sequence[tuple[str, int]], failed_attempt: bool) -> None:
        holder = self._threads.opened.writer.holder
        await self._threads.write(lambda transaction: leases.release(transaction, holder, items, failed_attempt))

    async def pending(self) -> list[PendingWork]:
        now = self._threads.opened
        async with now.places:
            asked = now.writer.submit(lambda transaction: leases.pending(transaction.db), reads=True)
            return await asyncio.shield(asyncio.wrap_future(asked))

    # Time.

    async def clock_marks(self) -> ClockMarks:
        def query(db: Database) -> ClockMarks:
            row = read_meta(db)
            marks = ClockMarks(seen_s=row["seen_s"], trusted_s=row["trusted_s"], doubt_s=row["doubt_s"])
            return batches.clock_marks(db, marks)

        return await self._threads.read(query)

    async def keep_clock_marks(self, marks: ClockMarks) -> None:
        def keep(transaction: Transaction) -> None:
            row = read_meta(transaction.db)
            values = {name: row[name] for name in ("no", "schema", "commits")}
            told = {"seen_s": marks.seen_s, "trusted_s": marks.trusted_s, "doubt_s": marks.doubt_s}
            write_row(transaction.db, "meta", values | told)

        await self._threads.write(keep)

    async def expire(self, now_s: float) -> list[str]:
        now = self._threads.opened
        holder = now.writer.holder
        self._give_back_owed(now)

        def run(transaction: Transaction) -> list[str]:
            for name in leases.free_over(transaction, holder.no):
                log.warning("%s has not been heard of for longer than store.lease: its items are leased again", name)
            late = batches.expire(transaction, holder, now_s)
            batches.expire_files(transaction, now_s)
            return late

        return await self._threads.write(run)

    async def sweep(self, now_s: float) -> Swept:
        count, files = await self._threads.write(
            lambda transaction: batches.sweep(transaction, now_s - self.settings.retention_s)
        )
        return Swept(batches=count, files=len(files))

    # What was learned.

    async def save_learned(self, name: str, data: bytes) -> None:
        check_learned(name, data)
        await self._threads.write(
            lambda transaction: transaction.db.insert_rows(
                "learned", ("name", "data", "sum"), [(name, data, learned_sum(name, data))], True
            )
        )

    async def load_learned(self, name: str) -> bytes | None:
        check_learned(name)

        return await self._threads.read(lambda db: read_learned(db, name))


def _ask(db: Database, operation: Operation[T]) -> T:
    from chiron.store.jobs.database import Meta

    return operation(Transaction(db, Meta()))
