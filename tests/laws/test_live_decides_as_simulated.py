"""Law 10: the live control plane decides as the simulated one does, given the same input at the same times.

Requests enter as bytes on a server connection and leave as bytes: admission, the control plane, calls and answers are
those of the gateway, on asyncio. Only engines and fleet are models, and the loop's time is virtual. The same scenario
runs through the simulator, and the decision logs must be equal: times, reasons and all numbers, to the bit.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from chiron.config.build import setups
from chiron.config.scenario import load_scenario, parse_scenario
from chiron.fleet.model import Failures
from chiron.gateway.emulation import EmulatedGateway
from chiron.gateway.relay.admission import Models, ServedModel
from chiron.gateway.relay.keys import Key, KeyRing, hash_secret
from chiron.gateway.settings import LimitSettings, ModelSettings
from chiron.net.clock import LiveClock
from chiron.net.server import HttpServer, ServerLimits
from chiron.policies.registry import make_policy
from chiron.sim.recorder import Recorder
from chiron.sim.run import Simulation
from chiron.sim.setup import Setup
from chiron.telemetry.run_data import OUTCOMES
from memory_client import Client
from virtual_loop import run_virtual


async def live(setup: Setup) -> tuple[Recorder, list[Client], list[Any]]:
    """The scenario through the gateway; its journal, its clients and its requests' bytes."""
    loop = asyncio.get_running_loop()
    workload = setup.workload
    clock = LiveClock(loop, wall_s=0.0)
    recorder = Recorder(workload)
    classes = {c.name: c for c in workload.classes}
    interactive = next(name for name, c in classes.items() if c.interactive)
    served = {}
    for spec in setup.models:
        settings = ModelSettings(
            name=spec.name, kinds=(), classes=tuple(classes), default_class=interactive, batch_class=""
        )
        served[spec.name] = ServedModel(settings=settings, classes=classes, kv_capacity_tokens=10**9)
    lengths = workload.output_tokens.tolist()
    gateway = EmulatedGateway(
        clock=clock,
        specs=setup.models,
        served=Models(served),
        classes=workload.classes,
        policy=make_policy(setup.policy, setup.settings),
        profiles=setup.profiles,
        cold_start=setup.cold_start,
        failures=setup.failures,
        journal=recorder,
        output_length=lambda request: lengths[request.id],
        seed=setup.seed,
        gpus_max=setup.gpus_max,
        scrape_period_s=setup.scrape_period_s,
        scrape_delay_s=setup.scrape_delay_s,
        kv_transfer_gb_per_s=setup.kv_transfer_gb_per_s,
        limits=LimitSettings(queue_max=10**6),
        keys=KeyRing([Key(name=name, hash=hash_secret(name.encode())) for name in workload.tenants if name]),
        observer=recorder.observe,
    )
    clock.post(lambda: gateway.begin(setup.initial))
    server = HttpServer(gateway.front.handle, ServerLimits(), None, None)
    clients = [Client() for _ in range(len(workload))]
    # One timer per moment: asyncio keeps no order among equal ones.
    for arrival_s, rows in groupby(range(len(workload)), key=workload.arrival_s.tolist().__getitem__):
        loop.call_at(arrival_s, connect, server, [(clients[row], body(setup, row)) for row in rows])
    while recorder.ended_count < len(workload):
        await asyncio.sleep(1.0)
    clock.stop()
    await server.close(0)
    return recorder, clients, lengths


def connect(server: HttpServer, arrivals: list[tuple[Client, bytes]]) -> None:
    for client, message in arrivals:
        protocol = client.protocol = server.accept()
        protocol.connection_made(client)
        protocol.data_received(message)


def body(setup: Setup, row: int) -> bytes:
    workload = setup.workload
    content = json.dumps(
        {
            "model": workload.models[workload.model[row]],
            "prompt": [7] * int(workload.input_tokens[row]),
            "stream": bool(row % 2),
        }
    ).encode()
    name = workload.classes[workload.cls[row]].name
    lines = ["POST /v1/completions HTTP/1.1", "connection: close", f"x-chiron-class: {name}"]
    if workload.tenant is not None:
        lines.append(f"authorization: Bearer {workload.tenants[workload.tenant[row]]}")
    return "\r\n".join((*lines, f"content-length: {len(content)}", "", "")).encode() + content


