"""Law 10 on the gateway's real path: it decides as the simulator does, to the last bit, failures included.

Requests enter as bytes of clients' connections. They go through admission, calls, the clients of engines over HTTP and
connections in memory, to the emulated engine's own server, and its tokens and its metrics page come back as bytes, each
a wire's time later. Only sockets and processes are missing, and the loop's time is virtual. The simulator gets the same
input: its engines are models at the other end of such a wire (``engines.remote``).
"""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from chiron.control import scrapes
from chiron.core.types import ModelSpec
from chiron.engines.remote import CUT, Wire
from chiron.fleet.model import Failures, Sleep
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.queues.overload import OverloadSettings
from chiron.policies.registry import POLICIES
from chiron.sim.run import Simulation
from chiron.sim.setup import Setup
from chiron.telemetry.run_data import OUTCOMES
from real_path import Client, both, check_equal
from scenario_factory import PROFILE, kind_of, setup_of

PROFILE = replace(
    PROFILE,
    h_ms=12.0,
    w0_ms=2.0,
    f_ms_per_token=0.6,
    c_ms_per_context_token=0.02,
    q_ms_per_token_squared=0.0001,
    kv_capacity_tokens=1500,
    kv_bytes_per_token=2_000_000,
    max_num_seqs=24,
    max_num_batched_tokens=128,
)
CHAT, AGENT, NIGHT = range(3)
Row = tuple[float, int, int, int, int]
"""Arrival (s), tokens of prompt and answer, model, class."""
TRIES = ((CUT,), (CUT, CUT), (503,), (500, CUT), (429, 429, CUT), (CUT,) * 5, (500, 500))
"""What becomes of the first tries of a request, one way after the other."""


def burst() -> list[Row]:
    """Of two interactive classes, over a batch job. Some of it fits into no engine."""
    draw, at_s, rows = Random(5), 0.0, []
    while at_s < 50.0:
        at_s += draw.expovariate(16.0 if 15.0 < at_s < 25.0 else 3.0)
        rows.append((at_s, draw.randint(20, 120), draw.randint(2, 25), 0, draw.choice((CHAT, CHAT, AGENT))))
    rows += [(8.0, draw.randint(20, 100), draw.randint(10, 40), 0, NIGHT) for _ in range(100)]
    rows += [(at_s, 900, 700, 0, CHAT) for at_s in (3.0, 9.0, 23.0)]
    return rows


def scenario(policy: str, *, fails: bool, rows: list[Row] | None = None, notice_s: float = 0.0) -> Setup:
    """Small engines, on which three of six instances at most die, if it ``fails``, and engines lose requests."""
    rows = burst() if rows is None else rows
    failures = Failures(at=(20.3, 26.4, 40.6), start_failure=0.3) if fails else Failures()
    return setup_of(
        rows,
        policy=policy,
        profile=PROFILE,
        model=ModelSpec(
            name="m0",
            kinds=(kind_of(PROFILE, max_num_batched_tokens=PROFILE.max_num_batched_tokens),),
            max_instances=6,
        ),
        settings=POLICIES[policy].settings(),
        failures=failures,
        scrape_delay_s=0.0,
        wire=Wire(
            network_s=1 / 1024,
            notice_s=notice_s,
            faults={row: TRIES[row % len(TRIES)] for row in range(3, len(rows), 5)} if fails else {},
            pieces=frozenset(range(1, len(rows), 3)) if fails else frozenset(),
        ),
    )


def overload() -> Setup:
    """Two keys and two classes want much more than the one instance can do, and the policy refuses some."""
    draw, at_s, rows = Random(7), 0.0, []
    while at_s < 15.0:
        at_s += draw.expovariate(30.0)
        rows.append((at_s, draw.randint(20, 120), draw.randint(2, 20), 0, draw.choice((CHAT, CHAT, AGENT))))
    setup = scenario("chiron", fails=False, rows=rows)
    tenant = np.array([int(row % 8 == 0) for row in range(len(rows))])
    return replace(
        setup,
        models=tuple(replace(spec, max_instances=1) for spec in setup.models),
        settings=ChironSettings(overload=OverloadSettings(refuse=True)),
        workload=replace(setup.workload, tenants=("greedy", "modest"), tenant=tenant),
    )


def through_relays() -> Setup:
    """Deaths and refusals, and no two arrivals at once, which several relays would bring in an order of their own. No
    connection is cut: whether that shows depends on who has used it before, and each relay has its own."""
    spread = sorted((at_s + row / 1024 if at_s == 8.0 else at_s, *rest) for row, (at_s, *rest) in enumerate(burst()))
    rows = [each for each in spread if each[0] < 30.0]
    setup = scenario("chiron", fails=True, rows=rows)
    assert setup.wire is not None
    tries = ((503,), (500, 503), (429, 429, 500), (500,) * 5)
    faults = {row: tries[row % len(tries)] for row in range(3, len(rows), 5)}
    return replace(
        setup,
        failures=replace(setup.failures, at=(14.3, 20.3)),
        wire=replace(setup.wire, faults=faults),
    )


def said(client: Client) -> str:
    """The text of an answer that came as a stream or in one piece."""
    head, _, body = b"".join(client.received).partition(b"\r\n\r\n")
    if b"text/event-stream" not in head:
        return str(json.loads(body)["choices"][0]["text"])
    events = [part for part in body.split(b"data: ")[1:] if part.startswith(b"{")]
    choices = [json.loads(event[: event.rindex(b"}") + 1])["choices"] for event in events]
    return "".join(choice[0]["text"] for choice in choices if choice)


