"""A backtest leaves out what its answer cannot depend on, and answers as if it had not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.policies.fluid_queue import Floats, late_requests
from chiron.policies.headroom import CONSTANT, Backtest, Headroom, Question, Rule, answer
from effort import examples

RULES = (CONSTANT, *(Rule(window_s=w, settle_s=s) for w in (15, 60, 180, 600) for s in (60, 300)))


def second_by_second(load: Floats, requests: Floats, slack_s: float, fleet: Floats) -> float:
    late = backlog = 0.0
    for arrives, serves, count in zip(load.tolist(), fleet.tolist(), requests.tolist(), strict=True):
        backlog = max(0.0, backlog + arrives - serves)
        if arrives > 0.0 and (over := min(backlog - slack_s * serves, arrives)) > 0.0:
            backlog -= over
            late += count * over / arrives
    return late


@settings(max_examples=examples(100))
@given(
    # In quarters, which have no rounding.
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20), st.integers(1, 6)), min_size=1, max_size=80),
    st.integers(0, 16),
)
def test_busy_periods_without_a_late_request_need_no_look(seconds: list[tuple[int, int, int]], slack: int) -> None:
    load = np.array([each / 4.0 for each, _, _ in seconds])
    requests = np.array([float(count) for _, count, _ in seconds])
    fleet = np.array([float(count) for _, _, count in seconds])
    assert late_requests(load, requests, slack / 4.0, fleet) == second_by_second(load, requests, slack / 4.0, fleet)


def test_an_overload_of_any_length_is_counted() -> None:
    load = np.concatenate((np.full(50, 1.0), np.full(1500, 4.0), np.full(2000, 1.0), np.full(9, 7.0)))
    fleet = np.full(len(load), 2.0)
    late = late_requests(load, load, 3.0, fleet)
    assert late == second_by_second(load, load, 3.0, fleet)
    assert late > 2900.0


def question(seed: int, **changes: object) -> Question:
    """Half an hour of a load that comes back every ten minutes, with bursts."""
    draw = np.random.default_rng(seed)
    time_s = np.arange(1800)
    load = np.where(draw.random(1800) < 0.02, draw.uniform(5.0, 30.0, 1800), 2.0)
    load = load + np.where(time_s % 600 < 120, 6.0, 0.0)
    asked = Question(
        load=load,
        counts=np.ceil(load)[None, :],
        slack_s=(2.0,),
        rules=RULES,
        cold_start_s=30.0,
        tick_s=5.0,
        miss_max=0.005,
        floor=1,
        ceiling=40,
        current=None,
    )
    return replace(asked, **changes)  # type: ignore[arg-type]


def found(asked: Question) -> Headroom:
    return answer(Backtest(question=asked))


FORETOLD = np.where(np.arange(1800) % 600 < 150, 9.0, 0.0)


@pytest.mark.parametrize("foretold", [None, FORETOLD], ids=["nothing foretold", "a period foretold"])
@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_of_all_rules_is_the_cheapest_of_each_alone(seed: int, foretold: Floats | None) -> None:
    asked = question(seed, foretold=foretold)
    alone = [found(replace(asked, rules=(rule,))) for rule in RULES]
    steady = alone[0].h
    assert found(asked) == replace(min(alone, key=lambda each: each.instances), steady=steady)
    assert len({each.instances for each in alone}) > 4, "and they differ"


def test_the_rule_in_force_is_kept_for_a_little_more_though_a_cheaper_one_is_known() -> None:
    asked = question(3)
    alone = {rule: found(replace(asked, rules=(rule,))).instances for rule in RULES[1:]}
    best = min(alone, key=lambda rule: alone[rule])
    assert any(alone[best] < alone[rule] <= alone[best] / 0.97 for rule in alone)
    for rule in alone:
        kept = found(replace(asked, rules=(best, rule), current=rule)).rule == rule
        assert kept == (0.97 * alone[rule] <= alone[best])


def test_the_least_fixed_fleet_is_always_known() -> None:
    load = np.linspace(2.0, 20.0, 1800)
    asked = question(0, load=load, counts=np.ceil(load)[None, :])
    there, back = (found(replace(asked, rules=rules)) for rules in (RULES, RULES[::-1]))
    assert there.steady == back.steady > there.instances + 1.0, "which is no answer"


@pytest.mark.parametrize("seed", range(4))
def test_it_does_not_matter_which_rule_is_tried_first(seed: int) -> None:
    surge = np.where(np.arange(1800) % 600 < 60, 20.0, 2.0) + np.random.default_rng(seed).random(1800)
    asked = question(seed, periods=True, load=surge, counts=np.ceil(surge)[None, :])
    there, back = (found(replace(asked, rules=rules)) for rules in (RULES, RULES[::-1]))
    assert there == back
    assert there.rule.period_s == 600, "and periods are tried"