def scenario(policy: str, *, failures: Failures | None = None) -> Setup:
    """Bursts, a batch job that needs eviction and instances of its own, cold starts."""
    loaded = load_scenario(
        "demo",
        (
            "scale=0.12",
            'duration="9m"',
            "batch_job.0.requests=2500",
            'batch_job.0.at="1m"',
            'classes.batch.deadline="6m"',
            'classes.chat.itl="120ms"',
            "models.llama-8b.initial=2",
        ),
    )
    (setup,) = setups(loaded, policies=[policy], seeds=[3])
    return replace(setup, failures=failures or Failures())


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("chiron-paper", "llumnix-tuned", "hpa-queue-tuned")]


@pytest.mark.parametrize("policy", ["chiron", *OTHERS])
def test_gateway_and_simulator_write_equal_decision_logs(policy: str) -> None:
    setup = scenario(policy)
    simulation = Simulation(setup)
    simulation.run()

    recorder, clients, lengths = run_virtual(live(setup))

    assert len(simulation.recorder.decisions) > (20 if "chiron" in policy else 3)
    # repr: nan is nan here, and floats are told apart to the last bit.
    assert [repr(d) for d in recorder.decisions] == [repr(d) for d in simulation.recorder.decisions]
    assert recorder.plan_changes == simulation.recorder.plan_changes
    live_table, table = recorder.table(), simulation.recorder.table()
    for column in ("dispatch_s", "first_token_s", "finish_s", "outcome", "evictions"):
        assert getattr(live_table, column).tolist() == getattr(table, column).tolist(), column
    for client, tokens in zip(clients, lengths, strict=True):
        answer = b"".join(client.received)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.count(b" word") == tokens, "every token once, evicted or not"


def test_equal_also_when_instances_die_and_starts_fail() -> None:
    setup = scenario("chiron", failures=Failures(at=(100.0, 200.0, 300.0), start_failure=0.3))
    simulation = Simulation(setup)
    simulation.run()

    recorder, _, _ = run_virtual(live(setup))

    assert simulation.plane.instances, "deaths and failed starts are in the log, and the fleet lives on"
    assert OUTCOMES.index("failed") in simulation.recorder.table().outcome.tolist()
    assert [repr(d) for d in recorder.decisions] == [repr(d) for d in simulation.recorder.decisions]
    assert recorder.table().outcome.tolist() == simulation.recorder.table().outcome.tolist()


OVERLOAD = """
grace = "1m"
[classes.chat]
kind = "interactive"
ttft = "2s"
itl = "100ms"
[classes.code]
kind = "interactive"
ttft = "5s"
itl = "200ms"
weight = 2
[models.m]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]
max_instances = 1
[[workload]]
model = "m"
class = "chat"
key = "greedy"
generate = { kind = "poisson", rate = 15, duration = "40s", lengths = "sharegpt-300" }
[[workload]]
model = "m"
class = "chat"
key = "modest"
generate = { kind = "poisson", rate = 1, duration = "40s", lengths = "sharegpt-300" }
[[workload]]
model = "m"
class = "code"
key = "modest"
generate = { kind = "poisson", rate = 5, duration = "40s", lengths = "sharegpt-300" }
[policies.chiron.overload]
refuse = true
"""


def test_equal_also_in_an_overload_of_classes_and_keys_with_refusals() -> None:
    (setup,) = setups(parse_scenario(OVERLOAD, directory=Path(), name="overload"), policies=["chiron"])
    simulation = Simulation(setup)
    simulation.run()

    recorder, clients, _ = run_virtual(live(setup))

    shed = [outcome == OUTCOMES.index("shed") for outcome in simulation.recorder.table().outcome.tolist()]
    assert sum(shed) > 50
    live_table, table = recorder.table(), simulation.recorder.table()
    for column in ("dispatch_s", "first_token_s", "finish_s", "outcome"):
        assert getattr(live_table, column).tolist() == getattr(table, column).tolist(), column
    for client, was_shed in zip(clients, shed, strict=True):
        head = b"".join(client.received).partition(b"\r\n\r\n")[0]
        assert head.startswith(b"HTTP/1.1 429 " if was_shed else b"HTTP/1.1 200 ")
        assert (b"\r\nretry-after: " in head) == was_shed
