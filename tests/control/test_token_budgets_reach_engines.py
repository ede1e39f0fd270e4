"""A plan's token budget is that of instances to come; a local one goes to engines that take it while they run."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from chiron.control.actuators import DirectActuators, NullActuators
from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.types import Decision, Instance, InstanceKind, ModelSpec, Request, RequestClass, Sample
from chiron.policies.instances import take_back_fullest
from chiron.policies.policy import Policy
from chiron.policies.views import FleetPlan, FleetView, LocalDecision, LocalView, ModelPlan, TokenBudget

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=1.0, itl_s=0.1)
TICK_S = 10.0


class World:
    """Fleet, engines and journal in one. ``plan`` and ``local`` are what the policy says."""

    wants_events = False

    def __init__(self, *, live: bool = False, starts: bool = True, advise: bool = False) -> None:
        kind = InstanceKind(
            name="k", gpu="g", gpus=1, price_per_gpu_hour=1.0, kv_capacity_tokens=2000, max_num_seqs=2,
            max_num_batched_tokens=2048, live_token_budget=live, start_token_budget=starts,
        )  # fmt: skip
        self.instances = 2
        self.renews = 0
        self.plan: TokenBudget | None = None
        self.over_budget = 0
        self.local: TokenBudget | None = None
        self.told: list[int] = []
        self.decisions: list[Decision] = []
        self.created: list[Instance] = []
        self.removed: list[Instance] = []
        self.clock = VirtualClock()
        self.plane = ControlPlane(
            clock=self.clock,
            fleet=self,
            journal=self,
            models=[ModelSpec(name="m", kinds=(kind,), min_instances=1, max_instances=5)],
            classes=[CHAT],
            policy=Policy(
                name="p",
                settings=None,
                fleet=self._fleet,
                fleet_period_s=TICK_S,
                batch_size=self._batch_size,
                take_back=take_back_fullest,
            ),
            actuators=NullActuators() if advise else DirectActuators(),
        )
        self.plane.request_initial("m", self.instances)
        for instance in list(self.created):
            self.plane.instance_ready(instance, self)
        self.plane.begin()

    def _fleet(self, settings: object, state: None, view: FleetView) -> tuple[FleetPlan, None]:
        self.over_budget = view.models[0].over_budget
        counts = {"interactive": 0, "mixed": self.instances, "batch": 0}
        return {"m": ModelPlan(counts=counts, reason="r", token_budget=self.plan, renews=self.renews)}, None  # type: ignore[arg-type]

    def _batch_size(self, settings: object, state: None, view: LocalView) -> tuple[LocalDecision | None, None]:
        return LocalDecision(max_batch_size=view.max_batch_size, reason="r", token_budget=self.local), None

    def ticks(self, count: int = 1) -> None:
        for _ in range(count):
            self.clock.run_until(self.clock.now_s + TICK_S)

    def scrape(self, instance: Instance) -> None:
        for steps in (1, 2):
            self.clock.run_until(self.clock.now_s + 0.1)
            zero = dict.fromkeys(("waiting", "waiting_tokens", "head_tokens", "kv_used_tokens", "preemptions"), 0)
            self.plane.sampled(
                [
                    Sample(
                        instance_id=instance.id, taken_s=self.clock.now_s, running=1, steps=steps, busy_s=0.1,
                        decode_tokens=steps, prefill_tokens=0, context_tokens=0.0, **zero,
                    )
                ]
            )  # fmt: skip

    def budgets(self) -> list[Mapping[str, object]]:
        return [
            {"subject": d.subject, "before": d.before, "after": d.after, "reason": d.reason}
            for d in self.decisions
            if d.kind == "token_budget"
        ]

    def create(self, instance: Instance) -> None:
        self.created.append(instance)

    def remove(self, instance: Instance) -> None:
        self.removed.append(instance)

    def set_max_num_batched_tokens(self, max_num_batched_tokens: int) -> None:
        self.told.append(max_num_batched_tokens)

    def start(self, request: Request) -> None: ...
    def evict(self, request: Request) -> None: ...
    def set_max_batch_size(self, max_batch_size: int) -> None: ...
    def decided(self, now_s: float, decision: Decision) -> None:
        self.decisions.append(decision)

    def ended(self, request: Request) -> None: ...
    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


SMALL = TokenBudget(max_num_batched_tokens=512, reason="why")


def test_instances_to_come_start_with_the_budget_of_the_plan_and_those_that_run_keep_theirs() -> None:
    world = World()
    world.plan, world.instances = SMALL, 3
    world.ticks(2)
    assert [i.max_num_batched_tokens for i in world.created] == [2048, 2048, 512]
    assert world.budgets() == [{"subject": "m", "before": 2048, "after": 512, "reason": "why"}], "once"
    assert world.told == []
    world.plan, world.instances = None, 4
    world.ticks()
    assert world.created[-1].max_num_batched_tokens == 2048
    assert [each["after"] for each in world.budgets()] == [512, 2048]


def test_what_cannot_be_started_with_another_budget_keeps_its_own() -> None:
    world = World(starts=False)
    world.plan, world.instances = SMALL, 3
    world.ticks(2)
    assert [i.max_num_batched_tokens for i in world.created] == [2048] * 3
    assert world.budgets() == [], "nothing is decided that nobody carries out"


def test_those_with_another_budget_than_new_ones_have_are_drained_first() -> None:
    world = World()
    world.plan, world.instances = SMALL, 3
    world.ticks()
    world.plane.instance_ready(world.created[2], world)
    world.instances = 2
    world.ticks()
    assert [i.id for i in world.removed] == [2], "not the newest one"


@pytest.mark.parametrize(("renews", "taken_back"), [(0, True), (1, False)])
def test_what_drains_to_be_replaced_is_not_taken_back_as_its_own_successor(renews: int, taken_back: bool) -> None:
    world = World()
    for number in range(4):
        world.plane.submit(Request(number, "m", CHAT, 0.0, 10))
    world.plan, world.instances = SMALL, 1
    world.ticks()
    assert [i.state for i in world.created] == ["ready", "draining"]
    world.instances, world.renews = 2, renews
    world.ticks()
    assert (world.created[1].state == "ready") is taken_back
    assert [i.max_num_batched_tokens for i in world.created[2:]] == [512] * (not taken_back)


@pytest.mark.parametrize(
    ("world", "over"),
    [(World(), 2), (World(live=True), 0), (World(starts=False), 0)],
    ids=["started with it", "told live", "has its own"],
)
def test_a_policy_sees_how_many_keep_a_larger_budget_than_new_ones_get(world: World, over: int) -> None:
    world.plan = SMALL
    world.ticks(1)
    assert world.over_budget == 0, "the plan is not in force yet"
    world.instances = 3
    world.ticks(2)
    assert world.over_budget == over, "the third is none of them"
    world.plan = None
    world.ticks(2)
    assert world.over_budget == 0, "a smaller one is not larger"


@pytest.mark.parametrize(("live", "told"), [(True, [512]), (False, [])])
def test_an_engine_that_takes_a_budget_while_it_runs_is_told_it(live: bool, told: list[int]) -> None:
    world = World(live=live)
    world.local = SMALL
    world.told.clear()
    first = world.created[0]
    world.scrape(first)
    assert world.told == told
    assert first.max_num_batched_tokens == (512 if live else 2048)
    found = [{"subject": "m#1", "before": 2048, "after": 512, "reason": "why"}] if live else []
    assert world.budgets() == found
    world.scrape(first)
    assert world.told == told, "once"


def test_a_budget_beyond_the_kinds_own_is_cut_to_it() -> None:
    world = World(live=True)
    world.local = world.plan = TokenBudget(max_num_batched_tokens=9999, reason="why")
    world.instances = 3
    world.told.clear()
    world.scrape(world.created[0])
    world.ticks()
    assert world.told == []
    assert [i.max_num_batched_tokens for i in world.created] == [2048, 2048, 2048]


def test_a_new_one_that_takes_it_live_is_told_when_it_is_ready() -> None:
    world = World(live=True)
    world.plan, world.instances = SMALL, 3
    world.ticks()
    world.told.clear()
    world.plane.instance_ready(world.created[2], world)
    assert world.told == [512]


def test_one_that_takes_it_live_is_told_its_own_too_as_another_brain_may_have_set_less() -> None:
    world = World(live=True)
    assert world.told == [2048, 2048]


def test_advice_touches_nothing() -> None:
    world = World(live=True, advise=True)
    world.local = SMALL
    world.scrape(world.created[0])
    world.scrape(world.created[0])
    assert world.told == []
    assert world.created[0].max_num_batched_tokens == 2048
    assert [each["after"] for each in world.budgets()] == [512], "it is said once"
