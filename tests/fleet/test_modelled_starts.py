"""A modelled start takes what its source takes: a fresh node, a warm one, a peer, a sleeper; and each has its bill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from chiron.core.clock import VirtualClock
from chiron.core.types import Engine, Instance, InstanceKind
from chiron.fleet.model import ColdStart, FleetModel, Sleep

KIND = InstanceKind(
    name="k", gpu="g", gpus=2, price_per_gpu_hour=1.0, kv_capacity_tokens=1, max_num_seqs=1, weight_bytes=10_000_000_000
)
COLD = ColdStart(
    node_start_s=30.0, model_load_s=20.0, warm_load_s=15.0, warm_for_s=100.0, weights_gb_per_s=1.0, jitter=0.0
)
PEERS = replace(COLD, peer_load_s=2.0, peer_gb_per_s=5.0)
SLEEP = Sleep(host_memory_gb=25.0, fall_asleep_s=4.0, wake_s=1.0, wake_gb_per_s=20.0, price_per_gb_hour=0.36)


class Up:
    """An engine, as far as a fleet needs one."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance

    def fail(self) -> None: ...
    def start(self, request: object) -> None: ...
    def evict(self, request: object) -> None: ...
    def set_max_batch_size(self, max_batch_size: int) -> None: ...


class World:
    """A fleet, and what it tells."""

    def __init__(self, cold: ColdStart, sleep: Sleep = SLEEP, gpus_max: Mapping[str, int] | None = None) -> None:
        self.clock = VirtualClock()
        self.fleet = FleetModel(
            clock=self.clock, cold_start=cold, seed=0, make_engine=Up, sleep=sleep, gpus_max=gpus_max
        )
        self.fleet.listener = self.fleet.sleep_listener = self
        self.asleep: Mapping[str, int] = {}
        self.left: list[int] = []
        self.next = 0

    def instance_ready(self, instance: Instance, engine: Engine) -> None:
        instance.state, instance.ready_s = "ready", self.clock.now_s

    def instance_failed(self, instance: Instance) -> None:
        raise AssertionError("nothing fails here")

    def instance_asleep(self, instance: Instance) -> None:
        self.left.append(instance.id)

    def kinds_asleep(self, asleep: Mapping[str, int]) -> None:
        self.asleep = dict(asleep)

    def ask(self, kind: InstanceKind = KIND, model: str = "m") -> Instance:
        self.next += 1
        instance = Instance(self.next, model, kind, "mixed", self.clock.now_s)
        self.fleet.create(instance)
        return instance

    def start(self, kind: InstanceKind = KIND) -> tuple[str, float]:
        """(source, seconds) of a start; the instance goes on running."""
        instance = self.ask(kind)
        self.clock.run_until(self.clock.now_s + 1000.0)
        return instance.source, instance.ready_s - instance.created_s

    def up(self, kind: InstanceKind = KIND, model: str = "m") -> Instance:
        instance = self.ask(kind, model)
        self.clock.run_until(self.clock.now_s + 80.0)
        assert instance.state == "ready"
        return instance


def test_the_first_start_takes_a_node_and_its_weights_from_storage() -> None:
    assert World(PEERS).start() == ("node", 30.0 + 20.0 + 10.0)


def test_a_node_that_ran_the_model_lately_is_warm() -> None:
    world = World(PEERS)
    world.fleet.remove(world.up())
    assert world.start() == ("disk", 15.0)


@pytest.mark.parametrize(
    ("cold", "released", "expected"),
    [
        (PEERS, False, ("peer", 30.0 + 2.0 + 2.0)),
        (PEERS, True, ("peer", 2.0 + 2.0)),
        (replace(PEERS, warm_load_s=3.0), True, ("disk", 3.0)),
        (replace(PEERS, peer_load_s=29.0), False, ("node", 60.0)),
        (COLD, False, ("node", 60.0)),
    ],
    ids=["on a fresh node", "on a warm node", "slower than the disk", "slower than storage", "none"],
)
def test_a_ready_instance_hands_its_weights_over_where_that_is_faster(
    cold: ColdStart, released: bool, expected: tuple[str, float]
) -> None:
    world = World(cold)
    world.up()
    if released:
        world.fleet.remove(world.up())
    assert world.start() == expected


def test_an_instance_of_another_kind_or_one_that_is_gone_when_loading_begins_is_no_peer() -> None:
    world = World(PEERS)
    world.up(replace(KIND, name="other"))
    world.up(model="another of the same profile")
    assert world.start() == ("node", 60.0)
    world = World(replace(PEERS, warm_for_s=0.0))
    first, second = world.up(), world.ask()
    world.clock.run_until(world.clock.now_s + 10.0)  # Its node is still coming.
    world.fleet.remove(first)
    world.clock.run_until(world.clock.now_s + 1000.0)
    assert second.source == "node"


def test_a_sleeper_wakes_before_all_else_and_is_billed_for_memory_alone() -> None:
    world = World(PEERS)
    world.up()
    instance = world.up()
    gpu_s = world.fleet.bill.gpus * 1.0
    world.fleet.sleep(instance)
    assert not world.left, "its GPUs are not free at once"
    world.clock.run_until(world.clock.now_s + 4.0)
    assert (world.left, dict(world.asleep), world.fleet.bill.gpus) == ([instance.id], {"k": 1}, gpu_s / 2)
    world.clock.run_until(world.clock.now_s + 100.0)
    before = world.fleet.bill.cost.get("m", 0.0)
    assert world.start() == ("memory", 1.0 + 0.5)
    bill = world.fleet.bill
    assert bill.memory_gb_seconds == pytest.approx(10.0 * 100.0)
    assert bill.cost["m"] - before == pytest.approx(10.0 * 100.0 / 3600.0 * 0.36)
    assert (bill.cold_starts, bill.warm_starts, bill.wakes) == (2, 0, 1)
    assert not world.asleep


