"""A load that comes back is met by knowing when, and noise is not taken for one."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest

from chiron.policies.chiron.global_loop import decide_fleet
from chiron.policies.chiron.load import first_memory
from chiron.policies.chiron.load_history import presumed
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.headroom import (
    CONSTANT,
    Backtest,
    Floats,
    Headroom,
    Question,
    Rule,
    advanced,
    answer,
    followed,
    periods,
)
from policy_factory import fleet, instance, model

RULES = (CONSTANT, *(Rule(window_s=w, settle_s=s) for w in (15, 60, 600) for s in (60, 300, 1800)))
PERIOD_S = 900


def surges(seconds: int = 3600, *, period_s: int = PERIOD_S, seed: int = 1) -> Floats:
    """Two minutes of four times the load in each period, the first after a third of one."""
    at = (np.arange(seconds) - period_s // 3) % period_s < 120
    noise = np.random.default_rng(seed).gamma(4.0, 0.25, seconds)
    return np.where(at, 12.0, 3.0) * noise


def bursts(seed: int) -> Floats:
    return np.where(np.random.default_rng(seed).random(3600) < 0.02, 30.0, 2.0)


def question(load: Floats, *, looks: bool = True, current: Rule | None = None) -> Question:
    return Question(
        load=load,
        counts=np.ceil(load)[None, :],
        slack_s=(3.0,),
        rules=RULES,
        cold_start_s=60.0,
        tick_s=5.0,
        miss_max=0.006,
        floor=1,
        ceiling=100,
        current=current,
        periods=looks,
    )


def chosen(load: Floats, *, looks: bool = True, current: Rule | None = None) -> Headroom:
    return answer(Backtest(question=question(load, looks=looks, current=current)))


def test_the_period_of_a_load_is_found_and_none_in_what_has_none() -> None:
    assert PERIOD_S in periods(surges(), 60.0)
    assert periods(surges(period_s=500), 60.0) == (500, 1000, 1500), "the likest first"
    assert all(not periods(bursts(seed), 60.0) for seed in range(5))
    assert periods(np.full(3600, 4.0), 60.0) == ()
    assert periods(np.array([1.0]), 60.0) == ()
    assert periods(surges(1500), 60.0) == (), "one that was not seen twice"
    assert periods(surges(period_s=400), 240.0)[0] >= 480, "instances must have time to start"


@pytest.mark.parametrize("seed", [1, 3, 5])
def test_a_long_period_is_found_though_fewer_moments_are_so_far_apart(seed: int) -> None:
    noise = np.random.default_rng(seed).gamma(4.0, 0.25, 360).repeat(10)
    load = np.where((np.arange(3600) - 400) % 1340 < 60, 3.0, 1.0) * noise
    assert 1340 in periods(load, 60.0)


def test_a_rule_that_looks_back_is_adopted_where_it_saves_a_tenth() -> None:
    plain, back = chosen(surges(), looks=False), chosen(surges())
    assert plain.rule.period_s == 0
    assert back.rule.period_s == PERIOD_S
    assert back.instances < 0.8 * plain.instances
    assert back.steady == plain.steady < inf


def test_a_period_that_saves_little_is_left_alone() -> None:
    wave = (1.0 + 0.2 * np.sin(2 * np.pi * np.arange(3600) / 1200)) * 4.0
    load = np.random.default_rng(5).gamma(4.0, 0.25, 3600) * wave
    assert len(periods(load, 60.0)) == 1, "a broad peak counts once"
    assert chosen(load) == chosen(load, looks=False)


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_followed_as_it_would_be_without(seed: int) -> None:
    assert chosen(bursts(seed)) == chosen(bursts(seed), looks=False)


def test_a_period_in_force_stays_while_it_saves_anything_and_goes_with_the_surges() -> None:
    in_force = chosen(surges()).rule
    assert chosen(surges(seed=2), current=in_force).rule.period_s == PERIOD_S
    quiet = np.random.default_rng(3).gamma(4.0, 0.75, 3600)
    assert chosen(quiet, current=in_force).rule.period_s == 0


def test_what_it_follows_is_what_came_about_now_and_a_start_later_one_period_ago() -> None:
    load = np.ones(2000)
    load[1000:1060] = 9.0
    rule = Rule(window_s=60, settle_s=60, period_s=900, span_s=15)
    late = [now for now in range(1400, 2000, 5) if followed(load[:now], rule, 5.0, 60.0) > 5.0]
    # From a start and twice the span before it would come back at 1900, until a little after it would end at 1960.
    assert 1900 - 60 - 45 <= late[0] <= 1900 - 60 - 10
    assert 1960 <= late[-1] <= 1960 + 30
    assert late == list(range(late[0], late[-1] + 1, 5))
    assert followed(load[:800], rule, 5.0, 60.0) == 1.0, "no period has gone by"


def test_it_is_cut_into_steps_like_the_rest() -> None:
    whole = answer(Backtest(question=question(surges())))
    backtest = Backtest(question=question(surges()))
    while not backtest.done:
        before = backtest.steps
        backtest = advanced(backtest, 3)
        assert before < backtest.steps <= before + 3
    assert repr(answer(backtest)) == repr(whole)


def test_a_fleet_is_there_before_the_surge_and_small_between() -> None:
    ours = ChironSettings()
    load = surges(3600 + 2 * PERIOD_S)
    live = model([instance(id=i) for i in range(4)])

    def planned(now: int) -> int:
        memory = first_memory(ours, live, float(now))
        past = load[now - 3600 : now]
        history = replace(presumed(now - 3600.0, past, 1), counts=np.ceil(past)[None, :])
        memory = replace(memory, history=history, headroom=chosen(past), backtest_s=float(now))
        plan, _ = decide_fleet(ours, {live.name: memory}, fleet(live, now_s=float(now), since_s=5.0))
        return int(plan[live.name].numbers["wanted"])

    begins = 3600 + PERIOD_S // 3
    assert planned(begins - 65) >= 12, "one start ahead"
    assert planned(begins - 200) <= 8
