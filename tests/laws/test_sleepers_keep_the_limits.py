"""Whoever sleeps, wakes or falls asleep: no more GPUs than exist are in use, no more host memory than there is, and the
control plane knows how many sleep."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis.strategies import sampled_from

from chiron.fleet.model import Sleep
from chiron.sim.run import Simulation
from chiron.sim.setup import Setup
from effort import examples
from scenario_factory import WildSettings, run, setup_of, setups

law = settings(max_examples=examples(30))
SLEEP = Sleep(host_memory_gb=30.0, sleeper_gb=10.0, fall_asleep_s=4.0, wake_s=0.2)
ON_NODES = replace(SLEEP, host_memory_gb=10.0, gpus_per_node=2)


def limits(simulation: Simulation) -> None:
    setup, fleet = simulation.setup, simulation.fleet
    if setup.gpus_max:
        assert fleet.bill.gpus <= sum(setup.gpus_max.values())
    asleep = {name: count for state in simulation.plane.models.values() for name, count in state.asleep.items()}
    assert all(used_gb <= setup.sleep.host_memory_gb for used_gb in fleet.sleepers.gb().values())
    assert 10.0 * sum(asleep.values()) == sum(fleet.sleepers.gb().values())
    if fleet.places is not None:
        held = fleet.places.held()
        assert all(0 < gpus <= setup.sleep.gpus_per_node for gpus in held.values())
        assert sum(held.values()) == sum(i.gpus for i in simulation.plane.instances.values())
    assert all(asleep.values())


@given(setups("wild"), sampled_from((SLEEP, ON_NODES)))
@law
def test_no_more_is_in_use_than_there_is(setup: Setup, sleep: Sleep) -> None:
    run(replace(setup, sleep=sleep, settings=replace(setup.settings, sleeps=True)), watch=limits)


def test_in_one_story_instances_sleep_and_wake() -> None:
    rows = [(0.5 * n, 10, 20, 0, 0) for n in range(120)]
    sleeping = setup_of(
        rows,
        policy="wild",
        settings=WildSettings(sleeps=True, seed=3),
        sleep=SLEEP,
        gpus_max={"g": 3},
        horizon_s=120.0,
    )
    done = run(sleeping, watch=limits)
    bill = done.simulation.fleet.bill
    assert bill.wakes > 1
    assert bill.memory_gb_seconds > 10.0
    summary = done.result.summary
    assert summary["finished"] > 0
    assert (summary["wakes"], summary["sleepers_gb"]) == (bill.wakes, bill.memory_gb_seconds / summary["sim_s"])
    assert run(replace(sleeping, sleep=Sleep())).simulation.fleet.bill.wakes == 0
