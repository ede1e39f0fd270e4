"""The policies that CONTRIBUTING.md shows work as they stand there."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chiron.config.build import setups
from chiron.config.scenario import load_scenario
from chiron.core.types import Placement, Request
from chiron.policies.order import KeyOrder
from chiron.policies.policy import Estimates, Policy, PolicyEntry
from chiron.policies.registry import POLICIES, make_policy
from chiron.policies.rivals.routing import LeastRouter
from chiron.policies.rivals.static import StaticSettings
from chiron.sim.run import simulate
from chiron.telemetry.result import Result
from scenario_text import SMALL

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


def run(tmp_path: Path, *overrides: str, policy: str = "target", events: io.StringIO | None = None) -> Result:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    (setup,) = setups(load_scenario(str(path), overrides), policies=[policy], seeds=[1])
    return simulate(setup, events=events)


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


def test_an_admission_rule_is_one_file_and_the_simulator_sees_whom_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("admission", "chiron-impatient", tmp_path, monkeypatch)
    events = io.StringIO()
    crowded = ("models.llama.max_instances=1", "classes.chat.itl=20ms")
    result = run(tmp_path, *crowded, "workload.0.generate.rate=40", policy="chiron-impatient", events=events)
    ends = [line for line in map(json.loads, events.getvalue().splitlines()) if line["event"] == "ended"]
    refused = [line for line in ends if line["outcome"] == "shed"]
    assert len(refused) == result.summary["shed"] > 50
    assert {line["reason"] for line in refused} == {"queue_too_old"}
    assert not any("reason" in line for line in ends if line["outcome"] != "shed")
    patient = run(tmp_path, *crowded, "policies.chiron-impatient.wait_max=100s", policy="chiron-impatient")
    assert patient.summary["shed"] == 0


def test_a_queue_order_is_one_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shortest_first(settings: StaticSettings) -> Policy:
        order = KeyOrder(lambda request: request.input_tokens)
        return replace(make_policy("static", settings), holds_batch=True, router=one_at_a_time, order=lambda *_: order)

    entry = PolicyEntry(settings=StaticSettings, make=shortest_first, about="shortest prompt first")
    monkeypatch.setitem(POLICIES, "shortest", entry)
    result = run(tmp_path, "models.llama.max_instances=1", "workload.0.generate.rate=1", policy="shortest")
    requests = result.requests
    assert (requests.cls == 0).sum() > 30
    interactive = [
        (dispatched, tokens, arrived)
        for dispatched, tokens, arrived, cls in zip(
            requests.dispatch_s, requests.input_tokens, requests.arrival_s, requests.cls, strict=True
        )
        if cls == 0
    ]
    for dispatched, tokens, _ in interactive:
        passed = [t for d, t, arrived in interactive if arrived < dispatched < d]
        assert all(t >= tokens for t in passed), "nobody with a shorter prompt waited meanwhile"


class OneAtATime(LeastRouter):
    def place(self, request: Request, waited_s: float) -> Placement | None:
        placement = super().place(request, waited_s)
        return placement if placement is not None and not placement.instance.requests else None


def one_at_a_time(_: Any, estimates: Estimates) -> OneAtATime:
    return OneAtATime(estimates, lambda instance: len(instance.requests))
