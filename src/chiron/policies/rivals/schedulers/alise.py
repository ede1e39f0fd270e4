"""``alise-like``: ALISE's speculative scheduling (2024) in every engine of a fixed fleet, as far as it is public.

Shortest remaining time first, by predicted lengths, in levels::

    time      : prefill + a step for each token that is predicted; what is made already is off it
    levels    : 0 up to base_s of what is left, 1 up to twice that, 2 up to four times, and so on; first come, first
                served within one
    error     : an answer that is as long as predicted is taken to become twice as long
    aging     : a level better for each aging_s that it waits
    swap      : a better level takes places back from a worse one; who would wait longest leaves first, and its KV goes
                to host memory

Source: arXiv 2410.23537, of which no constants and no code are public. What is filled in is in
docs/policies/schedulers.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log2
from typing import Annotated, Any, Final

from chiron.core.types import Request
from chiron.policies.checks import above, at_least
from chiron.policies.composers.leveled import LeveledComposer
from chiron.policies.policy import Estimates, Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.static import decide_fleet, initial_roles
from chiron.policies.size import prefill_s

_DUST: Final = 1e-9
"""That divisions of times leave behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AliseSettings:
    length_error: float = 0.5
    """Of the predictor: standard deviation of log(predicted / true), so that two of three predictions are within a
    factor of 1.65. The paper's predictor, which looks up similar prompts, is not public."""
    base_s: Annotated[float, Between(0.25, 8.0, log=True)] = 1.0
    """What is left on the first level at the most."""
    levels: int = 8
    aging_s: Annotated[float, Between(5.0, 300.0, log=True)] = 60.0
    """For each of which a waiting request rises by a level."""
    decode_batch: int = 32
    """Sequences in the step of which a token's time is reckoned."""
    every_steps: int = 8
    """Steps between two decisions about who gives way."""
    instances: int = 0
    """Instances of each model; 0: the fleet stays that there is at the start."""
    fleet_factor: Annotated[float, Between(0.5, 4.0, log=True)] = 1.0
    """That one is the initial fleet, so many times as large, rounded up."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "fleet_factor", "base_s", "levels", "aging_s", "decode_batch", "every_steps", "max_num_seqs")
        at_least(0, self, "length_error", "instances")


class _Job:
    __slots__ = ("prefill_s", "risen", "since_s", "tokens", "waits")

    def __init__(self, tokens: float, prefill_s: float, since_s: float) -> None:
        self.tokens = tokens
        """Of its answer, as predicted."""
        self.prefill_s = prefill_s
        """0 once it has had a place: its KV is kept."""
        self.since_s = since_s
        self.waits = True
        self.risen = 0
        """Levels by which it rose while it waited; it keeps them until it waits again."""


class Remaining:
    """Levels of what is left, in the engines of one model; implements ``policies.composers.leveled.Levels``."""

    def __init__(self, settings: AliseSettings, estimates: Estimates, jobs: dict[int, _Job]) -> None:
        """``jobs``: of all engines, by request."""
        self._settings = settings
        self._estimates = estimates
        self._jobs = jobs

    def enters(self, request: Request) -> bool:
        job = self._jobs.get(request.id)
        if job is not None:
            return not job.waits
        expected = request.predicted_tokens or self._estimates.expected_output[request.class_name]
        prompt_s = prefill_s(self._estimates, request.input_tokens)
        self._jobs[request.id] = _Job(max(1.0, expected), prompt_s, request.arrival_s)
        return False

    def starts(self, request: Request, now_s: float) -> None:
        job = self._jobs.get(request.id)
        if job is not None:
            job.waits = False

    def stops(self, request: Request, now_s: float) -> None:
        job = self._jobs.get(request.id)
        if job is not None:
            job.waits, job.since_s = True, now_s

    def level(self, request: Request, now_s: float, made: int) -> int:
        settings, job = self._settings, self._jobs.get(request.id)
        if job is None:
            return settings.levels - 1  # It was called off.
        if made:
            job.prefill_s = 0.0
        while made >= job.tokens:
            job.tokens *= 2.0
        left_s = self.left_s(request, made)
        level = 0 if left_s <= settings.base_s else min(settings.levels - 1, 1 + int(log2(left_s / settings.base_s)))
        if job.waits:
            job.risen = int((now_s - job.since_s) / settings.aging_s + _DUST)
        return max(0, level - job.risen)

    def better_s(self, request: Request) -> float:
        job, settings = self._jobs.get(request.id), self._settings
        if job is None or job.risen >= settings.levels:
            return inf
        return job.since_s + settings.aging_s * (job.risen + 1)

    def left_s(self, request: Request, made: int) -> float:
        """What it takes yet, as far as anybody knows."""
        job, times = self._jobs[request.id], self._estimates.step_times
        token_s = times.fixed_s + times.per_sequence_s * self._settings.decode_batch
        return job.prefill_s + token_s * (job.tokens - made)


def make_alise(settings: AliseSettings) -> Policy:
    jobs: dict[int, _Job] = {}

    def compose(_: Any, estimates: Estimates) -> LeveledComposer:
        return LeveledComposer(Remaining(settings, estimates, jobs), every_steps=settings.every_steps)

    def ended(_: Any, request: Request, now_s: float) -> None:
        jobs.pop(request.id, None)

    return Policy(
        name="alise-like",
        settings=settings,
        compose=compose,
        ended=ended,
        fleet=decide_fleet,
        initial_roles=initial_roles,
        fleet_period_s=30.0,
        initial_max_batch_size=settings.max_num_seqs,
    )
