"""Laws 5 and 6, checked after every event of random simulations, with every engine step an event of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from chiron.core.types import Instance
from chiron.engines.model import EngineModel
from chiron.policies.size import prompt_tokens
from chiron.sim.run import Simulation
from chiron.sim.setup import Setup
from effort import examples
from scenario_factory import PROFILE, in_two_sizes, run, setup_of, setups

law = settings(
    max_examples=examples(80),
)


def engines(simulation: Simulation) -> list[EngineModel]:
    return [engine for engine in simulation.fleet.engines.values() if isinstance(engine, EngineModel)]


class LimitWatch:
    """Max batch size and KV of every engine. A lowered limit may be exceeded by those inside, never by more."""

    def __init__(self) -> None:
        self.running: dict[int, int] = {}
        self.looked = 0

    def __call__(self, simulation: Simulation) -> None:
        for engine in engines(simulation):
            sample = engine.sample()
            self.looked += 1
            assert 0 <= sample.kv_used_tokens <= engine.kv_capacity_tokens
            allowed = max(engine.max_batch_size, self.running.get(sample.instance_id, 0))
            assert sample.running <= allowed
            self.running[sample.instance_id] = sample.running


@given(setups())
@law
def test_no_engine_step_exceeds_the_max_batch_size_or_the_kv_cache(setup: Setup) -> None:
    run(setup, step_mode=True, watch=LimitWatch())


@given(setups() | setups("wild").map(in_two_sizes))
@law
def test_control_counts_what_the_engines_hold(setup: Setup) -> None:
    def watch(simulation: Simulation) -> None:
        for instance in simulation.plane.instances.values():
            inside = instance.requests.values()
            assert instance.running_interactive == sum(r.interactive for r in inside)
            assert set(instance.batch) == {r.id for r in inside if not r.interactive}
            assert instance.kv_reserved_tokens == sum(r.reserved_tokens for r in inside)
            assert sum(instance.class_counts.values()) == len(inside)
            assert instance.prefill_backlog_s == pytest.approx(sum(r.prefill_cost_s for r in inside), abs=1e-6)
            assert not set(instance.requests) & set(instance.evicting)
        for state in simulation.plane.models.values():
            assert state.waiting.input_tokens == sum(r.input_tokens for r in state.waiting)
            assert state.batch.count == sum(1 for _ in state.batch)

    run(setup, watch=watch)


def eligible(instance: Instance, *, interactive: bool) -> bool:
    """Empty, and free to take this kind of work. While evicted work leaves, its end will be answered by dispatch."""
    if instance.state != "ready" or instance.requests or instance.evicting:
        return False
    held = instance.eviction_pause_until_s >= 0.0 and len(instance.batch) >= instance.eviction_left
    return interactive or (instance.role != "interactive" and not held)


def idle_while_waiting(simulation: Simulation) -> None:
    for state in simulation.plane.models.values():
        for instance in state.instances.values():
            # One that fits on a larger kind only waits for it, and nobody else does.
            for request in state.waiting:
                if prompt_tokens(request) < instance.kv_capacity_tokens:
                    assert not eligible(instance, interactive=True), f"{request.id} waits beside an empty instance"
            for request in state.batch:
                if prompt_tokens(request) < instance.kv_capacity_tokens:
                    assert not eligible(instance, interactive=False), f"{request.id} waits beside an empty instance"
    for engine in engines(simulation):
        sample = engine.sample()
        if sample.waiting:
            assert sample.running or sample.kv_used_tokens, "an engine idles while a request waits in it"


@given(setups("chiron"))
@law
def test_nothing_waits_beside_an_empty_instance_under_chiron(setup: Setup) -> None:
    run(setup, watch=idle_while_waiting)


@given(setups("chiron").map(in_two_sizes))
@law
def test_nothing_waits_beside_an_empty_instance_of_two_sizes_under_chiron(setup: Setup) -> None:
    run(setup, watch=idle_while_waiting)


@given(setups("static"))
@law
def test_nothing_waits_beside_an_empty_instance_under_static(setup: Setup) -> None:
    run(setup, watch=idle_while_waiting)


def test_kv_is_all_given_back_and_tokens_add_up_when_work_is_preempted() -> None:
    rows = [(0.25 * n, 20, 60, 0, n % 3) for n in range(12)]
    setup = setup_of(rows, profile=PROFILE, horizon_s=300.0)
    done = run(setup, step_mode=True, watch=(watch := LimitWatch()))
    summary = done.result.summary
    assert watch.looked > 100
    assert summary["preemptions"] > 0, "the story needs pressure"
    assert summary["finished"] == 12
    (engine,) = engines(done.simulation)
    assert engine.kv_used_tokens == engine.batch == engine.context_sum == 0
    restarts = summary["preemptions"]
    prefills = 12 * 60 - engine.decode_tokens
    # Each prefill, the first one or again after a preemption, makes one token; a prompt may be preempted before that.
    assert 12 <= prefills <= 12 + restarts
    assert engine.prefill_tokens > 12 * 20


def test_without_pressure_each_token_is_computed_once() -> None:
    roomy = replace(PROFILE, kv_capacity_tokens=10_000)
    rows = [(0.25 * n, 20, 60, 0, n % 3) for n in range(12)]
    done = run(setup_of(rows, policy="chiron", profile=roomy))
    (engine,) = engines(done.simulation)
    assert (engine.prefill_tokens, engine.decode_tokens) == (12 * 20, 12 * 59)
