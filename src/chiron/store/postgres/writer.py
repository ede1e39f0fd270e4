"""One thread that writes, and commits for many callers at once.

Operations that have queued up are run in one transaction, and everybody is answered after its commit. Those of several
gateways take turns (an advisory lock): all but leases, which skip what others are leasing.

**A lost connection.** Whether a commit succeeded of which no answer came is not known, so each transaction counts up in
the row of its holder: once there is a connection again, that number says it. The transaction is run again only if it
was not committed. Everything else fails with ``StoreUnavailable`` until then, at once.

**A holder that is over.** A gateway that stalled for longer than its lease finds its row gone at its next commit: that
is taken back, and run again as a new holder. If the row goes while it is not known whether a commit succeeded, nobody
will know: it is not run again, and callers are told so.

**Two of one name**, as where a data directory was copied: whoever starts frees what the other has, as if that were its
last process. The other finds its holder over and one of its name alive, and goes on under a new name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from queue import Empty, SimpleQueue
from random import Random
from threading import Event, Lock, Thread
from typing import Any, Final, TypeVar
from zlib import crc32

import psycopg

from chiron.store.jobs.batches import purge_step
from chiron.store.jobs.database import Meta, Operation, Transaction
from chiron.store.jobs.items import finish
from chiron.store.lease import Leads
from chiron.store.port import Ended, StoreClosed, StoreError, StoreUnavailable
from chiron.store.postgres.connection import Connection, Patience, connect, is_lost, store_error, where
from chiron.store.postgres.content import remove_step
from chiron.store.postgres.lease import cut_off_older, require_lead, writer_name
from chiron.store.postgres.leases import Holder, free, free_over, is_alive, register
from chiron.store.postgres.schema import prepare
from chiron.store.postgres.settings import PostgresSettings

log = logging.getLogger("chiron.store")

T = TypeVar("T")

TURN_LOCK: Final = 0x43484952_5455524E
"""Whoever writes anything but a lease has it until the commit; one for each schema."""
CHANNEL: Final = "chiron_store"
TRIES_MAX: Final = 5
"""Of a transaction that the server gave up for others."""
RECONNECT_MIN_S: Final = 0.1


Results = tuple[Sequence[Ended], float]
"""Results, and when they came."""


@dataclass(slots=True)
class _Job:
    run: Operation[Any]
    alone: bool
    reads: bool
    future: Future[Any]
    ended: Results | None = None
    """Set instead of ``run``: results, which are written together with those of other callers."""


class _OverError(Exception):
    """Our holder is over."""


class Writer:
    """Runs operations in the order of asking. ``told`` hears "" when the store can be used, else why not."""

    def __init__(
        self,
        settings: PostgresSettings,
        name: str,
        told: Callable[[str], None],
        new_name: Callable[[], str],
        leads: Leads | None = None,
        patience: Patience | None = None,
    ) -> None:
        """``new_name`` is asked for if another gateway has this one, and keeps it; not of one that ``leads``, which
        writes nothing any more then. Blocks. Raises StoreError."""
        self._settings = settings
        self._leads = leads
        self._patience = patience
        self._name = name
        self._told = told
        self._new_name = new_name
        self._turn = TURN_LOCK ^ crc32(settings.schema.encode())
        self._random = Random(f"{name}:reconnect")
        self.holder = Holder()
        self._has_chores = True
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._closed = False
        self._lost = False
        self._closing = Lock()
        self._end = Event()
        self._commits = 0
        self._db = self._connect()
        try:
            self._register(self._name)
        except psycopg.Error as error:
            self._db.close()
            raise store_error(error, settings) from error
        except BaseException:
            self._db.close()
            raise
        self._thread = Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation[T], *, alone: bool = False, reads: bool = False) -> Future[T]:
        """``alone``: in a transaction of its own, without waiting for other gateways' turns; ``reads``: so, and it
        changes nothing. What was asked before is committed by then."""
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                future.set_exception(StoreClosed(f"{where(self._settings)}: closed"))
            else:
                self._queue.put(_Job(operation, alone or reads, reads, future))
        return future

    def look(self) -> None:
        """Whether the server is there: a reader has found it gone."""
        self.submit(lambda transaction: None)

    def finish(self, ended: Sequence[Ended], now_s: float) -> Future[None]:
        """Keep results, with those of other callers that wait."""
        future: Future[None] = Future()
        with self._closing:
            if self._closed:
                future.set_exception(StoreClosed(f"{where(self._settings)}: closed"))
            else:
                self._queue.put(_Job(_nothing, False, False, future, (ended, now_s)))
        return future

    def close(self) -> None:
        """Do what was asked so far if there is a connection, give back what is leased, then stop. Blocks."""
        with self._closing:
            if not self._closed:
                self._queue.put(None)
            self._closed = True
        if self._lost:
            self._end.set()
        self._thread.join()
        self._db.close()

    # The thread.

    def _work(self) -> None:
        beat_s = self._settings.lease_s / 3
        ahead: list[_Job | None] = []
        while True:
            group: list[_Job] = []
            try:
                while len(group) < self._settings.group_max:
                    wait = not group and not self._has_chores
                    job = ahead.pop() if ahead else self._queue.get(block=wait, timeout=beat_s if wait else None)
                    if group and (job is None or job.alone or group[0].alone):
                        ahead.append(job)
                        break
                    if job is None:
                        self._leave()
                        return
                    group.append(job)
            except Empty:
                pass
            if not group or (self._has_chores and not group[0].alone):
                self._has_chores = False
                group.append(_Job(_chores, False, False, Future()))  # At least this renews the lease.
            self._commit(group)

    def _commit(self, group: list[_Job], tries: int = 0) -> None:
        """Run it until it is committed, or has failed, and answer."""
        transaction = Transaction(self._db, Meta())
        committing = False
        try:
            results = self._run(group, transaction)
            committing = True
            self._db.execute("COMMIT")
        except _OverError:
            self._roll_back()
            self._commit_as_new_holder(group, tries)
        except Exception as error:
            if is_lost(self._db.raw):
                if committing and not group[0].reads:
                    self._reconnect(error)
                    self._settle(group, results, transaction, tries)
                else:
                    _fail(group, StoreUnavailable(str(self._named(error))))
                    self._reconnect(error)
                return
            self._roll_back()
            gave_way = isinstance(error, psycopg.errors.DeadlockDetected | psycopg.errors.SerializationFailure)
            if gave_way and tries < TRIES_MAX:
                self._commit(group, tries + 1)
                return
            if len(group) == 1:
                _answer(group[0], None, self._named(error))
            else:
                for job in group:
                    self._commit([job])
        else:
            self._answer(group, results, transaction)

    def _settle(self, group: list[_Job], results: list[Any], transaction: Transaction, tries: int) -> None:
        """Answer those whose commit was not answered, or run it again."""
        committed = self._is_committed()
        if committed:
            self._answer(group, results, transaction)
        elif committed is not None and tries < TRIES_MAX:
            self._commit(group, tries + 1)
        else:
            while_away = "closed" if self._end.is_set() else "taken for dead, or cut off again and again,"
            said = f"{while_away} while the server was away; whether it was done is not known"
            _fail(group, StoreUnavailable(f"{where(self._settings)}: {said}"))

    def _run(self, group: list[_Job], transaction: Transaction) -> list[Any]:
        db = self._db
        if group[0].reads:
            db.execute("BEGIN READ ONLY")
            return [group[0].run(transaction)]
        db.execute("BEGIN")
        if not group[0].alone:
            db.execute("SELECT pg_advisory_xact_lock(?)", (self._turn,))
        results = self._run_each(group, transaction)
        if transaction.has_news:
            db.execute(f"NOTIFY {CHANNEL}, '{self._settings.schema}'")
        row = db.execute(
            "UPDATE holders SET commits = commits + 1, until = clock_timestamp() + make_interval(secs => ?)"
            " WHERE no = ? RETURNING commits",
            (self._settings.lease_s, self.holder.no),
        ).fetchone()
        if row is None:
            raise _OverError
        self._commits = row["commits"]
        return results

    def _run_each(self, group: list[_Job], transaction: Transaction) -> list[Any]:
        results: list[Any] = []
        for ended, jobs in groupby(group, key=lambda job: job.ended is not None):
            if not ended:
                results += [job.run(transaction) for job in jobs]
                continue
            together = [job.ended for job in jobs if job.ended is not None]
            lines = [one for several, _ in together for one in several]
            finish(transaction, self.holder, lines, max(now_s for _, now_s in together))
            results += [None] * len(together)
        return results

    def _answer(self, group: list[_Job], results: list[Any], transaction: Transaction) -> None:
        self._has_chores |= transaction.has_chores
        for job, result in zip(group, results, strict=True):
            _answer(job, result, None)

    def _roll_back(self) -> None:
        self.holder.cursors.clear()
        try:
            self._db.execute("ROLLBACK")
        except psycopg.Error:
            self._db.close()  # Then it is lost, which the next use finds.

    def _commit_as_new_holder(self, group: list[_Job], tries: int) -> None:
        try:
            if self._leads is not None:
                log.error("%s: over: nothing more is written, unless this gateway leads still", self._name)
            elif is_alive(self._db, self._name):
                taken, self._name = self._name, self._new_name()
                log.error(
                    "another gateway runs as %s: was its directory copied? This one goes on as %s", taken, self._name
                )
            else:
                log.warning("%s: not heard of for longer than store.lease: what was leased may run twice", self._name)
            self._register(self._name)
        except (psycopg.Error, StoreError) as error:
            if is_lost(self._db.raw):
                self._reconnect(error)
            _fail(group, self._named(error))
        else:
            if tries < TRIES_MAX:
                self._commit(group, tries + 1)
            else:
                _fail(group, StoreUnavailable(f"{where(self._settings)}: the lease of this gateway does not last"))

    def _named(self, error: Exception) -> Exception:
        return store_error(error, self._settings) if isinstance(error, psycopg.Error) else error

    # Connecting.

    def _connect(self) -> Connection:
        leads = self._leads
        called = "writer" if leads is None else writer_name(leads, self._settings.schema)
        db = connect(self._settings, called, self._patience)
        try:
            prepare(db, self._settings)
        except BaseException:
            db.close()
            raise
        return db

    def _register(self, name: str) -> None:
        """Become a new holder, of a name that then has no other."""
        db = self._db
        db.execute("BEGIN")
        transaction = Transaction(db, Meta())
        if self._leads is not None:
            cut_off_older(db, self._leads, self._settings.schema)
        db.execute("SELECT pg_advisory_xact_lock(?)", (self._turn,))
        if self._leads is not None:
            try:
                require_lead(db, self._leads)
            except StoreError:
                db.execute("ROLLBACK")
                raise
        free_over(transaction, -1, name)
        number = register(db, name, self._settings.lease_s)
        db.execute("COMMIT")
        self.holder.no = number
        self.holder.cursors.clear()
        self._commits = 0
        self._has_chores = True

    def _is_committed(self) -> bool | None:
        """Whether the transaction whose commit was not answered is. Waits for the server to have done with it. None:
        nobody knows any more, since our holder is over, or this is the end."""
        while not self._end.is_set():
            try:
                row = self._db.execute(
                    "SELECT commits FROM holders WHERE no = ? FOR UPDATE", (self.holder.no,)
                ).fetchone()
            except psycopg.Error as error:
                self._reconnect(error)
            else:
                return None if row is None else bool(row["commits"] == self._commits)
        return None

    def _reconnect(self, error: Exception) -> None:
        """Blocks until there is a connection, or the end. Those who ask meanwhile are refused."""
        why = str(self._named(error))
        log.error("batches and files are not served: %s; reconnecting", why)
        self._lost = True
        self._told(why)
        self.holder.cursors.clear()  # What was leased last may not have been.
        self._db.close()
        began_s, delay_s = time.monotonic(), RECONNECT_MIN_S
        while not self._end.is_set():
            self._refuse(why)
            self._end.wait(delay_s * self._random.uniform(0.5, 1.0))
            delay_s = min(self._settings.reconnect_max_s, 2 * delay_s)
            if self._end.is_set():
                return
            try:
                self._db = self._connect()
            except StoreError as failed:
                if str(failed) != why:
                    log.warning("batches and files are not served: %s", failed)
                    why = str(failed)
                    self._told(why)
                if self._closed:
                    self._end.set()
                continue
            self._lost = False
            self._told("")
            log.info("batches and files are served again, after %.1f s", time.monotonic() - began_s)
            return

    def _refuse(self, why: str) -> None:
        """What has queued up."""
        kept: list[None] = []
        while True:
            try:
                job = self._queue.get_nowait()
            except Empty:
                break
            if job is None:
                kept.append(None)
            else:
                _answer(job, None, StoreUnavailable(why))
        for end in kept:
            self._queue.put(end)
            self._end.set()

    def _leave(self) -> None:
        try:
            self._db.execute("BEGIN")
            transaction = Transaction(self._db, Meta())
            self._db.execute("SELECT pg_advisory_xact_lock(?)", (self._turn,))
            free(transaction, self.holder.no)
            if transaction.has_news:
                self._db.execute(f"NOTIFY {CHANNEL}, '{self._settings.schema}'")
            self._db.execute("COMMIT")
        except psycopg.Error as error:
            log.warning("what was leased is free only after store.lease: %s", self._named(error))


def _chores(transaction: Transaction) -> None:
    purge_step(transaction)
    remove_step(transaction)


def _nothing(transaction: Transaction) -> None:
    """What a job does that has something else to be done with it."""


def _fail(group: list[_Job], error: Exception) -> None:
    for job in group:
        _answer(job, None, error)


def _answer(job: _Job, result: Any, error: Exception | None) -> None:
    # A caller that was cancelled while waiting has cancelled its future.
    if not job.future.set_running_or_notify_cancel():
        return
    if error is None:
        job.future.set_result(result)
    else:
        job.future.set_exception(error)
