"""Brings batch work from the store to the control plane, and its results back.

A job may have a million items; the control plane gets a window of them (``window``), earliest deadline first, and the
rest as sums (``backlog``), so that it can plan for all of it. Memory holds at most: the
window, bounded in items and in bytes, what engines run, and the suspects.

**Suspects.** An item may be poison: it kills every engine that gets it, and other requests fail with it. So an item
that failed in the control plane is put back with a failed attempt and tried again as the only suspect of its model;
innocent ones succeed then, and the poison fails alone. When items fail one after the other and none succeeds, the
engines are at fault rather than the items: waiting ones are taken back, and single items are tried, ever less often.

Nothing here decides what runs where or when. All state that matters is in the store; a ``kill -9`` loses the work in
flight and no result.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from chiron.control.dispatcher import RETRIES_MAX
from chiron.core.ports import BatchAnnouncements, Completions
from chiron.core.types import Request
from chiron.gateway.batch.backlog import Backlog
from chiron.gateway.batch.call import BatchCall, failure, output_limit
from chiron.gateway.batch.lines import ENDPOINTS, by_name, line_body, line_check
from chiron.gateway.batch.log import BatchLog
from chiron.gateway.batch.settings import RunnerClock, RunnerSettings, back_off, try_later
from chiron.gateway.batch.window import Lease, Window
from chiron.gateway.batch.writer import ResultWriter
from chiron.gateway.relay.admission import Models, check_fits
from chiron.gateway.relay.body import places
from chiron.gateway.relay.collect import CollectError
from chiron.gateway.relay.errors import ApiError
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.settings import BatchSettings
from chiron.store.port import Batch, BatchStore, InputLimits, Item, NotFound, PendingWork, StoreError, StoreFull
from chiron.store.trusted_clock import BACK_S, ClockMarks, begin, look, words

log = logging.getLogger("chiron.batch")

HELD_MAX = 64
"""Items of one batch that wait here for their key's limits."""


