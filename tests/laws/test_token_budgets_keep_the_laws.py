"""Token budgets that change while engines run: the gateway's real path decides as the simulator does, and a log of its
inputs replays."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import orjson
import pytest

from chiron.core.types import ModelSpec
from chiron.engines.remote import Wire
from chiron.policies.registry import POLICIES, make_policy
from chiron.runtime.input_log import described
from chiron.runtime.replay import replay
from chiron.sim.setup import Setup
from real_path import both, run_real
from scenario_factory import PROFILE, WILD, WildSettings, kind_of, setup_of
from virtual_loop import run_virtual

TIMES = replace(PROFILE, f_ms_per_token=0.6, kv_capacity_tokens=1500, max_num_seqs=24, max_num_batched_tokens=128)


def scenario(*, live: bool) -> Setup:
    draw = Random(5)
    kind = kind_of(TIMES, max_num_batched_tokens=TIMES.max_num_batched_tokens, live_token_budget=live)
    return setup_of(
        [(n / 9, draw.randint(20, 300), draw.randint(2, 25), 0, 0) for n in range(150)],
        policy="wild",
        profile=TIMES,
        model=ModelSpec(name="m0", kinds=(kind,), max_instances=3),
        settings=WildSettings(budgets=True, packs=False),
        scrape_delay_s=0.0,
        wire=Wire(network_s=1 / 1024),
    )


@pytest.fixture(autouse=True)
def wild(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "wild", WILD)


@pytest.mark.parametrize("live", [True, False])
def test_the_real_path_decides_as_the_simulator(*, live: bool) -> None:
    simulation, real = both(scenario(live=live))
    table, decisions = simulation.recorder.table(), simulation.recorder.decisions
    # The real path ends with a whole second.
    assert [repr(each) for each in real.recorder.decisions][: len(decisions)] == [repr(each) for each in decisions]
    assert real.recorder.table().finish_s.tolist() == table.finish_s.tolist()
    told = [each for each in decisions if each.kind == "token_budget" and "#" in each.subject]
    assert (len(told) > 5) == live


def test_a_log_of_inputs_replays() -> None:
    setup = scenario(live=True)
    facts = described(make_policy("wild", setup.settings), setup.models, setup.workload.classes, setup.gpus_max)
    lines: list[dict[str, Any]] = [{"t": 0.0, "event": "log", **facts}]
    run_virtual(run_real(setup, record=lambda line: lines.append(dict(line))))
    done = replay(orjson.loads(orjson.dumps(line)) for line in lines)
    assert done.difference == ""
    assert any(line.get("kind") == "token_budget" for line in lines)
