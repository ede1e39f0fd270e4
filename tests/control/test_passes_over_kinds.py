"""A kind of which no instance comes gives way to the next one that has room."""

from __future__ import annotations

from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.types import Decision, Instance, InstanceKind, ModelSpec, Request, RequestClass
from chiron.policies.registry import make_policy

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=1.0, itl_s=0.1)


def kind(name: str, most: int) -> InstanceKind:
    shape = {"price_per_gpu_hour": 1.0, "kv_capacity_tokens": 2000, "max_num_seqs": 2}
    return InstanceKind(name=name, gpu="g", gpus=1, max_instances=most, **shape)  # type: ignore[arg-type]


class World:
    """Fleet, engines and journal in one: what is asked of the fleet, in order."""

    wants_events = False

    def __init__(self, *kinds: InstanceKind, instances: int, gpus: int = 100) -> None:
        self.asked: list[str] = []
        self.plane = ControlPlane(
            clock=VirtualClock(),
            fleet=self,
            journal=self,
            models=[ModelSpec(name="m", kinds=kinds, min_instances=instances, max_instances=instances)],
            classes=[CHAT],
            policy=make_policy("chiron", None),
            gpus_max={"g": gpus},
        )
        self.plane.request_initial("m", instances)

    def create(self, instance: Instance) -> None:
        self.asked.append(f"+{instance.kind.name}")

    def remove(self, instance: Instance) -> None:
        self.asked.append(f"-{instance.kind.name}")

    def start(self, request: Request) -> None: ...
    def evict(self, request: Request) -> None: ...
    def set_max_batch_size(self, max_batch_size: int) -> None: ...
    def decided(self, now_s: float, decision: Decision) -> None: ...
    def ended(self, request: Request) -> None: ...
    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


def test_starts_of_it_are_given_up_for_the_next_kind_and_it_is_used_again_later() -> None:
    world = World(kind("first", 2), kind("second", 5), instances=2)
    assert world.asked == ["+first", "+first"]
    world.plane.kinds_limited({"first": 0})
    assert world.asked[2:] == ["-first", "+second", "-first", "+second"]
    world.plane.kinds_limited({"first": 0})
    assert len(world.asked) == 6, "once"
    world.plane.kinds_limited({})
    failed = next(iter(world.plane.instances.values()))
    world.plane.instance_ready(failed, world)
    world.plane.instance_failed(failed)
    assert world.asked[6:] == ["+first"]


def test_it_is_tried_all_the_same_where_nothing_else_has_room() -> None:
    world = World(kind("first", 2), kind("second", 1), instances=2)
    world.plane.kinds_limited({"first": 0})
    assert world.asked == ["+first", "+first", "-first", "+second"]
    world.plane.kinds_limited({"first": 0, "second": 0})
    assert len(world.asked) == 4


def test_gpus_that_its_start_holds_are_room_for_the_next_kind() -> None:
    world = World(kind("first", 1), kind("second", 1), instances=1, gpus=1)
    world.plane.kinds_limited({"first": 0})
    assert world.asked == ["+first", "-first", "+second"]


def test_starts_for_which_there_is_something_stay() -> None:
    world = World(kind("first", 3), kind("second", 3), instances=3)
    world.plane.instance_ready(next(iter(world.plane.instances.values())), world)
    world.plane.kinds_limited({"first": 2})
    assert world.asked[3:] == ["-first", "+second"]
    world.plane.kinds_limited({"first": 2})
    assert len(world.asked) == 5


def test_an_instance_that_is_ready_stays() -> None:
    world = World(kind("first", 1), kind("second", 1), instances=1)
    world.plane.instance_ready(next(iter(world.plane.instances.values())), world)
    world.plane.kinds_limited({"first": 0})
    assert world.asked == ["+first"]
