"""What makes one trial better than another: every class within its SLO often enough, in the worst run before the mean,
then the fewest GPU-hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from statistics import fmean

from chiron.studies.trial import Summary

TARGET = 0.99
STEP = 0.005
"""Shortfalls are compared in steps of this size: less would be noise between seeds, and would be paid for with GPUs."""

IN_WORDS = (
    "fewest GPU-hours (mean over workloads, each over its lower bound) with at least {target:g} of every class within "
    "its SLO in every run; where no trial has that, the least shortfall of the worst run, then the least mean "
    "shortfall, both in steps of {step:g}, then GPU-hours; ties by attainment; never a trial that in any run lacks "
    "more than the published settings, by more than {step:g}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One candidate over all calibration runs."""

    shortfalls: tuple[float, ...]
    """Of each run, what the worst class lacks to the target; empty: a run failed."""
    worse: bool = False
    """Whether a run lacks more than it does with the published settings, by more than a step."""
    stopped: bool = False
    """Whether it was stopped before its last run because it could not become the best any more: figures are of the runs
    that it had."""
    cost: float
    """Mean over runs of GPU-hours over the workload's lower bound."""
    attainment: float
    """Of the worst class in the worst run."""
    gpu_hours: float
    """Sum over runs."""

    @property
    def shortfall(self) -> float:
        """Mean over runs; inf: a run failed."""
        return fmean(self.shortfalls) if self.shortfalls else inf

    @property
    def worst_shortfall(self) -> float:
        """Of the worst run; inf: a run failed."""
        return max(self.shortfalls, default=inf)

    @property
    def rank(self) -> Rank:
        """The least is the best. The worst run comes before the mean: settings that give one workload up to serve
        the others well would be found out on the next one."""
        return (
            self.worse or self.stopped,
            _steps(self.worst_shortfall),
            _steps(self.shortfall),
            self.cost,
            -self.attainment,
        )

    def best_possible(self, runs: int) -> Rank:
        """The best rank that it can still get when the first of so many runs gave this score: nothing lacks and nothing
        costs anything in the others."""
        others = runs - len(self.shortfalls)
        # As zeros, and not by a share: rounded otherwise, a mean at the end of a step would be one more.
        whole = replace(self, shortfalls=self.shortfalls + (0.0,) * others, stopped=False)
        return replace(whole, cost=self.cost * len(self.shortfalls) / runs).rank

    def against(self, published: Sequence[float]) -> Score:
        """The same score, which knows whether it gives up what the published settings have: their shortfalls in the
        same runs."""
        pairs = zip(self.shortfalls, published, strict=False)
        return replace(self, worse=any(lacks > had + STEP for lacks, had in pairs))


Rank = tuple[bool, float, float, float, float]
FAILED = Score(shortfalls=(), worse=True, cost=inf, attainment=0.0, gpu_hours=inf)


def _steps(shortfall: float) -> float:
    return inf if shortfall == inf else ceil(shortfall / STEP)


def worst_class(summary: Summary) -> float:
    """Attainment of the class that has least; 1 if nobody asked."""
    return min(summary["attainment"].values(), default=1.0)


def score(summaries: Sequence[Summary | None], bounds: Sequence[float], target: float) -> Score:
    """``bounds``: the least GPU-hours of each run's workload. None: a run that failed."""
    done = [summary for summary in summaries if summary is not None]
    if len(done) < len(summaries) or not done:
        return FAILED
    worst = [worst_class(summary) for summary in done]
    hours = [float(summary["gpu_hours"]) for summary in done]
    return Score(
        shortfalls=tuple(max(0.0, target - share) for share in worst),
        cost=fmean(used / least for used, least in zip(hours, bounds, strict=True)),
        attainment=min(worst),
        gpu_hours=sum(hours),
    )
