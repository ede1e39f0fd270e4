"""One thread that writes, and commits for many callers at once.

Waiting for the disk costs about the same for one operation as for two hundred, so whatever has queued up is run in one
transaction and everybody is answered after its commit. If an operation in the group fails, the group is rolled back
and each is run again by itself: an operation may therefore run twice, and must only touch the database and what it
notes in ``Transaction.undo``.

Each commit that changes something has a number. Once it is on the disk the number is written to a file of its own
(``acknowledged``), by which the next start knows whether the database still has all that callers were told of.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

from chiron.store.jobs.database import Meta, Operation, Transaction
from chiron.store.jobs.rows import write_row
from chiron.store.port import StoreClosed
from chiron.store.sqlite.acknowledged import Acknowledged
from chiron.store.sqlite.database import SCHEMA_VERSION, SQLITE_ERRORS, Connection, store_error

log = logging.getLogger("chiron.store")

T = TypeVar("T")


@dataclass(slots=True)
class _Job:
    run: Operation[Any]
    reads: bool
    future: Future[Any]


class Writer:
    """Runs operations in the order of asking. ``chore`` is run beside them, a small step per transaction, for as long
    as ``has_chores`` is set in the transaction."""

    def __init__(
        self,
        db: Connection,
        path: Path,
        group_max: int,
        chore: Operation[None],
        meta: Meta,
        acknowledged: Acknowledged,
    ) -> None:
        self._db = db
        self._meta = meta
        self._acknowledged = acknowledged
        self._acknowledging = True
        self._path = path
        self._group_max = group_max
        self._chore = chore
        self._has_chores = True
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._ahead: list[_Job | None] = []
        self._closed = False
        self._closing = Lock()
        """Nothing is queued behind the end of the queue."""
        self._thread = Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation[T], reads: bool = False) -> Future[T]:
        """``reads``: it changes nothing in the database. It then runs after the commit of all before it, so that it
        never sees what is rolled back later."""
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                future.set_exception(StoreClosed(f"{self._path}: closed"))
            else:
                self._queue.put(_Job(operation, reads, future))
        return future

    def close(self) -> None:
        """Do what was asked so far, then stop. Blocks."""
        with self._closing:
            if not self._closed:
                self._queue.put(None)
            self._closed = True
        self._thread.join()
        self._db.close()
        self._acknowledged.close()

    def _work(self) -> None:
        while True:
            group = self._take_group()
            if group is None:
                return
            if group and group[0].reads:
                self._read(group[0])
                continue
            if self._has_chores:
                self._has_chores = False
                group.append(_Job(self._chore, False, Future()))
            self._commit(group)

    def _take_group(self) -> list[_Job] | None:
        """The next read alone, or the writes before it; empty when there are only chores; None at the end."""
        group: list[_Job] = []
        while len(group) < self._group_max:
            try:
                job = self._ahead.pop() if self._ahead else self._queue.get(block=not (group or self._has_chores))
            except Empty:
                break
            if group and (job is None or job.reads):
                self._ahead.append(job)
                break
            if job is None:
                return None
            group.append(job)
            if job.reads:
                break
        return group

    def _read(self, job: _Job) -> None:
        try:
            result = job.run(Transaction(self._db, self._meta))
        except Exception as error:
            _answer(job, None, self._named(error))
        else:
            _answer(job, result, None)

    def _commit(self, group: list[_Job]) -> None:
        transaction = Transaction(self._db, self._meta)
        before = self._db.total_changes
        try:
            self._db.execute("BEGIN IMMEDIATE")
            results = [job.run(transaction) for job in group]
            meta = transaction.meta
            if self._db.total_changes != before or meta != self._meta:
                meta = replace(meta, commits=self._meta.commits + 1)
                write_meta(self._db, meta)
            self._db.execute("COMMIT")
        except Exception as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            for undo in reversed(transaction.undo):
                undo()
            if len(group) == 1:
                _answer(group[0], None, self._named(error))
            else:
                for job in group:
                    self._commit([job])
        else:
            self._has_chores |= transaction.has_chores
            if meta is not self._meta:
                self._meta = meta
                self._acknowledge()
            for job, result in zip(group, results, strict=True):
                _answer(job, result, None)

    def _acknowledge(self) -> None:
        try:
            self._acknowledged.write(self._meta.commits)
        except OSError as error:
            if self._acknowledging:
                log.error(
                    "%s cannot be written, so lost commits could go unnoticed: %s", self._acknowledged.path, error
                )
            self._acknowledging = False
        else:
            self._acknowledging = True

    def _named(self, error: Exception) -> Exception:
        if isinstance(error, SQLITE_ERRORS):
            return store_error(error, self._path)
        return error


def write_meta(db: Connection, meta: Meta) -> None:
    write_row(db, "meta", {"no": 1, "schema": SCHEMA_VERSION, "commits": meta.commits} | asdict(meta.marks))


def _answer(job: _Job, result: Any, error: Exception | None) -> None:
    # A caller that was cancelled while waiting has cancelled its future.
    if not job.future.set_running_or_notify_cancel():
        return
    if error is None:
        job.future.set_result(result)
    else:
        job.future.set_exception(error)
