"""Law 4: no decision reads a true output length before the request ends, nor an arrival before it happens."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chiron.sim.run
from chiron.control.scrapes import GAP_S, SLICE
from chiron.core.compiled import build
from chiron.core.types import ModelSpec, Request
from chiron.engines.remote import Wire
from chiron.sim.setup import Setup
from effort import examples
from policy_names import every
from scenario_factory import PROFILE, Run, example_setup, kind_of, run, setup_of, setups

law = settings(
    max_examples=examples(60),
)


def until(done: Run, end_s: float) -> list[str]:
    """The log before this time."""
    return [line for line, event in zip(done.log.splitlines(), done.events, strict=True) if event["t"] < end_s]


def first_end_s(done: Run) -> float:
    return float(min((event["t"] for event in done.events if event["event"] == "ended"), default=1e9))


@given(setups(), st.integers(0, 99))
@law
def test_other_output_lengths_change_nothing_before_the_first_request_ends(setup: Setup, seed: int) -> None:
    workload = setup.workload
    shuffled = np.random.default_rng(seed).permutation(workload.output_tokens)
    one = run(setup)
    other = run(replace(setup, workload=replace(workload, output_tokens=shuffled)))
    end_s = min(first_end_s(one), first_end_s(other))
    assert until(one, end_s) == until(other, end_s)


@given(setups(), st.integers(1, 1_000_000))
@law
def test_what_arrives_later_changes_nothing_before(setup: Setup, thinning: int) -> None:
    workload = setup.workload
    last = thinning % len(workload)
    cut_s = float(workload.arrival_s[last])
    kept = workload.arrival_s < cut_s
    if not kept.any():
        return
    names = ("arrival_s", "input_tokens", "output_tokens", "model", "cls", "deadline_s")
    part = replace(workload, **{name: getattr(workload, name)[kept] for name in names})
    whole, short = run(setup), run(replace(setup, workload=part))
    end_s = min(cut_s, short.simulation.clock.now_s)  # A run stops when nothing is left to do.
    assert until(whole, end_s) == until(short, end_s)


sealed = pytest.mark.skipif(build() == "compiled", reason="compiled code reads attributes without asking the class")


class SealedRequest(Request):
    """A request whose payload only the engine model may touch."""

    __slots__ = ("sealed",)

    @property
    def payload(self) -> int:
        reader = sys._getframe(1).f_globals["__name__"]
        if reader != "chiron.engines.model":
            raise AssertionError(f"{reader} reads the true output length")
        return int(self.sealed)

    @payload.setter
    def payload(self, value: Any) -> None:
        self.sealed = value


@sealed
@pytest.mark.parametrize("policy", every("wild"))
def test_nothing_but_the_engine_reads_the_payload(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chiron.sim.run, "Request", SealedRequest)
    done = run(example_setup(policy))
    assert done.result.summary["finished"] > 50


@sealed
def test_the_seal_is_noticed_when_broken() -> None:
    request = SealedRequest(1, "m0", setup_of([(0.0, 1, 1, 0, 0)]).workload.classes[0], 0.0, 1, 7)
    with pytest.raises(AssertionError, match="reads the true output length"):
        _ = request.payload


def test_what_engines_report_is_known_only_after_the_scrape_delay() -> None:
    """A fleet view before the first scrape arrives holds nothing of the engines; one after it is that old."""
    ages: list[float] = []
    setup = setup_of([(0.0, 20, 150, 0, 0)], policy="chiron", scrape_period_s=1.0, scrape_delay_s=0.7)

    def watch(simulation: chiron.sim.run.Simulation) -> None:
        now_s = simulation.clock.now_s
        for instance in simulation.plane.instances.values():
            if instance.sample is None:
                assert now_s < 1.7
            else:
                ages.append(now_s - instance.sample.taken_s)

    run(setup, watch=watch)
    assert ages
    assert min(ages) == pytest.approx(0.7)
    assert max(ages) <= 1.7 + 1e-9


@pytest.mark.parametrize(
    ("wire", "age_s"), [(Wire(network_s=1 / 1024, notice_s=0.05), 0.0), (None, 2 * GAP_S)], ids=["wire", "no wire"]
)
def test_beside_a_wire_a_sample_is_of_when_its_slice_is_taken(wire: Wire | None, age_s: float) -> None:
    """As a gateway counts what it relays at that moment. Without a wire it is of when the engine was read: that of the
    last instance, in the second slice of a round, is then two gaps old."""
    ages: dict[float, float] = {}
    spec = ModelSpec(name="m0", kinds=(kind_of(PROFILE),), min_instances=1, max_instances=SLICE + 2)
    setup = setup_of([(0.0, 20, 150, 0, 0)], model=spec, initial=SLICE + 2, scrape_delay_s=0.0, wire=wire)

    def watch(simulation: chiron.sim.run.Simulation) -> None:
        sample = simulation.plane.instances[SLICE + 2].sample
        if sample is not None:
            ages.setdefault(sample.taken_s, simulation.clock.now_s - sample.taken_s)

    run(setup, watch=watch)
    assert len(ages) > 1
    assert list(ages.values()) == pytest.approx([age_s] * len(ages))
