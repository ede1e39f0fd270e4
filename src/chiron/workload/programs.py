"""Programs: agents and chats that make one call after another, each only once those before it have ended.

A program is a row of steps. A step is one call, or several at once that begin with the same prompt (a fork); the next
step waits for all of them (the join), and for a tool, or for a user who thinks. Its prompt is the whole conversation:
the prompt before, what was answered to it, and what tool or user add. So prompts grow, and each begins with the last.

Programs arrive whether or not the service is fast (an open loop); within one, a slow service makes the next call later
(a closed loop). What is drawn is fixed before a run by the seed: the same programs for every policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from chiron.core.types import RequestClass
from chiron.workload.errors import WorkloadSettingError, require
from chiron.workload.generate import REQUESTS_MAX, Arrivals, arrival_times
from chiron.workload.lengths import LENGTH_MAX, FieldLengths, log_moments, sample_field
from chiron.workload.seeds import generator
from chiron.workload.types import Floats, Ints

ASSUMED_TOKEN_S = 0.02
"""A token of an answer is assumed to take as long where arrivals are needed before a run: for the initial fleet."""
BRANCHES_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LognormalNumber:
    """Lognormal, given by ``mean`` and ``cv`` or by ``p50`` and ``p99``, and no more than ``max``."""

    mean: float | None = None
    cv: float | None = None
    """Standard deviation / mean."""
    p50: float | None = None
    p99: float | None = None
    max: float = inf

    def __post_init__(self) -> None:
        given = {(self.mean is not None, self.cv is not None), (self.p50 is not None, self.p99 is not None)}
        if given != {(True, True), (False, False)}:
            raise WorkloadSettingError("a lognormal needs either mean and cv, or p50 and p99")
        for name in ("mean", "p50", "max"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "above 0")
        require(self.cv is None or 0 <= self.cv < inf, "cv", self.cv, "at least 0 and finite")
        if self.p50 is not None and self.p99 is not None:
            require(self.p50 <= self.p99 < inf, "p99", self.p99, f"at least p50 ({self.p50:g}) and finite")

    def sample(self, count: int, rng: np.random.Generator) -> Floats:
        drawn = rng.lognormal(*log_moments(self.mean, self.cv, self.p50, self.p99), count)
        return np.minimum(drawn, self.max)


Number = int | LognormalNumber
"""A whole number, or one that is drawn and rounded, at least 1."""
Seconds = float | LognormalNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramShape:
    """What the programs of one kind are like."""

    steps: Number
    """Calls in a row."""
    branches: Number = 1
    """Calls that a step makes at once; drawn for each step."""
    first: FieldLengths
    """Tokens of the first prompt."""
    added: FieldLengths
    """Tokens that tool or user add to the conversation before each later step."""
    output: FieldLengths
    """Tokens of each answer."""
    think_s: Seconds = 0.0
    """Of tool or user, from the end of a step to the next."""
    input_max: int = LENGTH_MAX
    """Tokens to which a longer conversation is cut."""

    def __post_init__(self) -> None:
        for name, most in (("steps", 10_000), ("branches", BRANCHES_MAX)):
            value = getattr(self, name)
            fine = not isinstance(value, int) or 1 <= value <= most
            require(fine, name, value, f"1 to {most}, or drawn")
        require(self.input_max >= 1, "input_max", self.input_max, "1 or more")
        fine = isinstance(self.think_s, LognormalNumber) or 0 <= self.think_s < inf
        require(fine, "think", self.think_s, "0 or more and finite, or drawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramStream:
    """Programs of one kind, which arrive one by one."""

    kind: str
    model: str
    cls: RequestClass
    arrivals: Arrivals
    duration_s: float
    shape: ProgramShape
    deadline_s: float = inf
    """Of a program, from its start to the end of its last call."""
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """The calls of one stream, program by program, as columns; those that a call waits for are before it."""

    start_s: Floats
    """By program."""
    of: Ints
    """By call, as all that follow: its program."""
    input_tokens: Ints
    output_tokens: Ints
    think_s: Floats
    arrival_s: Floats
    """If each token of an answer takes ``ASSUMED_TOKEN_S``."""
    earliest_s: Floats
    parents: tuple[tuple[int, ...], ...]


def drawn(stream: ProgramStream, *, seed: int, name: str) -> Drawn:
    """``seed`` and ``name`` together name the draws. Raises WorkloadSettingError."""
    require(0 < stream.duration_s < inf, "duration", stream.duration_s, "above 0 s and finite")
    start_s = arrival_times(stream.arrivals, stream.duration_s, generator(seed, f"{name} arrivals"))
    shape, rng = stream.shape, generator(seed, f"{name} calls")
    steps = _whole(shape.steps, len(start_s), rng, most=10_000)
    total = int(steps.sum())
    _refuse_many(total, "calls or more")
    branches = _whole(shape.branches, total, rng, most=BRANCHES_MAX)
    _refuse_many(int(branches.sum()), "calls")
    waited_for = branches[1:] * branches[:-1]
    waited_for[np.cumsum(steps)[:-1] - 1] = 0  # A first step waits for none.
    _refuse_many(int(waited_for.sum()), "pairs of a call and one that it waits for")
    return _laid_out(shape, start_s, steps, branches, rng)


def _refuse_many(count: int, what: str) -> None:
    if count > REQUESTS_MAX:
        raise WorkloadSettingError(f"these programs make {count:,} {what}; at most {REQUESTS_MAX:,} are allowed")


def _laid_out(shape: ProgramShape, start_s: Floats, steps: Ints, branches: Ints, rng: np.random.Generator) -> Drawn:
    first = sample_field(shape.first, len(start_s), rng)
    added = sample_field(shape.added, len(branches), rng)
    outputs = sample_field(shape.output, int(branches.sum()), rng)
    thinks = _seconds(shape.think_s, len(branches), rng)
    of: list[int] = []
    inputs: list[int] = []
    think_s: list[float] = []
    arrival_s: list[float] = []
    earliest_s: list[float] = []
    parents: list[tuple[int, ...]] = []
    step = 0
    for program, (begin_s, count) in enumerate(zip(start_s.tolist(), steps.tolist(), strict=True)):
        before: tuple[int, ...] = ()
        prompt, at_s, least_s = int(first[program]), begin_s, begin_s
        for index in range(count):
            wait_s = float(thinks[step]) if index else 0.0
            at_s, least_s = at_s + wait_s, least_s + wait_s
            mine = tuple(range(len(of), len(of) + int(branches[step])))
            for _ in mine:
                of.append(program)
                inputs.append(min(prompt, shape.input_max))
                think_s.append(wait_s)
                arrival_s.append(at_s)
                earliest_s.append(least_s)
                parents.append(before)
            made = outputs[mine[0] : mine[-1] + 1]
            at_s += ASSUMED_TOKEN_S * int(made.max())
            prompt += int(made.sum()) + int(added[step])
            before = mine
            step += 1
    return Drawn(
        start_s=start_s,
        of=np.array(of, dtype=np.int64),
        input_tokens=np.array(inputs, dtype=np.int64),
        output_tokens=outputs,
        think_s=np.array(think_s, dtype=np.float64),
        arrival_s=np.array(arrival_s, dtype=np.float64),
        earliest_s=np.array(earliest_s, dtype=np.float64),
        parents=tuple(parents),
    )


def _whole(number: Number, count: int, rng: np.random.Generator, *, most: int) -> Ints:
    if isinstance(number, int):
        return np.full(count, number, dtype=np.int64)
    return np.clip(np.rint(number.sample(count, rng)), 1, most).astype(np.int64)


def _seconds(seconds: Seconds, count: int, rng: np.random.Generator) -> Floats:
    if isinstance(seconds, LognormalNumber):
        return seconds.sample(count, rng)
    return np.full(count, float(seconds))


def flat(parents: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """As ``Programs.parents`` and ``parents_from``."""
    ends = np.cumsum([0, *(len(each) for each in parents)], dtype=np.int64)
    return np.array([row for each in parents for row in each], dtype=np.int64), ends