def test_one_that_goes_back_to_sleep_while_it_wakes_is_billed_until_it_sleeps() -> None:
    world = World(COLD)
    instance = world.up()
    world.fleet.sleep(instance)
    world.clock.run_until(100.0)
    assert world.asleep == {"k": 1}
    again = world.ask()
    assert (again.source, world.asleep) == ("memory", {})
    world.clock.run_until(101.0)
    again.state = "draining"
    world.fleet.sleep(again)
    gpu_s = world.fleet.bill.gpu_seconds["m"]
    world.clock.run_until(105.4)
    assert (world.left, world.asleep, world.fleet.bill.gpus) == ([instance.id], {}, 2)
    world.clock.run_until(105.6)  # 1.5 s to wake and 4 s to fall asleep.
    assert (world.left, world.asleep, world.fleet.bill.gpus) == ([instance.id, again.id], {"k": 1}, 0)
    assert world.fleet.bill.gpu_seconds["m"] - gpu_s == pytest.approx(2 * 5.5)


def test_a_wake_that_would_have_failed_does_not_sleep_again() -> None:
    world = World(COLD)
    world.fleet.sleep(world.up())
    world.clock.run_until(100.0)
    world.fleet._failures = replace(world.fleet._failures, start_failure=1.0)
    again = world.ask()
    again.state = "draining"
    world.fleet.sleep(again)
    world.clock.run_until(200.0)
    assert (world.left[-1], world.asleep, world.fleet.bill.gpus) == (again.id, {}, 0)


ON_NODES = replace(SLEEP, gpus_per_node=4, host_memory_gb=10.0)


def test_a_sleeper_wakes_on_its_node_alone() -> None:
    world = World(COLD, ON_NODES, {"g": 8})
    up = [world.up() for _ in range(4)]
    for instance in (up[0], up[2]):  # One on each of the two nodes.
        world.fleet.sleep(instance)
        world.clock.run_until(world.clock.now_s + 5.0)
    assert world.asleep == {"k": 2}
    one, other = (world.up(replace(KIND, name="small", gpus=1)) for _ in range(2))
    assert world.fleet.places is not None
    assert world.fleet.places.held() == {("g", 0): 4, ("g", 1): 2}, "they are packed"
    assert world.ask().source == "memory"
    world.fleet.remove(up[3])
    assert world.ask().source == "disk", "GPUs are free on the other node"
    assert world.asleep == {"k": 1}
    world.fleet.remove(one)
    world.fleet.remove(other)
    assert world.ask().source == "memory"


def test_each_node_has_memory_of_its_own_and_who_is_spread_over_two_does_not_sleep() -> None:
    world = World(COLD, ON_NODES, {"g": 8})
    on_one = [world.up() for _ in range(2)]
    for instance in on_one:
        world.fleet.sleep(instance)
        world.clock.run_until(world.clock.now_s + 5.0)
    assert world.asleep == {"k": 1}, "the node has memory for one"
    smalls = [world.up(replace(KIND, name="small", gpus=3)) for _ in range(2)]
    spread = world.up()
    left = len(world.left)
    world.fleet.sleep(spread)
    world.clock.run_until(world.clock.now_s)
    assert (len(world.left), world.asleep) == (left + 1, {"k": 1}), "at once"
    world.fleet.remove(smalls[0])
    assert world.fleet.places is not None
    assert world.fleet.places.held() == {("g", 1): 3}


def test_of_gpus_without_a_limit_there_is_another_node() -> None:
    world = World(COLD, ON_NODES)
    for gpus in (3, 2, 6):
        world.up(replace(KIND, name=str(gpus), gpus=gpus))
    assert world.fleet.places is not None
    assert sorted(world.fleet.places.held().values()) == [3, 4, 4]


def test_memory_holds_so_many_and_is_shared_by_kinds() -> None:
    """Room for two. The third of a kind is stopped, one of another kind takes a place of the first's, and
    another one not the last."""
    world = World(COLD)
    up = [world.up() for _ in range(3)]
    others = [world.up(replace(KIND, name="a")) for _ in range(2)]
    for instance in (*up, *others):
        world.fleet.sleep(instance)
        world.clock.run_until(world.clock.now_s + 5.0)
    assert world.left == [each.id for each in (*up, *others)]
    assert dict(world.asleep) == {"k": 1, "a": 1}
    assert [world.start()[0] for _ in range(2)] == ["memory", "node"]
    world.fleet.keep_asleep("a", 0)
    assert not world.asleep


def test_what_can_never_sleep_does_not_fall_asleep_first() -> None:
    world = World(COLD, replace(SLEEP, host_memory_gb=9.0))
    instance = world.up()
    world.fleet.sleep(instance)
    world.clock.run_until(world.clock.now_s)
    assert (world.left, world.fleet.bill.gpus) == ([instance.id], 0)


def test_nobody_is_stopped_for_one_that_finds_no_room_all_the_same() -> None:
    world = World(replace(COLD, weights_gb_per_s=2.0), replace(SLEEP, host_memory_gb=40.0))
    large = replace(KIND, name="large", weight_bytes=35_000_000_000)
    up = [world.up() for _ in range(3)] + [world.up(large)]
    for instance in up:
        world.fleet.sleep(instance)
        world.clock.run_until(world.clock.now_s + 5.0)
    assert dict(world.asleep) == {"k": 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host_memory_gb", -1.0),
        ("wake_gb_per_s", 0.0),
        ("sleeper_gb", 0.0),
        ("gpus_per_node", -1),
        ("fall_asleep_s", -1.0),
    ],
)
def test_what_makes_no_sense_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}; it must be"):
        Sleep(**{field: value})
