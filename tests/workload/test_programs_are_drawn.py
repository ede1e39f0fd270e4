"""Programs as a workload: conversations that grow, steps that fork and join, the same for the same seed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from math import inf

import numpy as np
import pytest

from chiron.config.build import workload_of
from chiron.config.scenario import load_scenario
from chiron.core.types import RequestClass
from chiron.studies.trial import workload_digest
from chiron.workload.build import Stream, build_workload
from chiron.workload.errors import WorkloadSettingError
from chiron.workload.generate import Gamma, Poisson
from chiron.workload.lengths import ConstantTokens, LognormalTokens
from chiron.workload.programs import LognormalNumber, ProgramShape, ProgramStream, drawn
from chiron.workload.select import begins_s, kept
from chiron.workload.types import Programs, Trace, Workload

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=1.0, itl_s=0.1)
FIXED = ProgramShape(
    steps=3,
    branches=2,
    first=ConstantTokens(tokens=100),
    added=ConstantTokens(tokens=7),
    output=ConstantTokens(tokens=10),
    think_s=2.0,
)


def stream(shape: ProgramShape = FIXED, **changes: object) -> ProgramStream:
    base = ProgramStream(
        kind="agent", model="m", cls=CHAT, arrivals=Poisson(rate=0.5), duration_s=60.0, shape=shape, deadline_s=30.0
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def made(*streams: ProgramStream, seed: int = 1) -> tuple[Workload, Programs]:
    workload = build_workload([], programs=streams, seed=seed)
    assert workload.programs is not None
    return workload, workload.programs


def calls_of(programs: Programs, program: int) -> list[int]:
    return np.flatnonzero(programs.of == program).tolist()


def parents_of(programs: Programs, row: int) -> list[int]:
    return programs.parents[programs.parents_from[row] : programs.parents_from[row + 1]].tolist()  # type: ignore[no-any-return]


def test_a_prompt_is_all_that_was_said_before_and_what_is_new() -> None:
    workload, programs = made(stream())
    rows = calls_of(programs, 0)
    assert workload.input_tokens[rows].tolist() == [100, 100, 127, 127, 154, 154]
    cut, _ = made(stream(replace(FIXED, input_max=120)))
    assert cut.input_tokens[rows].max() == 120


def test_a_step_waits_for_every_branch_of_the_one_before() -> None:
    _, programs = made(stream())
    for program in range(len(programs)):
        first, second, third = (calls_of(programs, program)[at : at + 2] for at in (0, 2, 4))
        assert [parents_of(programs, row) for row in first] == [[], []]
        assert all(parents_of(programs, row) == first for row in second)
        assert all(parents_of(programs, row) == second for row in third)


def test_arrivals_are_planned_with_an_assumed_pace_and_bounded_by_none() -> None:
    workload, programs = made(stream())
    rows = calls_of(programs, 0)
    after_s = workload.arrival_s[rows] - programs.start_s[0]
    assert after_s.tolist() == pytest.approx([0.0, 0.0, 2.2, 2.2, 4.4, 4.4])
    assert (programs.earliest_s[rows] - programs.start_s[0]).tolist() == pytest.approx([0.0, 0.0, 2.0, 2.0, 4.0, 4.0])
    assert programs.deadline_s[0] == programs.start_s[0] + 30.0


def test_rows_are_sorted_and_requests_of_their_own_are_marked() -> None:
    trace = Trace(
        arrival_s=np.array([0.0, 20.0, 40.0]),
        input_tokens=np.full(3, 5),
        output_tokens=np.full(3, 6),
        source="by hand",
    )
    workload = build_workload([Stream(trace=trace, model="m", cls=CHAT)], programs=[stream(), stream()], seed=2)
    programs = workload.programs
    assert programs is not None
    assert (np.diff(workload.arrival_s) >= 0).all()
    alone = programs.of < 0
    assert workload.input_tokens[alone].tolist() == [5, 5, 5]
    assert all(
        programs.of[parent] == programs.of[row] for row in range(len(workload)) for parent in parents_of(programs, row)
    )
    assert all(parent < row for row in range(len(workload)) for parent in parents_of(programs, row))


def test_the_same_seed_draws_the_same_programs_and_another_stream_draws_others() -> None:
    shape = replace(
        FIXED,
        steps=LognormalNumber(mean=4, cv=1, max=20),
        branches=LognormalNumber(p50=1.0, p99=4.0),
        output=LognormalTokens(mean=50, cv=1),
        think_s=LognormalNumber(mean=0.5, cv=2),
    )
    one, again, other = made(stream(shape))[0], made(stream(shape))[0], made(stream(shape), seed=2)[0]
    assert np.array_equal(one.output_tokens, again.output_tokens)
    assert np.array_equal(one.arrival_s, again.arrival_s)
    assert not np.array_equal(one.arrival_s[:20], other.arrival_s[:20])
    beside, programs = made(stream(shape), stream(shape, kind="other"))
    first = programs.kind[programs.of] == 0
    assert np.array_equal(beside.output_tokens[first], one.output_tokens)


def test_a_part_of_a_workload_has_whole_programs() -> None:
    workload, programs = made(stream())
    later = begins_s(workload) >= 30.0
    part = kept(workload, later, earlier_s=30.0)
    assert part.programs is not None
    assert len(part) == 6 * len(part.programs)
    assert part.programs.start_s.tolist() == pytest.approx((programs.start_s[programs.start_s >= 30.0] - 30.0).tolist())
    for row in range(len(part)):
        assert all(part.programs.of[parent] == part.programs.of[row] for parent in parents_of(part.programs, row))
        assert len(parents_of(part.programs, row)) in (0, 2)
    assert part.arrival_s.min() >= 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"branches": 65}, "branches is 65"),
        ({"think_s": inf}, "think is inf"),
        ({"input_max": 0}, "input_max is 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(WorkloadSettingError, match=message):
        replace(FIXED, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "branches", "programs", "message"),
    [
        (10_000, 1, 100_000, "1,000,000,000 calls or more; at most 50,000,000"),
        (100, 64, 10_000, "64,000,000 calls; at most"),
        (1000, 64, 13, "53,194,752 pairs of a call and one that it waits for; at most"),
        (1000, 64, 12, ""),
    ],
)
def test_programs_that_no_memory_holds_are_refused_before_they_are_drawn(
    steps: int, branches: int, programs: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chiron.workload.programs._laid_out", lambda *_: None)
    many = stream(replace(FIXED, steps=steps, branches=branches), arrivals=Gamma(rate=1.0, cv=0.0))
    with pytest.raises(WorkloadSettingError, match=message) if message else nullcontext():
        drawn(replace(many, duration_s=float(programs)), seed=1, name="x")


def test_programs_wait_for_no_other_program() -> None:
    """Each with one step: none waits, however many there are."""
    none = stream(replace(FIXED, steps=1, branches=64), arrivals=Gamma(rate=1.0, cv=0.0), duration_s=3.0)
    assert len(drawn(none, seed=1, name="x").of) == 64 * 3


def test_a_lognormal_needs_one_pair_of_figures() -> None:
    with pytest.raises(WorkloadSettingError, match="either mean and cv, or p50 and p99"):
        LognormalNumber(mean=1.0)


def test_the_packaged_agents_make_as_many_calls_as_the_trace_that_they_are_after() -> None:
    """TraceLab, calls of a user's request: 8.8 in the mean, 2 in the median, 21 at p90, 87 at p99."""
    scenario = load_scenario("agents", ["program.0.arrivals.rate=4"])
    programs = workload_of(scenario, 1).programs
    assert programs is not None
    coding = np.flatnonzero(programs.kind == programs.kinds.index("coding"))
    calls = np.bincount(programs.of[programs.of >= 0])[coding]
    assert calls.mean() == pytest.approx(8.8, rel=0.15)
    assert np.quantile(calls, (0.5, 0.9, 0.99)) == pytest.approx((3, 21, 87), rel=0.35)


def test_the_digest_of_a_workload_sees_every_call() -> None:
    """The text of a long array leaves out its middle."""
    workload, programs = made(stream(duration_s=600.0))
    assert len(workload) > 1500
    think_s = programs.think_s.copy()
    think_s[len(think_s) // 2] += 1.0
    other = replace(workload, programs=replace(programs, think_s=think_s))
    assert workload_digest(workload) == workload_digest(replace(workload))
    assert workload_digest(workload) != workload_digest(other)
