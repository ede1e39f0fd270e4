"""Streams and jobs become one workload, in order, with the right labels and deadlines."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest

from chiron.core.types import RequestClass
from chiron.workload.build import BatchJob, Stream, build_workload
from chiron.workload.errors import WorkloadSettingError
from chiron.workload.lengths import ConstantTokens, EmpiricalLengths, IndependentLengths, LognormalTokens
from chiron.workload.types import Trace

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=1, itl_s=0.1)
URGENT = RequestClass(name="urgent", kind="interactive", deadline_s=30)
NIGHT = RequestClass(name="night", kind="batch", deadline_s=86_400)
SHORT = IndependentLengths(input=ConstantTokens(tokens=7), output=ConstantTokens(tokens=8))


def trace(*arrivals: float, tokens: int = 1) -> Trace:
    ones = np.full(len(arrivals), tokens, dtype=np.int64)
    return Trace(arrival_s=np.array(arrivals), input_tokens=ones, output_tokens=ones, source="made")


def job(**changes: object) -> BatchJob:
    settings = {"model": "b", "cls": NIGHT, "at_s": 2.0, "requests": 3, "deadline_s": 3600.0, "lengths": SHORT}
    return BatchJob(**{**settings, **changes})  # type: ignore[arg-type]


def test_requests_are_sorted_and_ties_keep_the_order_given() -> None:
    streams = [
        Stream(trace=trace(0, 2, 4, tokens=1), model="a", cls=CHAT),
        Stream(trace=trace(0, 1, 2, tokens=2), model="b", cls=URGENT),
    ]
    workload = build_workload(streams, [job()])
    assert workload.arrival_s.tolist() == [0, 0, 1, 2, 2, 2, 2, 2, 4]
    assert workload.input_tokens.tolist() == [1, 2, 2, 1, 2, 7, 7, 7, 1]
    assert workload.models == ("a", "b")
    assert workload.model.tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 0]
    assert workload.classes == (CHAT, URGENT, NIGHT)
    assert workload.cls.tolist() == [0, 1, 1, 0, 1, 2, 2, 2, 0]
    assert workload.deadline_s.tolist() == [inf, 30, 31, inf, 32, 3602, 3602, 3602, inf]


def test_a_job_of_a_million_has_its_lengths_and_deadline() -> None:
    lengths = IndependentLengths(
        input=LognormalTokens(mean=500, cv=1), output=LognormalTokens(p50=40, p99=700, max_tokens=4096)
    )
    workload = build_workload([], [job(requests=1_000_000, lengths=lengths, deadline_s=inf)], seed=5)
    assert len(workload) == 1_000_000
    assert workload.input_tokens.mean() == pytest.approx(500, rel=0.01)
    assert workload.output_tokens.max() == 4096
    assert np.isinf(workload.deadline_s).all()


def test_jobs_draw_by_seed_and_independently_of_each_other() -> None:
    values = np.arange(1, 1001)
    drawn = job(lengths=EmpiricalLengths(input_tokens=values, output_tokens=values, source="made"), requests=100)
    workload = build_workload([], [drawn, drawn], seed=1)
    assert workload.input_tokens[:100].tolist() != workload.input_tokens[100:].tolist()
    again = build_workload([], [drawn, drawn], seed=1)
    assert workload.input_tokens.tolist() == again.input_tokens.tolist()
    assert workload.input_tokens.tolist() != build_workload([], [drawn, drawn], seed=2).input_tokens.tolist()


def test_one_name_means_one_class() -> None:
    other = RequestClass(name="chat", kind="interactive", ttft_s=2)
    streams = [Stream(trace=trace(0), model="a", cls=CHAT), Stream(trace=trace(1), model="a", cls=other)]
    with pytest.raises(WorkloadSettingError, match="class 'chat' is given twice and differs"):
        build_workload(streams)


def test_nothing_is_no_workload() -> None:
    with pytest.raises(WorkloadSettingError, match="the workload is empty"):
        build_workload([], [])
    with pytest.raises(WorkloadSettingError, match="the workload is empty"):
        build_workload([Stream(trace=trace(), model="a", cls=CHAT)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"at_s": -1.0}, "at_s is -1.0"),
        ({"requests": 0}, "requests is 0"),
        ({"deadline_s": 0.0}, "deadline_s is 0.0"),
    ],
)
def test_a_job_out_of_range_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(WorkloadSettingError, match=says):
        job(**change)
