"""How much headroom this traffic needs: a backtest over its own history.

The paper takes the over-provisioning Theta from the spike ratio of arrivals over one model-load interval. Here the
question is asked directly: with which rule, applied to the last hour as it would have been lived through, would the
SLOs have been met with the fewest instance-seconds?

A rule is (window, settle, h): the fleet at time t is ``h`` times the largest ``window``-mean of the load seen between
``t - cold_start - settle`` and ``t - cold_start``: what was asked for arrives one cold start later, and shrinks only
once it has stayed small. Against that fleet the load is run as a fluid queue in which late requests make way for the
others (``policies.queues.overload``): as much is late as exceeds what its class can wait for. For each (window,
settle) the least h that keeps every class's misses within the target is found; the cheapest rule wins. What the largest
fleet there may be would have let be late as well does not count. 1/h is the paper's Theta. Bursty traffic ends up with
long windows, trending traffic with short ones.

One more rule, ``CONSTANT``, is the least fixed fleet that would have done: for bursts without memory nothing that
follows the load is cheaper.

What comes back is better met by knowing when. Where the load resembles itself some time ago (its autocorrelation has a
peak), rules are tried that also look one such period back: at the load from a little before to a little after that
moment. They can say nothing of the first period, so they and the best of the plain rules are run over what is left of
it, and have to save a tenth there: a period that is none is found in any noise.

All that takes some milliseconds, and no request should have to wait for it: a ``Backtest`` is the computation as a
value, as far as it has come, and ``advanced`` takes it a few steps on, each of them one run of the load or one rule's
basis. What comes out does not depend on how it was cut. Only the cheapest rules count, so of most it is enough to know
that what they could cost beside those does not suffice.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf

import numpy as np

from chiron.policies.fluid_queue import Floats, late_makes_way, late_requests, wait_s

_GRID: Floats = 0.25 * 1.06 ** np.arange(0, 72, dtype=np.float64)
"""Headrooms tried: a quarter (of a short window's peak) to about 15, in steps of 6 %."""


_WORTH = 0.03
"""Share of its cost that a new rule must save."""
_PERIOD_WORTH = 0.1
"""The same of a rule that looks one period back, beside the best that does not; half of it keeps one in force."""
_PERIOD_MARGIN = 1.05
"""On its headroom: it was found on less than all of the history."""
_PERIOD_LEAST_S = 300
_PERIODS = 3
"""Tried at most."""
_APART = 0.2
"""Of a period: another that is tried differs by more."""
_ALIKE = 0.25
"""Least autocorrelation of a period that is tried, in the mean over the pairs that are so far apart."""
_BIN_S = 10
"""Of the load whose autocorrelation is taken."""
_SPANS_S = (15, 60)
"""Means over so long are looked at, from as long before to as long after the same moment one period ago."""
_BESIDE = 3
"""Plain rules, the best, that are run over the same part of the history."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How to follow the load. A window of 0 does not: ``h`` is then the fleet itself."""

    window_s: int
    settle_s: int
    period_s: int = 0
    """It looks so far back as well; 0: it does not."""
    span_s: int = 0
    """At means over so long, about that moment."""


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
    periods: bool = False
    """Rules that look back by a period are tried too."""
    foretold: Floats | None = None
    """Instances that would have been there in each second whatever the rule, shape (T,); None: none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plan:
    """What a rule plans with, over the history."""

    basis: Floats
    """What it multiplies, for the fleet of each ``tick``; the last ends with the history."""
    tick: int
    """Seconds."""
    least: Floats | None
    """Instances of each second that are there whatever the rule, shape (T,); None: none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Search:
    """For the least headroom of one rule that suffices: it is above ``low``'s and at most ``high``'s of the grid.
    Misses fall as it grows."""

    rule: Rule
    grid: Floats
    plan: _Plan
    low: int
    high: int
    """At first the largest that could count; -1: none could."""
    allowed: tuple[float, ...]
    """Requests of each class that may be late."""
    begin: int = 0
    """Second of the history from which on it counts."""
    possible: bool = False
    """``high`` is enough."""
    stride: int = 0
    """The next to be tried is so far below ``high``; 0: half way to ``low``."""

    @property
    def over(self) -> bool:
        return self.low > self.high or (self.possible and self.low == self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """A rule to be run from some second of the history on."""

    rule: Rule
    begin: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backtest:
    """A backtest under way."""

    question: Question
    found: tuple[Headroom, ...] = ()
    """Of the first rules; what does not count has cost inf."""
    trials: tuple[_Trial, ...] | None = None
    """Of periods, and of plain rules beside them; None: not looked for yet."""
    tried: tuple[Headroom, ...] = ()
    """Of the first of these."""
    search: _Search | None = None
    allowed: tuple[int, tuple[float, ...]] | None = None
    """Those of the last search, and the second from which on it counted."""
    steps: int = 0
    """That it has taken so far."""

    @property
    def done(self) -> bool:
        return self.trials is not None and len(self.tried) == len(self.trials)


def advanced(backtest: Backtest, steps: int) -> Backtest:
    """So many steps on, or done."""
    last = backtest.steps + steps
    while backtest.steps < last and not backtest.done:
        backtest = _advanced(backtest, last)
    return backtest


def answer(backtest: Backtest) -> Headroom:
    """What comes out; what is left to compute is computed."""
    while not backtest.done:
        backtest = _advanced(backtest, sys.maxsize)
    question, found = backtest.question, backtest.found
    best = min(found, key=lambda f: f.instances)
    # A change of rule moves the fleet: it must be worth it.
    present = next((f for f in found if f.rule == question.current), best)
    chosen = best if best.instances < (1.0 - _WORTH) * present.instances else present
    chosen = _recurring(backtest) or chosen
    steady = next((f.h for f in found if f.rule == CONSTANT and f.instances < inf), inf)
    return replace(chosen, steady=steady)


def _recurring(backtest: Backtest) -> Headroom | None:
    """The rule that looks one period back and saves the most beside the best that does not, if that is enough."""
    current = backtest.question.current
    worth = _PERIOD_WORTH / 2.0 if current is not None and current.period_s else _PERIOD_WORTH
    plain: dict[int, float] = {}
    best, least = None, 1.0 - worth
    for trial, found in zip(backtest.trials or (), backtest.tried, strict=True):
        if not trial.rule.period_s:
            plain[trial.begin] = min(found.instances, plain.get(trial.begin, inf))
        elif found.instances < least * plain[trial.begin]:
            best, least = found, found.instances / plain[trial.begin]
    return None if best is None else replace(best, h=_PERIOD_MARGIN * best.h)


def _advanced(backtest: Backtest, last: int) -> Backtest:
    """By a step, or, within a search, to the last."""
    question, search, steps = backtest.question, backtest.search, backtest.steps + 1
    plain = len(backtest.found) < len(question.rules)
    if search is None and not plain and backtest.trials is None:
        return replace(backtest, trials=_trials(question, backtest.found), steps=steps)
    if search is None:
        search = _began(backtest)
        return replace(backtest, search=search, allowed=(search.begin, search.allowed), steps=steps)
    if not search.over:
        search, steps = _searched(question, search, backtest.steps, last)
        return replace(backtest, search=search, steps=steps)
    h, cost = float(search.grid[-1]), inf
    if search.possible:
        h = float(search.grid[search.high])
        cost = _cost(question, search.plan, h, search.begin)
    found = Headroom(rule=search.rule, h=h, instances=cost)
    if plain:
        return replace(backtest, found=(*backtest.found, found), search=None, steps=steps)
    return replace(backtest, tried=(*backtest.tried, found), search=None, steps=steps)


def _searched(question: Question, search: _Search, steps: int, last: int) -> tuple[_Search, int]:
    """To its end, or until so many steps have been taken."""
    low, high, possible, stride = search.low, search.high, search.possible, search.stride
    while steps < last and low <= high and not (possible and low == high):
        at = high
        if possible:
            at = high - stride if stride and high - stride > low else (low + high) // 2
        steps += 1
        if _suffices(question, search, at):
            stride = 2 * stride if possible else stride
            high, possible = at, True
        else:
            low, stride = at + 1, 0
    return replace(search, low=low, high=high, possible=possible, stride=stride), steps


def _suffices(question: Question, search: _Search, at: int) -> bool:
    """Whether no class misses more than it may, with this headroom of the grid."""
    since = slice(search.begin, None)
    fleet = _fleet(question, search.plan, float(search.grid[at]))[since]
    if len(fleet) and fleet.min() >= max(question.ceiling, 1):
        return True  # What the largest fleet misses is allowed.
    return late_makes_way(question.load[since], question.counts[:, since], question.slack_s, fleet, search.allowed)


def _cost(question: Question, plan: _Plan, h: float, begin: int) -> float:
    """Mean instances from that second on."""
    if plan.least is not None:
        return float(_fleet(question, plan, h)[begin:].mean())
    # Of the first tick it is a part.
    seconds = len(question.load) - begin
    ticks, part = divmod(seconds, plan.tick)
    whole = _whole(question, plan, h)
    total = plan.tick * float(whole[len(whole) - ticks :].sum())
    return (total + part * float(whole[-ticks - 1] if part else 0.0)) / seconds


def _trials(question: Question, found: Sequence[Headroom]) -> tuple[_Trial, ...]:
    """For each period the best plain rules, then those that look back by it."""
    if not question.periods:
        return ()
    plain = sorted((f for f in found if f.instances < inf), key=lambda f: f.instances)[:_BESIDE]
    trials: list[_Trial] = []
    for period_s in periods(question.load, question.cold_start_s):
        recent = dict.fromkeys(
            (f.rule.window_s, f.rule.settle_s) for f in plain if f.rule != CONSTANT and f.rule.settle_s <= period_s
        )
        recent = recent or dict.fromkeys([(_SPANS_S[-1], _SPANS_S[-1])])
        quick = min((r for r in question.rules if r != CONSTANT), key=lambda r: (r.settle_s, r.window_s), default=None)
        if quick is not None:
            recent[quick.window_s, quick.settle_s] = None
        trials += [_Trial(rule=f.rule, begin=period_s) for f in plain]
        trials += [
            _Trial(rule=Rule(window_s=window, settle_s=settle, period_s=period_s, span_s=span), begin=period_s)
            for window, settle in recent
            for span in _SPANS_S
        ]
    return tuple(trials) if plain else ()


def periods(load: Floats, cold_start_s: float) -> tuple[int, ...]:
    """Times after which the load resembles itself, the likest first: peaks of its autocorrelation. At most half of the
    history, so that one period can be judged by another; at least what a start and a look around take."""
    bins = len(load) // _BIN_S
    if bins < 2:
        return ()
    x = load[-bins * _BIN_S :].reshape(bins, _BIN_S).mean(axis=1)
    x = x - x.mean()
    power = np.abs(np.fft.rfft(x, 2 * bins)) ** 2
    alike = np.fft.irfft(power)[:bins]
    if alike[0] <= 1e-12 * bins:
        return ()
    alike = alike / alike[0]
    least = ceil(max(_PERIOD_LEAST_S, cold_start_s + 4 * max(_SPANS_S)) / _BIN_S)
    lags = range(least, bins // 2)
    # Of fewer pairs there is less to add up; the likest first all the same, since more can be judged by more.
    least_alike = _ALIKE * (1.0 - np.arange(bins) / bins)
    peaks = [k for k in lags if alike[k] > least_alike[k] and alike[k - 1] < alike[k] >= alike[k + 1]]
    found: list[int] = []
    for k in sorted(peaks, key=lambda k: -alike[k]):
        # A broad peak has many tops in noise.
        if len(found) < _PERIODS and all(abs(k - other) > _APART * other for other in found):
            found.append(k)
    return tuple(_BIN_S * k for k in found)


def _began(backtest: Backtest) -> _Search:
    """The next rule's."""
    question, known = backtest.question, backtest.allowed
    if len(backtest.found) < len(question.rules):
        trial = _Trial(rule=question.rules[len(backtest.found)], begin=0)
        most = _most(question, backtest.found, trial.rule)
    else:
        assert backtest.trials is not None
        trial = backtest.trials[len(backtest.tried)]
        most = _most_beside(backtest, trial)
    rule, begin = trial.rule, trial.begin
    grid = _GRID
    if rule == CONSTANT:
        grid = np.arange(max(question.floor, 1), max(question.ceiling, 1) + 1, dtype=float)
    allowed = known[1] if known is not None and known[0] == begin else _allowed(question, begin)
    plan = _plan(question, rule)
    high, stride = len(grid) - 1, 0
    if most < inf:
        # What counts is seldom much cheaper than what would just count.
        high, stride = _affordable(question, plan, grid, begin, most), 1
    return _Search(rule=rule, grid=grid, plan=plan, low=0, high=high, allowed=allowed, begin=begin, stride=stride)


def _affordable(question: Question, plan: _Plan, grid: Floats, begin: int, most: float) -> int:
    """The last of the grid that costs no more than that; -1: none."""
    low, high = -1, len(grid) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _cost(question, plan, float(grid[middle]), begin) <= most:
            low = middle
        else:
            high = middle - 1
    return low


def _most(question: Question, found: Sequence[Headroom], rule: Rule) -> float:
    """That a plain rule may cost to count: as much as the last of the cheapest, beside which periods are tried. The one
    in force and the fixed fleet always do."""
    costs = sorted(f.instances for f in found)
    least = _BESIDE if question.periods else 1
    return inf if rule in (CONSTANT, question.current) or len(costs) < least else costs[least - 1]


def _most_beside(backtest: Backtest, trial: _Trial) -> float:
    """The same of a trial: as much as the cheapest plain rule, less what a period has to save beside it."""
    tried = zip(backtest.trials or (), backtest.tried, strict=False)
    plain = min((f.instances for t, f in tried if t.begin == trial.begin and not t.rule.period_s), default=inf)
    return (1.0 - _PERIOD_WORTH / 2.0) * plain if trial.rule.period_s else plain


def _allowed(question: Question, begin: int) -> tuple[float, ...]:
    """``miss_max`` of each class beyond what the largest fleet would have let be late: what no rule could have served
    in time asks for none, or it would ask for the largest fleet until it is forgotten."""
    load = question.load[begin:]
    fleet = np.full(len(load), float(max(question.ceiling, 1)))
    waits = bool((load > fleet).any()) and bool((wait_s(load, fleet) > min(question.slack_s, default=inf)).any())
    return tuple(
        question.miss_max * float(row.sum()) + (late_requests(load, row, slack_s, fleet) if waits else 0.0)
        for row, slack_s in zip(question.counts[:, begin:], question.slack_s, strict=True)
    )


def window_mean(load: Floats, window_s: int) -> float:
    """Mean of the last ``window_s`` seconds; 0 of none."""
    part = load[max(0, len(load) - window_s) :]
    return float(part.mean()) if len(part) else 0.0


def followed(load: Floats, rule: Rule, tick_s: float, ahead_s: float = 0.0) -> float:
    """What the rule multiplies now: the largest window mean within the settling time, and, if it looks back by a
    period, what came then from about this moment to ``ahead_s`` later."""
    if rule == CONSTANT:
        return 1.0
    if not len(load):
        return 0.0
    tick = max(1, round(tick_s))
    reach = rule.settle_s + rule.window_s + tick
    recent = float(_means(load[-reach:], rule.window_s, tick)[-max(1, rule.settle_s // tick + 1) :].max())
    if not rule.period_s:
        return recent
    first = len(load) - rule.period_s - 2 * rule.span_s
    last = min(len(load), len(load) - rule.period_s + ceil(ahead_s) + tick + 2 * rule.span_s)
    if first < 0:
        return recent
    return max(recent, float(_means(load[first:last], rule.span_s, tick)[rule.span_s // tick :].max()))


def _plan(question: Question, rule: Rule) -> _Plan:
    """Not yet multiplied."""
    load, tick = question.load, max(1, round(question.tick_s))
    least = None
    if question.foretold is not None:
        least = np.minimum(np.ceil(question.foretold - 0.05), max(question.ceiling, 1))
    if rule == CONSTANT:
        return _Plan(basis=np.ones(1), tick=max(1, len(load)), least=least)
    return _Plan(basis=_basis(load, rule, question.cold_start_s, tick), tick=tick, least=least)


def _basis(load: Floats, rule: Rule, cold_start_s: float, tick: int) -> Floats:
    """The largest window mean that the fleet of each tick was planned with."""
    means = _means(load, rule.window_s, tick)
    lag = max(1, ceil(cold_start_s / tick) + 1)
    settle = max(1, rule.settle_s // tick)
    padded = np.concatenate((np.full(lag + settle, means[0]), means))
    peaks = _largest(padded, settle + 1)[: len(means)]
    if rule.period_s:
        peaks = np.maximum(peaks, _period_ago(load, rule, tick))
    return peaks


def _period_ago(load: Floats, rule: Rule, tick: int) -> Floats:
    """The largest mean that ended from ``span`` before the same moment one period ago to twice that after it; 0 within
    the first period."""
    means = _means(load, rule.span_s, tick)
    span, back = max(1, rule.span_s // tick), rule.period_s // tick
    padded = np.concatenate((np.zeros(back + span), means))
    return _largest(padded, 3 * span + 1)[: len(means)]


def _largest(values: Floats, width: int) -> Floats:
    """The largest of each ``width`` in a row, from those of half as many."""
    known = 1
    while 2 * known <= width:
        values = np.maximum(values[:-known], values[known:])
        known *= 2
    rest = width - known
    return np.maximum(values[:-rest], values[rest:]) if rest else values


def _means(load: Floats, window_s: int, tick: int) -> Floats:
    """Window means at the end of every tick, the last at the end of ``load``."""
    sums = np.concatenate(([0.0], np.cumsum(load)))
    ends = np.arange(len(load) - (len(load) - 1) // tick * tick, len(load) + 1, tick)
    starts = np.maximum(0, ends - window_s)
    means: Floats = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _fleet(question: Question, plan: _Plan, h: float) -> Floats:
    """Instances in each second, shape (T,)."""
    fleet: Floats = np.repeat(_whole(question, plan, h), plan.tick)[-len(question.load) :]
    return fleet if plan.least is None else np.maximum(fleet, plan.least)


def _whole(question: Question, plan: _Plan, h: float) -> Floats:
    """Instances in each tick, by the rule."""
    fleet: Floats = np.maximum(np.ceil(plan.basis * h - 0.05), max(question.floor, 1))
    return np.minimum(fleet, max(question.ceiling, 1), out=fleet)


def missed(question: Question, headroom: Headroom, last_s: int) -> tuple[float, float]:
    """(requests that would have missed, requests) in the last seconds, with a headroom that was found before them."""
    fleet = _fleet(question, _plan(question, headroom.rule), headroom.h)[-last_s:]
    load, counts = question.load[-last_s:], question.counts[:, -last_s:]
    late = sum(late_requests(load, row, slack_s, fleet) for row, slack_s in zip(counts, question.slack_s, strict=True))
    return late, float(counts.sum())
