"""How much headroom this traffic needs: a backtest over its own history.

The paper takes the over-provisioning Theta from the spike ratio of arrivals over one model-load interval. Here the
question is asked directly: with which rule, applied to the last hour as it would have been lived through, would the
SLOs have been met with the fewest instance-seconds?

A rule is (window, settle, h): the fleet at time t is ``h`` times the largest ``window``-mean of the load seen between
``t - cold_start - settle`` and ``t - cold_start``: what was asked for arrives one cold start later, and shrinks only
once it has stayed small. Against that fleet the load is run as a fluid queue; a request misses when its wait exceeds
its class's slack. For each (window, settle) the least h that keeps every class's misses within the target is found;
the cheapest rule wins. 1/h is the paper's Theta. Bursty traffic ends up with long windows, trending traffic with
short ones.

One more rule, ``CONSTANT``, is the least fixed fleet that would have done: for bursts without memory nothing that
follows the load is cheaper.
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


_WORTH = 0.03
"""Share of its cost that a new rule must save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How to follow the load. A window of 0 does not: ``h`` is then the fleet itself."""

    window_s: int
    settle_s: int


CONSTANT = Rule(window_s=0, settle_s=0)


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
    current: Rule | None = None,
) -> Headroom:
    """The cheapest rule that meets the SLOs, or the ``current`` one if that is nearly as cheap.

    ``load``: instances' worth of work arriving in each past second, shape (T,). ``counts``: requests per class and
    second, shape (C, T). ``slack_s``: the wait each class can bear. ``floor``, ``ceiling``: fleet bounds.
    """
    tick = max(1, round(tick_s))
    found: list[Headroom] = []
    for rule in rules:
        if rule == CONSTANT:
            grid, basis = np.arange(max(floor, 1), max(ceiling, 1) + 1, dtype=float), np.ones(len(load))
        else:
            grid, basis = _GRID, _basis(load, rule, cold_start_s, tick)
        h, cost = _least(load, counts, slack_s, basis, grid, miss_max, floor, ceiling)
        found.append(Headroom(rule=rule, h=h, instances=cost))
    best = min(found, key=lambda f: f.instances)
    # A change of rule moves the fleet: it must be worth it.
    present = next((f for f in found if f.rule == current), best)
    return best if best.instances < (1.0 - _WORTH) * present.instances else present


def window_mean(load: Floats, window_s: int) -> float:
    """Mean of the last ``window_s`` seconds."""
    part = load[-window_s:]
    return float(part.mean()) if len(part) else 0.0


def followed(load: Floats, rule: Rule, tick_s: float) -> float:
    """What the rule multiplies now: the largest window mean within the settling time."""
    if rule == CONSTANT:
        return 1.0
    tick = max(1, round(tick_s))
    reach = rule.settle_s + rule.window_s + tick
    return float(_means(load[-reach:], rule.window_s, tick)[-max(1, rule.settle_s // tick + 1) :].max())


def _basis(load: Floats, rule: Rule, cold_start_s: float, tick: int) -> Floats:
    """The largest window mean that the fleet of each second was planned with, shape (T,)."""
    means = _means(load, rule.window_s, tick)
    lag = max(1, ceil(cold_start_s / tick) + 1)
    span = lag + max(1, rule.settle_s // tick)
    padded = np.concatenate((np.full(span, means[0]), means))
    windows = np.lib.stride_tricks.sliding_window_view(padded, span - lag + 1)
    peaks = windows.max(axis=1)[: len(means)]
    basis: Floats = np.repeat(peaks, tick)[-len(load) :]
    return basis


def _means(load: Floats, window_s: int, tick: int) -> Floats:
    """Window means at the end of every tick, the last at the end of ``load``."""
    sums = np.concatenate(([0.0], np.cumsum(load)))
    ends = np.arange(len(load) - (len(load) - 1) // tick * tick, len(load) + 1, tick)
    starts = np.maximum(0, ends - window_s)
    means: Floats = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _least(
    load: Floats,
    counts: Floats,
    slack_s: Sequence[float],
    basis: Floats,
    grid: Floats,
    miss_max: float,
    floor: int,
    ceiling: int,
) -> tuple[float, float]:
    """(least headroom of the grid that suffices, its mean instances); misses fall as it grows, so bisect."""
    low, high = 0, len(grid) - 1
    if not meets_slos(load, counts, slack_s, _fleet(basis, grid[high], floor, ceiling), miss_max):
        return float(grid[high]), inf
    while low < high:
        middle = (low + high) // 2
        if meets_slos(load, counts, slack_s, _fleet(basis, grid[middle], floor, ceiling), miss_max):
            high = middle
        else:
            low = middle + 1
    return float(grid[high]), float(_fleet(basis, grid[high], floor, ceiling).mean())


def _fleet(basis: Floats, h: float, floor: int, ceiling: int) -> Floats:
    fleet: Floats = np.clip(np.ceil(basis * h - 0.05), max(floor, 1), max(ceiling, 1))
    return fleet


def meets_slos(load: Floats, counts: Floats, slack_s: Sequence[float], fleet: Floats, miss_max: float) -> bool:
    """Run the load as a fluid queue through the fleet: backlog by the reflection of its net input."""
    net = np.cumsum(load - fleet)
    backlog = net - np.minimum(np.minimum.accumulate(net), 0.0)
    wait_s = backlog / fleet
    for requests, slack in zip(counts, slack_s, strict=True):
        total = requests.sum()
        if total > 0 and requests[wait_s > slack].sum() > miss_max * total:
            return False
    return True
