"""Instances as detached actors of a Ray cluster, each in a placement group of its own.

Ray places them, restarts nothing, and adds nodes where its autoscaler is set up; Chiron decides how many there are.
Requests go to the engines by plain HTTP, never through Ray. When the gateway ends they go on (``on_stop``), and the
next one takes them over.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from chiron.core.types import Instance
from chiron.fleet.health import HealthTarget, Probe
from chiron.fleet.port import Claim, FleetEnvironment, FleetReport, KindReport, Memory, Trouble
from chiron.fleet.ray.client import AgentClient
from chiron.fleet.ray.cluster import RayCluster
from chiron.fleet.ray.instances import Hold, Loss, RayInstances, RayTimes
from chiron.fleet.ray.places import FILE, NAME, Place, from_bytes, read_places, to_bytes, write_places
from chiron.fleet.ray.source import RaySource
from chiron.fleet.records import InstanceFailedError, InstanceRecord, InstanceRecords, starts_report
from chiron.fleet.starts import StartDelayedError, Starts
from chiron.fleet.waiting import unless, until_known

log = logging.getLogger("chiron.fleet")

_CLOSE_TIMEOUT_S = 5.0
_STOP_MARGIN_S = 15.0
"""Beyond the longest stop timeout, that the end of a gateway waits for what it removes."""
_SWEEP_S = 600.0
"""Longest that a cluster of which the config says nothing any more is asked, at one start."""
RETRY_S = 10.0
"""Of what is in the cluster's hands: when there may be news."""


class ActorLostError(InstanceFailedError):
    """Its actor or its node ended: no fault of the engine."""


def connect(source: RaySource) -> RayCluster:
    return AgentClient(source.address, source.namespace, source.python)


