"""The policies that CONTRIBUTING.md shows work as they stand there."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

from chiron.config.build import setups
from chiron.config.scenario import load_scenario
from chiron.core.types import ModelSpec
from chiron.engines.remote import Wire
from chiron.policies.policy import PolicyEntry
from chiron.policies.registry import POLICIES
from chiron.sim.run import Simulation, simulate
from chiron.sim.setup import Setup
from chiron.telemetry.result import Result
from chiron.telemetry.run_data import OUTCOMES
from real_path import RealPath, both, check_equal, run_real
from scenario_factory import PROFILE, kind_of, setup_of, workload_of
from scenario_text import SMALL
from virtual_loop import run_virtual

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


def block(name: str, example: str = "rival") -> str:
    """The Python block under the comment ``example: name``."""
    found = re.findall(rf"<!-- {example}: {name} -->\n```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def saved(example: str, policy: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file as saved by a reader, and its line in the registry."""
    path = directory / f"{example}.py"
    path.write_text(block("file", example))
    spec = importlib.util.spec_from_file_location(f"{example}_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    line = block("registry", example)
    lines: dict[str, Any] = eval(f"{{{line}}}", {**vars(module), "PolicyEntry": PolicyEntry})
    assert list(lines) == [policy]
    monkeypatch.setitem(POLICIES, policy, lines[policy])
    return module


@pytest.fixture
def rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return saved("rival", "target", tmp_path, monkeypatch)


def run(tmp_path: Path, *overrides: str) -> Result:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    (setup,) = setups(load_scenario(str(path), overrides), policies=["target"], seeds=[1])
    return simulate(setup)


@pytest.mark.usefixtures("rival")
def test_the_example_grows_the_fleet_with_the_requests_on_it(tmp_path: Path) -> None:
    small_target = run(tmp_path, "policies.target.requests_per_instance=5", "models.llama.initial=1")
    large_target = run(tmp_path, "policies.target.requests_per_instance=500", "models.llama.initial=1")
    assert small_target.summary["finished"] == small_target.summary["requests"] > 200
    assert small_target.summary["instances_peak"] > large_target.summary["instances_peak"] == 1
    grown = [d for d in small_target.decisions if d.kind == "fleet" and d.after > d.before]
    assert {d.reason for d in grown} == {"target"}
    assert all(d.numbers["requests"] > 5 * d.before for d in grown)


@pytest.mark.usefixtures("rival")
def test_a_misspelt_setting_of_the_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"policies\.target\.requests_per_instanc.*requests_per_instance"):
        run(tmp_path, "policies.target.requests_per_instanc=5")


def test_the_example_is_as_short_as_it_is_said_to_be() -> None:
    assert len(block("file").splitlines()) < 40
    assert len(block("registry").splitlines()) == 1


# -- one hook exchanged, simulated and as a gateway --------------------------------------------------------------------


CHAT, AGENT, NIGHT = range(3)
SLOW = replace(
    PROFILE,
    h_ms=12.0,
    f_ms_per_token=0.6,
    kv_capacity_tokens=1500,
    max_num_seqs=8,
    max_num_batched_tokens=128,
)


def trial(policy: str, *, instances: int = 1) -> Setup:
    """More interactive requests than the instances can do, and a batch job."""
    draw, at_s, rows = Random(7), 0.0, []
    while at_s < 10.0:
        at_s += draw.expovariate(20.0)
        rows.append((at_s, draw.randint(20, 120), draw.randint(2, 20), 0, draw.choice((CHAT, AGENT))))
    rows += [(2.0 + n / 64, draw.randint(20, 120), draw.randint(2, 20), 0, NIGHT) for n in range(30)]
    kind = kind_of(SLOW, max_num_batched_tokens=SLOW.max_num_batched_tokens)
    return setup_of(
        rows,
        policy=policy,
        settings=POLICIES[policy].settings(),
        profile=SLOW,
        model=ModelSpec(name="m0", kinds=(kind,), min_instances=instances, max_instances=instances),
        initial=instances,
        scrape_delay_s=0.0,
        wire=Wire(network_s=1 / 1024),
    )


