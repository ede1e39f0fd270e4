"""``chiron``, global loop: interactive load, its history, and the fleet that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor, inf, sqrt

import numpy as np

from chiron.policies.capacity import Capacity, capacity, decode_s, prefill_s
from chiron.policies.chiron.load_history import LoadHistory, presumed, worth
from chiron.policies.chiron.local_loop import itl_target_s
from chiron.policies.chiron.long_history import (
    QUARTER,
    LongHistory,
    Minutes,
    all_minutes,
    foretold,
    foretold_now,
    nothing_before,
    recurrences,
)
from chiron.policies.chiron.recurrence import (
    LOOK_S,
    Look,
    Recurrence,
    aged,
    looked,
    tried,
)
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.fluid_queue import Floats
from chiron.policies.headroom import (
    CONSTANT,
    Backtest,
    Headroom,
    Question,
    Rule,
    advanced,
    answer,
    followed,
    missed,
    window_mean,
)
from chiron.policies.views import ClassMix, ModelView, TokenBudget


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelMemory:
    """What the global loop remembers of one model."""

    history: LoadHistory
    """Of interactive requests."""
    headroom: Headroom
    backtest_s: float
    """Time of the last backtest."""
    backtest: Backtest | None = None
    """The one under way."""
    long: LongHistory = field(default_factory=lambda: nothing_before(0))
    """What ``history`` no longer knows."""
    recurrence: Recurrence = field(default_factory=Recurrence)
    """Periods of more than half an hour."""
    looks: tuple[tuple[int, Backtest], ...] = ()
    """Backtests under way that tell what each period would save; the first is of none."""
    look_s: float = -inf
    """Time of the last ones."""
    wanted: tuple[tuple[float, int], ...] = ()
    """(time, instances wanted for what may pass) over the hold time."""
    last_change_s: float = -inf
    last_direction: int = 0
    extra: int = 0
    """Instances added for batch deadlines."""
    token_budget: TokenBudget | None = None
    """That instances are started with; None: their kind's."""
    budget_kept_s: float = -inf
    """When it was last no smaller than it had to be."""
    pressure: float = 1.0
    """Grows while SLOs are missed, and decays after."""
    itl_missed: float | None = None
    """Share of requests that missed their ITL SLO over the last minutes; None: nothing is known yet."""
    itl_missed_lasting: float = 0.0
    """The same, from none at the start: it takes minutes of misses to raise it."""
    spare_trust: float = 0.0
    """Batch work released to spare capacity over that capacity, as measured; 0: not yet."""
    batch_work_s: float = 0.0
    """Queued batch work at the last tick, and the spare capacity and batch instances that then stood against it."""
    batch_spare: float = 0.0
    batch_own: float = 0.0
    batch_apart: float = 0.0
    """Instances without interactive work that queued batch work would fill until it is due; 0 where it runs about as
    well beside interactive requests."""
    risk_until_s: float = -inf
    """Deadline of the last request group that was at risk: until it is done or due, batch work goes before interactive
    requests that are lost."""
    apart_missed_s: float = -inf
    """When interactive requests last missed their ITL SLO so often that none is kept free for batch work."""

    @property
    def load(self) -> Floats:
        """Instances' worth of interactive work that arrived in each second remembered."""
        return self.history.load

    @property
    def counts(self) -> Floats:
        """Interactive requests by class and second, shape (classes, seconds)."""
        return self.history.counts


def _interactive(model: ModelView) -> list[ClassMix]:
    return [m for m in model.mixes if m.cls.interactive]


def interactive_capacity(settings: ChironSettings, model: ModelView, memory: ModelMemory) -> Capacity:
    """One instance's capacity for the interactive mix of the last two minutes."""
    weighted = weighted_mixes(model, memory)
    return capacity(
        model.step_times,
        weighted,
        itl_target_s=itl_target_s(settings, tightest_itl_s(weighted), model.itl_missed, model.step_times.fixed_s),
        kv_capacity_tokens=model.kv_capacity_tokens,
        max_num_seqs=model.max_num_seqs,
    )


def weighted_mixes(model: ModelView, memory: ModelMemory) -> list[tuple[float, ClassMix]]:
    """The interactive classes by how many of their requests came in the last two minutes."""
    mixes = _interactive(model)
    rates = memory.counts[:, -120:].sum(axis=1).tolist() if memory.counts.shape[1] else [0.0] * len(mixes)
    return [(rate + 1e-6, mix) for rate, mix in zip(rates, mixes, strict=True)]


def tightest_itl_s(weighted: Sequence[tuple[float, ClassMix]]) -> float:
    """The tightest of those that come at all."""
    every = min((m.cls.itl_s for _, m in weighted), default=inf)
    return min((m.cls.itl_s for rate, m in weighted if rate >= 1.0), default=every)


