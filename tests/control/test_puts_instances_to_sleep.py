"""Instances without use sleep where a plan says so, hold their GPUs until then, and starts are learned by source."""

from __future__ import annotations

from typing import Any

import pytest

from chiron.control.model import ModelState
from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.kept import Kept
from chiron.core.types import Instance, ModelSpec, Request, StartSource
from chiron.policies.instances import take_back_fullest
from chiron.policies.policy import Policy
from chiron.policies.registry import make_policy
from chiron.policies.views import FleetPlan, FleetView, ModelPlan, ModelView
from recorded_plane import Recorded
from scenario_factory import CLASSES, PROFILE, kind_of

NAMES = ("a", "b")
A, B = (kind_of(PROFILE, name=name) for name in NAMES)


class World:
    """Two models on two GPUs, plans that a test dictates, and a fleet that only writes down what it is asked for."""

    wants_events = False

    def __init__(self, *, ready: int = 2) -> None:
        self.clock = VirtualClock()
        self.asked: list[str] = []
        self.made: list[Instance] = []
        self.plan = {"a": (ready, 0), "b": (0, 0)}
        self.views: dict[str, ModelView] = {}
        self.plane = ControlPlane(
            clock=self.clock,
            fleet=self,
            journal=self,
            models=[ModelSpec(name=kind.name, kinds=(kind,), min_instances=0, max_instances=2) for kind in (A, B)],
            classes=CLASSES,
            policy=Policy(
                name="dictated", settings=None, fleet=self.decide, fleet_period_s=1.0, take_back=take_back_fullest
            ),
            gpus_max={A.gpu: 2},
            sleepers=self,
        )
        self.plane.adopt("a", ready, lambda instance: self)
        self.plane.begin()

    def decide(self, settings: Any, state: Any, view: FleetView) -> tuple[FleetPlan, Any]:
        self.views = {model.name: model for model in view.models}
        return {
            name: ModelPlan(counts={"mixed": count}, reason="dictated", asleep=asleep)
            for name, (count, asleep) in self.plan.items()
        }, None

    def tick(self, **plan: tuple[int, int]) -> list[str]:
        """What the fleet is asked for at the next tick."""
        self.plan |= plan
        self.asked.clear()
        self.clock.run_until(self.clock.now_s + 1.0)
        return list(self.asked)

    def create(self, instance: Instance) -> None:
        self.asked.append(f"+{instance.kind.name}")
        self.made.append(instance)

    def remove(self, instance: Instance) -> None:
        self.asked.append(f"-{instance.kind.name}")

    def sleep(self, instance: Instance) -> None:
        self.asked.append(f"z{instance.kind.name}")
        self.made.append(instance)

    def keep_asleep(self, kind: str, most: int) -> None:
        self.asked.append(f"{kind}<={most}")

    def start(self, request: Request) -> None: ...
    def evict(self, request: Request) -> None: ...
    def set_max_batch_size(self, max_batch_size: int) -> None: ...
    def decided(self, now_s: float, decision: Any) -> None: ...
    def ended(self, request: Request) -> None: ...
    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


def test_it_holds_its_gpus_until_it_sleeps_and_the_next_start_is_any_other() -> None:
    world = World()
    assert world.tick(a=(1, 2), b=(1, 0)) == ["za"]
    assert world.tick() == [], "its GPU is not free, and it is told once"
    world.plane.kinds_asleep({"a": 1})
    world.plane.instance_asleep(world.made[0])
    assert world.asked == ["+b"], "at once, and not at the next tick"
    assert world.tick() == []
    assert (world.views["a"].asleep, world.views["b"].asleep) == (1, 0)
    assert [view.id for view in world.views["a"].instances] == [1]


def test_no_more_sleep_than_the_plan_allows_counting_those_that_fall_asleep() -> None:
    world = World()
    assert sorted(world.tick(a=(0, 1))) == ["-a", "za"]
    world.plane.kinds_asleep({"a": 1})
    world.plane.instance_asleep(world.made[0])
    assert world.tick(a=(0, 0)) == ["a<=0"]


def test_one_that_falls_asleep_is_not_taken_back() -> None:
    world = World(ready=1)
    assert world.tick(a=(0, 1)) == ["za"]
    assert world.tick(a=(1, 1)) == ["+a"], "it is on its way, and there is a second GPU"


def test_one_that_dies_while_it_falls_asleep_is_gone() -> None:
    world = World()
    world.tick(a=(1, 2))
    world.plane.instance_failed(world.made[0])
    world.plane.instance_asleep(world.made[0])
    assert world.plane.refused_events == 1
    assert world.tick(b=(1, 0)) == ["+b"]


