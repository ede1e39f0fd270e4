"""``stage-balance``: the fewest replicas with which a queue model of the pipeline keeps TTFT and ITL. Ours.

OpScale (arXiv 2608.13499) is the starting point: shrink what is not critical while the predicted latency is far below
the SLO, else grow the bottleneck. Here every tick begins with the least that the bounds allow and gives the bottleneck
one replica after the other until the load that is planned for meets its SLOs (``queue_model``); then it takes back
what turned out not to be needed, dearest first. So stages that are not the bottleneck never hold more than they need.

The load is the largest rate of the last minutes (as long as a replica takes to start, and a while more) and what the
randomness of arrivals adds to it; interactive requests that wait count as arrivals that must be served within their
TTFT. Batch work counts by its deadlines, as the rate at which it must be done to keep all of them: however much of it
arrives at once, a deadline that is far away asks for nothing. What is late already asks for no more.

Replicas that fail are made up for: how often they do is measured, and each is missing for as long as another one takes
to start, so a stage gets as many more that what the load needs is up but for a small share of the time.

Planned step times are corrected by what stages measure. Growing is done at once, shrinking only to what has been enough
for a while. Without metrics nothing shrinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb, exp, isfinite, isnan, sqrt

from chiron.policies.checks import above, at_least
from chiron.policies.stages.queue_model import Forecast, StageLoad, forecast, pass_s
from chiron.policies.views import ClassMix, PipelineView, StagePlan, StageView


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBalanceSettings:
    tick_s: float = 5.0
    slo_share: float = 0.8
    """Of the ITL and TTFT SLOs, which predicted means may take: requests differ from the mean. Our choice."""
    spread: float = 2.0
    """Standard deviations of Poisson arrivals on top of the largest rate seen."""
    rate_window_s: float = 15.0
    """A rate is the mean over this long."""
    look_back_s: float = 120.0
    """The largest rate counts for this long, and for as long as a replica takes to start besides."""
    hold_s: float = 120.0
    """A stage shrinks to the most that it needed within this time."""
    stale_s: float = 15.0
    """What stages report is missing when it is older."""
    memory_s: float = 600.0
    """Failures count less with their age: by this time constant."""
    short_share: float = 0.05
    """Of the time, in which failures may leave a stage fewer replicas than the load needs."""

    def __post_init__(self) -> None:
        above(0, self, "tick_s", "slo_share", "rate_window_s", "stale_s", "memory_s", "short_share")
        at_least(0, self, "spread", "look_back_s", "hold_s")
        if self.slo_share > 1:
            raise ValueError(f"slo_share is {self.slo_share}; it must lie in 0..1")


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceState:
    """What the policy remembers of one pipeline."""

    arrivals: tuple[tuple[float, float, float], ...] = ()
    """(time, seconds, requests) of each tick."""
    wanted: tuple[tuple[float, tuple[int, ...]], ...] = ()
    """(time, replicas of each stage that were needed)."""
    factors: tuple[float, ...] = ()
    """Measured over planned time of each stage's passes."""
    ready: tuple[int, ...] = ()
    """Replicas of each stage at the last tick."""
    lost: float = 0.0
    """Replicas that failed, and seconds that replicas lived, both with less weight the longer ago."""
    lived_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """The least replicas found for a load."""

    replicas: tuple[int, ...]
    forecast: Forecast
    spares: tuple[int, ...] = ()
    """How many of them make up for failures."""


def decide_stages(
    settings: StageBalanceSettings, state: BalanceState | None, view: PipelineView
) -> tuple[tuple[StagePlan, ...], BalanceState]:
    state = state or BalanceState(factors=(1.0,) * len(view.stages))
    state = _remember(settings, state, view)
    load = planned_load(settings, state, view)
    if load is None:
        return tuple(StagePlan(replicas=s.planned, reason="nothing_known") for s in view.stages), state
    sizing = with_spares(settings, state, view, size(view, load, state.factors))
    # The first plan on record is what was found: it is not given up before the load has been seen for a while.
    before = state.wanted or ((view.now_s, tuple(stage.planned for stage in view.stages)),)
    history = (*((t, n) for t, n in before if t > view.now_s - settings.hold_s), (view.now_s, sizing.replicas))
    state = replace(state, wanted=history)
    needed = [max(counts[i] for _, counts in history) for i in range(len(view.stages))]
    sound = view.sample_age_s <= settings.stale_s
    plans = tuple(_plan(stage, sizing, load, i, needed[i], sound) for i, stage in enumerate(view.stages))
    return plans, state


