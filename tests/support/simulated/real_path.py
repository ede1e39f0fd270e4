"""A scenario through the gateway's real path under virtual time, with engines in memory."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TextIO

from chiron.control.autoscaler import Observer
from chiron.control.plane import ControlPlane
from chiron.core.ports import Journal
from chiron.core.types import InstanceKind, ModelSpec, RequestClass
from chiron.engines.profile import Profile
from chiron.engines.remote import CUT
from chiron.engines.serve.emulated_engine import EmulatedSettings
from chiron.fleet.endpoints import EndpointsSource
from chiron.fleet.model import ColdStart, Failures, Sleep
from chiron.fleet.port import LiveFleetEvents
from chiron.gateway.gateway import Gateway
from chiron.gateway.instances.engines import Engines
from chiron.gateway.relay.admission import Models, ServedModel
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key, hash_secret
from chiron.gateway.relay.relay import Relay
from chiron.gateway.settings import KindSettings, LimitSettings, ModelSettings
from chiron.net.clock import LiveClock
from chiron.net.memory import MemoryNetwork
from chiron.net.server import HttpServer, Incoming, ServerLimits
from chiron.policies.policy import Policy
from chiron.policies.registry import make_policy
from chiron.runtime.emulated import EmulatedFleet, Fault, wire
from chiron.runtime.input_log import MarkedLiveClock, Point, RecordedInputs, RecordedOutputs, Write
from chiron.sim.recorder import Recorder
from chiron.sim.run import Simulation
from chiron.sim.setup import Setup
from virtual_loop import run_virtual


class Client(asyncio.Protocol):
    """One client: keeps what it is sent."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received.append(data)


class Faults:
    """What ``Wire.faults`` says, at the engines' end; ``told`` counts."""

    def __init__(self, faults: Mapping[int, tuple[int, ...]]) -> None:
        self.told = 0
        self._left = {row: iter(each) for row, each in faults.items()}

    def __call__(self, incoming: Incoming) -> bool:
        if incoming.method != b"POST":
            return False
        status = next(self._left.get(json.loads(incoming.body)["prompt"][0], iter(())), None)
        if status is None:
            return False
        self.told += 1
        if status == CUT:
            incoming.abort()
        else:
            incoming.respond(status, b"{}")
        return True


@dataclass(frozen=True)
class RealPath:
    """What a run left behind."""

    recorder: Recorder
    clients: list[Client]
    plane: ControlPlane
    faults: int
    """Tries that engines lost or refused."""


def served(name: str, classes: Mapping[str, RequestClass], batch_class: str = "") -> ServedModel:
    default = next(cls.name for cls in classes.values() if cls.interactive)
    told = ModelSettings(name=name, kinds=(), classes=tuple(classes), default_class=default, batch_class=batch_class)
    return ServedModel(settings=told, classes=classes, kv_capacity_tokens=10**9)


def kind_settings(kind: InstanceKind) -> KindSettings:
    """Of an emulated engine; where it comes from is its fleet's own affair."""
    source = EndpointsSource(urls=("http://127.0.0.1:9",))
    return KindSettings(kind=kind, engine="emulated", source=source, context_tokens=kind.kv_capacity_tokens)


class Site:
    """A gateway over emulated engines in memory, on the running loop's clock; its clients' bytes arrive at once."""

    def __init__(
        self,
        *,
        models: Sequence[ModelSpec],
        classes: Sequence[RequestClass],
        profiles: Mapping[str, Profile],
        policy: Policy,
        journal: Journal,
        cold_start: ColdStart,
        failures: Failures | None = None,
        seed: int = 0,
        network_s: float = 0.0,
        fault: Fault = lambda incoming: False,
        notice_s: float = 0.0,
        kv_transfer_gb_per_s: float = 20.0,
        tenants: Sequence[str] = (),
        gpus_max: Mapping[str, int] | None = None,
        observer: Observer | None = None,
        scrape_period_s: float = 1.0,
        batch_class: str = "",
        relays: int = 0,
        record: Write | None = None,
        sleep: Sleep | None = None,
    ) -> None:
        """``relays``: through so many of them, each at the other end of a connection, in turn; 0: all in one.
        ``record`` gets the lines of an input log."""
        loop = asyncio.get_running_loop()
        self.clock = clock = LiveClock(loop, wall_s=0.0)
        self._recording: RecordedInputs | None = None
        if record is not None:
            point = Point()
            self.clock = clock = MarkedLiveClock(loop, point, wall_s=0.0)
            self._recording = RecordedInputs(clock=clock, point=point, write=record)
            journal = RecordedOutputs(journal, record)
        by_name = {cls.name: cls for cls in classes}

        def know() -> Models:
            return Models({spec.name: served(spec.name, by_name, batch_class) for spec in models})

        self.models = known = know()
        self.keys = KeyRing([Key(name=name, hash=hash_secret(name.encode())) for name in tenants if name])
        self.next_id = itertools.count().__next__
        network = wire(clock, network_s)
        kinds = [kind_settings(kind) for spec in models for kind in spec.kinds]
        limits = LimitSettings(queue_max=10**6)

        def make_fleet(events: LiveFleetEvents) -> EmulatedFleet:
            return EmulatedFleet(
                clock=clock,
                events=events,
                network=network,
                profiles=profiles,
                cold_start=cold_start,
                failures=failures or Failures(),
                seed=seed,
                settings=EmulatedSettings(kv_transfer_gb_per_s=kv_transfer_gb_per_s),
                fault=fault,
                notice_s=notice_s,
                sleep=sleep,
            )

        self.engines = Engines(
            clock=clock,
            kinds=kinds,
            models=known.by_name,
            make_fleet=make_fleet,
            network=network,
        )
        self.gateway = Gateway(
            clock=clock,
            engines=self.engines,
            journal=journal,
            models=known,
            specs=models,
            classes=classes,
            policy=policy,
            keys=self.keys,
            limits=limits,
            next_id=self.next_id,
            responded=lambda status: None,
            gpus_max=gpus_max,
            observer=observer,
            scrape_period_s=scrape_period_s,
            recording=self._recording,
        )
        self._door = MemoryNetwork(loop.call_soon)
        fronts = [self.gateway.front]
        self.relays: list[Relay] = []
        if relays:
            brain = self.gateway.open_to_relays(responded=lambda status, count: None, ride_s=0.0)
            self._door.listen("brain", lambda: brain.link("a relay").wire)
        for _ in range(relays):
            relay = Relay(
                clock=clock,
                models=know(),
                kinds=kinds,
                keys=self.keys,
                limits=limits,
                closed=lambda why: None,
                network=network,
                ride_s=0.0,
            )
            self.relays.append(relay)
            self._door.connect("brain", lambda relay=relay: relay.uplink.wire)  # type: ignore[misc]
        if relays:
            fronts = [relay.front for relay in self.relays]
        self._servers = [HttpServer(front.handle, ServerLimits(), None, None) for front in fronts]
        for number, server in enumerate(self._servers):
            self._door.listen(f"gateway-{number}", server.accept)
        self._turns = itertools.cycle(range(len(fronts)))

    def begin(self, initial: Mapping[str, int]) -> None:
        engines, fleet = self.engines, self.engines.fleet
        assert isinstance(fleet, EmulatedFleet)

        def begin() -> None:
            if self._recording is not None:
                self._recording.start()
            self.gateway.begin(initial, attach=lambda i: engines.attach(i, fleet.running(i)), loops=(fleet,))

        self.clock.post(begin)

    def ask(self, client: Client, message: bytes) -> None:
        self._door.connect(f"gateway-{next(self._turns)}", lambda: client)
        client.transport.write(message)

    async def close(self) -> None:
        self.clock.stop()
        for server in self._servers:
            await server.close(0)
        await self.engines.close()