POLICIES_COMPARED = ["chiron", "chiron-paper", "hpa-queue-tuned", "llumnix-tuned"]


TOLD, FOUND = "deaths are told at once", "deaths are found out"
DEATHS = [
    pytest.param("chiron", FOUND),
    pytest.param("chiron", TOLD, marks=pytest.mark.slow),
    pytest.param("llumnix-tuned", FOUND, marks=pytest.mark.slow),
    *(
        pytest.param(policy, noticed, marks=pytest.mark.slow)
        for policy in POLICIES_COMPARED[1:]
        for noticed in (FOUND, TOLD)
        if (policy, noticed) != ("llumnix-tuned", FOUND)
    ),
]


@pytest.mark.parametrize(("policy", "noticed"), DEATHS)
def test_decides_the_same_while_instances_die_and_engines_lose_requests(policy: str, noticed: str) -> None:
    setup = scenario(policy, fails=True, notice_s=0.05 if noticed == FOUND else 0.0)
    simulation, real = both(setup)

    check_equal(simulation, real)
    outcomes = [OUTCOMES[outcome] for outcome in simulation.recorder.table().outcome.tolist()]
    assert {"finished", "failed", "rejected"} <= set(outcomes), "everything that can go wrong went wrong"
    assert real.faults > 20
    for client, outcome, tokens in zip(real.clients, outcomes, setup.workload.output_tokens.tolist(), strict=True):
        if outcome == "finished":
            assert len(said(client).split()) == tokens, "every token once, interrupted or not"
        else:
            assert b"error" in b"".join(client.received)


@pytest.mark.parametrize(
    "policy", ["chiron", *(pytest.param(p, marks=pytest.mark.slow) for p in POLICIES_COMPARED[1:])]
)
def test_decides_the_same_while_nothing_fails(policy: str) -> None:
    simulation, real = both(scenario(policy, fails=False))

    check_equal(simulation, real)
    if policy == "chiron":
        assert real.plane.evictions > 0
        assert len(real.recorder.decisions) > 20


def test_decides_the_same_in_an_overload_of_classes_and_keys() -> None:
    simulation, real = both(overload())

    check_equal(simulation, real)
    shed = [OUTCOMES[outcome] == "shed" for outcome in simulation.recorder.table().outcome.tolist()]
    assert 50 < sum(shed) < len(shed) - 50
    for client, was_shed in zip(real.clients, shed, strict=True):
        head = b"".join(client.received).partition(b"\r\n\r\n")[0]
        assert head.startswith(b"HTTP/1.1 429 " if was_shed else b"HTTP/1.1 200 ")
        assert (b"\r\nretry-after: " in head) == was_shed


@pytest.mark.parametrize("relays", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 5))])
def test_decides_the_same_with_any_number_of_relays(relays: int) -> None:
    setup = through_relays()
    simulation, real = both(setup, relays)

    check_equal(simulation, real)
    outcomes = [OUTCOMES[outcome] for outcome in simulation.recorder.table().outcome.tolist()]
    assert {"finished", "failed", "rejected"} <= set(outcomes)
    assert real.plane.evictions > 0
    for client, outcome, tokens in zip(real.clients, outcomes, setup.workload.output_tokens.tolist(), strict=True):
        if outcome == "finished":
            assert len(said(client).split()) == tokens, "every token once, interrupted or not"
        else:
            received = b"".join(client.received)
            assert b"error" in received or not received.startswith(b"HTTP/1.1 200 ")


def test_decides_the_same_while_instances_sleep_and_wake() -> None:
    """Two bursts: what the first one needed sleeps meanwhile, and there is room for three."""
    draw, at_s, rows = Random(11), 0.0, []
    while at_s < 44.0:
        at_s += draw.expovariate(24.0 if 5.0 < at_s < 9.0 or at_s > 40.0 else 1.0)
        rows.append((at_s, draw.randint(20, 120), draw.randint(2, 25), 0, draw.choice((CHAT, CHAT, AGENT))))
    setup = replace(
        scenario("chiron", fails=False, rows=rows),
        settings=ChironSettings(hold_s=5.0, memory_s=30, prior_s=10),
        sleep=Sleep(host_memory_gb=30.0, sleeper_gb=10.0, fall_asleep_s=1.0, wake_s=0.5),
    )
    simulation, real = both(setup)

    check_equal(simulation, real)
    assert simulation.fleet.bill.wakes > 0
    known = [{**state.asleep, **state.start_s} for state in real.plane.models.values()]
    assert known == [{**state.asleep, **state.start_s} for state in simulation.plane.models.values()]
    assert known[0]["memory"] == 0.5, "it looks ahead by what a wake takes"


def test_decides_the_same_when_a_round_of_scrapes_is_taken_in_slices() -> None:
    rows = [row for row in burst() if row[0] < 12.0]
    setup = scenario("chiron", fails=False, rows=rows)
    count = 3 * scrapes.SLICE
    models = tuple(replace(spec, min_instances=count, max_instances=count) for spec in setup.models)
    simulation, real = both(replace(setup, models=models, initial={"m0": count}))

    check_equal(simulation, real)
    taken = {i.sample.taken_s for i in real.plane.instances.values() if i.sample is not None}
    assert len(taken) >= 3


def test_another_wire_is_another_log() -> None:
    """What is compared above shows a millisecond."""
    setup = scenario("llumnix-tuned", fails=False)
    finish_s = []
    for network_s in (1 / 1024, 2 / 1024):
        simulation = Simulation(replace(setup, wire=Wire(network_s=network_s)))
        simulation.run()
        finish_s.append(simulation.recorder.table().finish_s.tolist())

    assert finish_s[0] != finish_s[1]