def _plan(stage: StageView, sizing: Sizing, load: StageLoad, number: int, needed: int, sound: bool) -> StagePlan:
    wanted, predicted = sizing.replicas[number], sizing.forecast
    numbers = {
        "rate": load.rate,
        "wanted": float(wanted),
        "spares": float(sizing.spares[number]),
        "itl_s": predicted.itl_s if isfinite(predicted.itl_s) else -1.0,
        "itl_slo_s": load.itl_s if isfinite(load.itl_s) else -1.0,
        "ttft_s": predicted.ttft_s if isfinite(predicted.ttft_s) else -1.0,
        "kv": predicted.kv[number],
        "utilisation": -1.0 if isnan(stage.utilisation) else stage.utilisation,
    }
    if wanted > stage.planned:
        reason = "bottleneck" if predicted.fits else "slo_out_of_reach"
        if wanted - sizing.spares[number] <= stage.planned:
            reason = "replicas_fail"
        return StagePlan(replicas=wanted, reason=reason, numbers=numbers)
    if not sound:
        return StagePlan(replicas=stage.planned, reason="metrics_missing", numbers=numbers)
    if needed < stage.planned:
        return StagePlan(replicas=needed, reason="latency_allows_fewer", numbers=numbers)
    return StagePlan(replicas=stage.planned, reason="enough", numbers=numbers)


def size(view: PipelineView, load: StageLoad, factors: Sequence[float]) -> Sizing:
    """The bottleneck first, until the load fits; then without what is not needed."""
    kinds = view.kind.stages
    replicas = [kind.min_replicas for kind in kinds]
    found = forecast(view.kind, replicas, load, factors)
    while not found.fits:
        grown = _grown(view, replicas, found, load, factors)
        if grown is None:
            break
        replicas, found = grown
    if found.fits:
        replicas, found = _trimmed(view, replicas, found, load, factors)
    return Sizing(replicas=tuple(replicas), forecast=found)


def _grown(
    view: PipelineView, replicas: list[int], found: Forecast, load: StageLoad, factors: Sequence[float]
) -> tuple[list[int], Forecast] | None:
    """With one replica more where it helps most, which is at the bottleneck; where several stages are equally short,
    one of them or all of them together. None: it helps nowhere."""
    kinds = view.kind.stages
    tried = []
    for more in (*_one_more(replicas), [count + 1 for count in replicas]):
        within = [min(count, kind.max_replicas) for count, kind in zip(more, kinds, strict=True)]
        if within != replicas:
            predicted = forecast(view.kind, within, load, factors)
            if predicted.fits or _better(predicted, found):
                tried.append((within, predicted))
    return min(tried, key=lambda pair: (not pair[1].fits, _merit(pair[1], pair[0])), default=None)


def _one_more(replicas: Sequence[int]) -> list[list[int]]:
    return [[count + (i == j) for j, count in enumerate(replicas)] for i in range(len(replicas))]


def _merit(found: Forecast, replicas: Sequence[int]) -> tuple[float, float]:
    """What is short, by how many replicas it takes."""
    return found.excess * sum(replicas), found.pressure


def _better(one: Forecast, other: Forecast) -> bool:
    """By a percent, in what is short: otherwise a replica is of no use. Micro-batches go by the largest number of
    replicas, so one more may cost a little before the next one helps."""
    if one.excess > other.excess * 1.05:
        return False
    return one.excess < 0.99 * other.excess or one.pressure < 0.99 * other.pressure or one.ttft_s < 0.99 * other.ttft_s


def _trimmed(
    view: PipelineView, replicas: list[int], found: Forecast, load: StageLoad, factors: Sequence[float]
) -> tuple[list[int], Forecast]:
    """Without replicas that the load does not need, the dearest stage first."""
    kinds = view.kind.stages
    dearest = sorted(range(len(kinds)), key=lambda i: (-kinds[i].gpus * kinds[i].price_per_gpu_hour, i))
    for i in dearest:
        while replicas[i] > kinds[i].min_replicas:
            fewer = [count - (i == j) for j, count in enumerate(replicas)]
            predicted = forecast(view.kind, fewer, load, factors)
            if not predicted.fits:
                break
            replicas, found = fewer, predicted
    return replicas, found


def with_spares(settings: StageBalanceSettings, state: BalanceState, view: PipelineView, sizing: Sizing) -> Sizing:
    """And as many more as failures take: a replica that fails is missing for as long as another one takes to start."""
    rate = state.lost / state.lived_s if state.lived_s > 0.0 else 0.0
    with_more = [
        _with_spares(count, min(0.5, rate * stage.start_s), stage.kind.max_replicas, settings.short_share)
        for count, stage in zip(sizing.replicas, view.stages, strict=True)
    ]
    spares = tuple(more - count for more, count in zip(with_more, sizing.replicas, strict=True))
    return replace(sizing, replicas=tuple(with_more), spares=spares)


def _with_spares(needed: int, down: float, most: int, short_share: float) -> int:
    """The fewest of which ``needed`` are up but for this share of the time, each being down for ``down`` of it."""
    for count in range(needed, most):
        up = sum(comb(count, k) * down**k * (1.0 - down) ** (count - k) for k in range(count - needed + 1))
        if 1.0 - up <= short_share:
            return count
    return most


