"""Programs in a simulation: a call comes once those that it waits for have ended, whatever the service does."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiron.config.build import setups
from chiron.config.read import ConfigError
from chiron.config.scenario import parse_scenario
from chiron.core.compiled import build
from chiron.core.types import Request
from chiron.policies.rivals.scalers.static import StaticSettings
from chiron.sim.bound import bound
from chiron.sim.run import Simulation, simulate
from chiron.sim.setup import Setup
from chiron.telemetry.programs import lost_calls
from chiron.telemetry.result import Result
from chiron.telemetry.run_data import OUTCOMES
from chiron.telemetry.store import load_result, save_result
from chiron.workload.types import Programs
from policy_names import ALL_CODE
from scenario_factory import PROFILE, setup_of

SCENARIO = """
[classes.agent]
kind = "interactive"
ttft = "5s"
itl = "100ms"
[models.m]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]
initial = 1
[[program]]
model = "m"
class = "agent"
name = "coding"
arrivals = { kind = "poisson", rate = 0.5, duration = "40s" }
steps = { mean = 4, cv = 0.5, max = 9 }
branches = { mean = 1.5, cv = 0.5, max = 3 }
first = 300
added = { mean = 100, cv = 1 }
output = { mean = 60, cv = 1 }
think = { mean = 1, cv = 1 }
deadline = "30s"
[[workload]]
model = "m"
class = "agent"
generate = { kind = "poisson", rate = 1, duration = "40s", lengths = { input = 200, output = 40 } }
"""


def scenario_setup(policy: str = "static", **changes: Any) -> Setup:
    (made,) = setups(parse_scenario(SCENARIO, directory=Path()), policies=[policy])
    return replace(made, **changes)


def logged(setup: Setup, *, step_mode: bool = False) -> tuple[Result, list[dict[str, Any]]]:
    events = StringIO()
    simulation = Simulation(setup, step_mode=step_mode, events=events)
    simulation.run()
    return simulation.result(wall_s=0.0, with_bound=False), [
        json.loads(line) for line in events.getvalue().splitlines()
    ]


def by_hand(rows: list[tuple[float, int, int, int, int]], parents: list[list[int]], think_s: list[float]) -> Setup:
    """One program of all rows."""
    base = setup_of(rows, settings=StaticSettings(max_num_seqs=8))
    ends = np.cumsum([0, *(len(each) for each in parents)])
    programs = Programs(
        kinds=("one",),
        kind=np.zeros(1, dtype=np.int64),
        start_s=np.zeros(1),
        deadline_s=np.array([inf]),
        of=np.zeros(len(rows), dtype=np.int64),
        think_s=np.array(think_s),
        earliest_s=np.array([row[0] for row in rows]),
        parents=np.array([each for some in parents for each in some], dtype=np.int64),
        parents_from=ends,
    )
    return replace(base, workload=replace(base.workload, programs=programs))


def test_a_call_comes_a_think_time_after_the_last_of_those_before_it() -> None:
    rows = [(0.0, 5, 4, 0, 0), (0.0, 5, 9, 0, 0), (1.0, 20, 3, 0, 0), (2.0, 30, 2, 0, 0)]
    result, _ = logged(by_hand(rows, [[], [], [0, 1], [2]], [0.0, 0.0, 0.5, 0.25]))
    table = result.requests
    assert table.arrival_s[2] == max(table.finish_s[:2]) + 0.5
    assert table.arrival_s[3] == table.finish_s[2] + 0.25
    assert result.programs[0].finish_s == table.finish_s[3]
    assert (result.programs[0].calls, result.programs[0].calls_finished, result.programs[0].output_tokens) == (4, 4, 18)


def test_a_program_of_which_a_call_does_not_finish_makes_no_more() -> None:
    too_long = PROFILE.kv_capacity_tokens + 5
    rows = [(0.0, 5, 40, 0, 0), (0.0, too_long, 4, 0, 0), (1.0, 20, 3, 0, 0), (2.0, 30, 2, 0, 0)]
    result, events = logged(by_hand(rows, [[], [], [0], [0, 1]], [0.0, 0.0, 0.1, 0.1]))
    assert len(result.requests.arrival_s) == 2
    assert {event["request"] for event in events if event["event"] == "arrival"} == {0, 1}
    assert result.programs[0].finish_s == -1.0
    assert result.summary["programs"]["one"]["finished"] == 0
    assert result.summary["unfinished"] == 0, "what never came is no request"


@pytest.mark.skipif(build() == "compiled", reason="a method of a compiled class cannot be replaced")
def test_calls_that_a_dropped_program_never_makes_are_missed() -> None:
    """Or whoever drops the first call of the largest programs would be the best of all."""
    setup = scenario_setup()
    programs = setup.workload.programs
    assert programs is not None
    calls = np.bincount(programs.of[programs.of >= 0])
    largest = int(calls.argmax())
    simulation = Simulation(setup)
    submit = simulation.plane.submit
    first: list[int] = []  # Calls that were made.

    def dropped(request: Request) -> None:
        submit(request)
        if request.program == str(largest):
            first.append(request.id)
            simulation.plane.cut_off(request)

    simulation.plane.submit = dropped  # type: ignore[method-assign]
    simulation.run()
    summary = simulation.result(with_bound=False).summary
    assert 0 < len(first) < calls[largest]
    assert summary["attainment"] == {"agent": (len(setup.workload) - calls[largest]) / len(setup.workload)}


def test_calls_after_one_that_fits_no_engine_are_held_against_nobody() -> None:
    too_long = PROFILE.kv_capacity_tokens + 5
    rows = [(0.0, 5, 4, 0, 0), (0.0, too_long, 4, 0, 0), (1.0, 20, 3, 0, 0)]
    result, _ = logged(by_hand(rows, [[], [], [0, 1]], [0.0, 0.0, 0.1]))
    assert set(result.summary["attainment"].values()) == {1.0}


def test_calls_that_could_not_come_before_the_horizon_are_not_missed() -> None:
    rows = [(0.0, 5, 100, 0, 0), (0.25, 5, 9, 0, 0), (9.0, 20, 3, 0, 0)]
    simulation = Simulation(replace(by_hand(rows, [[], [0], [1]], [0.0, 0.25, 8.75]), horizon_s=0.5))
    simulation.run()
    assert simulation.programs is not None
    assert len(simulation.programs.lost(simulation.recorder.table(), 0.5).cls) == 1
    assert len(simulation.programs.lost(simulation.recorder.table(), inf).cls) == 2


@pytest.mark.parametrize(
    ("outcomes", "lost"),
    [
        (["failed", ""], [1]),
        (["shed", ""], [1]),
        (["unfinished", ""], [1]),
        (["rejected", ""], []),
        (["failed", "rejected", ""], []),
        (["cancelled", ""], []),  # The load generator stopped.
        (["finished", ""], []),  # Its time had not come when a run was stopped.
    ],
)
def test_which_calls_are_lost(outcomes: list[str], lost: list[int]) -> None:
    """Of one program, beside a request of its own that failed; "": a call that never came."""
    came = np.array([outcome != "" for outcome in [*outcomes, "failed"]])
    codes = np.array([OUTCOMES.index(outcome or "unfinished") for outcome in [*outcomes, "failed"]])
    of = np.array([0] * len(outcomes) + [-1])
    assert lost_calls(of, came, codes).tolist() == lost


@pytest.mark.parametrize("policy", ["static", "chiron"])
def test_every_call_of_every_program_is_made_in_its_order(policy: str) -> None:
    setup = scenario_setup(policy)
    result, events = logged(setup)
    workload, programs = setup.workload, setup.workload.programs
    assert programs is not None
    assert result.summary["finished"] == result.summary["requests"] == len(workload)
    came = {e["request"]: e["t"] for e in events if e["event"] == "arrival"}
    ended = {e["request"]: e["t"] for e in events if e["event"] == "ended"}
    for row in range(len(workload)):
        parents = programs.parents[programs.parents_from[row] : programs.parents_from[row + 1]].tolist()
        if parents:
            assert came[row] == max(ended[parent] for parent in parents) + programs.think_s[row]
        else:
            assert came[row] == workload.arrival_s[row]
    assert {e["program"] for e in events if e["event"] == "arrival" and "program" in e} == {
        str(number) for number in range(len(programs))
    }
    assert (np.diff(result.requests.arrival_s) >= 0).all()
    assert (result.requests.arrival_s <= result.requests.dispatch_s).all()
    latest = [max(ended[row] for row in np.flatnonzero(programs.of == p)) for p in range(len(programs))]
    assert sorted(point.finish_s for point in result.programs) == pytest.approx(sorted(latest))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ALL_CODE)
def test_every_policy_serves_programs(policy: str) -> None:
    shorter = parse_scenario(SCENARIO, directory=Path()).with_overrides("duration=15s", "models.m.initial=2")
    (setup,) = setups(shorter, policies=[policy])
    result = simulate(setup, with_bound=False)
    assert result.summary["finished"] == result.summary["requests"] == len(setup.workload)
    assert all(program.finish_s >= program.start_s for program in result.programs)


def test_a_slower_service_gets_later_calls_and_the_same_programs() -> None:
    quick, slow = scenario_setup(), scenario_setup()
    slow = replace(slow, profiles={k: replace(p, h_ms=p.h_ms + 60.0) for k, p in slow.profiles.items()})
    one, other = simulate(quick, with_bound=False), simulate(slow, with_bound=False)
    assert sorted(one.requests.input_tokens) == sorted(other.requests.input_tokens)
    assert other.requests.arrival_s[-1] > one.requests.arrival_s[-1]
    latency = [r.summary["programs"]["coding"]["latency_s"]["p50"] for r in (one, other)]
    assert latency[1] > latency[0]


def test_step_by_step_and_again_it_is_the_same() -> None:
    setup = scenario_setup()
    plain, stepped = logged(setup), logged(setup, step_mode=True)
    assert plain[1] == stepped[1]
    assert plain[1] == logged(setup)[1]


def test_programs_are_judged_by_their_own_deadline_and_are_kept_with_a_result(tmp_path: Path) -> None:
    result = simulate(scenario_setup(), with_bound=False)
    figures = result.summary["programs"]["coding"]
    met = sum(p.finish_s <= p.deadline_s for p in result.programs)
    assert figures["attainment"] == met / len(result.programs)
    assert figures["latency_s"]["p50"] == pytest.approx(np.median([p.finish_s - p.start_s for p in result.programs]))
    assert load_result(save_result(result, tmp_path / "r.chiron")).programs == result.programs


def test_a_run_that_stops_early_has_only_the_calls_that_came() -> None:
    setup = scenario_setup(horizon_s=10.0)
    result, events = logged(setup)
    came = [e["request"] for e in events if e["event"] == "arrival"]
    assert setup.workload.programs is not None
    by_itself = np.diff(setup.workload.programs.parents_from) == 0
    assert (result.requests.arrival_s <= 10.0).sum() == len(came)
    assert len(result.requests.arrival_s) == len(set(came) | set(np.flatnonzero(by_itself)))
    assert all(p.start_s <= 10.0 for p in result.programs)
    assert any(p.finish_s < 0 for p in result.programs)


def test_the_full_bound_takes_calls_as_early_and_as_late_as_they_can_be() -> None:
    """When a call comes is the policy's doing: a bound that knew planned arrivals would be none."""
    setup = scenario_setup()
    assert setup.workload.programs is not None
    later_s = np.where(setup.workload.programs.of >= 0, 5.0, 0.0)
    later = replace(setup.workload, arrival_s=setup.workload.arrival_s + later_s)
    one, other = bound(setup), bound(replace(setup, workload=later))
    assert one.gpu_hours == other.gpu_hours > 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("program.0.steps=0", r"program\[0\]: steps is 0; it must be 1 or more"),
        ("program.0.think.p50=1", r"program\[0\]\.think: a lognormal needs either"),
        ("program.0.think='-1s'", r"program\[0\]\.think"),
        ("program.0.model=x", r"program\[0\]\.model: unknown name 'x'"),
        ("program.0.arrivals.kind=closed-loop", r"program\[0\]\.arrivals\.kind: 'closed-loop'; .*allowed: poisson"),
        ("program.0.arrivals.rate=0", r"program\[0\]\.arrivals: rate is 0\.0"),
        ("program.0.deadline=0", r"program\[0\]: deadline is 0\.0; it must be above 0"),
        ("program.0.brances=2", r"program\[0\]\.brances: unknown key .*did you mean 'branches'"),
    ],
)
def test_a_mistake_in_a_program_is_refused_with_its_path(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_scenario(SCENARIO, directory=Path()).with_overrides(change)


def test_a_shape_that_cannot_be_drawn_is_refused_with_its_path() -> None:
    scenario = parse_scenario(SCENARIO, directory=Path()).with_overrides("program.0.steps=20000")
    with pytest.raises(ConfigError, match=r"program\[0\]: steps is 20000; it must be 1 to 10000"):
        setups(scenario, policies=["static"])