_REACH = 1.3
"""Times the busiest minute of the last hour: where awake and sleeping instances are as many, no cold start is due."""


def start_s(settings: ChironSettings, memory: ModelMemory, model: ModelView) -> float:
    """What the next starts will take, as measured by source: a wake while the sleepers will do, else what weights from
    an instance that is ready take, else a cold start."""
    measured = model.start_s
    awake = model.count("ready", "starting")
    if settings.sleepers and model.asleep and "memory" in measured:
        busiest = followed(memory.load, Rule(window_s=60, settle_s=settings.memory_s), settings.tick_s)
        if awake + model.asleep >= _REACH * busiest:
            return measured["memory"]
    if "peer" in measured:
        return measured["peer"] if model.count("ready") else measured.get("node", model.cold_start_s)
    return model.cold_start_s


FIRST_RULE = Rule(window_s=60, settle_s=600)
"""In force until there was a backtest."""


def first_memory(settings: ChironSettings, model: ModelView, now_s: float) -> ModelMemory:
    """Before anything is known, the fleet that was found is taken as right for its load: none for none, where a model
    may have no instance and nobody has asked for it."""
    seconds = settings.prior_s
    found = model.count("ready", "starting")
    instances = found if model.min_instances == 0 and not model.arrivals else max(1, found)
    return ModelMemory(
        history=presumed(
            floor(now_s) - seconds, np.full(seconds, settings.prior_load * instances), len(_interactive(model))
        ),
        headroom=Headroom(rule=FIRST_RULE, h=settings.headroom_prior, instances=float(instances)),
        backtest_s=now_s,
        long=nothing_before(seconds),
        look_s=now_s,
    )


def begun(settings: ChironSettings, memory: ModelMemory | None, model: ModelView, now_s: float) -> ModelMemory:
    """What is known of a model at a tick; of the last hour it may be nothing."""
    if memory is not None and memory.history.seconds:
        return memory
    first = first_memory(settings, model, now_s)
    if memory is None:
        return first
    return replace(first, long=replace(memory.long, known_s=first.long.known_s), recurrence=memory.recurrence)


def remember(settings: ChironSettings, memory: ModelMemory, model: ModelView, now_s: float, rate: float) -> ModelMemory:
    """Append the seconds since the last tick, and take back what arrived before and never ran."""
    history = memory.history
    mixes = _interactive(model)
    seconds = floor(now_s) - round(history.began_s) - history.seconds
    worths = worth(model.step_times, [m.output_tokens for m in mixes], rate)
    history = history.after(seconds, worths, model.arrivals, [m.cls.name for m in mixes])
    left = history.load[: max(0, history.seconds - settings.memory_s)]
    long = memory.long.after(left, _slack_s(settings, model)) if len(left) else memory.long
    return replace(memory, history=history.last(settings.memory_s), long=long)


def backtested(settings: ChironSettings, memory: ModelMemory, model: ModelView, now_s: float) -> ModelMemory:
    """Choose the rule anew, once there is something to learn from: asked at one tick, adopted at the next at which the
    computation is over. If nothing has been done about it by then, nobody prepares, and it is done at once."""
    backtest = memory.backtest
    if backtest is not None:
        if backtest.steps and not backtest.done:
            return memory
        return replace(_adopted(settings, memory, answer(backtest)), backtest=None)
    if memory.looks:
        if any(look.steps for _, look in memory.looks) and not all(look.done for _, look in memory.looks):
            return memory
        return replace(memory, looks=(), recurrence=_judged(settings, memory, model.max_instances))
    if not _asks(settings, memory, now_s):
        return memory
    question = Question(
        load=memory.load,
        counts=memory.counts,
        slack_s=tuple(_slacks_s(settings, model)),
        rules=(CONSTANT, *(Rule(window_s=w, settle_s=s) for w in settings.windows_s for s in settings.settles_s)),
        cold_start_s=model.cold_start_s if settings.look_ahead else 0.0,
        tick_s=settings.tick_s,
        miss_max=late_max(settings, memory),
        floor=model.min_instances,
        ceiling=model.max_instances,
        current=memory.headroom.rule,
        periods=settings.look_back,
    )
    period_s = memory.recurrence.period_s
    if period_s:
        minutes = _minutes(settings, memory, model)
        question = replace(question, foretold=_foretold(settings, memory, model, minutes, period_s))
    memory = replace(memory, backtest=Backtest(question=question), backtest_s=now_s)
    if settings.look_back and now_s - memory.look_s >= LOOK_S:
        known = aged(memory.recurrence, now_s - memory.look_s)
        memory = replace(memory, look_s=now_s, recurrence=known, looks=_looks(settings, memory, model, question))
    return memory


