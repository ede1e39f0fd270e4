"""``aibrix-optimizer``: AIBrix's GPU optimizer, followed by its autoscaler after Knative's.

Every 10 s, from the requests of the last 240 s, in patterns of like prompts and answers, as far as each has ten::

    load     = requests a second in all, in the window or in the last 10 s, whichever is more, shared out over the
               patterns as they came in the window
    replicas = ceil(sum over patterns: load / requests a second of one instance at that pattern within the SLO)

and, of these numbers over 180 s (stable) and 60 s (panic)::

    pods(window) = ceil(mean / target) out of a tolerance of 0.1 for what there is, within floor(pods / 2) .. 2 * pods
    panic        : while the mean of the panic window is more than twice that of the stable one, and for a stable window
                   after it; meanwhile the most that either has asked for, never less
    else         : pods(stable window)

Sources: vllm-project/aibrix, python/aibrix/aibrix/gpu_optimizer (load_monitor, optimizer) and
samples/autoscaling/optimizer-kpa.yaml (no delay of scaling down). Its optimizer is Melange's, an integer program that
chooses among GPU types by price; of one type it says the sum above. Its table of what an instance does is measured
beforehand by prompt and answer length under one SLO; here it is a share of what the learned step times allow within the
tightest ITL.
Requests go to the instance with the fewest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, inf, log2
from typing import Annotated, Any

from chiron.core.kept import Kept
from chiron.core.types import RequestClass
from chiron.policies.capacity import capacity, work_s
from chiron.policies.checks import above, at_least
from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model, mixed_plan, within_bounds
from chiron.policies.rivals.scalers.past import MOST, pairs, read_by, told_by
from chiron.policies.views import ArrivalView, ClassMix, FleetPlan, FleetView, ModelPlan, ModelView

MOST_CAME = 100_000
"""Entries of a window that are kept for the next run."""
Pattern = tuple[str, float]
"""Class, and log2 of its prompts in tenths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AibrixOptimizerSettings:
    interval_s: float = 10.0
    """Between decisions (AIBrix's default, as all where nothing else is said)."""
    window_s: Annotated[float, Between(60.0, 900.0, log=True)] = 240.0
    """Over which requests are counted."""
    fewest: int = 10
    """Requests of a pattern that counts."""
    target: Annotated[float, Between(0.2, 1.0)] = 1.0
    """Less than 1 leaves headroom: the sample's targetValue, which it says to lower for bursts."""
    utilisation: Annotated[float, Between(0.2, 1.0)] = 0.8
    """Share of what an instance does within the SLO, by its step times, that the table of it has. Ours: AIBrix's is
    measured, so waiting is in it."""
    stable_window_s: float = 180.0
    panic_window_s: float = 60.0
    panic_threshold: float = 2.0
    tolerance: float = 0.1
    rate_up: float = 2.0
    rate_down: float = 2.0
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "interval_s", "target", "utilisation", "panic_window_s", "panic_threshold")
        at_least(0, self, "tolerance")
        at_least(1, self, "fewest", "max_num_seqs")
        above(1, self, "rate_up", "rate_down")
        if not self.interval_s <= self.window_s:
            raise ValueError(f"window_s is {self.window_s}; it must be at least interval_s ({self.interval_s})")
        if not self.panic_window_s <= self.stable_window_s:
            raise ValueError(
                f"panic_window_s is {self.panic_window_s}; it must be at most stable_window_s ({self.stable_window_s})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Came:
    """Requests of one pattern in one second."""

    second: int
    pattern: Pattern
    requests: int
    input_tokens: float
    input_square: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one model."""

    begun_s: float | None = None
    came: tuple[Came, ...] = ()
    """In the window."""
    replicas: tuple[tuple[float, int], ...] = ()
    """(time, what the optimizer said) in the stable window."""
    panic_s: float = -inf
    """When there was last a reason to panic; -inf: there is no panic."""
    panic_pods: int = 0
    """Most that was asked for in this panic."""


State = dict[str, Memory]


def decide_fleet(settings: AibrixOptimizerSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself: one optimizer each."""
    return each_model(_decide_model, Memory, settings, state, view)


def _decide_model(
    settings: AibrixOptimizerSettings, memory: Memory, model: ModelView, now_s: float
) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    begun_s = now_s - settings.interval_s if memory.begun_s is None else memory.begun_s
    new = [_came(arrival) for arrival in model.arrivals if arrival.requests > 0]
    came = tuple(each for each in (*memory.came, *new) if each.second >= now_s - settings.window_s)
    memory = replace(memory, begun_s=begun_s, came=came)
    span_s = min(settings.window_s, max(now_s - begun_s, settings.interval_s))
    rate = requests_per_s(settings, came, span_s, now_s)
    said = optimum(settings, model, came, rate)
    if said is None:
        return mixed_plan(within_bounds(model, current), "too_few_requests"), memory
    kept = tuple(each for each in memory.replicas if each[0] > now_s - settings.stable_window_s)
    memory = replace(memory, replicas=(*kept, (now_s, said)))
    count, memory = followed(settings, memory, max(1, model.count("ready")), now_s)
    count = within_bounds(model, count)
    if memory.panic_s > -inf and count >= current:
        reason = "panic"
    else:
        reason = "optimum_above" if count > current else "optimum_below" if count < current else "steady"
    return mixed_plan(count, reason, {"optimum": float(said), "requests_per_s": rate}), memory


def _came(arrival: ArrivalView) -> Came:
    mean = max(1.0, arrival.input_tokens / arrival.requests)
    return Came(
        second=arrival.second,
        pattern=(arrival.cls.name, round(log2(mean), 1)),
        requests=arrival.requests,
        input_tokens=arrival.input_tokens,
        input_square=arrival.input_square,
    )


def requests_per_s(settings: AibrixOptimizerSettings, came: tuple[Came, ...], span_s: float, now_s: float) -> float:
    """The larger of the mean rate in the window and that since the last decision."""
    current = sum(each.requests for each in came if each.second >= now_s - settings.interval_s)
    return max(sum(each.requests for each in came) / span_s, current / settings.interval_s)


def optimum(settings: AibrixOptimizerSettings, model: ModelView, came: tuple[Came, ...], rate: float) -> int | None:
    """Replicas for so many requests a second, like those of the window; None: of no pattern are there enough."""
    if not came:
        return model.min_instances
    mixes = {mix.cls.name: mix for mix in model.mixes}
    patterns: dict[Pattern, list[Came]] = {}
    for each in came:
        patterns.setdefault(each.pattern, []).append(each)
    counted = {
        pattern: requests
        for pattern, requests in patterns.items()
        if sum(each.requests for each in requests) >= settings.fewest
    }
    covered = sum(each.requests for requests in counted.values() for each in requests)
    if not covered:
        return None
    itl_s = min((mix.cls.itl_s for mix in _used(model) if mix.cls.interactive), default=inf)
    busy = 0.0
    for pattern, requests in sorted(counted.items()):
        number = sum(each.requests for each in requests)
        busy += rate * number / covered / _per_s(settings, model, mixes[pattern[0]], requests, number, itl_s)
    return ceil(busy / settings.utilisation - 1e-9)


def _used(model: ModelView) -> list[ClassMix]:
    return [mix for mix in model.mixes if mix.finished] or list(model.mixes)


def _per_s(
    settings: AibrixOptimizerSettings, model: ModelView, mix: ClassMix, came: list[Came], number: int, itl_s: float
) -> float:
    """Requests a second of this pattern alone that one instance serves within the SLO."""
    alike = replace(
        mix,
        input_tokens=sum(each.input_tokens for each in came) / number,
        input_square=sum(each.input_square for each in came) / number,
    )
    carried = capacity(
        model.step_times,
        [(1.0, alike)],
        itl_target_s=itl_s,
        kv_capacity_tokens=model.kv_capacity_tokens,
        max_num_seqs=min(model.max_num_seqs, settings.max_num_seqs),
    )
    return max(1e-9, carried.work_rate / max(1e-9, work_s(model.step_times, alike)))


def followed(settings: AibrixOptimizerSettings, memory: Memory, pods: int, now_s: float) -> tuple[int, Memory]:
    """Pods that the autoscaler makes of what the optimizer said, from so many that are ready."""
    stable = _mean(memory.replicas, -inf)
    panic = _mean(memory.replicas, now_s - settings.panic_window_s)
    panic_s, panic_pods = memory.panic_s, memory.panic_pods
    if panic > settings.panic_threshold * stable:
        panic_s = now_s
    elif now_s - panic_s > settings.stable_window_s:
        panic_s, panic_pods = -inf, 0
    count = pods_of(settings, stable, pods)
    if panic_s > -inf:
        count = panic_pods = max(count, pods_of(settings, panic, pods), panic_pods)
    return count, replace(memory, panic_s=panic_s, panic_pods=panic_pods)


def _mean(replicas: tuple[tuple[float, int], ...], after_s: float) -> float:
    some = [count for at_s, count in replicas if at_s > after_s]
    return sum(some) / len(some)


def pods_of(settings: AibrixOptimizerSettings, mean: float, pods: int) -> int:
    """For a mean of what the optimizer said, from so many pods."""
    wanted = mean / settings.target
    if abs(wanted / pods - 1.0) <= settings.tolerance:
        return pods
    return min(max(ceil(wanted), floor(pods / settings.rate_down)), ceil(settings.rate_up * pods))


def _told(settings: AibrixOptimizerSettings, memory: Memory, now_s: float) -> dict[str, Any]:
    """The window, by class, and what the optimizer said."""
    came: dict[str, list[list[float]]] = {}
    for each in memory.came:
        ago_s = floor(now_s) - each.second
        row = [ago_s, each.pattern[1], each.requests, each.input_tokens, each.input_square]
        came.setdefault(each.pattern[0], []).append(row)
    return {
        "begun_ago_s": now_s - (now_s if memory.begun_s is None else memory.begun_s),
        "came": came,
        "replicas": [[now_s - at_s, count] for at_s, count in memory.replicas],
        **({"panic_ago_s": now_s - memory.panic_s, "panic_pods": memory.panic_pods} if memory.panic_s > -inf else {}),
    }


def _read(
    settings: AibrixOptimizerSettings, kept: Kept, classes: Sequence[RequestClass], now_s: float
) -> Memory | None:
    if "begun_ago_s" not in kept:
        return None
    told = kept.part("came")
    came = [
        Came(
            second=floor(now_s) - round(ago_s),
            pattern=(cls.name, length),
            requests=round(requests),
            input_tokens=tokens,
            input_square=square,
        )
        for cls in classes
        if cls.name in told
        for ago_s, length, requests, tokens, square in told.rows(cls.name, -1.0, MOST, width=5, most=MOST_CAME) or ()
    ]
    panic_ago_s = kept.number("panic_ago_s", 0.0, settings.stable_window_s) if "panic_ago_s" in kept else None
    return Memory(
        begun_s=now_s - (kept.number("begun_ago_s", 0.0, MOST) or 0.0),
        came=tuple(came),
        replicas=tuple((now_s - ago_s, round(count)) for ago_s, count in pairs(kept, "replicas", MOST_CAME)),
        panic_s=-inf if panic_ago_s is None else now_s - panic_ago_s,
        panic_pods=0 if panic_ago_s is None else kept.whole("panic_pods", 0, 10**6) or 0,
    )


def make_aibrix_optimizer(settings: AibrixOptimizerSettings) -> Policy:
    return Policy(
        name="aibrix-optimizer",
        settings=settings,
        fleet=decide_fleet,
        learned=told_by(_told),
        restore=read_by(_read),
        fleet_period_s=settings.interval_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
