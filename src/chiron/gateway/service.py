"""The gateway: everything wired, started, and stopped in order.

``run`` serves until it is cancelled. ``Service`` is the same in parts, for tests and tools that look inside.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from chiron.core.ports import Journal
from chiron.core.types import Decision, Instance
from chiron.fleet.port import FleetEnvironment
from chiron.fleet.union import UnionFleet
from chiron.gateway.api import ApiLimits, ApiState, make_app
from chiron.gateway.batch.opening import StoreOpening
from chiron.gateway.batch.runner import BatchRunner
from chiron.gateway.brain.input_file import InputFile
from chiron.gateway.brain.learned import LearnedKeeper
from chiron.gateway.gateway import BEFORE_S, Gateway
from chiron.gateway.instances.engine import InstanceEngine
from chiron.gateway.instances.engines import Engines
from chiron.gateway.instances.fleet_memory import FleetMemory
from chiron.gateway.owner import owner_of
from chiron.gateway.processes.start import BrainStart
from chiron.gateway.processes.workers import Workers
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.outages import Outage
from chiron.gateway.reporting.desired import desired_page
from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter, wall_time
from chiron.gateway.reporting.journal import LiveJournal
from chiron.gateway.reporting.live_result import LiveRecorder
from chiron.gateway.reporting.metrics import LoopLag, Metrics
from chiron.gateway.reporting.readiness import Readiness
from chiron.gateway.reporting.status import LeaderReport, RelayReport, StatusSources, status
from chiron.gateway.serving import collect_rarely, models_of, server_limits, tls_context
from chiron.gateway.settings import ModelSettings, ServeConfig
from chiron.net.clock import LiveClock
from chiron.net.files import files_max, files_open
from chiron.net.server import HttpServer, serve
from chiron.policies.registry import make_policy
from chiron.policies.stages.registry import with_stages
from chiron.runtime.input_log import MarkedLiveClock, Point, RecordedOutputs, described
from chiron.store.directory import make_directory
from chiron.store.make import make_store
from chiron.store.postgres.settings import PostgresSettings
from chiron.telemetry.advice import log_facts
from chiron.telemetry.decision_text import words
from chiron.telemetry.errors import TelemetryError
from chiron.telemetry.result import Result
from chiron.telemetry.store import save_result

log = logging.getLogger("chiron.gateway")

STORE_STOP_S = 10.0
"""Beyond the grace period: for so long a stop waits for a store that does not answer."""
FILES_LOOK_S = 1.0
"""Between two looks at how many file descriptors are open."""
JOURNAL_PERIOD_S = 0.25
"""Longest that the event log may be behind while nothing happens."""
RESULT = "result.chiron"
"""File in the data directory that a run leaves behind, for ``chiron explain`` and reports."""
FILES_SHORT = 0.85
"""Of the file descriptors that there may be: from here on it is said."""
FILES_WARN_S = 60.0
SWITCH_INTERVAL_S = 0.0005
"""How long a thread that computes (validation of a job's lines) may keep the loop waiting."""


class Service:
    """One gateway."""

    def __init__(self, config: ServeConfig, *, advise: bool = False, brain: BrainStart | None = None) -> None:
        """To be made on the loop that runs it. ``brain``: relays in other processes listen; None: this one does.
        Raises ValueError or OSError for what cannot work."""
        self.config = config
        self.advise = advise
        loop = asyncio.get_running_loop()
        point = Point()
        recorded = config.input_log is not None
        ahead_s = BEFORE_S if brain is not None and brain.follows else 0.0
        time_s = brain.time_s if brain is not None else time.monotonic
        self.clock = (
            MarkedLiveClock(loop, point, time_s=time_s, ahead_s=ahead_s)
            if recorded
            else LiveClock(loop, time_s=time_s, ahead_s=ahead_s)
        )
        self._input_file = InputFile(self.clock, point) if recorded else None
        make_directory(config.data)
        self._numbers = itertools.count(1)
        self.models = models_of(config)
        self.keys = KeyRing(config.keys, config.admin_key_hash, admin_open=config.server.loopback)
        specs = [m.spec() for m in config.models]
        classes = list(config.classes.values())
        self.recorder = LiveRecorder(models=specs, classes=classes)
        self.journal = LiveJournal(recorder=self.recorder)
        kinds = [kind for model in config.models for kind in model.kinds]
        opened, shared = asyncio.Event(), isinstance(config.store, PostgresSettings)
        self.engines = Engines(
            clock=self.clock,
            kinds=kinds,
            models=self.models.by_name,
            make_fleet=lambda events: UnionFleet(
                {kind.kind.name: kind.source for kind in kinds},
                FleetEnvironment(
                    clock=self.clock,
                    events=events,
                    log_directory=config.data / "logs",
                    directory=config.data,
                    memory=FleetMemory(opened, lambda: self.store) if shared else None,
                    settings=config.fleet,
                    sleepers=config.sleepers,
                    devices=tuple(config.devices),
                    owner=lambda: owner_of(config),
                    settle_s=brain.settle_s if brain is not None else 0.0,
                    grace_s=config.server.grace_s,
                    advise=advise,
                    noted=self._fleet_noted,
                    why=self._why,
                ),
            ),
            failed=self._instance_failed,
        )
        policy = make_policy(config.policy, config.policy_settings)
        if config.stage_policy:
            policy = with_stages(policy, config.stage_policy, config.stage_settings)
        sleeps = self.engines.sleeps and not advise
        self._facts = described(policy, specs, classes, config.gpus, advise=advise, sleeps=sleeps)
        journal: Journal = _TellsOperator(self.journal, advise=advise)
        if self._input_file is not None:
            journal = RecordedOutputs(journal, self._input_file.write)
        self.gateway = Gateway(
            clock=self.clock,
            engines=self.engines,
            journal=journal,
            models=self.models,
            specs=specs,
            classes=classes,
            policy=policy,
            keys=self.keys,
            limits=config.limits,
            next_id=self._next_id,
            responded=self.journal.responded,
            own_hosts=config.server.own_hosts,
            gpus_max=config.gpus,
            observer=self.journal.observe,
            scrape_period_s=config.telemetry.scrape_period_s,
            capacity_told=self._capacity_told,
            outage_changed=self._outage_changed,
            stages=(self.recorder,),
            advise=advise,
            recording=None if self._input_file is None else self._input_file.recording,
        )
        self.plane = self.gateway.plane
        self.recorder.open_requests = self.plane.unfinished
        self.inputs = self.gateway.inputs
        self.desk = self.gateway.desk
        self.front = self.gateway.front
        self.outages = self.gateway.outages
        leads = brain.leads if brain is not None else None
        self.store = make_store(config.store, config.data, self._wall_s, leads)
        self.runner = BatchRunner(
            store=self.store,
            clock=self.clock,
            completions=self.inputs,
            announcements=self.inputs,
            models=self.models,
            keys=self.keys,
            next_id=self._next_id,
            settings=config.batch,
            clock_set_s=lambda: time.time() - self._wall_s(),
        )
        self.learned = LearnedKeeper(store=self.store, clock=self.clock, plane=self.inputs, wall_s=self._wall_s)
        self.url = ""
        self._begun_s = 0.0
        self._stopping = False
        self._files_warned_s = -FILES_WARN_S
        self._lag = LoopLag(loop)
        self.opening = StoreOpening(self.store, self.runner, clock=self.clock, data=config.data, opened=opened)
        self._ready = Readiness(
            config.models,
            clock=self.clock,
            front=self.front,
            models=self.models,
            outages=self.outages,
            plane=self.plane,
        )
        self.metrics = Metrics(self.plane, self.journal, self.around)
        self._server: HttpServer | None = None
        self._brain = brain
        self._workers: Workers | None = None

    async def start(self) -> str:
        """Open the store, ask for the first instances, listen. Returns the URL that clients use."""
        config = self.config
        if await self.opening.begin():
            await self.learned.read()
        port = await self._listen()
        # Not before data directory and port are ours: it puts aside the log that another gateway may be writing.
        self.journal.log_to(self._event_writer())
        if self._input_file is not None and config.input_log is not None:
            told = config.telemetry
            self._input_file.open(
                config.input_log, rotate_bytes=told.rotate_bytes, rotate_keep=told.rotate_keep, facts=self._facts
            )
        scheme = "https" if config.server.tls else "http"
        host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
        self.url = f"{scheme}://{host}:{port}"
        if self._brain is None:
            self.clock.post(self._begin)
        else:
            await self._open_to_relays(self._brain)
        await self.opening.start_runner()
        collect_rarely()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        return self.url

    async def _open_to_relays(self, brain: BrainStart) -> None:
        """The first brain begins once all listen; one that follows hears from its first moment on what runs."""
        assert self._workers is not None
        if brain.follows:
            self.clock.post(self._begin)
        await self._workers.open(brain.relays.brain_path)
        brain.opened()
        if not brain.follows:
            await self._workers.wait()
            self.clock.post(self._begin)

    async def _listen(self) -> int:
        """Where clients, or relays for them, reach this process. Returns the clients' port."""
        config, brain = self.config, self._brain
        app, is_app = make_app(self._api_state()), lambda incoming: not self.front.takes(incoming)
        if brain is None:
            self._server = await serve(
                self.front.handle,
                host=config.server.host,
                port=config.server.port,
                ssl=tls_context(config),
                limits=server_limits(config),
                app=app,
                is_app=is_app,
                screen=self.front.screen,
            )
            return self._server.port
        path = str(brain.relays.api_path)
        limits = server_limits(config)
        self._server = await serve(
            self.front.handle, path=path, limits=limits, app=app, is_app=is_app, screen=self.front.screen
        )
        workers = self._workers = Workers(clock=self.clock, count=brain.relays.relays)
        workers.relays = self.gateway.open_to_relays(
            responded=self.journal.responded,
            listening=workers.listens,
            left=workers.left,
            term=brain.term,
            superseded=brain.superseded,
            expects=brain.expects,
            protocol=config.relays.protocol,
            gateway=config.gateways.name if config.gateways is not None else "",
        )
        return brain.relays.port

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no more, let running requests end for up to ``grace_s`` (default: the config's), then stop it all."""
        self._drain(True)
        await self._stop(grace_s, self._workers.stop if self._workers is not None else None)

    async def hand_over(self) -> None:
        """Stop at once, and let relays go on: another brain follows this one."""
        await self._stop(0.0, self._workers.part if self._workers is not None else None, hands_over=True)

    async def _stop(
        self,
        grace_s: float | None,
        stop_relays: Callable[[float], Awaitable[None]] | None,
        *,
        hands_over: bool = False,
    ) -> None:
        self._stopping = True
        grace_s = self.config.server.grace_s if grace_s is None else grace_s
        self.store.hurry(grace_s + STORE_STOP_S)
        if self._server is not None:
            closing = asyncio.gather(
                self._server.close(grace_s), *([stop_relays(grace_s)] if stop_relays is not None else [])
            )
            await self.runner.close()
            await closing
        self.clock.stop()
        if self.gateway.relays is not None:
            self.gateway.relays.close()
        self._lag.close()
        self.opening.close()
        if self._server is not None:  # Else nothing was served, and the directory may be another's.
            await self.learned.close()
        await self.engines.close(hands_over=hands_over)
        await self.store.close()
        self.journal.close()
        if self._input_file is not None:
            self._input_file.close()

    def accept_relay(self) -> Any:
        """The end of a connection to a relay of another gateway."""
        assert self._workers is not None
        return self._workers.accept()

    def known_relays(self) -> frozenset[str]:
        """Those that one which follows this brain has to wait for."""
        return self.gateway.relays.known if self.gateway.relays is not None else frozenset()

    def around(self) -> StatusSources:
        """What the status page and the metrics show besides the control plane."""
        return StatusSources(
            url=self.url,
            version=version("chiron-serving"),
            policy=self.config.policy_label,
            advise=self.advise,
            wall_origin_s=self.clock.wall_origin_s,
            instance_urls=self.engines.urls(),
            fleet=self.engines.report(),
            gpus_max=self.config.gpus,
            batches=self.opening.batches,
            batch_in_flight=self.runner.in_flight(),
            outages={model: outage.reason for model, outage in self.outages.now.items()},
            loop_lag_s=self._lag.worst_s,
            connections=self._connections(),
            relays=self._relay_reports(),
            relays_started=self._workers.started if self._workers is not None else 0,
            leader=self._leader_report(),
            cascades=self.gateway.desk.cascades.tallies,
            files_open=files_open(),
            files_max=files_max(),
        )

    def _connections(self) -> int:
        """Of clients: those that come to this process are relays' where there are any."""
        if self.gateway.relays is not None:
            return self.gateway.relays.connections
        return len(self._server.connections) if self._server is not None else 0

    def _leader_report(self) -> LeaderReport | None:
        relays, brain, gateways = self.gateway.relays, self._brain, self.config.gateways
        if relays is None or brain is None:
            return None
        several = gateways is not None and brain.leads is not None
        return LeaderReport(
            gateway=gateways.name if several and gateways is not None else "",
            address="{}:{}".format(*gateways.address) if several and gateways is not None else "",
            term=brain.term,
            leads_s=self.clock.now_s - self._begun_s,
            settling=self.plane.settling,
            relays_missing=relays.missing,
            fallback_placements=relays.own_placements,
            expired_requests=relays.expired,
        )

    def _relay_reports(self) -> tuple[RelayReport, ...]:
        relays = self.gateway.relays
        return tuple(
            RelayReport(
                pid=link.pid,
                connections=link.health.connections,
                files_open=link.health.files_open,
                loop_lag_s=link.health.loop_lag_s,
                open_requests=len(link.calls),
                late_messages=link.late,
                told=link.told,
                gateway=link.gateway,
                protocol=link.wire.version,
                fallback_placements=link.own_placements,
            )
            for link in (relays.links if relays is not None else ())
        )

    def status(self) -> dict[str, Any]:
        """The object of ``GET /chiron/status``."""
        found: dict[str, Any] = {}
        self.clock.post(lambda: found.update(status(self.plane.snapshot(), self.journal, self.around())))
        return found | {"batch_runner": self.runner.summary(), "store": dict(self.store.report())}

    def desired(self) -> dict[str, Any]:
        """The object of ``GET /chiron/desired``."""
        found: dict[str, Any] = {}
        self.clock.post(lambda: found.update(desired_page(self.plane.snapshot(), self.journal, self.around())))
        return found

    def result(self) -> Result:
        """The run so far, as the simulator's reports have it. Without the config, which may hold tokens."""
        return self.recorder.result(
            self.clock.elapsed_s(),
            policy=self.plane.policy,
            label=self.config.policy_label,
            evictions=self.plane.evictions,
            began=wall_time(self.clock.wall_origin_s),
        )

    def drain(self) -> None:
        """Answer new requests with 503 from now on."""
        self._drain(True)
        self.journal.note(self.clock.elapsed_s(), "drain", {})

    def undrain(self) -> bool:
        """Take new requests again, unless the gateway stops."""
        if self._stopping:
            return False
        self._drain(False)
        self.journal.note(self.clock.elapsed_s(), "undrain", {})
        return True

    def _drain(self, on: bool) -> None:
        self.front.draining = on
        if self.gateway.relays is not None:
            self.gateway.relays.drain(on)

    def _begin(self) -> None:
        self._begun_s = self.clock.now_s
        initial = {model.name: _initial(model, advise=self.advise) for model in self.config.models}
        self.learned.begin()
        if self._brain is not None and self._brain.follows:
            self.gateway.take_over(settle_s=self._brain.settle_s, awaited=self._brain.awaited)
        self.gateway.begin(initial)
        self.clock.call_later(FILES_LOOK_S, self._watch_files)
        self.clock.call_later(0.0, self.opening.look)
        self._settle_journal()

    def _settle_journal(self) -> None:
        self.clock.call_later(JOURNAL_PERIOD_S, self._settle_journal)
        self.journal.begin_to_count()
        self._count_on()

    def _count_on(self) -> None:
        """A step at a time, so that no request waits for all of it."""
        if self.journal.count_on():
            self.clock.call_later(0.0, self._count_on)

    def _watch_files(self) -> None:
        self.clock.call_later(FILES_LOOK_S, self._watch_files)
        opened, most = files_open(), files_max()
        if opened > FILES_SHORT * most and self.clock.now_s >= self._files_warned_s + FILES_WARN_S:
            self._files_warned_s = self.clock.now_s
            log.warning(
                "%d of %d file descriptors are in use: idle and slow clients are closed for new ones, and engines may "
                "not be reached; raise the limit (ulimit -n), or set limits.connections_max lower",
                opened,
                most,
            )

    def _instance_failed(self, instance: Instance, reason: str) -> None:
        facts = {"instance": instance.id, "model": instance.model, "kind": instance.kind.name, "reason": reason}
        self.journal.note(self.clock.now_s, "failure", facts)

    def _fleet_noted(self, kind: str, text: str) -> None:
        self.clock.post(lambda: self.journal.note(self.clock.now_s, "fleet_note", {"kind": kind, "note": text}))

    def _why(self, kind: str) -> str:
        """The reason of the plan in force, of the model that has this kind of instance."""
        model = next((m.name for m in self.config.models if any(k.kind.name == kind for k in m.kinds)), "")
        plan = self.journal.plan_of(model)
        return words(plan.reason) if plan is not None else ""

    def _outage_changed(self, model: str, outage: Outage | None) -> None:
        name, reason = ("outage_ended", "") if outage is None else ("outage", outage.reason)
        self.journal.note(self.clock.now_s, name, {"model": model, "reason": reason})

    def _capacity_told(self, engine: InstanceEngine, tokens: int) -> None:
        kinds = {kind.kind.name: kind for model in self.config.models for kind in model.kinds}
        instance = engine.instance
        if kinds[instance.kind.name].kv_capacity_known:
            return
        self.inputs.capacity_told(instance, tokens)
        largest = self.plane.kv_capacity_tokens(instance.model)
        self.models.by_name[instance.model].kv_capacity_tokens = largest

    def _event_writer(self) -> EventWriter | None:
        config, telemetry = self.config, self.config.telemetry
        if config.event_log is None:
            return None
        config.event_log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings = EventLogSettings(
            path=config.event_log,
            rotate_bytes=telemetry.rotate_bytes,
            rotate_keep=telemetry.rotate_keep,
            grouped=telemetry.event_log_grouped,
        )
        specs = [model.spec() for model in config.models]
        facts = {"policy": config.policy_label, **log_facts(specs, config.classes.values(), advise=self.advise)}
        return EventWriter(settings, wall_origin_s=self.clock.wall_origin_s, facts=facts)

    def _next_id(self) -> int:
        return next(self._numbers)

    def _wall_s(self) -> float:
        """One wall clock for whatever is written down, also if the machine's own is set meanwhile."""
        return self.clock.wall_s(self.clock.elapsed_s())

    def _api_state(self) -> ApiState:
        return ApiState(
            store=self.store,
            keys=self.keys,
            models=self.models,
            work=self.runner,
            wall_s=self._wall_s,
            started_s=self.clock.wall_origin_s,
            ready=self._ready.gateway,
            model_ready=self._ready.model,
            retry_after_s=self.config.limits.retry_after_s,
            status=self.status,
            desired=self.desired,
            drain=self.drain,
            undrain=self.undrain,
            metrics=self._render_metrics,
            batch=self.config.batch,
            limits=ApiLimits(peer_share=self.config.limits.peer_share),
        )

    def _render_metrics(self) -> bytes:
        page: list[bytes] = []
        self.clock.post(lambda: page.append(self.metrics.render()))  # Gauges as of now, not of the last event.
        return page[0]


class _TellsOperator:
    """A journal that also tells an operator of changes of the fleet."""

    wants_events = True

    def __init__(self, journal: LiveJournal, *, advise: bool) -> None:
        self._journal = journal
        self._fleet = "advised fleet" if advise else "fleet"
        self.event = journal.event
        self.ended = journal.ended

    def decided(self, now_s: float, decision: Decision) -> None:
        self._journal.decided(now_s, decision)
        if decision.kind == "fleet":
            before, after, why = decision.before, decision.after, decision.reason
            log.info("%s of %s: %g -> %g instances: %s", self._fleet, decision.subject, before, after, why)


async def run(
    config: ServeConfig,
    *,
    advise: bool = False,
    brain: BrainStart | None = None,
    on_ready: Callable[[str], None] | None = None,
    leading: Callable[[Service], None] = lambda service: None,
    hands_over: Callable[[], bool] = lambda: False,
) -> None:
    """Serve until cancelled; then stop well, and leave the run's result in the data directory. ``on_ready`` hears the
    URL, ``leading`` what serves; ``hands_over``: another brain follows, so that relays go on. The others are as
    ``Service`` has them."""
    service = Service(config, advise=advise, brain=brain)
    started = False
    try:
        url = await service.start()
        started = True
        leading(service)
        if on_ready is not None:
            on_ready(url)
        await asyncio.Event().wait()
    finally:
        await (service.hand_over() if hands_over() else service.stop())
        if started:
            save(service)


def save(service: Service) -> None:
    """The run's result, in the data directory."""
    try:
        save_result(service.result(), service.config.data / RESULT, mode=0o600)
    except TelemetryError as error:
        log.warning("the result of this run could not be saved: %s", error)


def _initial(model: ModelSettings, *, advise: bool) -> int:
    """Instances to begin with. Where the fleet is to stay as it is, all that run already take part, and no model has
    none."""
    if not advise:
        return model.min_instances
    return min(model.max_instances, max(1, model.min_instances, sum(kind.source.standing for kind in model.kinds)))
