"""Instances as processes on this machine.

An instance starts when its kind may be tried (``starts``), its GPUs are free (``devices``) and its engine, run by a
supervisor, answers; it has failed when its process ends or stops answering. The fleet never restarts an instance: the
control plane is told that it failed and asks for another one, so that it alone decides how many there are. An engine
may outlive its instance: it sleeps (``sleepers``), and wakes as that of another one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from chiron.core.types import Instance
from chiron.fleet.health import HealthTarget, Probe
from chiron.fleet.port import Claim, FleetEnvironment, FleetReport, InstanceUsage
from chiron.fleet.process import orphans
from chiron.fleet.process.devices import Devices
from chiron.fleet.process.engine_process import EngineExitedError, EngineProcess, tail
from chiron.fleet.process.sleepers import HostedEngine, ProcessSleepers, SleepSource
from chiron.fleet.process.usage import CpuTimes, cpu_share, sample_below
from chiron.fleet.records import InstanceFailedError, InstanceRecord, InstanceRecords, starts_report
from chiron.fleet.starts import StartDelayedError, Starts

log = logging.getLogger("chiron.fleet")

TOKEN_BUDGET = "{max_num_batched_tokens}"
"""In a command: the token budget of its steps that the instance is to have."""
_CLOSE_MARGIN_S = 5.0
"""Beyond the longest stop timeout, before ``close`` falls back on killing by mark."""
_LEAVE_STARTS = 2
"""Failures in a row of a kind after which sleepers leave the GPUs on which it cannot start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSource:
    """How an instance of a kind is started."""

    command: tuple[str, ...]
    """``{port}`` in any argument becomes a free port; without it the process prints ``chiron-engine ready port=N``.
    ``{max_num_batched_tokens}`` becomes the instance's token budget."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Added to the environment of this process; not shown, it may hold secrets."""
    health_path: str = "/health"
    """Answers 200 once the engine can take requests."""
    start_timeout_s: float = 300.0
    """Longest from the start of the process until it answers, seconds; large models load for minutes."""
    stop_timeout_s: float = 10.0
    """Seconds between SIGTERM and SIGKILL."""
    gpus: int = 0
    """Devices that one instance gets to itself, if the fleet has any to hand out."""
    log_bytes_max: int = 8 * 1024 * 1024
    """Size at which an instance's log is rotated, once: it takes at most twice that."""
    sleep: SleepSource | None = None
    """None: instances are stopped, and never sleep."""
    standing: ClassVar[int] = 0
    instances_max: ClassVar[int | None] = None
    summary: ClassVar[str] = "started here"

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError("command is empty; it must name the engine's program")
        if self.gpus < 0:
            raise ValueError(f"gpus is {self.gpus}; it must be 0 or more")
        for name in ("start_timeout_s", "stop_timeout_s", "log_bytes_max"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


class ProcessFleet:
    """Implements ``LiveFleet`` and ``LiveSleepers``."""

    def __init__(self, sources: Mapping[str, ProcessSource], environment: FleetEnvironment) -> None:
        """``sources`` by InstanceKind.name. Raises ValueError or OSError for what cannot work."""
        devices = environment.devices
        for name, source in sources.items():
            if devices and source.gpus > len(devices):
                raise ValueError(f"kind {name!r}: gpus is {source.gpus}; there are {len(devices)} devices")
        environment.log_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.devices = Devices(devices)
        self._settings = environment.settings
        self._sources = dict(sources)
        self._directory = environment.log_directory
        self._owner = orphans.owner_mark()
        self._records = InstanceRecords(clock=environment.clock, events=environment.events, serve=self._serve)
        self._starts = {name: Starts(self._settings.backoff) for name in sources}
        self._events = environment.events
        self._clock = environment.clock
        self._sleepers = ProcessSleepers(
            {name: source.sleep for name, source in sources.items() if source.sleep is not None},
            environment.sleepers,
            self._settings.health,
            self._tell_asleep,
        )
        self.sleeping_kinds = self._sleepers.kinds
        self._engines: dict[int, HostedEngine] = {}
        """Those of instances, by instance id."""
        self._logs: set[Path] = set()
        """Of running engines."""
        self._ports: set[int] = set()
        """Given to running engines; one of them may not have bound its own yet."""
        self._spawning = asyncio.Lock()
        """Making a process holds up the loop for milliseconds; several must not do so in a row."""
        self._cpu: dict[int, tuple[float, CpuTimes]] = {}
        self._usage: dict[int, InstanceUsage] = {}
        self._sampling: asyncio.Task[None] | None = None
        if killed := orphans.kill_orphans():
            log.warning("ended %d engine processes whose gateway is gone: %s", len(killed), killed)

    def create(self, instance: Instance) -> None:
        """Answered by ``instance_ready`` or ``instance_failed``, later."""
        assert instance.kind.name in self._sources, f"no process kind {instance.kind.name!r}"
        self._records.begin(instance)
        if self._sampling is None:
            self._sampling = asyncio.get_running_loop().create_task(self._sample())

    def remove(self, instance: Instance) -> None:
        """At any time, also while it starts; harmless twice."""
        self._records.end(instance)

    def sleep(self, instance: Instance) -> None:
        """Answered by ``instance_asleep`` or ``instance_failed``, later."""
        engine = self._engines.get(instance.id)
        if engine is not None:  # Else it has failed, and that is about to be told.
            engine.to_sleep.set()

    def keep_asleep(self, kind: str, most: int) -> None:
        self._sleepers.keep(kind, most)

    def suspect(self, instance: Instance) -> None:
        """Somebody could not reach it: check now, and fail it if it does not answer."""
        self._records.suspect(instance)

    def adopt(self, kind: str, url: str) -> Claim | None:
        return None  # They end with the gateway that started them.

    def report(self) -> FleetReport:
        return FleetReport(
            kinds={
                name: replace(starts_report(starts.status()), sleep=self._sleepers.status(name))
                for name, starts in self._starts.items()
            },
            usage={instance: usage for instance, usage in self._usage.items() if instance in self._engines},
        )

    def log_path(self, instance: Instance) -> Path:
        """Its output, standard and error; what was rotated is beside it, with ``.1``. One that woke goes on writing
        where it began."""
        engine = self._engines.get(instance.id)
        return engine.log if engine is not None else self._new_log(instance)

    def _new_log(self, instance: Instance) -> Path:
        model = re.sub(r"[^A-Za-z0-9._-]+", "_", instance.model)
        return self._directory / f"{model}-{instance.id}.log"

    async def close(self, *, hands_over: bool = False) -> None:
        """Stop everything, side by side; nothing is left when this returns, whoever follows."""
        longest_s = max((source.stop_timeout_s for source in self._sources.values()), default=0.0)
        await asyncio.gather(self._records.close(longest_s + _CLOSE_MARGIN_S), self._sleepers.close())
        await self._sleepers.close()  # What fell asleep just then.
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.wait((self._sampling,))
        mine = f"{self._owner}/{id(self):x}."
        await asyncio.to_thread(orphans.kill_marked, lambda mark: mark.startswith(mine))

    async def _serve(self, record: InstanceRecord) -> None:
        """One instance from its turn to its end, and what its kind learns from it."""
        starts = self._starts[record.instance.kind.name]
        record.resources.callback(starts.over, record)
        try:
            await starts.turn(record)
        except StartDelayedError as error:
            raise InstanceFailedError(str(error)) from None
        source = self._sources[record.instance.kind.name]
        devices = await self._take_devices(record, source)
        record.began_s = asyncio.get_running_loop().time()
        try:
            await self._run(record, source, devices, starts)
        except (EngineExitedError, OSError, InstanceFailedError) as error:
            path = self.log_path(record.instance)
            lines = tail(path, self._settings.reason_lines)
            reason = f"{error}; last lines of {path}:\n{lines}" if lines else str(error)
            starts.failed(began_s=record.began_s, ready_s=record.ready_s, reason=reason)
            if record.ready_s is None and starts.failures >= _LEAVE_STARTS:
                self._sleepers.leave(devices, record.instance.kind.name)
            if (how := starts.status()).state != "ok":
                kind_name, wait_s = record.instance.kind.name, how.next_start_in_s
                log.warning(
                    "%s is %s: %d failures in a row, next start in %.1f s", kind_name, how.state, how.failures, wait_s
                )
            raise InstanceFailedError(reason) from error

    async def _run(
        self, record: InstanceRecord, source: ProcessSource, devices: tuple[str, ...], starts: Starts
    ) -> None:
        engine = await self._woken(record, source, devices) or await self._started(record, source, devices)
        self._records.ready(record, engine.url)
        starts.succeeded(record)
        woke = record.instance.source == "memory"

        def lasted() -> None:
            starts.lasted()
            if woke:
                self._sleepers.lasted(engine.kind)

        timer = asyncio.get_running_loop().call_later(self._settings.backoff.stable_after_s, lasted)
        record.resources.callback(timer.cancel)
        try:
            await engine.process.unless_exited(self._watch(record, source, engine))
        except (EngineExitedError, InstanceFailedError) as error:
            if woke and asyncio.get_running_loop().time() < timer.when():
                self._sleepers.failed_awake(engine.kind, str(error))
            raise
        await self._fall_asleep(record, engine)

    async def _take_devices(self, record: InstanceRecord, source: ProcessSource) -> tuple[str, ...]:
        if not self.devices.names or not source.gpus:
            return ()
        wait_s = self._settings.backoff.start_wait_s

        def prefer(free: Sequence[str]) -> Sequence[str]:
            return self._sleepers.preferred(record.instance.kind.name, source.gpus, free)

        devices = await self.devices.take(source.gpus, wait_s, prefer)
        if devices is None:
            raise InstanceFailedError(
                f"{source.gpus} of {len(self.devices.names)} devices did not become free within {wait_s:g} s"
            )
        record.resources.callback(self.devices.give, devices)
        return devices

    async def _woken(
        self, record: InstanceRecord, source: ProcessSource, devices: tuple[str, ...]
    ) -> HostedEngine | None:
        """The engine of a sleeper that could wake there and did."""
        instance = record.instance
        engine = self._sleepers.claim(instance.kind.name, _command(source, instance), devices)
        if engine is None:
            return None
        self._host(record, engine)
        why = await self._sleepers.wake(engine, source.health_path, record.check_now)
        if not why:
            instance.source = "memory"
            return engine
        log.warning("instance %d of %s starts anew, its sleeper did not wake: %s", instance.id, instance.model, why)
        self._forget(instance.id)
        record.began_s = asyncio.get_running_loop().time()
        return None

    async def _started(self, record: InstanceRecord, source: ProcessSource, devices: tuple[str, ...]) -> HostedEngine:
        """An engine whose process has been started and answers."""
        async with AsyncExitStack() as resources:
            given = any("{port}" in argument for argument in source.command)
            port = self._free_port(resources) if given else None
            engine = await self._start(record.instance, source, port, devices, resources)
        self._host(record, engine)
        engine.url = await engine.process.unless_exited(self._until_ready(record, engine.process, source, port))
        return engine

    async def _start(
        self,
        instance: Instance,
        source: ProcessSource,
        port: int | None,
        devices: tuple[str, ...],
        resources: AsyncExitStack,
    ) -> HostedEngine:
        """``resources`` hold its port; they become the engine's."""
        env = {**os.environ, **source.env}
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = env["HIP_VISIBLE_DEVICES"] = ",".join(devices)
        path = self._new_log(instance)
        self._logs.add(path)
        resources.callback(self._logs.discard, path)
        prune_logs(self._directory, self._settings.logs_kept, self._logs)
        command = _command(source, instance)
        async with self._spawning:
            process = await EngineProcess.start(
                [argument.replace("{port}", str(port)) for argument in command],
                env=env,
                stop_timeout_s=source.stop_timeout_s,
                log=path,
                log_bytes_max=source.log_bytes_max,
                mark=f"{self._owner}/{id(self):x}.{instance.id}",
            )
            resources.push_async_callback(process.stop)
            return HostedEngine(
                kind=instance.kind.name,
                process=process,
                command=command,
                devices=devices,
                log=path,
                resources=resources.pop_all(),
            )

    def _host(self, record: InstanceRecord, engine: HostedEngine) -> None:
        """It is this instance's now, and ends with it unless it sleeps."""
        record.resources.push_async_callback(engine.end_unless_asleep)
        self._engines[record.instance.id] = engine
        record.resources.callback(self._forget, record.instance.id)

    async def _fall_asleep(self, record: InstanceRecord, engine: HostedEngine) -> None:
        """It has drained, and nobody needs it now."""
        instance = record.instance
        why = await self._sleepers.put(engine)
        if why:
            log.info("instance %d of %s is stopped and does not sleep: %s", instance.id, instance.model, why)
        await engine.end_unless_asleep()  # First: what it holds is given back after it, also if this is cancelled.
        await record.resources.aclose()
        self._records.ended(record, lambda: self._events.instance_asleep(instance))

    def _tell_asleep(self) -> None:
        """Not at once: who is told may just have asked for it."""

        def tell() -> None:
            if not self._records.closed:
                self._events.kinds_asleep(self._sleepers.counts())

        asyncio.get_running_loop().call_soon(self._clock.post, tell)

    async def _until_ready(
        self, record: InstanceRecord, process: EngineProcess, source: ProcessSource, port: int | None
    ) -> str:
        """Its URL, once it answers there."""
        probe: Probe | None = None
        try:
            async with asyncio.timeout(source.start_timeout_s):
                if port is None:
                    await process.announced.wait()
                    port = process.port
                url = f"http://127.0.0.1:{port}"
                probe = Probe(HealthTarget(url=url, path=source.health_path), self._settings.health)
                await probe.until_passed(record.check_now)
                return url
        except TimeoutError:
            why = probe.reason if probe is not None else "it has printed no ready line"
            raise InstanceFailedError(f"it was not ready within {source.start_timeout_s:g} s: {why}") from None
        finally:
            if probe is not None:
                await probe.close()

    async def _watch(self, record: InstanceRecord, source: ProcessSource, engine: HostedEngine) -> None:
        """Until it is to sleep."""
        probe = Probe(HealthTarget(url=engine.url, path=source.health_path), self._settings.health)
        failing = asyncio.ensure_future(probe.until_failed(record.check_now))
        leaving = asyncio.ensure_future(engine.to_sleep.wait())
        try:
            await asyncio.wait((failing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not failing.done():
                engine.to_sleep.clear()
                return
            failing.result()
        finally:
            failing.cancel()
            leaving.cancel()
            await asyncio.gather(failing, leaving, return_exceptions=True)
            await probe.close()
        raise InstanceFailedError(f"it stopped answering: {probe.reason}")

    def _free_port(self, resources: AsyncExitStack) -> int:
        """Free now. If another program takes it before the engine, this start fails, and the next gets another."""
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
            if port not in self._ports:
                self._ports.add(port)
                resources.callback(self._ports.discard, port)
                return port

    def _forget(self, instance_id: int) -> None:
        self._engines.pop(instance_id, None)
        self._usage.pop(instance_id, None)
        self._cpu.pop(instance_id, None)

    async def _sample(self) -> None:
        """Off the loop's thread: a pass over /proc takes milliseconds."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._settings.usage_period_s)
            roots = {instance: engine.process.supervisor_pid for instance, engine in self._engines.items()}
            if not roots:
                continue
            trees = await asyncio.to_thread(sample_below, roots)
            now_s = loop.time()
            for instance, tree in trees.items():
                engine = self._engines.get(instance)
                if engine is None or engine.process.pid is None:
                    continue
                before_s, before = self._cpu.get(instance, (now_s, tree.cpu_s))
                self._cpu[instance] = now_s, tree.cpu_s
                self._usage[instance] = InstanceUsage(
                    cpu_share=cpu_share(before, tree.cpu_s, now_s - before_s),
                    rss_bytes=tree.rss_bytes,
                    pid=engine.process.pid,
                    restarts=self._starts[engine.kind].failures_total,
                )


def _command(source: ProcessSource, instance: Instance) -> tuple[str, ...]:
    """The instance's, but for its port."""
    budget = str(instance.max_num_batched_tokens)
    return tuple(argument.replace(TOKEN_BUDGET, budget) for argument in source.command)


def prune_logs(directory: Path, kept: int, in_use: set[Path]) -> None:
    """Delete the oldest logs beyond ``kept``."""
    logs: list[tuple[float, Path]] = []
    for path in directory.glob("*.log*"):
        try:
            logs.append((path.stat().st_mtime, path))
        except FileNotFoundError:
            continue
    logs.sort()
    for _, path in logs[: max(0, len(logs) - kept)]:
        if path.with_name(path.name.removesuffix(".1")) not in in_use:
            path.unlink(missing_ok=True)