class BatchRunner:
    """Runs all batch work of a gateway. One asyncio loop; ``start`` it once the store is open."""

    def __init__(
        self,
        *,
        store: BatchStore,
        clock: RunnerClock,
        completions: Completions,
        announcements: BatchAnnouncements,
        models: Models,
        keys: KeyRing,
        next_id: Callable[[], int],
        settings: BatchSettings | None = None,
        tuning: RunnerSettings | None = None,
        clock_set_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """``next_id`` gives ids of requests, shared with whoever else submits; ``clock_set_s`` says by how much the
        machine's clock was set since this process began."""
        self._store = store
        self._clock = clock
        self._completions = completions
        self._names = by_name(model.settings for model in (*models.cascades.values(), *models.by_name.values()))
        self._settings = settings or BatchSettings()
        self._tuning = tuning or RunnerSettings()
        self._windows = [
            Window(model, items_max=self._settings.window_max, tuning=self._tuning)
            for model in models.by_name.values()
            if model.settings.batch_class
        ]
        self._window_of = {name: w for w in self._windows for name in w.model.settings.aliases}
        self._window_of |= {window.name: window for window in self._windows}
        """By every name: an item has the name that its model had when its batch was accepted."""
        self._unserved: dict[str, int] = {}
        """Accepted items of models that are not served, by model."""
        self._backlog = Backlog(announcements=announcements, clock=clock, window_of=self._window_of)
        self._keys = keys
        self._next_id = next_id
        self._limits = InputLimits(items_max=self._settings.items_max, line_bytes_max=self._settings.line_max_bytes)
        self._tasks: list[asyncio.Task[None]] = []
        self._unchecked: asyncio.Queue[tuple[Batch, float]] = asyncio.Queue()
        """Batches to validate, each with the pause before another try if that fails."""
        self._news = asyncio.Event()
        self._writer = ResultWriter(store=store, clock=clock, tuning=self._tuning, on_return=self._news.set)
        self._log = BatchLog(store)
        self._dropped: dict[str, None] = {}
        """Batches that were cancelled or expired of late: a lease may be under way."""
        self._ended_since = 0
        self._next_sweep_s = 0.0
        self._to_validate: set[str] = set()
        """Batches in ``_unchecked``, or being validated, or to be tried again."""
        self._next_orphans_s = 0.0
        self._clock_set_s = clock_set_s
        self._marks = ClockMarks()
        self._keep_marks_s = 0.0
        self._closing = False

    # -- what the API calls ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what the last process left."""
        tuning = self._tuning
        self._store.on_news(self._news.set)
        marks = await self._store.clock_marks()
        self._marks = begin(marks, self._wall_s(), gap_s=tuning.clock_gap_s, grace_s=tuning.clock_grace_s)
        if self._marks.doubt_s:
            log.warning("%s", words(self._marks))
        unvalidated = await self._store.unvalidated()
        self._log.resumed(await self._store.pending(), unvalidated, self._wall_s())
        for batch in unvalidated:
            self.created(batch)
        loops = [self._validate_loop] * self._tuning.validations_at_once + [self._work_loop, self._writer.run]
        self._tasks = [asyncio.create_task(loop()) for loop in loops]
        self._clock.post(self._tick)

    @property
    def paused(self) -> str:
        """Why nothing goes on, if it does not: the store's complaint."""
        return self._writer.paused

    @property
    def busy(self) -> bool:
        """Too many batches wait for validation."""
        return self._unchecked.qsize() >= self._tuning.validations_max

    def created(self, batch: Batch) -> None:
        """Validate it, then run it."""
        if batch.id not in self._to_validate:
            self._to_validate.add(batch.id)
            self._unchecked.put_nowait((batch, self._tuning.backoff_min_s))

    async def cancel(self, batch_id: str, owner: str | None) -> Batch:
        """Cancel in the store, and stop what runs. Raises StoreError."""
        batch = await self._store.cancel_batch(batch_id, self._wall_s(), owner)
        self._drop(batch.id)
        return batch

    def in_flight(self) -> dict[str, int]:
        """Items that are out of the store, by batch id."""
        counts: dict[str, int] = {}
        for window in self._windows:
            for batch_id, _ in window.calls:
                counts[batch_id] = counts.get(batch_id, 0) + 1
        return counts

    def summary(self) -> dict[str, object]:
        """For the status page."""
        windows = self._windows
        return {
            "submitted": sum(len(window.calls) for window in windows),
            "queued": sum(len(window.queued()) for window in windows),
            "held_by_key_limits": sum(len(window.held) for window in windows),
            "suspects": sum(len(window.suspects) + (window.suspect is not None) for window in windows),
            "in_store": self._backlog.items,
            "unwritten": self._writer.unwritten,
            "validating": self._unchecked.qsize(),
            "paused": self.paused,
            "clock": words(self._marks),
            "unserved": dict(self._unserved),
            "failing_models": sorted(window.name for window in windows if window.engines_fail),
        }

    async def close(self, timeout_s: float = 5.0) -> None:
        """Give everything back, write what is known. What does not work out in time is done at the next start."""
        if self._closing or not self._tasks:
            return
        self._closing = True
        self._news.set()
        for window in self._windows:
            self._withdraw(window.calls.values())
            self._writer.give_back([*window.take_suspects(), *window.take_held()], failed=False)
        for task in self._tasks[:-2]:  # Validation starts over.
            task.cancel()
        work, write = self._tasks[-2:]
        await asyncio.wait([work], timeout=timeout_s / 2)
        self._writer.close()
        await asyncio.wait([write], timeout=timeout_s / 2)
        work.cancel()
        write.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._writer.unwritten:
            log.warning("%d results could not be written; those items run again", self._writer.unwritten)

    # -- validation --------------------------------------------------------------------------------------------

    async def _validate_loop(self) -> None:
        while True:
            batch, delay_s = await self._unchecked.get()
            check = line_check(batch.endpoint, self._names, self._keys.named(batch.owner))
            try:
                batch = await self._store.validate(batch.id, check, self._limits)
                log.info("batch %s: %s, %d items", batch.id, batch.status, batch.total)
                self._to_validate.discard(batch.id)
            except NotFound:
                self._to_validate.discard(batch.id)
            except StoreFull as error:
                # There is no room for the others either.
                next_s = await self._back_off(f"validation of {batch.id}", error, delay_s)
                self._unchecked.put_nowait((batch, next_s))
            except Exception as error:
                self._validate_later(batch, error, delay_s)
            self._news.set()

    def _validate_later(self, batch: Batch, error: Exception, delay_s: float) -> None:
        """What fails may be this batch alone, and go on failing: the others do not wait for it."""

        def again() -> None:
            self._unchecked.put_nowait((batch, next_s))

        next_s = try_later(self._clock, self._tuning, f"validation of {batch.id}", error, delay_s, again)

    # -- from the store to the control plane -------------------------------------------------------------------

    async def _work_loop(self) -> None:
        delay_s = self._tuning.backoff_min_s
        while not self._closing:
            await self._news.wait()
            self._news.clear()
            try:
                await self._look_after()
                if not self._writer.full:
                    await self._refill()
                delay_s = self._tuning.backoff_min_s
            except Exception as error:
                delay_s = await self._back_off("taking batch work", error, delay_s)

    def _tick(self) -> None:
        if not self._closing:
            self._news.set()
            self._clock.call_later(self._tuning.poll_s, self._tick)

    async def _look_after(self) -> None:
        """Deadlines and retention."""
        now_s = await self._due_s()
        if now_s >= self._next_orphans_s:
            # A gateway that shares the store may have died before it had validated all that it had taken.
            self._next_orphans_s = now_s + self._tuning.orphans_period_s
            for batch in await self._store.unvalidated():
                self.created(batch)
        for batch_id in await self._store.expire(now_s):
            log.info("batch %s expired", batch_id)
            self._drop(batch_id)
        if now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + self._tuning.sweep_period_s
            swept = await self._store.sweep(now_s)
            if swept.batches or swept.files:
                log.info("removed %d batches and %d files past their retention", swept.batches, swept.files)

    async def _due_s(self) -> float:
        """The time by which things expire: not the wall clock's if there is reason to doubt it."""
        before, wall_s = self._marks, self._wall_s()
        self._marks = look(before, wall_s, was_set=abs(self._clock_set_s()) > BACK_S)
        if before.doubt_s and not self._marks.doubt_s:
            log.info("the clock has run steadily and is trusted again")
        if wall_s >= self._keep_marks_s or bool(before.doubt_s) != bool(self._marks.doubt_s):
            await self._store.keep_clock_marks(self._marks)
            self._keep_marks_s = wall_s + self._tuning.clock_keep_s
        return self._marks.due_s

    async def _refill(self) -> None:
        """Take from the store what the windows have room for, and tell the control plane what is left."""
        self._ended_since = 0
        pending = await self._store.pending()
        await self._log.look(pending, self.in_flight())
        leased: list[tuple[Window, list[Item]]] = []

        def deliver() -> None:
            self._note_unserved(pending)
            for window in self._windows:
                self._try_held(window)
            for window, items in leased:
                for item in items:
                    self._log.saw(item.batch_id)
                    self._take(window, item)
            for window in self._windows:
                self._try_suspect(window)
                # Work with an earlier deadline came in: what is due last goes back.
                self._withdraw(window.surplus())
            # What no key pays for yet is no work that could be planned for.
            held = self._held_batches()
            self._backlog.tell([work for work in pending if work.batch_id not in held])

        try:
            for window in self._windows:
                waiting = [
                    work
                    for work in pending
                    if self._window_of.get(work.model) is window
                    and work.items
                    and work.batch_id not in window.held_batches
                ]
                first = min(waiting, key=lambda work: work.deadline_s, default=None)
                lease = None if first is None or self._closing else window.lease(self._clock.now_s, first.deadline_s)
                if first is not None and lease is not None:
                    leased.append((window, await self._lease(window, first.model, lease)))
            if leased:
                pending = await self._store.pending()
        finally:
            # Nobody else would ever run what is leased, whatever came after it.
            self._clock.post(deliver)

    def _note_unserved(self, pending: Iterable[PendingWork]) -> None:
        """Accepted work of models that the config had and has no longer: somebody must bring them back, or cancel."""
        counts: dict[str, int] = {}
        for work in pending:
            if work.items and work.model not in self._window_of:
                counts[work.model] = counts.get(work.model, 0) + work.items
                if work.model not in self._unserved:
                    log.warning(
                        "%s waits for model %r, which the config does not have: bring it back, give another model this "
                        "name as an alias, or cancel the batch",
                        work.batch_id,
                        work.model,
                    )
        self._unserved = counts

    async def _lease(self, window: Window, name: str, lease: Lease) -> list[Item]:
        """Items of one model. If they cannot be read, the other models do not wait for them."""
        try:
            besides = window.held_batches
            more = {"besides": besides} if besides else {}
            items = await self._store.lease(name, lease.items_max, lease.before_deadline_s, lease.bytes_max, **more)
        except StoreError as error:
            delay_s = window.lease_delay_s or self._tuning.backoff_min_s
            what = f"taking work of {name}"
            window.resume_s = self._clock.now_s + delay_s
            window.lease_delay_s = try_later(self._clock, self._tuning, what, error, delay_s, self._news.set)
            return []
        window.lease_delay_s = 0.0
        return items

    def _take(self, window: Window, item: Item) -> None:
        if self._closing or item.batch_id in self._dropped:
            self._writer.give_back([item], failed=False)
        elif item.attempts:
            window.suspects.append(item)
        elif item.batch_id in window.held_batches or not self._submit(window, item):
            self._hold(window, item)

    def _hold(self, window: Window, item: Item) -> None:
        """Its key has run out: it waits, and with it a few more of its batch; the others go back."""
        if sum(held.batch_id == item.batch_id for held in window.held) < HELD_MAX:
            window.held.append(item)
        else:
            self._writer.give_back([item], failed=False)

    def _held_batches(self) -> frozenset[str]:
        return frozenset().union(*(window.held_batches for window in self._windows))

    def _try_held(self, window: Window) -> None:
        """Let those run whose keys have something left again."""
        if not window.held:
            return
        out: set[str] = set()
        for item in window.take_held():
            if item.owner in out or not self._submit(window, item):
                out.add(item.owner)
                window.held.append(item)
        if not window.held:
            self._news.set()

    def _submit(self, window: Window, item: Item, *, suspect: bool = False) -> bool:
        """False: its key has run out, and it must wait."""
        if item.damage:
            self._writer.add(failure(item, "input_damaged", item.damage))
            return True
        body = line_body(item.body, item.endpoint)
        if body is None:
            message = "The request's line of the input file has changed since the batch was accepted."
            self._writer.add(failure(item, "invalid_json_line", message))
            return True
        try:
            check_fits(window.model, body.shape, item.endpoint == ENDPOINTS[0])
        except ApiError as error:
            self._writer.add(failure(item, "context_length_exceeded", error.message))
            return True
        input_tokens = window.model.tokens_of(body.shape)
        key = self._keys.named(item.owner)
        if key is not None and not suspect and not self._keys.take_spare(key, self._clock.now_s, input_tokens):
            return False
        call = BatchCall(item, body, self._tuning.answer_max_bytes, self._ended)
        request = Request(
            self._next_id(),
            window.name,
            window.cls,
            self._clock.now_s,
            input_tokens,
            payload=call,
            deadline_s=self._clock.from_wall_s(item.deadline_s),
            max_output_tokens=output_limit(body.shape.fields),
        )
        call.request = request
        request.sequences = places(call.sequences)
        window.calls[(item.batch_id, item.index)] = call
        if suspect:
            window.suspect = call
            # It had its retries; once more is enough to tell bad luck from poison.
            request.retries = RETRIES_MAX - 1
        self._completions.submit(request)
        return True

    def _try_suspect(self, window: Window) -> None:
        while (item := window.next_suspect(self._clock.now_s)) is not None:
            self._submit(window, item, suspect=True)

    # -- from the control plane to the store -------------------------------------------------------------------

    def _ended(self, call: BatchCall, request: Request) -> None:
        """The control plane has done with an item."""
        item, outcome = call.item, request.outcome
        window = self._window_of[item.model]
        window.ended(call)
        self._count_end(window)
        self._charge(call, request)
        if outcome == "cancelled":
            self._writer.give_back([item], failed=False)
        elif outcome == "finished" or call.refused:
            self._answered(window, call)
        elif outcome == "rejected":
            message = f"The prompt does not fit into the KV cache of any instance of model {item.model!r}."
            self._writer.add(failure(item, "context_length_exceeded", message))
        else:
            self._failed(window, call, call.error.message if call.error else "no engine could run it")

    def _charge(self, call: BatchCall, request: Request) -> None:
        """Its key pays for the output. What was taken back before it had any is tried, and paid for, again."""
        key = self._keys.named(call.item.owner)
        if key is None or not self._keys.limited(key):
            return
        tokens = request.tokens_done or call.tokens_seen
        if request.outcome == "cancelled" and not tokens:
            self._keys.give_back(key, request.input_tokens)
        else:
            self._keys.charge(key, tokens)

    def _count_end(self, window: Window) -> None:
        self._ended_since += 1
        if self._ended_since >= max(1, self._settings.window_max // 8) or window.suspects or not window.calls:
            self._news.set()

    def _answered(self, window: Window, call: BatchCall) -> None:
        try:
            self._writer.add(call.result())
        except CollectError as error:
            self._failed(window, call, str(error))
        else:
            window.failing = 0

    def _failed(self, window: Window, call: BatchCall, reason: str) -> None:
        item = call.item
        log.warning("batch %s item %d failed: %s", item.batch_id, item.index, reason)
        if item.attempts + 1 >= self._tuning.attempts_max:
            tries = f"Failed after {item.attempts + 1} attempts, each with retries."
            self._writer.add(failure(item, "request_failed", f"{tries} The last one: {reason}"))
        else:
            self._writer.give_back([item], failed=True)
        delay_s = window.gave_up(self._clock.now_s)
        if delay_s:
            self._clock.call_later(delay_s, self._news.set)
            # Not at once: the control plane is in the middle of telling of this end.
            self._clock.call_later(0.0, lambda: self._withdraw(window.queued()))

    # -- taking back -------------------------------------------------------------------------------------------

    def _drop(self, batch_id: str) -> None:
        """A batch is over: stop what runs of it. Items that go back without a result end with the batch."""
        self._dropped[batch_id] = None
        while len(self._dropped) > 1000:
            del self._dropped[next(iter(self._dropped))]
        for window in self._windows:
            self._withdraw(call for call in window.calls.values() if call.item.batch_id == batch_id)
            self._writer.give_back([*window.take_suspects(batch_id), *window.take_held(batch_id)], failed=False)
        self._news.set()

    def _withdraw(self, calls: Iterable[BatchCall]) -> None:
        """Cancel in the control plane; what it answers, ``_ended``, gives them back."""
        calls = list(calls)

        def cancel() -> None:
            for call in calls:
                assert call.request is not None
                if call.request.outcome is None:
                    self._completions.cancel(call.request)

        self._clock.post(cancel)

    # -- odds and ends -----------------------------------------------------------------------------------------

    async def _back_off(self, what: str, error: BaseException, delay_s: float) -> float:
        next_s = await back_off(self._clock, self._tuning, what, error, delay_s)
        self._news.set()
        return next_s

    def _wall_s(self) -> float:
        return self._clock.wall_s(self._clock.now_s)