async def run_real(
    setup: Setup, events: TextIO | None = None, relays: int = 0, record: Write | None = None
) -> RealPath:
    """The same as ``Simulation(setup, events=events).run()``, which needs a ``setup.wire``."""
    workload = setup.workload
    assert setup.wire is not None
    recorder, faults = Recorder(workload, events), Faults(setup.wire.faults)
    site = Site(
        models=setup.models,
        classes=workload.classes,
        profiles=setup.profiles,
        policy=make_policy(setup.policy, setup.settings),
        journal=recorder,
        cold_start=setup.cold_start,
        failures=setup.failures,
        seed=setup.seed,
        network_s=setup.wire.network_s,
        fault=faults,
        notice_s=setup.wire.notice_s,
        kv_transfer_gb_per_s=setup.kv_transfer_gb_per_s,
        tenants=workload.tenants,
        gpus_max=setup.gpus_max,
        observer=recorder.observe,
        scrape_period_s=setup.scrape_period_s,
        relays=relays,
        record=record,
        sleep=setup.sleep,
    )
    site.begin(setup.initial)
    clients = [Client() for _ in range(len(workload))]

    def arrive(rows: list[int]) -> None:
        for row in rows:
            site.ask(clients[row], message(setup, row))

    # One timer per moment: asyncio keeps no order among equal ones.
    loop = asyncio.get_running_loop()
    for arrival_s, rows in groupby(range(len(workload)), key=workload.arrival_s.tolist().__getitem__):
        loop.call_at(arrival_s, arrive, list(rows))
    while recorder.ended_count < len(workload):
        await asyncio.sleep(1.0)
    await site.close()
    return RealPath(recorder, clients, site.gateway.plane, faults.told)


def message(setup: Setup, row: int) -> bytes:
    workload, wire = setup.workload, setup.wire
    assert wire is not None
    content = {
        "model": workload.models[workload.model[row]],
        "prompt": [row] + [7] * (int(workload.input_tokens[row]) - 1),
        "max_tokens": int(workload.output_tokens[row]),
        "ignore_eos": True,
        "stream": row not in wire.pieces,
    }
    lines = [f"x-chiron-class: {workload.classes[workload.cls[row]].name}"]
    if workload.tenant is not None:
        lines.append(f"authorization: Bearer {workload.tenants[workload.tenant[row]]}")
    return completion(content, *lines)


def completion(content: Mapping[str, Any], *lines: str) -> bytes:
    """A client's request, as bytes."""
    body = json.dumps(content).encode()
    head = ("POST /v1/completions HTTP/1.1", "host: here", "connection: close", *lines, f"content-length: {len(body)}")
    return "\r\n".join((*head, "", "")).encode() + body


def both(setup: Setup, relays: int = 0) -> tuple[Simulation, RealPath]:
    """The scenario simulated, and on the real path."""
    simulation = Simulation(setup)
    simulation.run()
    return simulation, run_virtual(run_real(setup, relays=relays))


def check_equal(simulation: Simulation, real: RealPath) -> None:
    """They decided the same, and requests had the same times, to the last bit."""
    # repr: nan is nan here, and floats are told apart to the last bit.
    assert [repr(d) for d in real.recorder.decisions] == [repr(d) for d in simulation.recorder.decisions]
    assert real.recorder.plan_changes == simulation.recorder.plan_changes
    assert real.plane.evictions == simulation.plane.evictions
    seen, table = real.recorder.table(), simulation.recorder.table()
    for column in ("dispatch_s", "first_token_s", "finish_s", "outcome", "evictions"):
        assert getattr(seen, column).tolist() == getattr(table, column).tolist(), column