def _minutes(settings: ChironSettings, memory: ModelMemory, model: ModelView) -> Minutes:
    return all_minutes(memory.long, memory.load, _slack_s(settings, model))


def _lead_s(settings: ChironSettings, model: ModelView) -> float:
    return model.cold_start_s + settings.tick_s


def _foretold(
    settings: ChironSettings, memory: ModelMemory, model: ModelView, minutes: Minutes, period_s: int
) -> Floats:
    return foretold(minutes, period_s, _lead_s(settings, model), len(memory.load))


def _looks(
    settings: ChironSettings, memory: ModelMemory, model: ModelView, question: Question
) -> tuple[tuple[int, Backtest], ...]:
    """What is to be computed to judge the periods; nothing if there are none."""
    minutes = _minutes(settings, memory, model)
    exact = len(minutes.means) - memory.long.quarters.shape[1] * QUARTER
    periods = tried(recurrences(minutes, exact), memory.recurrence)
    plain = replace(question, periods=False, current=None, foretold=None)
    told = {period: _foretold(settings, memory, model, minutes, period) for period in periods}
    # Only where a period says anything of the last hour can it make a difference.
    asked = [(0, plain), *((p, replace(plain, foretold=f)) for p, f in told.items() if f.any())]
    return tuple((p, Backtest(question=q)) for p, q in asked) if len(asked) > 1 else ()


def _judged(settings: ChironSettings, memory: ModelMemory, most: int) -> Recurrence:
    """No headroom that was tried being enough counts as the largest fleet."""
    found: dict[int, Look] = {}
    before = {record.period_s: record.found for record in memory.recurrence.records}
    for period_s, backtest in memory.looks:
        headroom, earlier = answer(backtest), before.get(period_s)
        late, requests = missed(backtest.question, earlier, round(LOOK_S)) if earlier is not None else (0.0, 0.0)
        cost = min(headroom.instances, float(most))
        found[period_s] = Look(found=headroom, instances=cost, missed=late, requests=requests)
    return looked(memory.recurrence, found, late_max(settings, memory))


def recurring_to(settings: ChironSettings, memory: ModelMemory, model: ModelView) -> float:
    """Instances that the period in force foretells for when one asked for now is up; 0: there is none."""
    period_s = memory.recurrence.period_s
    if not period_s:
        return 0.0
    slack_s = _slack_s(settings, model)
    return foretold_now(memory.long, memory.load, slack_s, period_s, _lead_s(settings, model))


ITL_MISSED_S = 600.0
"""Over which the share of missed ITL SLOs is averaged."""
STEPS_AT_ONCE = 5
"""Of a backtest, in one call between ticks: less than a millisecond."""


def prepared(memories: Mapping[str, ModelMemory]) -> dict[str, ModelMemory] | None:
    """The backtests that are under way, a few steps on; None: there is nothing left to do."""
    for name, memory in memories.items():
        if memory.backtest is not None and not memory.backtest.done:
            return {**memories, name: replace(memory, backtest=advanced(memory.backtest, STEPS_AT_ONCE))}
    for name, memory in memories.items():
        for number, (period_s, look) in enumerate(memory.looks):
            if not look.done:
                looks = list(memory.looks)
                looks[number] = period_s, advanced(look, STEPS_AT_ONCE)
                return {**memories, name: replace(memory, looks=tuple(looks))}
    return None


def seen_s(settings: ChironSettings, memory: ModelMemory) -> float:
    """How much of the history is traffic that was seen."""
    seconds = memory.load.shape[0]
    return seconds - settings.prior_s if seconds < settings.memory_s else inf


def headroom_now(settings: ChironSettings, memory: ModelMemory) -> float:
    """What the rule in force is multiplied by. Before the first backtest it falls from ``headroom_prior``: of ``n``
    stretches that are alike the next is the busiest with a chance of one in ``n`` + 1."""
    headroom = memory.headroom
    known = not settings.adapt_headroom or headroom.rule != FIRST_RULE or headroom.h != settings.headroom_prior
    if known or settings.prior_steady_s <= 0.0:
        return headroom.h
    came = np.flatnonzero(memory.counts.any(axis=0))
    seen = memory.history.seconds - int(came[0]) if len(came) else 0
    return 1.0 + (headroom.h - 1.0) / sqrt(max(1.0, seen / settings.prior_steady_s))


def _asks(settings: ChironSettings, memory: ModelMemory, now_s: float) -> bool:
    """Whether it is time for a backtest."""
    due = now_s - memory.backtest_s >= settings.backtest_s
    learned = seen_s(settings, memory) >= settings.learning_s
    return settings.adapt_headroom and learned and due and bool(memory.counts.any())


