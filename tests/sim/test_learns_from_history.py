"""A scenario's history: every policy has lived through it, and nothing of it is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from chiron.config.build import setups
from chiron.config.read import ConfigError
from chiron.config.scenario import parse_scenario
from chiron.sim.run import Simulation, _lived_through, simulate
from chiron.sim.setup import Setup
from chiron.telemetry.run_data import FleetPoint

SCENARIO = """
[classes.chat]
kind = "interactive"
ttft = "5s"
itl = "200ms"

[models.llama]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]
max_instances = 8

[[workload]]
model = "llama"
class = "chat"
generate = { kind = "poisson", rate = 2, duration = "60s", lengths = { input = 700, output = 100 } }
"""
HISTORY = """
[[history]]
model = "llama"
class = "chat"
generate = { kind = "poisson", rate = 3, duration = "12m", lengths = { input = 2000, output = 40 } }
"""


def setup(text: str, policy: str = "chiron") -> Setup:
    (made,) = setups(parse_scenario(text, directory=Path()), policies=[policy], seeds=[3])
    return made


def run(made: Setup) -> tuple[dict[str, object], FleetPoint]:
    """The summary, and the fleet after the first decision."""
    result = simulate(made)
    return {**result.summary, "wall_s": 0.0}, result.fleet[0]


def test_a_policy_starts_with_what_it_has_learned_and_only_the_rest_is_counted() -> None:
    before, now = setup(SCENARIO), setup(SCENARIO + HISTORY)
    assert before.history is None
    assert now.history is not None
    assert len(now.history) > 5 * len(now.workload)
    fresh, guessed = run(before)
    summary, known = run(now)
    assert summary["requests"] == fresh["requests"] == len(before.workload)
    assert summary["gpu_hours_bound_full"] == fresh["gpu_hours_bound_full"]
    assert summary["sim_s"] == pytest.approx(fresh["sim_s"], rel=0.2), "its time is the judged one's alone"
    assert guessed.ibp_target == pytest.approx(1 / 1.5), "what is presumed of an unknown load"
    assert known.ibp_target != guessed.ibp_target
    assert 0.0 < known.ibp < guessed.ibp, "the last minute of the history, and what was presumed"
    assert known.t_s == guessed.t_s


@pytest.mark.slow
def test_the_history_draws_its_own_requests_and_is_the_same_each_time() -> None:
    made = setup(SCENARIO + HISTORY)
    alike = HISTORY.replace("rate = 3", "rate = 2").replace("2000, output = 40", "700, output = 100")
    both = setup(SCENARIO + alike)
    assert both.history is not None
    assert both.history.arrival_s[:10].tolist() != both.workload.arrival_s[:10].tolist()
    assert run(made) == run(setup(SCENARIO + HISTORY))


@pytest.mark.slow
def test_requests_after_the_history_do_not_change_what_is_learned_from_it() -> None:
    made = setup(SCENARIO + HISTORY)
    later = replace(made, workload=setup(SCENARIO.replace("rate = 2", "rate = 9")).workload)
    assert run(made)[1].ibp_target == run(later)[1].ibp_target


def test_a_policy_that_learns_no_load_runs_as_well() -> None:
    summary, _ = run(setup(SCENARIO + HISTORY, "hpa-queue"))
    assert summary["requests"] == summary["finished"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HISTORY.replace('"chat"', '"chut"'), r"history\[0\]\.class: unknown name 'chut'; did you mean 'chat'"),
        (HISTORY + "[[history]]\nmodel = 3\n", r"history\[1\]"),
        (HISTORY.replace('"12m"', '"1ms"').replace("rate = 3", "rate = 0.001"), r"history: the workload is empty"),
    ],
)
def test_a_history_is_read_as_strictly_as_the_rest(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        setup(SCENARIO + text)


def test_each_instance_of_autothrottle_goes_on_where_one_of_the_history_was() -> None:
    made = setup(SCENARIO.replace("max_instances = 8", "max_instances = 8\ninitial = 2") + HISTORY, "autothrottle")
    assert made.history is not None
    learned = _lived_through(made, made.history, step_mode=False)
    simulation = Simulation(made)
    simulation.plane.restore(learned, 0.0)
    simulation.run()
    towers = [instance.local.tower for instance in simulation.plane.instances.values()]
    assert [len(tower.tries) for tower in towers] == [12, 12], "twelve minutes of the history"