def planned_load(settings: StageBalanceSettings, state: BalanceState, view: PipelineView) -> StageLoad | None:
    """The load that the pipeline must bear; None: no class has requests or a shape yet."""
    mixes = [mix for mix in view.mixes if mix.finished > 0] or list(view.mixes)
    if not mixes:
        return None
    ttft_s = settings.slo_share * min(mix.cls.ttft_s for mix in mixes)
    rate = largest_rate(settings, state, view)
    rate += settings.spread * sqrt(rate / settings.rate_window_s)
    if view.waiting_interactive:
        # To be served within what a first token may take, or a rate window. That is more than helps those who wait, who
        # are late before a replica is up; it makes up for what the plan does not see.
        rate += view.waiting_interactive / max(1.0, min(ttft_s, settings.rate_window_s))
    batch_rate = due_rate(settings, view)
    shares = _shares(mixes, rate, batch_rate)
    return StageLoad(
        rate=rate + batch_rate,
        input_tokens=max(1.0, sum(w * m.input_tokens for w, m in zip(shares, mixes, strict=True)) / sum(shares)),
        output_tokens=max(1.0, sum(w * m.output_tokens for w, m in zip(shares, mixes, strict=True)) / sum(shares)),
        itl_s=settings.slo_share * min(mix.cls.itl_s for mix in mixes),
        ttft_s=ttft_s,
    )


def due_rate(settings: StageBalanceSettings, view: PipelineView) -> float:
    """Batch requests per second with which all that is due later than now is done by then, a replica's start and a
    margin before."""
    start_s = max(stage.start_s for stage in view.stages)
    most = ahead = 0.0
    for due_s, requests in view.batch_due:
        if due_s > view.now_s:
            ahead += requests
            usable_s = settings.slo_share * (due_s - view.now_s) - start_s
            most = max(most, ahead / max(settings.rate_window_s, usable_s))
    return most


def _shares(mixes: Sequence[ClassMix], rate: float, batch_rate: float) -> list[float]:
    """What of the load is of each class: those of one kind as they finished, the two kinds by their rates."""
    rates = {True: rate, False: batch_rate}
    counts = [float(max(1, mix.finished)) for mix in mixes]
    sums = {True: 0.0, False: 0.0}
    for count, mix in zip(counts, mixes, strict=True):
        sums[mix.cls.interactive] += count
    loaded = [kind for kind in (True, False) if rates[kind] > 0.0 and sums[kind] > 0.0]
    if len(loaded) < 2:
        return [n if m.cls.interactive in loaded or not loaded else 0.0 for n, m in zip(counts, mixes, strict=True)]
    return [n / sums[m.cls.interactive] * rates[m.cls.interactive] for n, m in zip(counts, mixes, strict=True)]


def largest_rate(settings: StageBalanceSettings, state: BalanceState, view: PipelineView) -> float:
    """Of all means over a rate window that ended within the look-back."""
    since_s = view.now_s - settings.look_back_s - max(stage.start_s for stage in view.stages)
    largest = 0.0
    for end_s, _, _ in state.arrivals:
        if end_s < since_s:
            continue
        inside = [a for a in state.arrivals if end_s - settings.rate_window_s < a[0] <= end_s]
        seconds = sum(a[1] for a in inside)
        if seconds > 0.0:
            largest = max(largest, sum(a[2] for a in inside) / seconds)
    return largest


def _remember(settings: StageBalanceSettings, state: BalanceState, view: PipelineView) -> BalanceState:
    kept_s = settings.look_back_s + max(stage.start_s for stage in view.stages) + settings.rate_window_s
    arrivals = tuple(a for a in state.arrivals if a[0] > view.now_s - kept_s)
    arrivals = (*arrivals, (view.now_s, view.since_s, view.arrival_rate * view.since_s))
    factors = tuple(_factor(factor, stage, view) for factor, stage in zip(state.factors, view.stages, strict=True))
    # One that is gone though the plan has it has failed.
    lost = sum(
        max(0, min(was, stage.planned) - stage.ready) for was, stage in zip(state.ready, view.stages, strict=False)
    )
    kept = exp(-view.since_s / settings.memory_s)
    return BalanceState(
        arrivals=arrivals,
        wanted=state.wanted,
        factors=factors,
        ready=tuple(stage.ready for stage in view.stages),
        lost=kept * state.lost + lost,
        lived_s=kept * state.lived_s + view.since_s * sum(stage.ready for stage in view.stages),
    )


def _factor(factor: float, stage: StageView, view: PipelineView) -> float:
    """A slow mean; a pass with long contexts or prompts is dearer than planned, and that is not held against it."""
    if isnan(stage.step_s) or stage.batch_tokens < 1.0:
        return factor
    # Contexts are read for sequences that decode; the other tokens are those of prompts.
    context = stage.batch_tokens * _decoding_share(view) * view.context_tokens
    planned_s = pass_s(stage.kind, stage.batch_tokens, context)
    measured = min(max(stage.step_s / planned_s, 0.8), 3.0)
    return factor + 0.1 * (measured - factor)


def _decoding_share(view: PipelineView) -> float:
    """Of all tokens that pass through, those of answers."""
    seen = [mix for mix in view.mixes if mix.finished] or view.mixes
    made = sum(max(1, mix.finished) * mix.output_tokens for mix in seen)
    given = sum(max(1, mix.finished) * mix.input_tokens for mix in seen)
    return made / (made + given) if made > 0.0 else 1.0
