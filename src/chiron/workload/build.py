"""Streams, programs and batch jobs, labelled with model and class and merged into one workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from chiron.core.types import RequestClass
from chiron.workload.cascades import CascadeShape
from chiron.workload.errors import WorkloadSettingError, require
from chiron.workload.lengths import Lengths, sample_lengths
from chiron.workload.programs import ASSUMED_TOKEN_S, Drawn, ProgramStream, drawn, flat
from chiron.workload.seeds import generator
from chiron.workload.types import Cascades, Floats, Ints, Programs, Trace, Workload


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stream:
    """A trace whose requests are all for one model, of one class and of one API key."""

    trace: Trace
    model: str
    cls: RequestClass
    tenant: str = ""
    cascade: CascadeShape | None = None
    """``model`` is a cascade of two others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """Requests that arrive together and are due together."""

    model: str
    cls: RequestClass
    at_s: float
    """Arrival of all of them."""
    requests: int
    deadline_s: float
    """Seconds after ``at_s``; it stands in place of the class's own deadline. inf: none."""
    lengths: Lengths

    def __post_init__(self) -> None:
        require(0 <= self.at_s < inf, "at_s", self.at_s, "at least 0 and finite")
        require(self.requests >= 1, "requests", self.requests, "at least 1")
        require(self.deadline_s > 0, "deadline_s", self.deadline_s, "above 0")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    model: str
    cls: RequestClass
    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    deadline_s: Floats
    tenant: str = ""
    stream: ProgramStream | None = None
    """Of which these are the calls, as ``calls`` says."""
    calls: Drawn | None = None
    start_s: Floats | None = None
    """Of calls of a cascade, when the client's request comes."""
    shown_tokens: int | Ints = 0
    other: str = ""
    """Of first calls: the model that is asked where they get no answer."""
    wait_s: float = inf
    """Of first calls: for an instance."""
    follows: Ints | None = None
    """Of second calls: their first ones, by their places in the part before this one."""


def build_workload(
    streams: Sequence[Stream],
    batch_jobs: Sequence[BatchJob] = (),
    programs: Sequence[ProgramStream] = (),
    *,
    seed: int = 0,
    first: int = 0,
) -> Workload:
    """Sorted by arrival; at equal times in the order given, streams before jobs and jobs before programs.

    A stream's requests are due at arrival + the class's ``deadline_s`` (inf without one). ``seed`` draws the lengths
    of the jobs, the programs, and which requests a cascade passes on; ``first``: number of the first stream, by which
    its draws are named. Raises WorkloadSettingError if two classes share a name and differ, or if nothing arrives.
    """
    parts = []
    for i, stream in enumerate(streams):
        if stream.cascade is None:
            parts.append(_of_stream(stream))
        else:
            parts += _of_cascade(stream, stream.cascade, generator(seed, f"cascade {first + i}"))
    parts += [_of_job(job, generator(seed, f"batch job {i}")) for i, job in enumerate(batch_jobs)]
    parts += [_of_programs(each, drawn(each, seed=seed, name=f"program {i}")) for i, each in enumerate(programs)]
    if not any(len(part.arrival_s) for part in parts):
        raise WorkloadSettingError(
            "the workload is empty: it needs a stream, programs or a batch job with at least one request"
        )
    if any(part.calls is not None for part in parts) and any(part.start_s is not None for part in parts):
        raise WorkloadSettingError("a workload has either programs or requests to a cascade, not both")
    models = tuple(dict.fromkeys(part.model for part in parts))
    classes = _classes(parts)
    tenants = tuple(dict.fromkeys(part.tenant for part in parts))
    arrival_s = np.concatenate([part.arrival_s for part in parts])
    order = np.argsort(arrival_s, kind="stable")
    return Workload(
        arrival_s=arrival_s[order],
        input_tokens=np.concatenate([part.input_tokens for part in parts])[order],
        output_tokens=np.concatenate([part.output_tokens for part in parts])[order],
        model=_labels(parts, [models.index(part.model) for part in parts])[order],
        cls=_labels(parts, [classes.index(part.cls) for part in parts])[order],
        deadline_s=np.concatenate([part.deadline_s for part in parts])[order],
        models=models,
        classes=classes,
        tenant=_labels(parts, [tenants.index(part.tenant) for part in parts])[order] if len(tenants) > 1 else None,
        tenants=tenants,
        programs=_programs(parts, order) if any(part.calls is not None for part in parts) else None,
        cascades=_cascades(parts, order, models) if any(part.start_s is not None for part in parts) else None,
    )


def _of_stream(stream: Stream) -> _Part:
    return _Part(
        model=stream.model,
        cls=stream.cls,
        arrival_s=stream.trace.arrival_s,
        input_tokens=stream.trace.input_tokens,
        output_tokens=stream.trace.output_tokens,
        deadline_s=stream.trace.arrival_s + stream.cls.deadline_s,
        tenant=stream.tenant,
    )


