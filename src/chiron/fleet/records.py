"""What live fleets have in common: a record of each instance, and a task that serves it until nothing of it is left.

A fleet supplies ``serve``: bring the instance up, say ``ready``, watch it; raise InstanceFailedError when it fails.
Whatever it acquires goes on the record's ``resources`` and is given back however the instance ends. The control plane
is told of a failure at once, before resources are given back, which may take a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from chiron.core.types import Instance
from chiron.fleet.port import KindReport, LiveFleetEvents, Trouble
from chiron.fleet.starts import StartStatus
from chiron.net.clock import LiveClock

log = logging.getLogger("chiron.fleet")


class InstanceFailedError(Exception):
    """An instance could not be started, or is dead; the message says why."""


class InstanceNotFoundError(Exception):
    """An instance that another gateway is said to have had is not there; the message says so."""


class InstanceRecord:
    """One instance in the fleet's hands."""

    __slots__ = ("began_s", "check_now", "instance", "ready_s", "resources")

    def __init__(self, instance: Instance, now_s: float) -> None:
        self.instance = instance
        self.began_s = now_s
        """The loop's time at which its start began; waiting before that does not count."""
        self.ready_s: float | None = None
        self.resources = AsyncExitStack()
        """Given back when it ends: processes, devices, ports, endpoints."""
        self.check_now = asyncio.Event()
        """Asks for a health check."""


class InstanceRecords:
    """The instances of one fleet."""

    def __init__(
        self, *, clock: LiveClock, events: LiveFleetEvents, serve: Callable[[InstanceRecord], Awaitable[None]]
    ) -> None:
        self.closed = False
        self._clock = clock
        self._events = events
        self._serve = serve
        self._records: dict[int, InstanceRecord] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def begin(self, instance: Instance, *, runs: bool = False) -> None:
        """``runs``: it is up already, from a gateway before this one."""
        assert instance.id not in self._records, f"instance {instance.id} exists already"
        if self.closed:
            return
        loop = asyncio.get_running_loop()
        record = InstanceRecord(instance, loop.time())
        record.ready_s = record.began_s if runs else None
        self._records[instance.id] = record
        task = loop.create_task(self._run(record), name=f"instance-{instance.id}")
        self._tasks[instance.id] = task
        task.add_done_callback(lambda task: self._gone(instance.id, task))

    def end(self, instance: Instance) -> None:
        """Nothing more is heard of it. Harmless if it has failed or was ended before."""
        if self._records.pop(instance.id, None) is not None:
            self._tasks[instance.id].cancel()

    def record(self, instance: Instance) -> InstanceRecord | None:
        """None: it has ended, or was never begun."""
        return self._records.get(instance.id)

    def suspect(self, instance: Instance) -> None:
        record = self._records.get(instance.id)
        if record is not None:
            record.check_now.set()

    def ready(self, record: InstanceRecord, url: str) -> None:
        """Tell that it answers, unless it was removed in the same moment."""
        record.ready_s = asyncio.get_running_loop().time()
        record.check_now.clear()

        def tell() -> None:
            if self._is_held(record):
                assert record.ready_s is not None
                record.instance.began_s = self._clock.now_s - (record.ready_s - record.began_s)
                self._events.instance_ready(record.instance, url)

        self._clock.post(tell)

    def leaving(self, record: InstanceRecord, reason: str) -> None:
        """Tell that it will end soon whatever Chiron does, if it is ready: what has not begun has nothing to lose."""

        def tell() -> None:
            if self._is_held(record) and record.ready_s is not None:
                self._events.instance_leaving(record.instance, reason)

        self._clock.post(tell)

    def ended(self, record: InstanceRecord, tell: Callable[[], None]) -> None:
        """What it held has been given back as it was asked for: ``tell``, unless it was removed meanwhile."""

        def told() -> None:
            if self._is_held(record):
                del self._records[record.instance.id]
                tell()

        self._clock.post(told)

    async def close(self, timeout_s: float) -> None:
        """End all, side by side."""
        self.closed = True
        for record in list(self._records.values()):
            self.end(record.instance)
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)

    async def _run(self, record: InstanceRecord) -> None:
        try:
            await self._serve_while_there(record)
        except asyncio.CancelledError:
            if self._is_held(record):
                raise  # Not ``end``: the whole program is being cancelled.
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
        except InstanceFailedError as error:
            self._failed(record, str(error))
        except Exception as error:
            log.exception("instance %d of %s failed unexpectedly", record.instance.id, record.instance.model)
            self._failed(record, f"{type(error).__name__}: {error}")
        finally:
            await record.resources.aclose()

    async def _serve_while_there(self, record: InstanceRecord) -> None:
        try:
            await self._serve(record)
        except InstanceNotFoundError as error:
            # Whoever has told of it may know better: nothing is cut off, and it goes once what runs there has ended.
            self.leaving(record, str(error))
            await asyncio.Event().wait()

    def _failed(self, record: InstanceRecord, reason: str) -> None:
        instance = record.instance

        def tell() -> None:
            if self._is_held(record):
                del self._records[instance.id]
                log.warning("instance %d of %s failed: %s", instance.id, instance.model, reason)
                self._events.instance_failed(instance, reason)

        self._clock.post(tell)

    def _is_held(self, record: InstanceRecord) -> bool:
        return self._records.get(record.instance.id) is record

    def _gone(self, instance_id: int, task: asyncio.Task[None]) -> None:
        del self._tasks[instance_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            task.get_loop().call_exception_handler({"message": "ending an instance failed", "exception": error})


def starts_report(starts: StartStatus) -> KindReport:
    """Of a kind whose instances are started."""
    if starts.state != "crash-looping":
        return KindReport(starts=starts)
    reason = f"its engine keeps failing to start ({starts.failures} in a row)"
    trouble = Trouble(reason=reason, retry_s=starts.next_start_in_s, outside=False)
    # When the pause is over the next start is a try.
    return KindReport(starts=starts, trouble=trouble, instances_max=0 if trouble.retry_s > 0.0 else None)
