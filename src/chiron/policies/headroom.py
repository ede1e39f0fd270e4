"""How much headroom this traffic needs: a backtest over its own history.

The paper takes the over-provisioning Theta from the spike ratio of arrivals over one model-load interval. Here the
question is asked directly: with which rule, applied to the last hour as it would have been lived through, would the
promises have been kept with the fewest instance-seconds?

A rule is (window, settle, h): the fleet at time t is ``h`` times the largest ``window``-mean of the load seen between
``t - cold_start - settle`` and ``t - cold_start``: what was asked for arrives one cold start later, and shrinks only
once it has stayed small. Against that fleet the load is run as a fluid queue; a request misses when its wait exceeds
its class's slack. For each (window, settle) the least h that keeps every class's misses within the target is found;
the cheapest rule wins. 1/h is the paper's Theta. Bursty traffic ends up with long windows, trending traffic with
short ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_GRID = 0.25 * 1.06 ** np.arange(0, 72)
"""Headrooms tried: a quarter (of a short window's peak) to about 15, in steps of 6 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How to follow the load."""

    window_s: int
    settle_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """The rule chosen, its headroom, and what it would have cost."""

    rule: Rule
    h: float
    instances: float
    """Mean instances over the history; inf: no headroom tried was enough."""


def choose_headroom(
    load: Floats,
    counts: Floats,
    slack_s: Sequence[float],
    rules: Sequence[Rule],
    *,
    cold_start_s: float,
    tick_s: float,
    miss_max: float,
    floor: int,
    ceiling: int,
) -> Headroom:
    """The cheapest rule that keeps the promises.

    ``load``: instances' worth of work arriving in each past second, shape (T,). ``counts``: requests per class and
    second, shape (C, T). ``slack_s``: the wait each class can bear. ``floor``, ``ceiling``: fleet bounds.
    """
    tick = max(1, round(tick_s))
    best: Headroom | None = None
    for rule in rules:
        basis = _basis(load, rule, cold_start_s, tick)
        found = _least(load, counts, slack_s, basis, miss_max, floor, ceiling)
        h, cost = found
        if best is None or cost < best.instances:
            best = Headroom(rule=rule, h=h, instances=cost)
    assert best is not None, "at least one rule"
    return best


def window_mean(load: Floats, window_s: int) -> float:
    """Mean of the last ``window_s`` seconds."""
    part = load[-window_s:]
    return float(part.mean()) if len(part) else 0.0


def _basis(load: Floats, rule: Rule, cold_start_s: float, tick: int) -> Floats:
    """The largest window mean that the fleet of each second was planned with, shape (T,)."""
    sums = np.concatenate(([0.0], np.cumsum(load)))
    ends = np.arange(tick, len(load) + 1, tick)
    starts = np.maximum(0, ends - rule.window_s)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    lag = max(1, ceil(cold_start_s / tick) + 1)
    span = lag + max(1, rule.settle_s // tick)
    padded = np.concatenate((np.full(span, means[0]), means))
    windows = np.lib.stride_tricks.sliding_window_view(padded, span - lag + 1)
    peaks = windows.max(axis=1)[: len(means)]
    basis: Floats = np.repeat(peaks, tick)
    short = len(load) - len(basis)
    return np.concatenate((basis, np.full(short, basis[-1]))) if short > 0 else basis[: len(load)]


def _least(
    load: Floats,
    counts: Floats,
    slack_s: Sequence[float],
    basis: Floats,
    miss_max: float,
    floor: int,
    ceiling: int,
) -> tuple[float, float]:
    """(least headroom of the grid that suffices, its mean instances); misses fall as it grows, so bisect."""
    low, high = 0, len(_GRID) - 1
    if not keeps_promises(load, counts, slack_s, _fleet(basis, _GRID[high], floor, ceiling), miss_max):
        return float(_GRID[high]), inf
    while low < high:
        middle = (low + high) // 2
        if keeps_promises(load, counts, slack_s, _fleet(basis, _GRID[middle], floor, ceiling), miss_max):
            high = middle
        else:
            low = middle + 1
    return float(_GRID[high]), float(_fleet(basis, _GRID[high], floor, ceiling).mean())


def _fleet(basis: Floats, h: float, floor: int, ceiling: int) -> Floats:
    fleet: Floats = np.clip(np.ceil(basis * h - 0.05), max(floor, 1), max(ceiling, 1))
    return fleet


def keeps_promises(load: Floats, counts: Floats, slack_s: Sequence[float], fleet: Floats, miss_max: float) -> bool:
    """Run the load as a fluid queue through the fleet: backlog by the reflection of its net input."""
    net = np.cumsum(load - fleet)
    backlog = net - np.minimum(np.minimum.accumulate(net), 0.0)
    wait_s = backlog / fleet
    for requests, slack in zip(counts, slack_s, strict=True):
        total = requests.sum()
        if total > 0 and requests[wait_s > slack].sum() > miss_max * total:
            return False
    return True