def _of_cascade(stream: Stream, cascade: CascadeShape, rng: np.random.Generator) -> list[_Part]:
    """First calls, and those that follow some of them."""
    trace, cls = stream.trace, stream.cls
    passed_on = cascade.passed_on(trace.input_tokens, rng)
    judged = cascade.judged_tokens(trace.output_tokens)
    first = _Part(
        model=cascade.first,
        cls=cls,
        arrival_s=trace.arrival_s,
        input_tokens=trace.input_tokens,
        output_tokens=np.where(passed_on, judged, trace.output_tokens),
        deadline_s=trace.arrival_s + cls.deadline_s,
        tenant=stream.tenant,
        start_s=trace.arrival_s,
        shown_tokens=judged,
        other=cascade.then,
        wait_s=cls.ttft_s / 2 if cascade.first_wait_s is None else cascade.first_wait_s,
    )
    start_s = trace.arrival_s[passed_on]
    then = _Part(
        model=cascade.then,
        cls=cls,
        arrival_s=start_s + ASSUMED_TOKEN_S * judged[passed_on],
        input_tokens=trace.input_tokens[passed_on],
        output_tokens=trace.output_tokens[passed_on],
        deadline_s=start_s + cls.deadline_s,
        tenant=stream.tenant,
        start_s=start_s,
        follows=np.flatnonzero(passed_on),
    )
    return [first, then]


def _cascades(parts: Sequence[_Part], order: Ints, models: tuple[str, ...]) -> Cascades:
    """Of all parts together, their rows in this order."""
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    then = np.full(len(order), -1, dtype=np.int64)
    rows = before = 0
    for part in parts:
        if part.follows is not None:
            then[place[before + part.follows]] = place[rows : rows + len(part.arrival_s)]
        before, rows = rows, rows + len(part.arrival_s)
    start_s = [part.arrival_s if part.start_s is None else part.start_s for part in parts]
    shown = [np.broadcast_to(part.shown_tokens, len(part.arrival_s)) for part in parts]
    wait_s = [np.full(len(part.arrival_s), part.wait_s) for part in parts]
    return Cascades(
        then=then,
        start_s=np.concatenate(start_s)[order],
        shown_tokens=np.concatenate(shown)[order],
        other=_labels(parts, [models.index(part.other) if part.other else -1 for part in parts])[order],
        wait_s=np.concatenate(wait_s)[order],
    )


def _of_job(job: BatchJob, rng: np.random.Generator) -> _Part:
    prompt, output = sample_lengths(job.lengths, job.requests, rng)
    return _Part(
        model=job.model,
        cls=job.cls,
        arrival_s=np.full(job.requests, float(job.at_s)),
        input_tokens=prompt,
        output_tokens=output,
        deadline_s=np.full(job.requests, job.at_s + job.deadline_s),
    )


def _of_programs(stream: ProgramStream, calls: Drawn) -> _Part:
    return _Part(
        model=stream.model,
        cls=stream.cls,
        arrival_s=calls.arrival_s,
        input_tokens=calls.input_tokens,
        output_tokens=calls.output_tokens,
        deadline_s=calls.arrival_s + stream.cls.deadline_s,
        tenant=stream.tenant,
        stream=stream,
        calls=calls,
    )


def _programs(parts: Sequence[_Part], order: Ints) -> Programs:
    """Of all parts together, their rows in this order."""
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    of: list[Ints] = []
    think_s: list[Floats] = []
    earliest_s: list[Floats] = []
    parents: list[list[int]] = []
    kind: list[str] = []
    start_s: list[Floats] = []
    deadline_s: list[Floats] = []
    rows = programs = 0
    for part in parts:
        count, calls, stream = len(part.arrival_s), part.calls, part.stream
        if calls is None or stream is None:
            of.append(np.full(count, -1, dtype=np.int64))
            think_s.append(np.zeros(count))
            earliest_s.append(part.arrival_s)
            parents += [[] for _ in range(count)]
        else:
            of.append(calls.of + programs)
            think_s.append(calls.think_s)
            earliest_s.append(calls.earliest_s)
            parents += [[int(place[rows + each]) for each in before] for before in calls.parents]
            kind += [stream.kind] * len(calls.start_s)
            start_s.append(calls.start_s)
            deadline_s.append(calls.start_s + stream.deadline_s)
            programs += len(calls.start_s)
        rows += count
    kinds = tuple(dict.fromkeys(kind))
    ordered, begins = flat([parents[row] for row in order.tolist()])
    return Programs(
        kinds=kinds,
        kind=np.array([kinds.index(each) for each in kind], dtype=np.int64),
        start_s=np.concatenate(start_s),
        deadline_s=np.concatenate(deadline_s),
        of=np.concatenate(of)[order],
        think_s=np.concatenate(think_s)[order],
        earliest_s=np.concatenate(earliest_s)[order],
        parents=ordered,
        parents_from=begins,
    )


def _classes(parts: Sequence[_Part]) -> tuple[RequestClass, ...]:
    by_name: dict[str, RequestClass] = {}
    for part in parts:
        known = by_name.setdefault(part.cls.name, part.cls)
        if known != part.cls:
            raise WorkloadSettingError(f"class {part.cls.name!r} is given twice and differs: {known} and {part.cls}")
    return tuple(by_name.values())


def _labels(parts: Sequence[_Part], values: Sequence[int]) -> Ints:
    return np.repeat(np.array(values, dtype=np.int64), [len(part.arrival_s) for part in parts])
