"""The clairvoyant schedule: the best on problems small enough to try everything, and within reach of a simulation."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from chiron.config.build import setups
from chiron.config.read import ConfigError
from chiron.config.scenario import parse_scenario
from chiron.core.types import Role
from chiron.policies.chiron.scheduled import ScheduledSettings, decide_fleet, scheduled
from chiron.sim.clairvoyant import CELLS_MAX, Problem, Schedule, best_schedule, problem_of
from chiron.sim.clairvoyant import found as schedule_found
from chiron.sim.run import simulate
from chiron.sim.setup import Setup
from chiron.telemetry.result import Result
from policy_factory import fleet, group, instance, model

SCENARIO = """
[classes.chat]
kind = "interactive"
ttft = "5s"
itl = "200ms"

[models.llama]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]
max_instances = 6

[[workload]]
model = "llama"
class = "chat"
[workload.generate]
kind = "spikes"
rate = 2
factor = 8
length = "40s"
period = "3m"
duration = "4m"
lengths = { input = 3000, output = 60 }
"""


def problem(loads: list[float], **changes: object) -> Problem:
    """Steps of one second, a request in each, a class that can wait for two seconds."""
    load = np.array(loads)[:, None]
    given = Problem(
        load=load,
        shares=(np.full(load.shape, 1.0 / len(loads)),),
        slack_s=(2.0,),
        counts=(1, 2, 3),
        initial=1,
        lead_steps=2,
        start_s=1.5,
        stop_s=0.5,
    )
    return replace(given, **changes)  # type: ignore[arg-type]


def paid(given: Problem, counts: tuple[int, ...]) -> tuple[float, float]:
    """(cost, share of misses) of a schedule, counted by hand."""
    now, backlog, cost_s, missed = given.initial, 0.0, 0.0, 0.0
    for step, count in enumerate(counts):
        cost_s += given.start_s * max(0, count - now) + given.stop_s * max(0, now - count) + count
        now = count
        backlog = max(0.0, backlog + float(given.load[step, 0]) - now)
        missed += float(given.shares[0][step, 0]) * (backlog / now > given.slack_s[0])
    return cost_s, missed


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_cheapest_of_all_schedules_that_keep_the_slos(seed: int) -> None:
    draw = np.random.default_rng(seed)
    given = problem(np.round(draw.uniform(0.0, 3.5, 8), 1).tolist(), initial=2)
    possible = [
        counts for counts in product(given.counts, repeat=8) if max(counts[: given.lead_steps]) <= given.initial
    ]
    least = min(cost_s for cost_s, missed in (paid(given, counts) for counts in possible) if missed == 0.0)
    found = best_schedule(given, miss_max=0.0)
    assert (found.cost_s, found.missed) == pytest.approx(paid(given, found.instances))
    assert found.missed == 0.0
    # Work that waits is held in levels, and read off between them.
    assert least - 1e-9 <= found.cost_s <= 1.06 * least


def test_what_cannot_be_ready_in_time_is_missed() -> None:
    found = best_schedule(problem([9.0] + [0.1] * 8, lead_steps=4), miss_max=0.0)
    assert max(found.instances[:4]) == 1
    assert found.missed > 0.0


def test_a_start_that_costs_more_than_it_saves_is_not_made() -> None:
    waves = [3.0, 3.0, 0.5, 0.5, 3.0, 3.0, 0.5, 0.5]
    dear = best_schedule(problem(waves, initial=3, start_s=50.0), miss_max=0.0)
    cheap = best_schedule(problem(waves, initial=3, start_s=0.0, stop_s=0.0), miss_max=0.0)
    assert sum(b > a for a, b in zip(dear.instances, dear.instances[1:], strict=False)) == 0
    assert sum(cheap.instances) < sum(dear.instances)
    assert isinstance(dear, Schedule)


def test_instances_are_asked_for_as_long_before_as_a_start_takes() -> None:
    ours = ScheduledSettings(schedules={"llama": (2, 2, 2, 2, 7, 1)}, step_s=10.0, ahead_s=15.0, tick_s=5.0)
    assert [scheduled(ours, "llama", now_s) for now_s in (0.0, 20.0, 25.0, 49.9, 50.0, 500.0)] == [2, 2, 7, 7, 1, 1]
    assert scheduled(ours, "other", 0.0) == 0


def test_batch_deadlines_add_instances_beside_the_schedule() -> None:
    ours = ScheduledSettings(schedules={"llama": (3,)}, step_s=10.0)

    def counts(deadline_s: float) -> dict[Role, int]:
        live = model([instance(id=i) for i in range(3)], groups=(group(deadline_s=deadline_s, requests=4000),))
        plan, _ = decide_fleet(ours, None, fleet(live, now_s=1000.0, since_s=5.0))
        return dict(plan["llama"].counts)

    assert counts(1e6) == {"interactive": 0, "mixed": 3, "batch": 0}
    assert counts(1100.0)["batch"] > 0


def made(policy: str, text: str = SCENARIO) -> Setup:
    (only,) = setups(parse_scenario(text, directory=Path()), policies=[policy], seeds=[1])
    return only


def test_a_long_time_and_a_large_fleet_are_scheduled_more_coarsely() -> None:
    text = SCENARIO.replace('duration = "4m"', 'duration = "24h"').replace("rate = 2\n", "rate = 0.05\n")
    day = made("clairvoyant", text.replace("max_instances = 6", "max_instances = 1000"))
    large = replace(day, initial={"llama": 773})
    for given, least_cells in ((day, 0), (large, CELLS_MAX // 2), (replace(day, initial={"llama": 1000}), 0)):
        asked = problem_of(given, given.models[0], 1.0)
        assert asked is not None
        steps, seconds = asked.load.shape
        counts = np.array(asked.counts)
        assert least_cells <= steps * len(counts) <= CELLS_MAX
        assert seconds == 5 if counts[-1] < 100 else 5 < seconds <= 17
        assert counts[0] == 1
        assert asked.initial in asked.counts
        assert (counts[1:] > counts[:-1]).all()
        assert (counts[1:] - counts[:-1] <= np.maximum(1, 0.01 * counts[:-1])).all()
        assert asked.load.sum() > 0.0
    minutes = replace(made("clairvoyant"), initial={"llama": 6})
    small = problem_of(minutes, minutes.models[0], 1.0)
    assert small is not None
    assert small.counts == (1, 2, 3, 4, 5, 6)


@pytest.mark.slow
def test_a_run_with_the_future_known_keeps_the_slos_on_fewer_gpus() -> None:
    ours, knowing = simulate(made("chiron")).summary, simulate(made("clairvoyant")).summary
    assert knowing["attainment"]["chat"] >= 0.99
    assert knowing["gpu_hours_bound"] < knowing["gpu_hours"] < 0.9 * ours["gpu_hours"]
    assert knowing["policy"] == "clairvoyant"


def test_batch_work_alone_needs_no_schedule_and_no_tries() -> None:
    alone = SCENARIO.replace('kind = "interactive"\nttft = "5s"\nitl = "200ms"', 'kind = "batch"\ndeadline = "10m"')
    given = made("clairvoyant", alone)

    def tried(setup: Setup) -> Result:
        raise AssertionError("a factor on no interactive load changes nothing")

    assert schedule_found(given, tried).settings.schedules == {}
    assert simulate(given).summary["attainment"]["chat"] >= 0.99


def test_it_needs_interactive_work_and_is_no_policy_that_can_be_set_or_served() -> None:
    given = made("clairvoyant")
    assert problem_of(given, replace(given.models[0], name="other"), 1.0) is None
    with pytest.raises(ConfigError, match="unknown policy 'clairvoyant'"):
        made("mine", SCENARIO + '[policies.mine]\npolicy = "clairvoyant"\n')
