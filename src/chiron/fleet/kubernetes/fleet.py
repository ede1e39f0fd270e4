"""Instances as pods of a Deployment, StatefulSet or LeaderWorkerSet.

Kubernetes places, restarts and adds nodes; Chiron sets how many replicas there are, takes each ready pod for an
instance, and names the one that goes. When the gateway ends nothing is scaled: the next one takes over what runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping

from chiron.core.types import Instance
from chiron.fleet.health import HealthTarget, Probe
from chiron.fleet.kubernetes.access import find_access
from chiron.fleet.kubernetes.client import Client
from chiron.fleet.kubernetes.holds import Hold, StartFailedError
from chiron.fleet.kubernetes.pods import FOR_CLIENTS, Pod, read_address
from chiron.fleet.kubernetes.source import KubernetesSource
from chiron.fleet.kubernetes.workload import Workload
from chiron.fleet.port import Claim, FleetEnvironment, FleetReport, KindReport, Trouble
from chiron.fleet.records import InstanceFailedError, InstanceRecord, InstanceRecords, starts_report
from chiron.fleet.starts import StartDelayedError, Starts
from chiron.fleet.waiting import unless, until_known

log = logging.getLogger("chiron.fleet")

_CLOSE_TIMEOUT_S = 5.0
UNKNOWN_S = 5.0
"""For so long the API server may take to say whether a pod of another gateway is there."""
RETRY_S = 10.0
"""Of what is in the cluster's hands: when there may be news."""


class PodTakenError(InstanceFailedError):
    """Its pod was deleted by somebody else: no fault of the start."""


