"""What makes one trial better than another: every class within its SLO often enough, then the fewest GPU-hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from statistics import fmean

from chiron.studies.trial import Summary

TARGET = 0.99
STEP = 0.005
"""Shortfalls are compared in steps of this size: less would be noise between seeds, and would be paid for with GPUs."""

IN_WORDS = (
    "fewest GPU-hours (mean over workloads, each over its lower bound) with at least {target:g} of every class within "
    "its SLO in every run; where no trial has that, the least mean shortfall in steps of {step:g}, then GPU-hours; "
    "ties by attainment"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One candidate over all calibration runs."""

    shortfall: float
    """Mean over runs of what the worst class lacks to the target; inf: a run failed."""
    cost: float
    """Mean over runs of GPU-hours over the workload's lower bound."""
    attainment: float
    """Of the worst class in the worst run."""
    gpu_hours: float
    """Sum over runs."""

    @property
    def rank(self) -> tuple[float, float, float]:
        """The least is the best."""
        steps = inf if self.shortfall == inf else ceil(self.shortfall / STEP)
        return steps, self.cost, -self.attainment


FAILED = Score(shortfall=inf, cost=inf, attainment=0.0, gpu_hours=inf)


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
        shortfall=fmean(max(0.0, target - share) for share in worst),
        cost=fmean(used / least for used, least in zip(hours, bounds, strict=True)),
        attainment=min(worst),
        gpu_hours=sum(hours),
    )