def _adopted(settings: ChironSettings, memory: ModelMemory, headroom: Headroom) -> ModelMemory:
    # An hour shows rare bursts that ten minutes do not.
    unseen = 1.0 - min(1.0, seen_s(settings, memory) / settings.memory_s)
    margin = 1.0 + settings.margin + settings.margin_unseen * unseen
    h = headroom.h * margin
    if headroom.rule == CONSTANT:
        h = float(round(h))  # Whole instances already: rounding a small margin up would double a fleet of one.
    return replace(memory, headroom=replace(headroom, h=h))


def _slacks_s(settings: ChironSettings, model: ModelView) -> list[float]:
    """How long the requests of each interactive class can wait."""
    times = model.step_times
    return [
        max(0.5, settings.slack_share * (m.cls.ttft_s - prefill_s(times, m.input_tokens, m.input_square)))
        for m in _interactive(model)
    ]


def _slack_s(settings: ChironSettings, model: ModelView) -> float:
    """Of the class that can wait least."""
    return min(_slacks_s(settings, model), default=1.0)


def surging_to(settings: ChironSettings, memory: ModelMemory, model: ModelView, serving: Capacity) -> float:
    """Instances that a queue asks for: what carries the load that comes now, and clears the queue by the time a new
    instance is up. 0 while no request waits.

    "Now" is as long as a start takes: a burst that has lasted so long is worth one, as who knows nothing of the end
    of a thing should buy once renting has cost as much (ski rental). At most a minute.
    """
    if model.waiting_interactive == 0:
        return 0.0
    window_s = max(1, int(min(max(model.cold_start_s, settings.tick_s), 60.0)))
    spike = _spike(settings, memory, model)
    outputs = [m.output_tokens for m in model.mixes if m.cls.interactive]
    context = model.waiting_input_tokens / model.waiting_interactive
    work = prefill_s(model.step_times, model.waiting_input_tokens, model.waiting_input_square)
    work += model.waiting_interactive * decode_s(model.step_times, context, sum(outputs) / len(outputs))
    queued = work / serving.work_rate / (settings.tick_s + model.cold_start_s)
    return max(window_mean(memory.load, window_s) + queued, spike)


_SPIKE_S = 10
_SPIKE_OVER = 1.3
_SPIKE_MOST = 3.0


def _spike(settings: ChironSettings, memory: ModelMemory, model: ModelView) -> float:
    """Instances for a spike that nothing announced, 0 if there is none. What the last ten seconds brought is as little
    to go by as it is to wait for: by the time that an instance planned now is up, the queue would be longer than
    requests can bear, several times over. At most thrice the busiest minute of the last ten, because ten seconds of
    bursty traffic show anything."""
    now = window_mean(memory.load, _SPIKE_S)
    ready = max(1, model.count("ready"))
    if not settings.surge_slack:
        return 0.0
    slack_s = min(_slacks_s(settings, model), default=0.0)
    if (now - ready) * (model.cold_start_s + settings.tick_s) <= settings.surge_slack * slack_s * ready:
        return 0.0
    busiest = followed(memory.load[:-_SPIKE_S], Rule(window_s=60, settle_s=600), settings.tick_s)
    return _SPIKE_OVER * min(now, _SPIKE_MOST * busiest)


def late_max(settings: ChironSettings, memory: ModelMemory) -> float:
    """Share of the requests that may wait for too long: what those leave that miss their ITL SLO anyway."""
    return max(settings.miss_max / 4.0, settings.miss_max - (memory.itl_missed or 0.0))


def with_itl_missed(settings: ChironSettings, memory: ModelMemory, model: ModelView) -> ModelMemory:
    """The model's own share is one of some hundred requests, which is no more than a few that missed."""
    before = model.itl_missed if memory.itl_missed is None else memory.itl_missed
    weight = min(1.0, settings.tick_s / ITL_MISSED_S)
    lasting = memory.itl_missed_lasting + weight * (model.itl_missed - memory.itl_missed_lasting)
    return replace(memory, itl_missed=before + weight * (model.itl_missed - before), itl_missed_lasting=lasting)


def pressure(before: float, model: ModelView) -> float:
    """Missed SLOs raise the headroom; met ones let it decay."""
    ended = model.attained + model.missed
    if ended == 0:
        return before
    if model.missed > 0.01 * ended:
        return min(1.25, before + 0.01)
    return max(1.0, before - 0.002)


def whole(instances: float) -> int:
    """Whole instances, forgiving a twentieth of one."""
    return max(0, ceil(instances - 0.05))