class RayFleet:
    """Implements ``LiveFleet``."""

    def __init__(
        self,
        sources: Mapping[str, RaySource],
        environment: FleetEnvironment,
        connect: Callable[[RaySource], RayCluster] = connect,
        times: RayTimes | None = None,
    ) -> None:
        """``sources`` by InstanceKind.name. ``connect`` reaches the cluster and namespace of a source."""
        self._sources = dict(sources)
        self._unknown_s = (times or RayTimes()).unknown_s
        self._settings = environment.settings
        self._records = InstanceRecords(clock=environment.clock, events=environment.events, serve=self._serve)
        self._starts = {name: Starts(self._settings.backoff) for name in sources}
        self._claims: dict[int, Hold] = {}
        """Of instances that take over what runs, until they are served; by instance id."""
        self._clusters: list[RayCluster] = []
        self._by_kind: dict[str, RayInstances] = {}
        self._running: dict[asyncio.Task[None], RayInstances] = {}
        self._connect = connect
        self._times = times
        self._environment = environment
        self._sweeps: set[asyncio.Task[None]] = set()
        places: dict[Place, dict[str, RaySource]] = {}
        for kind, source in sources.items():
            place = Place(address=source.address, namespace=source.namespace, python=source.python)
            places.setdefault(place, {})[kind] = source
        before = self._recorded()
        self._owner = _owner(environment) if places or before else ""
        for place, own in places.items():
            if len({source.on_stop for source in own.values()}) > 1:
                raise ValueError(f"kinds {', '.join(map(repr, own))} share a namespace, and differ in on_stop")
            cluster = connect(next(iter(own.values())))
            instances = RayInstances(
                cluster,
                place.namespace,
                own,
                owner=self._owner,
                advise=environment.advise,
                settle_s=environment.settle_s,
                grace_s=environment.grace_s,
                noted=environment.noted,
                hint=place.options,
                changes=environment.clock.elapsed_s,
                times=times,
            )
            self._clusters.append(cluster)
            self._by_kind.update(dict.fromkeys(own, instances))
            task = asyncio.get_running_loop().create_task(instances.run(), name=f"ray-{place.namespace}")
            task.add_done_callback(_report_end)
            self._running[task] = instances
        for instances in self._running.values():
            instances.beside(self._in(instances.namespace))
        self._shared: set[Place] | None = None
        """As the memory has them; None: not known yet."""
        self._swept: set[Place] = set()
        """Where nothing is left."""
        if self._owner and not environment.advise:
            self._record(before | places.keys())
            self._sweep_all(before - places.keys())
        if environment.memory is not None and not environment.advise:
            task = asyncio.get_running_loop().create_task(self._remember(environment.memory, before, set(places)))
            self._sweeps.add(task)
            task.add_done_callback(_report_end)

    def create(self, instance: Instance) -> None:
        """Answered by ``instance_ready`` once Ray has placed it and its engine answers, or by ``instance_failed``."""
        instances = self._by_kind[instance.kind.name]
        self._records.begin(instance)
        record = self._records.record(instance)
        if record is not None and instances.spare(instance.kind.name):  # At once, so that nobody else is told of it.
            self._claims[instance.id] = self._hold(record, instances)

    def remove(self, instance: Instance) -> None:
        """At any time; harmless twice."""
        self._records.end(instance)

    def suspect(self, instance: Instance) -> None:
        """Somebody could not reach it: check now, and fail it if it does not answer."""
        self._records.suspect(instance)

    def adopt(self, kind: str, url: str) -> Claim | None:
        instances = self._by_kind.get(kind)
        if instances is None or not instances.may_claim(kind, url):
            return None

        def begin(instance: Instance) -> None:
            self._records.begin(instance, runs=True)
            record = self._records.record(instance)
            if record is not None:
                self._claims[instance.id] = self._hold(record, instances, url)

        return Claim(begin=begin, found=False)  # The cluster has to tell of one at this address.

    def report(self) -> FleetReport:
        return FleetReport(kinds={kind: self._kind(kind) for kind in self._sources})

    async def close(self, *, hands_over: bool = False) -> None:
        """Remove what is to be removed when the gateway ends, and let the rest go on."""
        for sweep in self._sweeps:
            sweep.cancel()
        await asyncio.gather(*self._sweeps, return_exceptions=True)
        ends = [kind for kind, source in self._sources.items() if source.on_stop == "remove" and not hands_over]
        removed = {self._by_kind[kind] for kind in ends}
        for instances in removed:
            instances.end_spares()
        for task, instances in self._running.items():
            if instances not in removed:  # First, so that nothing is stopped for the instances that end now.
                task.cancel()
                await asyncio.wait((task,))
                await instances.free()
        await self._records.close(_CLOSE_TIMEOUT_S)
        longest_s = max((source.stop_timeout_s for source in self._sources.values()), default=0.0)
        for task, instances in self._running.items():
            if instances in removed and not task.done():
                if not await instances.until_stopped(longest_s + _STOP_MARGIN_S):
                    log.warning("Ray still has instances that were to be removed; the next start removes them")
                task.cancel()
        if self._running:
            await asyncio.wait(list(self._running))
        for cluster in self._clusters:
            await cluster.close()

    # -- where there are no kinds any more -----------------------------------------------------------------------

    def _recorded(self) -> set[Place]:
        directory = self._environment.directory
        return read_places(directory / FILE) if directory is not None else set()

    def _record(self, places: set[Place]) -> None:
        directory = self._environment.directory
        if directory is not None and places != self._recorded():
            write_places(directory / FILE, places)

    async def _remember(self, memory: Memory, before: set[Place], places: set[Place]) -> None:
        """Another gateway, which led before this one, may have had instances where this one never had."""
        saved = await memory.load(NAME)
        known = from_bytes(saved, NAME) if saved is not None else set()
        left = known - before - places
        if left:
            self._owner = self._owner or _owner(self._environment)
            self._sweep_all(left)
        self._shared = (known | before | places) - self._swept
        if self._shared != known:
            await memory.save(NAME, to_bytes(self._shared))

    async def _forget(self, place: Place) -> None:
        self._record(self._recorded() - {place})
        self._swept.add(place)
        if self._shared is not None and self._environment.memory is not None:
            self._shared.discard(place)
            await self._environment.memory.save(NAME, to_bytes(self._shared))

    def _sweep_all(self, places: set[Place]) -> None:
        for place in sorted(places):
            self._sweeps.add(asyncio.get_running_loop().create_task(self._sweep(place)))

    def _in(self, namespace: str) -> list[RayInstances]:
        return [each for each in self._running.values() if each.namespace == namespace]

    async def _sweep(self, place: Place) -> None:
        """End what this gateway, or one that it replaces, has left there."""
        given = RaySource(command=("none",), address=place.address, namespace=place.namespace, python=place.python)
        cluster = self._connect(given)
        instances = RayInstances(
            cluster,
            place.namespace,
            {},
            owner=self._owner,
            grace_s=self._environment.grace_s,
            changes=self._environment.clock.elapsed_s,
            times=self._times,
        )
        instances.beside(self._in(place.namespace))
        running = asyncio.get_running_loop().create_task(instances.run(), name=f"ray-sweep-{place.namespace}")
        running.add_done_callback(_report_end)
        try:
            if await instances.until_swept(_SWEEP_S + self._environment.grace_s):
                await self._forget(place)
            else:
                log.warning("instances may be left on Ray: chiron ray list %s", place.options)
        finally:
            running.cancel()
            await asyncio.wait((running,))
            await cluster.close()

    def _hold(self, record: InstanceRecord, instances: RayInstances, url: str = "") -> Hold:
        hold = instances.hold(record.instance.kind.name, record.check_now, url)
        record.resources.callback(instances.release, hold)
        return hold

    async def _serve(self, record: InstanceRecord) -> None:
        """One instance from its turn to its end, and what its kind learns from it."""
        kind = record.instance.kind.name
        starts = self._starts[kind]
        record.resources.callback(starts.over, record)
        hold = self._claims.pop(record.instance.id, None)
        if hold is None:
            try:
                await starts.turn(record)
            except StartDelayedError as error:
                raise InstanceFailedError(str(error)) from None
            hold = self._hold(record, self._by_kind[kind])
        record.began_s = asyncio.get_running_loop().time()
        try:
            await self._run(record, hold, starts)
        except ActorLostError:
            raise
        except InstanceFailedError as error:
            starts.failed(began_s=record.began_s, ready_s=record.ready_s, reason=str(error))
            raise

    async def _run(self, record: InstanceRecord, hold: Hold, starts: Starts) -> None:
        source = self._sources[record.instance.kind.name]
        if hold.before_url:
            found = self._found_itself(record, hold.before_url, source)
            await until_known((hold.placed, hold.lost), found, self._unknown_s)
        _raise(await unless(hold.lost, _result(hold.placed)), ready=False)
        hold.placed.result()
        try:
            async with asyncio.timeout(source.start_timeout_s):
                _raise(await unless(hold.lost, _result(hold.url)), ready=False)
                url = hold.url.result()
                probe = Probe(HealthTarget(url=url, path=source.health_path), self._settings.health)
                record.resources.push_async_callback(probe.close)
                _raise(await unless(hold.lost, probe.until_passed(record.check_now)), ready=False)
        except TimeoutError:
            why = probe.reason if hold.url.done() else hold.why or "it has printed no ready line"
            raise InstanceFailedError(f"it was not ready within {source.start_timeout_s:g} s: {why}") from None
        self._records.ready(record, url)
        starts.succeeded(record)
        lasted = asyncio.get_running_loop().call_later(self._settings.backoff.stable_after_s, starts.lasted)
        record.resources.callback(lasted.cancel)
        _raise(await unless(hold.lost, probe.until_failed(record.check_now)), ready=True)
        raise InstanceFailedError(f"it stopped answering: {probe.reason}")

    async def _found_itself(self, record: InstanceRecord, url: str, source: RaySource) -> None:
        """Ray does not say whether it is there; whoever told of it had it, and it answers."""
        probe = Probe(HealthTarget(url=url, path=source.health_path), self._settings.health)
        record.resources.push_async_callback(probe.close)
        await probe.until_passed(record.check_now)
        self._records.ready(record, url)
        await probe.until_failed(record.check_now)
        raise InstanceFailedError(f"it stopped answering: {probe.reason}")

    def _kind(self, kind: str) -> KindReport:
        state, starts = self._by_kind[kind].state(kind), starts_report(self._starts[kind].status())
        trouble = starts.trouble
        limits = [starts.instances_max] if starts.instances_max is not None else []
        if state.overdue:
            limits.append(state.holds - state.overdue)
            if trouble is None:
                trouble = Trouble(reason="no node of the cluster has room for it", retry_s=RETRY_S, outside=True)
        return KindReport(
            trouble=trouble,
            instances_max=min(limits, default=None),
            starts=starts.starts,
            found=state.found,
            known=state.known,
            notes=state.notes,
        )


def _owner(environment: FleetEnvironment) -> str:
    """As it is in names."""
    owner = environment.owner()
    return hashlib.sha256(owner.encode()).hexdigest()[:8] if owner else ""


async def _result(future: asyncio.Future[Any]) -> None:
    await asyncio.wait((future,))


def _raise(loss: Loss | None, *, ready: bool) -> None:
    """A node that is lost is nobody's fault; an actor that cannot even start would be tried for ever."""
    if loss is not None:
        raise (ActorLostError if loss.outside and ready else InstanceFailedError)(loss.reason)


def _report_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler({"message": "a Ray cluster is no longer watched", "exception": error})
