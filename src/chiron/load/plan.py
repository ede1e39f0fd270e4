"""What will be sent and when: a workload, split into requests of their own and batch jobs.

Everything here is fixed before the first byte is sent, by the seed alone; ``LoadPlan.digest`` proves that two runs
asked for the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import inf
from typing import Literal

import numpy as np
import numpy.typing as npt

from chiron.core.types import RequestClass
from chiron.load.errors import PlanError, require
from chiron.workload.seeds import generator
from chiron.workload.select import kept
from chiron.workload.types import Ints, Trace, Workload

BatchAs = Literal["api", "requests", "skip"]
Flags = npt.NDArray[np.bool_]
BATCH_AS: tuple[BatchAs, ...] = ("api", "requests", "skip")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobKey:
    """What tells the requests of a batch job from others of its class: model, class, arrival, time to the deadline."""

    model: str
    cls: str
    at_s: float
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """Requests that are submitted together through the batch API."""

    model: str
    cls: RequestClass
    at_s: float
    window_s: float
    """Completion window: seconds from submission to the deadline."""
    rows: Ints
    """Rows of the workload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How prompt and output lengths are changed before sending, for models and machines smaller than the trace's."""

    input_scale: float = 1.0
    output_scale: float = 1.0
    input_max: int = 131_072
    """Tokens; longer prompts are cut."""
    output_max: int = 131_072
    """Tokens; longer outputs are cut."""

    def __post_init__(self) -> None:
        for name in ("input_scale", "output_scale"):
            value = getattr(self, name)
            require(0 < value < inf, name, value, "a finite number above 0")
        for name in ("input_max", "output_max"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadPlan:
    """A request stream, ready to be sent."""

    name: str
    text: str
    """What made it, in words or as a scenario file."""
    seed: int
    workload: Workload
    single: Ints
    """Rows that are requests of their own, in order of arrival."""
    jobs: tuple[Job, ...] = ()

    @property
    def digest(self) -> str:
        """Equal for equal streams: arrivals, lengths, models, classes, jobs, and the seed of the prompts."""
        work = self.workload
        total = sha256(repr((self.seed, work.models, work.classes)).encode())
        for column in (work.arrival_s, work.input_tokens, work.output_tokens, work.model, work.cls, work.deadline_s):
            total.update(np.ascontiguousarray(column).tobytes())
        if work.programs is not None:
            for name in ("of", "think_s", "parents", "parents_from"):
                total.update(np.ascontiguousarray(getattr(work.programs, name)).tobytes())
        for job in self.jobs:
            total.update(job.rows.tobytes())
        return total.hexdigest()[:16]

    @property
    def last_s(self) -> float:
        """When the last request or job is due to be sent."""
        starts = [float(self.workload.arrival_s[self.single[-1]])] if len(self.single) else []
        return max([*starts, *(job.at_s for job in self.jobs)], default=0.0)


def make_plan(
    workload: Workload,
    *,
    name: str,
    seed: int,
    text: str = "",
    jobs: Sequence[JobKey] = (),
    batch_as: BatchAs = "api",
    lengths: Lengths | None = None,
) -> LoadPlan:
    """Split ``workload`` into single requests and the jobs of ``jobs``.

    ``batch_as``: what becomes of jobs: ``api`` submits them through /v1/batches, ``requests`` sends each of their
    requests by itself, ``skip`` leaves them out. Raises PlanError if nothing is left.
    """
    require(batch_as in BATCH_AS, "batch_as", batch_as, f"one of {', '.join(BATCH_AS)}")
    if workload.cascades is not None:
        raise PlanError(
            f"{name}: it has requests to a cascade, of which a gateway makes two calls itself; they can be simulated "
            "only, so let its [[workload]] name another model"
        )
    work = _scaled(workload, lengths or Lengths())
    in_job = np.zeros(len(work), dtype=np.bool_)
    found: list[Job] = []
    for key in jobs:
        rows = np.flatnonzero(_members(work, key) & ~in_job)
        in_job[rows] = True
        if len(rows):
            cls = work.classes[int(work.cls[rows[0]])]
            found.append(Job(model=key.model, cls=cls, at_s=key.at_s, window_s=key.deadline_s, rows=rows))
    if batch_as == "skip":
        work, in_job = _rows(work, ~in_job), np.zeros(int((~in_job).sum()), dtype=np.bool_)
    kept = tuple(found) if batch_as == "api" else ()
    single = np.arange(len(work)) if batch_as == "requests" else np.flatnonzero(~in_job)
    if not len(single) and not kept:
        raise PlanError(f"{name}: nothing to send: the stream holds no request")
    return LoadPlan(name=name, text=text, seed=seed, workload=work, single=single, jobs=kept)


def mixed(
    trace: Trace, *, model: str, mix: Mapping[str, float], classes: Mapping[str, RequestClass], seed: int
) -> Workload:
    """A trace's requests, all for one model, each of a class drawn by its share in ``mix``."""
    require(len(mix) > 0, "class mix", dict(mix), "at least one class")
    for name, share in mix.items():
        if name not in classes:
            raise PlanError(f"class mix: unknown class {name!r}; known are {', '.join(classes)}")
        require(0 < share < inf, f"class mix: {name}", share, "a number above 0")
    if not len(trace):
        raise PlanError("nothing to send: the stream holds no request")
    chosen = tuple(classes[name] for name in mix)
    shares = np.array(list(mix.values()))
    cls = generator(seed, "class mix").choice(len(chosen), size=len(trace), p=shares / shares.sum()).astype(np.int64)
    return Workload(
        arrival_s=trace.arrival_s,
        input_tokens=trace.input_tokens,
        output_tokens=trace.output_tokens,
        model=np.zeros(len(trace), dtype=np.int64),
        cls=cls,
        deadline_s=trace.arrival_s + np.array([c.deadline_s for c in chosen])[cls],
        models=(model,),
        classes=chosen,
    )


def _members(work: Workload, key: JobKey) -> Flags:
    names = [cls.name for cls in work.classes]
    if key.model not in work.models or key.cls not in names:
        return np.zeros(len(work), dtype=np.bool_)
    members: Flags = (
        (work.arrival_s == key.at_s)
        & (work.model == work.models.index(key.model))
        & (work.cls == names.index(key.cls))
        & (work.deadline_s == key.at_s + key.deadline_s)
    )
    return members


def _rows(work: Workload, keep: Flags) -> Workload:
    return kept(work, keep)


def _scaled(work: Workload, lengths: Lengths) -> Workload:
    return replace(
        work,
        input_tokens=_length(work.input_tokens, lengths.input_scale, lengths.input_max),
        output_tokens=_length(work.output_tokens, lengths.output_scale, lengths.output_max),
    )


def _length(tokens: Ints, factor: float, most: int) -> Ints:
    scaled = tokens if factor == 1 else np.rint(tokens * factor).astype(np.int64)
    return np.clip(scaled, 1, most)