def both_ways(setup: Setup) -> tuple[Simulation, RealPath]:
    simulation, real = both(setup)
    check_equal(simulation, real)
    return simulation, real


def test_an_admission_rule_refuses_requests_simulated_and_their_clients_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("admission", "chiron-impatient", tmp_path, monkeypatch)
    setup = trial("chiron-impatient")
    simulation, real = both_ways(setup)
    table = simulation.recorder.table()
    shed = [OUTCOMES[outcome] == "shed" for outcome in table.outcome.tolist()]
    assert 20 < sum(shed) < len(shed) - 50
    assert not any(was for was, cls in zip(shed, setup.workload.cls.tolist(), strict=True) if cls == NIGHT)
    for client, was_shed in zip(real.clients, shed, strict=True):
        head = b"".join(client.received).partition(b"\r\n\r\n")[0]
        assert head.startswith(b"HTTP/1.1 429 " if was_shed else b"HTTP/1.1 200 ")
        after = re.search(rb"\r\nretry-after: (\d+)", head)
        assert (after is not None and int(after[1]) >= 2) == was_shed, "it says for how long the oldest has waited"


def test_the_event_log_has_the_reason_of_an_admission_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("admission", "chiron-impatient", tmp_path, monkeypatch)
    setup, events = trial("chiron-impatient"), io.StringIO()
    Simulation(setup, events=events).run()
    ends = [line for line in map(json.loads, events.getvalue().splitlines()) if line["event"] == "ended"]
    assert {line["reason"] for line in ends if line["outcome"] == "shed"} == {"queue_too_old"}
    assert not any("reason" in line for line in ends if line["outcome"] != "shed")
    patient = Simulation(replace(setup, settings=replace(setup.settings, wait_max_s=100.0)))
    patient.run()
    assert OUTCOMES.index("shed") not in patient.recorder.table().outcome


def test_a_queue_order_holds_for_interactive_requests_and_for_batch_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("order", "chiron-shortest", tmp_path, monkeypatch)
    simulation, _ = both_ways(trial("chiron-shortest"))
    assert passed_by_longer(simulation, CHAT, AGENT) == 0
    assert passed_by_longer(simulation, NIGHT) == 0
    plain = Simulation(trial("chiron"))
    plain.run()
    assert passed_by_longer(plain, CHAT, AGENT) > 10
    assert passed_by_longer(plain, NIGHT) > 10


def passed_by_longer(simulation: Simulation, *classes: int) -> int:
    """Requests of these classes that were dispatched while one with a shorter prompt waited."""
    table = simulation.recorder.table()
    columns = (table.dispatch_s, table.arrival_s, table.input_tokens, table.cls)
    rows = [row for row in zip(*(column.tolist() for column in columns), strict=True) if row[3] in classes]
    assert sum(dispatch_s > arrival_s for dispatch_s, arrival_s, _, _ in rows) > 20, "they wait"
    return sum(
        any(arrival_s < at_s < dispatch_s and others < tokens for dispatch_s, arrival_s, others, _ in rows)
        for at_s, _, tokens, _ in rows
    )


def test_a_router_sends_requests_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("router", "static-freest", tmp_path, monkeypatch)
    long, short = (0.0, 1200, 200, 0, CHAT), [(1.0 + n / 8, 20, 20, 0, CHAT) for n in range(6)]

    def placed(policy: str) -> list[tuple[int, int]]:
        """Requests and instances, simulated and live."""
        setup = replace(trial(policy, instances=2), workload=workload_of([long, *short]))
        logs = io.StringIO(), io.StringIO()
        Simulation(setup, events=logs[0]).run()
        run_virtual(run_real(setup, logs[1]))
        simulated, live = (dispatched(log.getvalue()) for log in logs)
        assert simulated == live
        return simulated

    assert placed("static-freest") == [(0, 1), *((n, 2) for n in range(1, 7))]
    assert (2, 1) in placed("static"), "by count some go to the one with the long prompt"


def dispatched(log: str) -> list[tuple[int, int]]:
    lines = map(json.loads, log.splitlines())
    return [(line["request"], line["instance"]) for line in lines if line["event"] == "dispatch"]
