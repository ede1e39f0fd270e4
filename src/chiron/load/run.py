"""The open loop: every request is sent at its time, whether or not earlier ones have been answered.

A generator that waits for answers slows down with the server and hides how slow it is (coordinated omission). Here
the times are fixed beforehand and latencies count from them, not from the moment of sending. Should this process
itself fall behind, the lateness of every send is on record.

Programs are open loops, and the calls within one a closed loop: the next is due a think time after the last has ended.
"""

from __future__ import annotations

import asyncio
import gc
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

from chiron.load.batch import JobState, prepare_job, run_job
from chiron.load.body import Bodies
from chiron.load.errors import StoppedError, TargetError
from chiron.load.exchange import Exchange
from chiron.load.plan import LoadPlan
from chiron.load.probe import Probed, probe
from chiron.load.record import Progress, Record
from chiron.load.settings import LoadSettings
from chiron.net.client import Origin
from chiron.workload.calls import CallOrder

SENDS_PER_TURN = 32
"""Requests sent before answers are read again: a burst must not stop reading."""
TICK_S = 0.001
"""The resolution of the loop's timers. With less, some loops spin until the time has come."""
RATE_LOOKS = 10
"""Progress shows the rate of sending over this many updates."""
LEAD_S = 0.1
"""Between making everything ready and the run's time 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadRun:
    """A finished run."""

    plan: LoadPlan
    settings: LoadSettings
    record: Record
    jobs: tuple[JobState, ...]
    wall_s: float
    """From the run's time 0 to its end."""
    cpu_share: float
    """Of one core, used by this process."""
    ignore_eos: bool
    stopped: bool
    """Before all was sent and answered."""
    notes: tuple[str, ...]


async def run_load(
    plan: LoadPlan,
    settings: LoadSettings,
    *,
    progress: Callable[[Progress], None] | None = None,
    progress_period_s: float = 0.5,
    waiting: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
) -> LoadRun:
    """Send a plan. Set ``stop`` to end early: nothing more is sent, and what is in flight has ``grace_s``. ``waiting``
    gets what the run waits for before the first request, if it takes long.

    Raises TargetError if the server cannot be used at all, StoppedError at a stop before it has answered the probes;
    what fails later is in the record.
    """
    try:
        origin = Origin(
            settings.origin,
            connect_timeout_s=settings.connect_timeout_s,
            idle_max=settings.in_flight_max,
            keepalive=settings.keepalive,
            verify=settings.verify,
            cacert=settings.cacert,
        )
    except ValueError as error:
        raise TargetError(f"url {error}") from None
    stop = stop or asyncio.Event()
    try:
        probed = await _unless_stopped(probe(origin, plan, settings, waiting), stop)
        sender = _Sender(plan, settings, origin, probed.bodies, stop)
        sender.on_progress, sender.progress_period_s = progress, progress_period_s
        await sender.run()
    finally:
        await origin.close()
    return LoadRun(
        plan=plan,
        settings=settings,
        record=sender.record,
        jobs=tuple(sender.jobs),
        wall_s=sender.wall_s,
        cpu_share=sender.cpu_share,
        ignore_eos=probed.ignore_eos,
        stopped=sender.stopped,
        notes=probed.notes,
    )