class KubernetesFleet:
    """Implements ``LiveFleet``."""

    def __init__(
        self, sources: Mapping[str, KubernetesSource], environment: FleetEnvironment, unknown_s: float = UNKNOWN_S
    ) -> None:
        """``sources`` by InstanceKind.name. Raises ValueError for credentials that cannot be used."""
        self._sources = dict(sources)
        self._unknown_s = unknown_s
        self._settings = environment.settings
        self._records = InstanceRecords(clock=environment.clock, events=environment.events, serve=self._serve)
        self._starts = {name: Starts(self._settings.backoff) for name in sources}
        self._claims: dict[int, Hold] = {}
        """Of instances that take over a replica that is there, until they are served; by instance id."""
        self._clients: dict[tuple[str, str], Client] = {}
        self._workloads: dict[str, Workload] = {}
        named: dict[str, str] = {}
        for kind, source in sources.items():
            access = find_access(os.environ, source.kubeconfig, source.context)
            client = self._clients.setdefault(
                (source.kubeconfig, source.context), Client(access, changes=environment.clock.elapsed_s)
            )
            workload = Workload(
                source,
                client,
                source.namespace or access.namespace,
                advise=environment.advise,
                noted=lambda text, kind=kind: environment.noted(kind, text),  # type: ignore[misc]
                why=lambda kind=kind: environment.why(kind),  # type: ignore[misc]
                wall_s=lambda: environment.clock.wall_s(environment.clock.elapsed_s()),
            )
            if workload.name in named:
                raise ValueError(f"kinds {named[workload.name]!r} and {kind!r} are both pods of {workload.name}")
            named[workload.name] = kind
            self._workloads[kind] = workload
        self._running: list[asyncio.Task[None]] = []
        for kind, workload in self._workloads.items():
            task = asyncio.get_running_loop().create_task(workload.run(), name=f"workload-{kind}")
            task.add_done_callback(_report_end)
            self._running.append(task)

    def create(self, instance: Instance) -> None:
        """Answered by ``instance_ready`` once there is a pod for it, or by ``instance_failed``."""
        workload = self._workloads[instance.kind.name]
        self._records.begin(instance)
        record = self._records.record(instance)
        if workload.spare and record is not None:  # At once, so that nobody else is told of it.
            self._claims[instance.id] = self._hold(record, workload)

    def remove(self, instance: Instance) -> None:
        """At any time; harmless twice."""
        self._records.end(instance)

    def suspect(self, instance: Instance) -> None:
        """Somebody could not reach it: check now, and fail it if it does not answer."""
        self._records.suspect(instance)

    def adopt(self, kind: str, url: str) -> Claim | None:
        workload = self._workloads.get(kind)
        address = _address(url, self._sources[kind].port) if workload is not None else ""
        if workload is None or not address or not workload.may_claim(address):
            return None

        def begin(instance: Instance) -> None:
            self._records.begin(instance, runs=True)
            record = self._records.record(instance)
            if record is not None:
                self._claims[instance.id] = self._hold(record, workload, address)

        return Claim(begin=begin, found=False)  # Its watch has to find a pod with this address.

    def report(self) -> FleetReport:
        return FleetReport(kinds={kind: self._kind(kind) for kind in self._workloads})

    async def close(self, *, hands_over: bool = False) -> None:
        """Let every pod go on."""
        for task in self._running:  # First, so that nothing is scaled for the instances that end now.
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._records.close(_CLOSE_TIMEOUT_S)
        for workload in self._workloads.values():
            await workload.close()
        for client in self._clients.values():
            await client.close()

    def _hold(self, record: InstanceRecord, workload: Workload, address: str = "") -> Hold:
        hold = workload.hold(record.check_now, lambda reason: self._records.leaving(record, reason), address)
        record.resources.callback(workload.release, hold)
        return hold

    async def _serve(self, record: InstanceRecord) -> None:
        """One instance from its turn to its end, and what its kind learns from it."""
        kind = record.instance.kind.name
        workload, starts = self._workloads[kind], self._starts[kind]
        record.resources.callback(starts.over, record)
        hold = self._claims.pop(record.instance.id, None)
        if hold is None:
            try:
                await starts.turn(record)
            except StartDelayedError as error:
                raise InstanceFailedError(str(error)) from None
            hold = self._hold(record, workload)
        record.began_s = asyncio.get_running_loop().time()
        try:
            await self._run(record, workload, hold, starts)
        except PodTakenError:
            raise
        except (InstanceFailedError, StartFailedError) as error:
            starts.failed(began_s=record.began_s, ready_s=record.ready_s, reason=str(error))
            raise InstanceFailedError(str(error)) from None

    async def _run(self, record: InstanceRecord, workload: Workload, hold: Hold, starts: Starts) -> None:
        source = self._sources[record.instance.kind.name]
        if hold.address:
            found = self._found_itself(record, _at(hold.address, source.port), source)
            await until_known((hold.pod,), found, self._unknown_s)
        while True:
            pod = await hold.pod
            probe = Probe(self._target(source, pod), self._settings.health)
            record.resources.push_async_callback(probe.close)
            if await self._answers(record, source, hold, probe):
                break
            if hold.address:
                raise PodTakenError(hold.lost.result().reason)
            workload.wait_again(hold)
        self._records.ready(record, _url(pod, source.port))
        starts.succeeded(record)
        lasted = asyncio.get_running_loop().call_later(self._settings.backoff.stable_after_s, starts.lasted)
        record.resources.callback(lasted.cancel)
        if (loss := await unless(hold.lost, probe.until_failed(record.check_now))) is not None:
            raise (PodTakenError if loss.taken else InstanceFailedError)(loss.reason)
        workload.replace(hold)
        raise InstanceFailedError(f"pod {pod.name} stopped answering: {probe.reason}")

    async def _found_itself(self, record: InstanceRecord, url: str, source: KubernetesSource) -> None:
        """The API server does not say whether its pod is there; whoever told of it had it, and it answers."""
        probe = Probe(HealthTarget(url=url, path=source.health_path, headers=source.headers), self._settings.health)
        record.resources.push_async_callback(probe.close)
        await probe.until_passed(record.check_now)
        self._records.ready(record, url)
        await probe.until_failed(record.check_now)
        raise InstanceFailedError(f"it stopped answering: {probe.reason}")

    async def _answers(self, record: InstanceRecord, source: KubernetesSource, hold: Hold, probe: Probe) -> bool:
        """False: its pod was lost before it did."""
        try:
            async with asyncio.timeout(source.start_timeout_s):
                return await unless(hold.lost, probe.until_passed(record.check_now)) is None
        except TimeoutError:
            # Not deleted: it has never been seen to be an engine, and may be whatever somebody has named.
            raise InstanceFailedError(
                f"its pod is ready, and does not answer within {source.start_timeout_s:g} s: {probe.reason}"
            ) from None

    def _target(self, source: KubernetesSource, pod: Pod) -> HealthTarget:
        return HealthTarget(url=_url(pod, source.port), path=source.health_path, headers=source.headers)

    def _kind(self, kind: str) -> KindReport:
        state, starts = self._workloads[kind].state(), starts_report(self._starts[kind].status())
        trouble, most = starts.trouble, starts.instances_max
        limits = [state.most] if state.most is not None else []
        if state.overdue:
            limits.append(state.holds - state.overdue)
            if trouble is None and state.cause is not None:
                trouble = Trouble(reason=FOR_CLIENTS[state.cause.name], retry_s=RETRY_S, outside=True)
        if state.most == 0 and trouble is None:
            trouble = Trouble(reason="somebody has scaled it to zero", retry_s=RETRY_S, outside=True)
        if most is not None:
            limits.append(most)
        return KindReport(
            trouble=trouble,
            instances_max=min(limits, default=None),
            starts=starts.starts,
            found=state.found,
            fewest=state.fewest,
            known=state.known,
            notes=state.notes,
        )


def _url(pod: Pod, port: int) -> str:
    return _at(pod.address, port)


def _at(address: str, port: int) -> str:
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _address(url: str, port: int) -> str:
    """Of the pod that is at this URL; empty: none can be."""
    address = read_address(url.removeprefix("http://").removesuffix(f":{port}").strip("[]"))
    return address if url == _at(address, port) else ""


def _report_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler({"message": "a workload is no longer watched", "exception": error})
