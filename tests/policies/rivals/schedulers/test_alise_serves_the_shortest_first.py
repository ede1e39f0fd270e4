"""After ALISE: levels of predicted remaining time, wrong predictions, ageing, and predictions with a stated error."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiron.config.build import setups
from chiron.config.scenario import parse_scenario
from chiron.core.types import Request
from chiron.policies.composers.leveled import LeveledComposer
from chiron.policies.policy import Estimates
from chiron.policies.rivals.schedulers.alise import AliseSettings, Remaining
from chiron.policies.views import StepTimes
from chiron.sim.run import simulate
from chiron.workload.predicted import with_predictions
from policy_factory import CHAT
from scenario_factory import setup_of

TIMES = StepTimes(
    fixed_s=0.01,
    per_sequence_s=0.0,
    per_context_token_s=0.0,
    per_prefill_token_s=0.001,
    per_prefill_square_s=0.0,
)
"""A token of an answer takes 10 ms, one of a prompt 1 ms."""


def levels(jobs: dict[int, Any] | None = None) -> Remaining:
    estimates = Estimates(TIMES, ttft_max_s=inf)
    estimates.expected_output["chat"] = 50.0
    return Remaining(AliseSettings(), estimates, {} if jobs is None else jobs)


def request(number: int, predicted: int, prompt: int = 1, arrival_s: float = 0.0) -> Request:
    made = Request(number, "m", CHAT, arrival_s, prompt)
    made.predicted_tokens = predicted
    return made


@pytest.mark.parametrize(
    ("prompt", "predicted", "level"),
    [(100, 90, 0), (101, 90, 1), (100, 189, 1), (100, 191, 2), (100, 391, 3), (100, 100_000, 7), (100, 0, 0)],
)
def test_a_level_is_twice_as_much_time_as_the_one_before(prompt: int, predicted: int, level: int) -> None:
    """Nobody's prediction is the mean of the class, 50 tokens."""
    ours, new = levels(), request(1, predicted, prompt)
    ours.enters(new)
    assert ours.level(new, 0.0, 0) == level


def test_what_is_made_is_off_it_and_a_wrong_prediction_sinks() -> None:
    ours, one = levels(), request(1, 300, prompt=500)
    ours.enters(one)
    ours.starts(one, 0.0)
    assert [ours.level(one, 0.0, made) for made in (0, 1, 120, 240, 299)] == [2, 2, 1, 0, 0]
    assert ours.level(one, 0.0, 300) == 2, "then 300 more"
    assert ours.level(one, 0.0, 600) == 3, "then 600 more"


def test_who_waits_rises_by_a_level_a_minute_and_keeps_it_while_it_runs() -> None:
    ours, one = levels(), request(1, 800, arrival_s=100.0)
    ours.enters(one)
    assert ours.level(one, 100.0, 0) == 4
    assert ours.better_s(one) == 160.0
    assert [ours.level(one, now_s, 0) for now_s in (159.9, 160.0, 220.0)] == [4, 3, 2]
    assert ours.better_s(one) == 280.0
    ours.starts(one, 230.0)
    assert ours.level(one, 500.0, 0) == 2
    ours.stops(one, 500.0)
    assert ours.level(one, 500.0, 0) == 4


def test_who_lost_its_engine_waits_and_rises_in_the_next_one() -> None:
    jobs: dict[int, Any] = {}
    ours, one = levels(jobs), request(1, 800)
    composers = [LeveledComposer(ours, every_steps=1) for _ in range(2)]
    composers[0].add(one, 1, False)
    composers[0].remove_head(composers[0].head(0.0, False))  # type: ignore[arg-type]
    composers[1].add(one, 1, False)
    assert composers[1].head(100.0, False) is one
    assert ours.better_s(one) == 160.0
    assert composers[1].head(160.0, False) is one
    assert ours.level(one, 160.0, 0) == 3
    jobs.clear()  # It is called off.
    assert composers[1].head(400.0, False) is one


def test_predictions_have_the_stated_error_and_the_same_draws_for_any_policy() -> None:
    workload = setup_of([(float(i), 5, 1000, 0, 0) for i in range(4000)]).workload
    error = np.log(with_predictions(workload, 0.5, seed=1).predicted_tokens / 1000.0)  # type: ignore[operator]
    assert error.std() == pytest.approx(0.5, rel=0.05)
    assert error.mean() == pytest.approx(0.0, abs=0.03)
    exact = with_predictions(workload, 0.0, seed=1).predicted_tokens
    assert exact is not None
    assert (exact == 1000).all()


LOADED = """
[classes.chat]
kind = "interactive"
[models.m]
instances = [{ profile = "llama-3.1-8b/a100/tp1", max_num_seqs = 16 }]
initial = 1
max_instances = 1
[[workload]]
model = "m"
class = "chat"
generate = { kind = "poisson", rate = 8, duration = "40s", lengths = { input = 200, output = { mean = 300, cv = 2 } } }
"""


def test_answers_come_sooner_in_the_mean_than_first_come_first_served() -> None:
    made = setups(parse_scenario(LOADED, directory=Path()), policies=["static", "alise-like"])
    plain, ours = (simulate(setup, with_bound=False) for setup in made)
    assert made[0].workload.predicted_tokens is None, "nobody else is told"
    assert made[1].workload.predicted_tokens is not None
    mean_s = [float((r.requests.finish_s - r.requests.arrival_s).mean()) for r in (plain, ours)]
    assert mean_s[1] < 0.7 * mean_s[0]
    assert ours.summary["preemptions"] > 10
    assert ours.summary["finished"] == ours.summary["requests"]


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="length_error"):
        AliseSettings(length_error=-0.1)