async def _unless_stopped(probing: Coroutine[Any, Any, Probed], stop: asyncio.Event) -> Probed:
    """What the probes, which may wait for minutes, found out."""
    probed, stopped = asyncio.ensure_future(probing), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((probed, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not probed.done():
            raise StoppedError("stopped before the server answered a probe; nothing was measured")
        return probed.result()
    finally:
        probed.cancel()
        stopped.cancel()


class _Sender:
    """One run's state."""

    def __init__(
        self, plan: LoadPlan, settings: LoadSettings, origin: Origin, bodies: Bodies, stop: asyncio.Event
    ) -> None:
        self.record = Record(plan)
        self.jobs = [prepare_job(job, i, plan, bodies, settings) for i, job in enumerate(plan.jobs)]
        self.on_progress: Callable[[Progress], None] | None = None
        self.progress_period_s = 0.5
        self.wall_s = 0.0
        self.cpu_share = 0.0
        self.stopped = False
        self._plan = plan
        self._settings = settings
        self._origin = origin
        self._bodies = bodies
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        programs = plan.workload.programs
        self._calls = CallOrder(programs) if programs is not None else None
        self._coming = 0
        """Calls of programs whose time is known and has not come."""
        first = plan.single if self._calls is None else plan.single[~self._calls.waits[plan.single]]
        self._due_s: list[float] = plan.workload.arrival_s[first].tolist()
        self._rows: list[int] = first.tolist()
        self._next = 0
        self._start_s = 0.0
        self._flying: dict[int, Exchange] = {}
        """By row, in order of sending."""
        self._idle = asyncio.Event()
        self._sent_lately: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=RATE_LOOKS)
        """(when, sent by then) of the last looks."""
        self._fault: Exception | None = None

    async def run(self) -> None:
        loop = self._loop
        freezes = not gc.get_freeze_count()  # What a caller froze is not ours to unfreeze.
        if freezes:
            gc.collect()
            gc.freeze()  # The plan is large and does not change: no collection need look at it.
        cpu_s = process_time()
        self._start_s = perf_counter() + LEAD_S
        loop.call_later(LEAD_S, self._send_due)
        tasks = [
            loop.create_task(self._until_answered()),
            *(
                loop.create_task(run_job(job, self._origin, self.record, self._settings, self._start_s, self._stop))
                for job in self.jobs
            ),
        ]
        try:
            pending = set(tasks)
            while pending:
                period_s = self.progress_period_s
                done, pending = await asyncio.wait(pending, timeout=period_s, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                self._look()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if freezes:
                gc.unfreeze()
        self.wall_s = perf_counter() - self._start_s
        self.stopped = self._stop.is_set()
        self.cpu_share = (process_time() - cpu_s) / max(self.wall_s + LEAD_S, 1e-9)

    # -- sending -----------------------------------------------------------------------------------------------

    def _send_due(self) -> None:
        """Nobody awaits a timer: what goes wrong in it ends the run through the task that does wait."""
        try:
            self._send_turn()
        except Exception as error:
            self._fault = error
            self._idle.set()

    def _send_turn(self) -> None:
        """Send what is due, a bounded number at a time, and come back for the rest."""
        if self._stop.is_set():
            return
        turn_end = self._next + SENDS_PER_TURN
        while self._next < len(self._rows):
            wait_s = self._start_s + self._due_s[self._next] - perf_counter()
            if wait_s > 0:
                self._loop.call_later(max(wait_s, TICK_S), self._send_due)
                return
            if self._next >= turn_end:
                self._loop.call_soon(self._send_due)
                return
            self._send(self._rows[self._next])
            self._next += 1
        self._settle()

    def _settle(self) -> None:
        """Whether all that will be sent is answered."""
        over = self._stop.is_set() or (self._next >= len(self._rows) and not self._coming)
        if over and not self._flying:
            self._idle.set()

    def _send(self, row: int) -> None:
        record = self.record
        if len(self._flying) >= self._settings.in_flight_max:
            record.held_back(row)
            self._then(row, finished=False)
            return
        body, size = self._bodies.body(row, stream=True)
        sent_s = perf_counter()
        exchange = Exchange(row, sent_s, size, self._ended)
        self._flying[row] = exchange
        record.sent += 1
        record.attempted[row] = True
        record.sent_s[row] = sent_s - self._start_s
        exchange.call = self._origin.send(b"POST", self._bodies.path, self._bodies.headers(row), body, exchange)

    def _ended(self, exchange: Exchange) -> None:
        del self._flying[exchange.row]
        self.record.ended(exchange, self._start_s)
        if exchange.prompt_tokens > 0 and exchange.text_bytes:
            work = self._plan.workload
            model = work.models[work.model[exchange.row]]
            self._bodies.meters[model].observe(exchange.text_bytes, exchange.prompt_tokens)
        self._then(exchange.row, finished=exchange.outcome == "finished")
        self._settle()

    def _then(self, row: int, *, finished: bool) -> None:
        """A call of a program is over: those that waited for it follow, each after a while."""
        programs = self._plan.workload.programs
        if self._calls is None or programs is None:
            return
        now_s = perf_counter() - self._start_s
        for after in self._calls.ended(row, finished=finished):
            think_s = float(programs.think_s[after])
            self.record.due_s[after] = now_s + think_s
            self._coming += 1
            self._loop.call_later(max(think_s, TICK_S), self._send_call, after)

    def _send_call(self, row: int) -> None:
        wait_s = self._start_s + self.record.due_s[row] - perf_counter()
        if wait_s > 0 and not self._stop.is_set():  # The loop's clock may be ahead.
            self._loop.call_later(max(wait_s, TICK_S), self._send_call, row)
            return
        self._coming -= 1
        try:
            if self._calls is not None and not self._calls.is_off(row) and not self._stop.is_set():
                self._send(row)
            self._settle()
        except Exception as error:
            self._fault = error
            self._idle.set()

    # -- waiting -----------------------------------------------------------------------------------------------

    async def _until_answered(self) -> None:
        """Until every single request is over; after a stop, no longer than the grace."""
        if not self._rows:
            return
        idle, stop = self._loop.create_task(self._idle.wait()), self._loop.create_task(self._stop.wait())
        try:
            await asyncio.wait((idle, stop), return_when=asyncio.FIRST_COMPLETED)
            if not idle.done():
                if self._flying:
                    await asyncio.wait((idle,), timeout=self._settings.grace_s)
                for exchange in list(self._flying.values()):
                    exchange.abandon("cancelled", "stopped by us")
        finally:
            idle.cancel()
            stop.cancel()
        if self._fault is not None:
            raise self._fault

    def _look(self) -> None:
        """Time out what takes too long, and tell of progress."""
        oldest_s = perf_counter() - self._settings.request_timeout_s
        for exchange in list(self._flying.values()):
            if exchange.sent_s > oldest_s:
                break
            exchange.abandon("failed", "timeout", f"no end within {self._settings.request_timeout_s:g} s")
        if self.on_progress is not None:
            self.on_progress(self.snapshot())

    def snapshot(self) -> Progress:
        """The run, so far."""
        record = self.record
        elapsed_s = max(0.0, perf_counter() - self._start_s)
        since_s, sent_before = self._sent_lately[0]
        self._sent_lately.append((elapsed_s, record.sent))
        late_s = record.late_s()
        return Progress(
            elapsed_s=elapsed_s,
            total_s=self._plan.last_s,
            planned=len(self._plan.single),
            sent=record.sent,
            running=len(self._flying),
            done=record.done,
            not_sent=record.not_sent,
            late_max_s=float(late_s.max()) if len(late_s) else 0.0,
            sent_per_s=(record.sent - sent_before) / max(elapsed_s - since_s, 1e-9),
            errors=dict(record.errors),
            classes=record.by_class(),
            jobs=tuple(job.line() for job in self.jobs),
            stopping=self._stop.is_set(),
        )
