"""``chiron`` replaces instances that keep too large a token budget, a few at a time, while ITL SLOs are missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest

from chiron.policies.capacity import Capacity
from chiron.policies.chiron.global_loop import State, decide_fleet
from chiron.policies.chiron.load import first_memory
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.chiron.start_budget import replacements
from chiron.policies.views import ClassMix, FleetView, TokenBudget
from policy_factory import CHAT, arrival, instance, mix, model

SETTINGS = ChironSettings()
TICK_S = 5.0
SMALL = TokenBudget(max_num_batched_tokens=512, reason="step_above_itl_slo")
ENGINE = {"max_num_batched_tokens": 2048}


def chat(answer: int = 8) -> ClassMix:
    """Tight, short answers, and a prompt in a hundred of 20,000 tokens: 15 full steps, of 0.2 s at the whole budget."""
    tight = replace(CHAT, ttft_s=10.0, itl_s=0.05)
    return mix(tight, output_tokens=40.0, output_low=answer, input_tail=((20_000.0, 0.01),))


START_S = 30.0


@pytest.mark.parametrize(
    ("wanted", "ready", "over", "missed", "more"),
    [
        (4, 4, 0, 0.01, 0),
        (4, 4, 4, 0.003, 0),
        (4, 4, 4, 0.004, 1),
        (5, 5, 5, 0.01, 2),
        (8, 8, 1, 0.01, 1),
        (8, 10, 8, 0.01, 0),
    ],
    ids=["none to replace", "few miss", "one", "a quarter, rounded up", "what is left", "those are ready"],
)
def test_a_quarter_at_a_time_while_requests_miss(wanted: int, ready: int, over: int, missed: float, more: int) -> None:
    assert asked(wanted, ready, over, missed) == more


@pytest.mark.parametrize(("answer", "more"), [(1, 1), (8, 1), (40, 0), (400, 0)])
def test_only_where_short_answers_gain_much(answer: int, more: int) -> None:
    assert asked(4, 4, 4, 0.01, answer) == more


def asked(wanted: int, ready: int, over: int, missed: float, answer: int = 8) -> int:
    view = model([instance(id=i) for i in range(ready)], over_budget=over, mixes=(chat(answer),), **ENGINE)
    memory = replace(first_memory(SETTINGS, view, 0.0), itl_missed_lasting=missed, token_budget=SMALL)
    return replacements(SETTINGS, view, memory, Capacity(batch_size=10.0, step_s=0.05, work_rate=0.8), wanted)


class Fleet:
    """Four instances are enough. It follows its plans: starts take ``START_S``, and large budgets go first."""

    def __init__(self, *, most: int = 50, gpus: float = inf) -> None:
        self.most, self.gpus = most, gpus
        self.large = [True] * 4
        self.starting: list[float] = []
        self.state: State | None = None
        self.now_s = 0.0
        self.plans: list[tuple[float, int, str]] = [(-inf, 4, "")]
        self.renews: set[tuple[int, int]] = set()

    def ticks(self, count: int, *, missed: float = 0.01) -> None:
        for _ in range(count):
            self.now_s += TICK_S
            while self.starting and self.starting[0] <= self.now_s:
                self.starting.pop(0)
                self.large.append(False)
            self._follow(self._plan(missed))

    def _plan(self, missed: float) -> int:
        ready = [instance(id=i) for i in range(len(self.large))]
        starting = [instance(id=100 + i, state="starting") for i in range(len(self.starting))]
        view = model(
            [*ready, *starting],
            arrivals=tuple(arrival(int(self.now_s - TICK_S) + i, 1) for i in range(int(TICK_S))),
            min_instances=4,
            max_instances=self.most,
            over_budget=sum(self.large),
            itl_missed=missed,
            cold_start_s=START_S,
            mixes=(chat(),),
            **ENGINE,
        )
        view = FleetView(now_s=self.now_s, since_s=TICK_S, models=(view,), gpus_max={"A100": self.gpus})
        plans, self.state = decide_fleet(SETTINGS, self.state, view)
        plan = plans["llama"]
        self.plans.append((self.now_s, sum(plan.counts.values()), plan.reason))
        self.renews.add((sum(plan.counts.values()), plan.renews))
        return sum(plan.counts.values())

    def _follow(self, planned: int) -> None:
        present = len(self.large) + len(self.starting)
        self.starting += [self.now_s + START_S] * (planned - present)
        for _ in range(present - planned):
            self.large.remove(True in self.large)

    def changes(self) -> list[tuple[float, int, str]]:
        return [b for a, b in pairwise(self.plans) if a[1] != b[1]]


def test_one_after_another_is_replaced_and_then_the_fleet_rests() -> None:
    world = Fleet()
    world.ticks(200)
    assert world.large == [False] * 4
    assert [count for _, count, _ in world.changes()] == [5, 4] * 4
    assert {reason for _, count, reason in world.changes() if count == 5} == {"smaller_token_budget"}
    assert (5, 1) in world.renews, "the control plane knows what the fifth is for"
    assert (4, 0) in world.renews
    times = [time for time, _, _ in world.changes()]
    assert min(b - a for a, b in pairwise(times)) >= SETTINGS.hold_s, "no plan is reversed within the hold"


def test_it_begins_once_slos_have_been_missed_for_minutes_and_ends_once_they_are_met() -> None:
    world = Fleet()
    world.ticks(20, missed=0.0)
    world.ticks(30, missed=0.01)
    assert world.changes() == [], "that may pass"
    world.ticks(15, missed=0.01)
    assert [count for _, count, _ in world.changes()] == [5]
    world.ticks(80, missed=0.0)
    left = sum(world.large)
    world.ticks(80, missed=0.0)
    assert sum(world.large) == left > 0
    assert len(world.large) == 4


@pytest.mark.parametrize("bounds", [{"most": 4}, {"gpus": 4.0}], ids=["max_instances", "GPUs"])
def test_nothing_is_replaced_without_room_for_one_more(bounds: Mapping[str, int]) -> None:
    world = Fleet(**bounds)
    world.ticks(100)
    assert world.changes() == []