def woken(source: StartSource, *, load_s: float, asleep: int = 1) -> World:
    """The only instance has fallen asleep, another start is under way, and after a second it is not wanted."""
    world = World(ready=1)
    world.plane.models["a"].start_s.update({"memory": 4.0, "disk": load_s})
    world.tick(a=(0, 1))
    world.plane.kinds_asleep({"a": 1})
    world.plane.instance_asleep(world.made[0])
    assert world.tick(a=(1, 1)) == ["+a"]
    world.made[-1].source = source
    world.plane.kinds_asleep({})
    world.asked = world.tick(a=(0, asleep))
    return world


@pytest.mark.parametrize(
    ("source", "load_s", "asleep", "asked"),
    [
        ("memory", 11.0, 1, ["za"]),  # 3 s of the wake, 4 to fall asleep and 4 to wake once more.
        ("memory", 10.9, 1, ["-a"]),
        ("memory", 60.0, 0, ["-a"]),
        ("disk", 60.0, 1, ["-a"]),
        ("", 60.0, 1, ["-a"]),
    ],
)
def test_a_wake_that_is_not_wanted_any_more_sleeps_again_where_that_is_cheaper(
    source: StartSource, load_s: float, asleep: int, asked: list[str]
) -> None:
    assert woken(source, load_s=load_s, asleep=asleep).asked == asked


def test_one_that_sleeps_again_holds_its_gpus_until_then_and_is_no_start_any_more() -> None:
    world = woken("memory", load_s=60.0)
    (instance,) = world.plane.instances.values()
    assert world.tick(a=(1, 1), b=(1, 0)) == ["+a"], "one of two GPUs is free"
    world.asked.clear()
    world.plane.instance_ready(instance, world)
    assert instance.state == "draining"
    world.plane.kinds_asleep({"a": 1})
    world.plane.instance_asleep(instance)
    assert world.asked == ["+b"]
    assert instance.id not in world.plane.instances


def state() -> ModelState:
    return ModelState(ModelSpec(name="a", kinds=(A,)), CLASSES, make_policy("chiron"))


def started(state: ModelState, source: StartSource, took_s: float) -> None:
    instance = Instance(1, "a", A, "mixed", 100.0)
    instance.source, instance.ready_s = source, 100.0 + took_s
    state.started(instance)


def test_each_source_is_learned_and_a_wake_is_no_cold_start() -> None:
    learned = state()
    for source, took_s in (("node", 60.0), ("memory", 2.0), ("node", 40.0), ("peer", 8.0), ("memory", 3.0)):
        started(learned, source, took_s)  # type: ignore[arg-type]
    assert learned.start_s == pytest.approx({"node": 50.0, "memory": 2.5, "peer": 8.0})
    assert (learned.cold_starts_seen, learned.cold_start_s) == (3, pytest.approx(36.0))
    again = state()
    again.restore(Kept(learned.learned(0.0), "models.a", []), 0.0)
    assert again.start_s == learned.start_s
    started(again, "peer", 12.0)
    assert again.start_s["peer"] == pytest.approx(10.0)


@pytest.mark.parametrize("pair", [[1], [0, 5.0], [1, -3.0], [1, 1e9], "x", [True, 5.0]])
def test_what_was_kept_of_sources_and_is_unsound_is_left_out(pair: object) -> None:
    again = state()
    again.restore(Kept({"starts": {"node": pair, "disk": [2, 7.0]}}, "models.a", []), 0.0)
    assert again.start_s == {"disk": 7.0}


def test_a_log_of_inputs_has_it_all() -> None:
    recorded = Recorded()
    inputs, nothing = recorded.inputs, recorded.nothing
    inputs.submit(Request(1, "m0", CLASSES[0], 1.0, 8))
    recorded.clock.run_until(2.0)
    nothing.instance.source = "memory"
    inputs.instance_ready(nothing.instance, nothing)
    inputs.kinds_asleep({PROFILE.name: 2})
    inputs.instance_asleep(Instance(99, "m0", nothing.instance.kind, "mixed", 0.0))
    lines = recorded.lines
    recorded.lines = [line for line in lines if line.get("a") != (99,)]
    done = recorded.replayed()
    assert done.difference == ""
    assert done.learned.models["m0"]["starts"] == {"memory": [1, 1.0]}
    recorded.lines = lines
    assert "of which the replay knows nothing" in recorded.replayed().difference
