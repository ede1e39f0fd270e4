"""Means with confidence intervals over seeds. Seeds are few, so Student's t, and nothing is said of a single one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    mean: float
    low: float | None = None
    """Ends of the interval that holds the true mean with 95 % confidence; None: a single value says nothing of it."""
    high: float | None = None
    n: int = 1

    @property
    def sign(self) -> int:
        """Of a difference: 1 or -1 where its interval leaves out 0, else 0."""
        if self.low is None or self.high is None or self.low <= 0.0 <= self.high:
            return 0
        return 1 if self.low > 0.0 else -1

    def as_json(self) -> dict[str, float | int | None]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}


def estimate(values: Sequence[float], *, least: float | None = None, most: float | None = None) -> Estimate:
    """Of one value or more. ``least`` and ``most``: what the figure can be, where the interval would go beyond."""
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean=mean)
    half = quantile(len(values) - 1) * stdev(values) / sqrt(len(values))
    low, high = mean - half, mean + half
    return Estimate(
        mean=mean,
        low=low if least is None else max(low, least),
        high=high if most is None else min(high, most),
        n=len(values),
    )


def quantile(freedom: int) -> float:
    """Of Student's t, for an interval on both sides."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1.0 + CONFIDENCE) / 2.0))
