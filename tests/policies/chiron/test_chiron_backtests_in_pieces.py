"""The backtest is computed between ticks, a few steps at a time, and comes out the same as in one go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from chiron.policies.chiron.global_loop import decide_fleet, prepare
from chiron.policies.chiron.load import STEPS_AT_ONCE, ModelMemory
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.headroom import CONSTANT, Backtest, Headroom, Question, Rule, advanced, answer
from policy_factory import arrival, fleet, fleet_of, model

RULES = (CONSTANT, *(Rule(window_s=w, settle_s=s) for w in (15, 60, 600) for s in (60, 300)))
FAST = ChironSettings(learning_s=60.0, backtest_s=30.0, memory_s=600, prior_s=60, settles_s=(10, 60))
TICK_S = 5.0


def question(seed: int, *, ceiling: int = 100) -> Question:
    draw = np.random.default_rng(seed)
    load = np.where(draw.random(1800) < 0.02, 30.0, 2.0) + 3.0 * np.sin(np.arange(1800) / 200.0) ** 2
    return Question(
        load=load,
        counts=np.ceil(load)[None, :],
        slack_s=(2.0,),
        rules=RULES,
        cold_start_s=60.0,
        tick_s=TICK_S,
        miss_max=0.005,
        floor=1,
        ceiling=ceiling,
        current=RULES[2],
    )


@pytest.mark.parametrize("ceiling", [100, 1, 3], ids=["plenty", "a fleet of one", "never enough"])
def test_the_answer_does_not_depend_on_how_it_is_cut(ceiling: int) -> None:
    whole = answer(Backtest(question=question(1, ceiling=ceiling)))
    for steps in (1, 2, 3, 7):
        backtest = Backtest(question=question(1, ceiling=ceiling))
        while not backtest.done:
            before = backtest.steps
            backtest = advanced(backtest, steps)
            assert before < backtest.steps <= before + steps
        assert repr(answer(backtest)) == repr(whole)
    assert repr(answer(advanced(Backtest(question=question(1, ceiling=ceiling)), 5))) == repr(whole)


def drive(ticks: int, pieces: int) -> list[tuple[Headroom, bool]]:
    """The headroom in force after each tick, and whether a backtest was under way then; ``pieces`` calls of ``prepare``
    between two ticks."""
    state = None
    seen = []
    for tick in range(1, ticks + 1):
        now_s = TICK_S * tick
        load = 40 if tick % 12 < 3 else 5
        arrivals = tuple(arrival(int(now_s - TICK_S) + second, load) for second in range(int(TICK_S)))
        view = replace(model(fleet_of(3)), arrivals=arrivals)
        _, state = decide_fleet(FAST, state, fleet(view, now_s=now_s, since_s=TICK_S))
        memory: ModelMemory = state["llama"]
        seen.append((memory.headroom, memory.backtest is not None))
        for _ in range(pieces):
            state = prepare(FAST, state) or state
    return seen


def test_it_is_adopted_at_the_next_tick_whoever_computes_it() -> None:
    alone, prepared = drive(30, 0), drive(30, 100)

    assert repr(prepared) == repr(alone)
    assert sum(under_way for _, under_way in alone) >= 3
    changed = [i for i in range(1, 30) if alone[i][0] != alone[i - 1][0]]
    assert changed
    assert all(alone[i - 1][1] for i in changed), "asked at one tick, adopted at the next"


def test_it_is_waited_for_while_it_is_under_way() -> None:
    slow = drive(45, 2)

    assert 2 * STEPS_AT_ONCE < 20, "a tick is too short for all of it"
    runs = "".join("x" if under_way else "." for _, under_way in slow)
    assert "xxx" in runs, "no tick computes the rest at once"
    assert "x." in runs, "and it is over at last"


def test_nothing_is_prepared_when_nothing_is_under_way() -> None:
    assert prepare(FAST, None) is None
    _, state = decide_fleet(FAST, None, fleet(model(fleet_of(3)), now_s=5.0, since_s=5.0))
    assert prepare(FAST, state) is None
