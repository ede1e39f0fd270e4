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

All that takes some 10 ms, and no request should have to wait for it: a ``Backtest`` is the computation as a value, as
far as it has come, and ``advanced`` takes it a few steps on, each of them one run of the load or one rule's basis. What
comes out does not depend on how it was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    steady: float = inf
    """The least fixed fleet that would have done; inf: not known, or none."""


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
    """The cheapest rule that meets the SLOs, or the ``current`` one if that is nearly as cheap: all at once."""
    question = Question(
        load=load,
        counts=counts,
        slack_s=tuple(slack_s),
        rules=tuple(rules),
        cold_start_s=cold_start_s,
        tick_s=tick_s,
        miss_max=miss_max,
        floor=floor,
        ceiling=ceiling,
        current=current,
    )
    return answer(Backtest(question=question))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """What a backtest is about."""

    load: Floats
    """Instances' worth of work arriving in each past second, shape (T,)."""
    counts: Floats
    """Requests per class and second, shape (C, T)."""
    slack_s: tuple[float, ...]
    """The wait each class can bear."""
    rules: tuple[Rule, ...]
    cold_start_s: float
    tick_s: float
    miss_max: float
    floor: int
    """Of the fleet, as the next."""
    ceiling: int
    current: Rule | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Search:
    """For the least headroom of one rule that suffices: it is above ``low``'s and at most ``high``'s of the grid.
    Misses fall as it grows."""

    rule: Rule
    grid: Floats
    basis: Floats
    low: int
    high: int
    possible: bool = False
    """The largest of the grid is enough."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backtest:
    """A backtest under way."""

    question: Question
    found: tuple[Headroom, ...] = ()
    """Of the first rules."""
    search: _Search | None = None
    steps: int = 0
    """That it has taken so far."""

    @property
    def done(self) -> bool:
        return len(self.found) == len(self.question.rules)


def advanced(backtest: Backtest, steps: int) -> Backtest:
    """So many steps on, or done."""
    while steps > 0 and not backtest.done:
        backtest = _advanced(backtest)
        steps -= 1
    return backtest


def answer(backtest: Backtest) -> Headroom:
    """What comes out; what is left to compute is computed."""
    while not backtest.done:
        backtest = _advanced(backtest)
    found = backtest.found
    best = min(found, key=lambda f: f.instances)
    # A change of rule moves the fleet: it must be worth it.
    present = next((f for f in found if f.rule == backtest.question.current), best)
    chosen = best if best.instances < (1.0 - _WORTH) * present.instances else present
    steady = next((f.h for f in found if f.rule == CONSTANT and f.instances < inf), inf)
    return replace(chosen, steady=steady)


def _advanced(backtest: Backtest) -> Backtest:
    question, search = backtest.question, backtest.search
    backtest = replace(backtest, steps=backtest.steps + 1)
    if search is None:
        return replace(backtest, search=_began(question, question.rules[len(backtest.found)]))
    if search.possible and search.low >= search.high:
        h = float(search.grid[search.high])
        cost = float(_fleet(question, search, search.high).mean())
    else:
        middle = (search.low + search.high) // 2 if search.possible else search.high
        enough = meets_slos(
            question.load, question.counts, question.slack_s, _fleet(question, search, middle), question.miss_max
        )
        if search.possible or enough:
            low, high = (search.low, middle) if enough else (middle + 1, search.high)
            return replace(backtest, search=replace(search, low=low, high=high, possible=True))
        h, cost = float(search.grid[-1]), inf
    found = Headroom(rule=search.rule, h=h, instances=cost)
    return replace(backtest, found=(*backtest.found, found), search=None)


def _began(question: Question, rule: Rule) -> _Search:
    if rule == CONSTANT:
        grid = np.arange(max(question.floor, 1), max(question.ceiling, 1) + 1, dtype=float)
        basis = np.ones(len(question.load))
    else:
        grid = _GRID
        basis = _basis(question.load, rule, question.cold_start_s, max(1, round(question.tick_s)))
    return _Search(rule=rule, grid=grid, basis=basis, low=0, high=len(grid) - 1)


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


def _fleet(question: Question, search: _Search, at: int) -> Floats:
    """With this headroom of the grid."""
    basis, h = search.basis, search.grid[at]
    fleet: Floats = np.clip(np.ceil(basis * h - 0.05), max(question.floor, 1), max(question.ceiling, 1))
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
