"""What a control plane has learned outlives it: the next one plans as if there had been no restart."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import inf, nan, sin
from random import Random
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from chiron.control.learned import AGE_MAX_S, CLOCK_SKEW_MAX_S, Learned, LearnedError, from_bytes
from chiron.core.types import ModelSpec
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.policy import LOAD_AGE_MAX_S
from chiron.sim.run import Simulation
from chiron.sim.setup import Setup
from scenario_factory import PROFILE, kind_of, setup_of

RESTART_S, END_S = 900.0, 1200.0
FAST = ChironSettings(learning_s=120.0, backtest_s=30.0, memory_s=900, prior_s=120, settles_s=(10, 60))
ROOMY = replace(PROFILE, kv_capacity_tokens=20_000, max_num_seqs=2, max_num_batched_tokens=256)
TRACE_SEED = 3
TICK_S = FAST.tick_s
MISTAKE_MAX = 1
"""Instances that a plan may differ by after a restart that remembers, from one of the tick before, the same or the one
after: what runs at that moment and what is held are not carried over."""


@cache
def rows(start_s: float, end_s: float) -> list[tuple[float, int, int, int, int]]:
    """Chat that swells and bursts, as from ``start_s`` on."""
    draw, at_s, found = Random(TRACE_SEED), 0.0, []
    while at_s < end_s:
        burst = 2.0 if int(at_s) % 150 < 20 else 1.0
        at_s += draw.expovariate(burst * (5.0 + 4.0 * sin(at_s / 200.0)))
        row = (at_s - start_s, draw.randint(40, 200), draw.randint(20, 120), 0, 0)
        if at_s >= start_s:
            found.append(row)
    return found


def day(start_s: float = 0.0, end_s: float = END_S, initial: int = 1) -> Simulation:
    spec = ModelSpec(name="m0", kinds=(kind_of(ROOMY),), min_instances=1, max_instances=20)
    setup: Setup = setup_of(
        rows(start_s, end_s), policy="chiron", settings=FAST, profile=ROOMY, model=spec, initial=initial
    )
    return Simulation(replace(setup, horizon_s=end_s - start_s, seed=int(start_s)))


def planned(simulation: Simulation, start_s: float) -> dict[float, int]:
    """Instances planned at each tick, by the time of the whole day."""
    found: dict[float, int] = {}
    observe = simulation.plane._autoscaler._observer

    def look(view: Any, plan: Any) -> None:
        found[start_s + view.now_s] = sum(plan["m0"].counts.values())
        if observe is not None:
            observe(view, plan)

    simulation.plane._autoscaler._observer = look
    simulation.run()
    return found


@pytest.fixture(scope="module")
def without_restart() -> tuple[dict[float, int], Learned]:
    """The plans of the whole day, and what was known in the middle of it."""
    simulation = day(end_s=END_S + TICK_S)
    known: list[Learned] = []
    simulation.clock.call_at(RESTART_S, lambda: known.append(simulation.plane.learned(RESTART_S)))
    return planned(simulation, 0.0), known[0]


def after_restart(learned: Learned | None, count: int, notes: list[str] | None = None) -> dict[float, int]:
    simulation = day(RESTART_S, initial=count)
    if learned is not None:
        found = simulation.plane.restore(from_bytes(learned.to_bytes()), 5.0)
        if notes is not None:
            notes.extend(found)
    return planned(simulation, RESTART_S)


def mistakes(found: dict[float, int], right: dict[float, int]) -> list[int]:
    assert len(found) > 50
    near = [(at_s - TICK_S, at_s, at_s + TICK_S) for at_s in found]
    return [min(abs(count - right[n]) for n in around) for count, around in zip(found.values(), near, strict=True)]


@pytest.mark.slow
def test_a_restart_in_the_middle_of_a_day_changes_no_plan_by_much(
    without_restart: tuple[dict[float, int], Learned],
) -> None:
    plans, learned = without_restart
    notes: list[str] = []
    remembers = mistakes(after_restart(learned, plans[RESTART_S], notes), plans)
    forgets = mistakes(after_restart(None, plans[RESTART_S]), plans)

    assert notes == []
    assert max(remembers) <= MISTAKE_MAX
    assert sum(forgets) > 3 * sum(remembers), "which is what it is for"


def test_all_of_it_comes_back_as_it_was(without_restart: tuple[dict[float, int], Learned]) -> None:
    _, learned = without_restart
    plane = day(RESTART_S).plane
    assert plane.restore(from_bytes(learned.to_bytes()), 0.0) == []

    again = plane.learned(RESTART_S)

    assert plane.models["m0"].learner.trusted
    assert json.loads(again.to_bytes().split(b"\n")[0]) == json.loads(learned.to_bytes().split(b"\n")[0])


def test_the_least_fixed_fleet_comes_back_so_that_the_plans_stay_capped_by_it(
    without_restart: tuple[dict[float, int], Learned],
) -> None:
    _, learned = without_restart
    for change, steady in (
        (lambda m: m["fleet"].update(steady=4.0), 4.0),
        (lambda m: m["fleet"].pop("steady", None), inf),  # None would have done, or an earlier version kept none.
    ):
        plane = day(RESTART_S).plane
        assert plane.restore(changed(learned, change), 0.0) == []
        assert plane.fleet_state["m0"].headroom.steady == steady
    assert 1.0 <= learned.models["m0"]["fleet"]["steady"] <= 20.0


def changed(learned: Learned, change: Callable[[dict[str, Any]], None]) -> Learned:
    models = json.loads(json.dumps(learned.models))
    change(models["m0"])
    return replace_models(learned, models)


def replace_models(learned: Learned, models: Any) -> Learned:
    return Learned(policy=learned.policy, wall_s=learned.wall_s, models=models)


def b64(*values: float) -> str:
    return b64encode(np.array(values, dtype="<f4").tobytes()).decode()


THREE_APART = [(0.999 if i == j else -0.5) if i < 3 and j < 3 else 0.0 for i in range(5) for j in range(5)]
"""Any two of these may be, all three may not; with the ridge of the prior the elimination would divide by zero."""
WRONG: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("a cold start of no time", lambda m: m.update(cold_start_s=-1.0), "cold_start_s: -1.0 is not a number"),
    ("a cold start that is no number", lambda m: m.update(cold_start_s=nan), "cold_start_s: nan"),
    ("as many starts as never", lambda m: m.update(cold_starts_seen=inf), "cold_starts_seen: inf"),
    ("a limit beyond the engine's", lambda m: m.update(batch_size_hint=10**6), "batch_size_hint: 1000000"),
    ("text for a length", lambda m: m["learner"]["classes"]["chat"].update(input_mean="long"), "input_mean: 'long'"),
    ("no lengths", lambda m: m["learner"].update(classes=[]), "classes: it is not an object"),
    ("too few sums", lambda m: m["learner"]["steps"].update(moment=[1.0]), "moment: it is not a list"),
    (
        "sums that no equations have",
        lambda m: m["learner"]["steps"]["normal"].__setitem__(0, 0.0),
        "normal: these are not sums of squares",
    ),
    (
        "sums that no three equations have",
        lambda m: m["learner"]["steps"].update(prior=1.0, normal=THREE_APART),
        "normal: these are not sums of squares",
    ),
    ("a truth for a number", lambda m: m["learner"]["steps"].update(updates=True), "updates: True"),
    ("a load that is no text", lambda m: m["fleet"].update(load=7), "load: it is not a text"),
    ("a load of half a number", lambda m: m["fleet"].update(load="AAAA"), "load: "),
    ("a load that is no base64", lambda m: m["fleet"].update(load="\x00!"), "load: "),
    ("a load below nothing", lambda m: m["fleet"].update(load="AAAAAAAA8L8="), "load: not all of it are numbers"),
    ("a headroom of nothing", lambda m: m["fleet"].update(h=0.0), "h: 0.0 is not a number"),
    ("a period of no time", lambda m: m["fleet"].update(period_s=-5), "period_s: -5 is not a whole number"),
    ("a period without a span", lambda m: m["fleet"].update(period_s=900, span_s=0), "span_s: 0 is not"),
    ("a fixed fleet of none", lambda m: m["fleet"].update(steady=0.0), "steady: 0.0 is not a number"),
    ("a fixed fleet of any size", lambda m: m["fleet"].update(steady=inf), "steady: inf is not a number"),
    ("minutes of no load", lambda m: m["fleet"]["long"].update(minutes=b64(-1.0, 1.0)), "minutes: not all of it are"),
    ("half a minute", lambda m: m["fleet"]["long"].update(minutes=b64(1.0)), "minutes: it is of an odd length"),
    ("two weeks too many", lambda m: m["fleet"]["long"].update(quarters="A" * 10**6), "quarters: it is not a text"),
    ("seconds known of never", lambda m: m["fleet"]["long"].update(known_s=-1), "known_s: -1"),
    ("a record of half", lambda m: m["fleet"].update(records=[[1.0]]), "records: it is not a list of at most"),
    ("a period of a year", lambda m: m["fleet"].update(recurs_s=10**8), "recurs_s: 100000000"),
    ("a pressure of a thousand", lambda m: m["fleet"].update(pressure=1000.0), "pressure: 1000.0"),
]


@pytest.mark.parametrize(("change", "note"), [each[1:] for each in WRONG], ids=[each[0] for each in WRONG])
def test_what_is_damaged_is_left_out_with_a_note(
    change: Callable[[dict[str, Any]], Any], note: str, without_restart: tuple[dict[float, int], Learned]
) -> None:
    _, learned = without_restart
    plane = day(RESTART_S).plane

    notes = plane.restore(changed(learned, change), 5.0)

    assert len(notes) == 1
    assert note in notes[0]
    assert notes[0].startswith("models.m0.")
    plane.begin()
    plane.clock.run_until(30.0)  # It can be worked with.


def test_what_is_too_old_or_of_another_policy_is_left_out(
    without_restart: tuple[dict[float, int], Learned],
) -> None:
    _, learned = without_restart
    for age_s, policy, load, lengths in (
        (LOAD_AGE_MAX_S, "chiron", True, True),
        (LOAD_AGE_MAX_S + 1, "chiron", False, True),
        (60.0, "hpa", False, True),
        (AGE_MAX_S + 1, "chiron", False, False),
        (-CLOCK_SKEW_MAX_S, "chiron", True, True),
        (-60.0, "chiron", False, False),
        (-365 * 86400.0, "chiron", False, False),
        (365 * 86400.0, "chiron", False, False),
    ):
        plane = day(RESTART_S).plane
        notes = plane.restore(Learned(policy=policy, wall_s=0.0, models=learned.models), age_s)
        memory = (plane.fleet_state or {}).get("m0")
        assert bool(memory is not None and memory.history.seconds) == load
        # What is older than an hour keeps its time of day however long nobody looked.
        assert bool(memory is not None and memory.long.minutes.size) == (age_s > 0 and policy == "chiron" and lengths)
        assert plane.models["m0"].learner.trusted == lengths
        assert bool(notes) == (not (load and lengths))
        if age_s == LOAD_AGE_MAX_S + 1:
            assert notes == [
                "the last hour's load is 3601 s old and is not planned with (at most 3600 s are allowed); "
                "load that is kept for longer is"
            ]


def sealed(body: bytes) -> bytes:
    """With the checksum that it should have."""
    return b"%b\n%08x\n" % (body, crc32(body))


def test_bytes_that_are_no_learned_state_are_refused(without_restart: tuple[dict[float, int], Learned]) -> None:
    data = without_restart[1].to_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    for wrong, message in (
        (data[: len(data) // 2], "checksum"),
        (bytes(flipped), "checksum"),
        (b"", "checksum"),
        (sealed(b"[]"), "version None"),
        (sealed(b"[" * 100_000), "not JSON: maximum recursion depth"),
        (sealed(b'{"version":1,"policy":"chiron","wall_s":1%b,"models":{}}' % (b"0" * 400)), "wall_s: 1000"),
        (sealed(b'{"version":1,"policy":"chiron","wall_s":NaN,"models":{}}'), "wall_s: nan is not a number"),
    ):
        with pytest.raises(LearnedError, match=message):
            from_bytes(wrong)


def test_it_has_a_size(without_restart: tuple[dict[float, int], Learned]) -> None:
    assert len(without_restart[1].to_bytes()) < 60_000
