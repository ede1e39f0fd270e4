"""``wva-saturation``, ``wva-tokens``: llm-d's Workload Variant Autoscaler, by its two analyzers of saturation.

Every 15 s. ``saturation`` (V1), on the share of KV in use and the queue of each replica, the most of the last minute::

    saturated : kv >= 0.80 or queue >= 5
    spare     : mean over the others of threshold - value; 0 if there are none
    spare kv < 0.1 or spare queue < 3            : one more
    with the load of N on N - 1, neither is so   : one less (two or more must be unsaturated)
    while what was planned is not ready          : nothing

``tokens`` (V2), on tokens of KV::

    demand   = sum over replicas of (in use + queue * mean prompt) + what waits in front (prompts + n * mean answer)
    capacity = median over replicas of min(k1, k2), k1 = 0.8 * KV,
               k2 = in use where queue >= 5, else the mean of the last ten such, else N (I + O / 2),
               N = min(batched tokens * O / (I + O), max_num_seqs)
    more     : ceil((demand / 0.85 - (ready + starting) * capacity) / capacity)
    fewer    : floor((ready * capacity - demand / 0.70) / capacity)

An HPA follows: stabilised over 240 s, at most 10 pods in 150 s.

Sources: llm-d/llm-d-workload-variant-autoscaler, internal/saturation/analyzer.go, internal/engines/analyzers/
saturation_v2, charts. It was deprecated by llm-d in September 2026. It knows no SLO. There is one variant here, so the
cheapest and the dearest are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, floor
from statistics import fmean, median
from typing import Annotated, Literal

from chiron.policies.checks import above, at_least
from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model, held, mixed_plan, scraped
from chiron.policies.rivals.scalers.llmd import Followed, follow
from chiron.policies.views import FleetPlan, FleetView, InstanceView, ModelPlan, ModelView

SHORT_OUTPUT, LONG_OUTPUT = 100.0, 500.0
"""Answers below, between and above are remembered apart (the code's buckets)."""
REMEMBERED = 10
"""Observations of a saturated replica that the mean is over (the code)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WvaSettings:
    analyzer: Literal["saturation", "tokens"] = "saturation"
    kv_threshold: Annotated[float, Between(0.2, 1.0)] = 0.8
    """Share of KV in use above which a replica is saturated (the code's default, as all but the last two)."""
    queue_threshold: float = 5.0
    """Waiting requests, likewise."""
    spare_kv: Annotated[float, Between(0.02, 0.6, log=True)] = 0.1
    """Less spare KV than that, and there is one replica more."""
    spare_queue: Annotated[float, Between(0.5, 20.0, log=True)] = 3.0
    up_at: float = 0.85
    """Share of the capacity that demand may be, with ``tokens``."""
    down_at: float = 0.7
    """Likewise, after a replica less."""
    max_batched_tokens: int = 8192
    """Of a step, from which ``tokens`` takes how many sequences run at once."""
    window_s: float = 60.0
    """The most within it counts."""
    sync_s: float = 15.0
    stabilise_up_s: Annotated[float, Between(15.0, 240.0, log=True)] = 240.0
    """The HPA of the chart, as the next six."""
    stabilise_down_s: Annotated[float, Between(60.0, 900.0, log=True)] = 240.0
    up_pods: int = 10
    up_percent: float = 0.0
    up_period_s: float = 150.0
    down_pods: int = 10
    down_period_s: float = 150.0
    stale_s: float = 30.0
    """A scrape older than this is missing. Our choice."""
    max_num_seqs: int = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "queue_threshold", "window_s", "sync_s", "up_period_s", "down_period_s", "stale_s")
        at_least(1, self, "max_batched_tokens", "max_num_seqs")
        at_least(0, self, "spare_kv", "spare_queue", "stabilise_up_s", "stabilise_down_s", "up_percent")
        at_least(1, self, "up_pods", "down_pods")
        if not 0 < self.kv_threshold <= 1:
            raise ValueError(f"kv_threshold is {self.kv_threshold}; it must be above 0 and at most 1")
        if not 0 < self.down_at < self.up_at <= 1:
            raise ValueError(f"down_at is {self.down_at}; it must be above 0 and below up_at ({self.up_at}), at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class WvaTokensSettings(WvaSettings):
    """By tokens."""

    analyzer: Literal["saturation", "tokens"] = "tokens"
    up_at: Annotated[float, Between(0.3, 1.0)] = 0.85
    down_at: Annotated[float, Between(0.1, 0.95)] = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one model."""

    samples: tuple[tuple[float, int, float, float], ...] = ()
    """(time, replica, share of KV in use, waiting) in the window."""
    full: tuple[tuple[int, float], ...] = ()
    """(bucket of answers, tokens in use) of replicas that were saturated, the last ten of each bucket."""
    followed: Followed = field(default_factory=Followed)


State = dict[str, Memory]


def by_saturation(settings: WvaSettings, loads: Sequence[tuple[float, float]]) -> int:
    """-1, 0 or 1 replicas, from (share of KV in use, waiting) of each."""
    free = [load for load in loads if load[0] < settings.kv_threshold and load[1] < settings.queue_threshold]
    if not _spare(settings, free, 1.0):
        return 1
    if len(free) >= 2 and _spare(settings, free, len(free) / (len(free) - 1)):
        return -1
    return 0


def _spare(settings: WvaSettings, free: Sequence[tuple[float, float]], factor: float) -> bool:
    """Enough is spare with so many times the load."""
    kv = queue = 0.0
    if free:
        kv = settings.kv_threshold - factor * fmean(kv for kv, _ in free)
        queue = settings.queue_threshold - factor * fmean(queue for _, queue in free)
    return kv >= settings.spare_kv and queue >= settings.spare_queue


def by_tokens(settings: WvaSettings, demand: float, capacity: float, *, ready: int, starting: int) -> int:
    """Replicas more or, negative, fewer, for a demand and a replica's capacity in tokens of KV."""
    missing = demand / settings.up_at - (ready + starting) * capacity
    if missing > 0.0:
        return ceil(missing / capacity)
    spare = ready * capacity - demand / settings.down_at
    return -floor(spare / capacity) if spare > 0.0 else 0


def sequence_tokens(settings: WvaSettings, inputs: float, outputs: float) -> float:
    """Tokens of KV of the sequences that a replica can run at once, by lengths alone."""
    count = min(settings.max_batched_tokens * outputs / (inputs + outputs), float(settings.max_num_seqs))
    return count * (inputs + 0.5 * outputs)


def decide_fleet(settings: WvaSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself."""
    return each_model(_decide_model, Memory, settings, state, view)


def _decide_model(settings: WvaSettings, memory: Memory, model: ModelView, now_s: float) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    fresh = scraped(model, settings.stale_s)
    if fresh is None:
        return held(model), memory
    now = tuple((now_s, i.id, i.kv_used_tokens / i.kv_capacity_tokens, float(i.waiting)) for i in fresh)
    samples = (*(s for s in memory.samples if s[0] > now_s - settings.window_s), *now)
    loads = {i.id: _most(samples, i.id) for i in fresh}
    if settings.analyzer == "saturation":
        numbers: dict[str, float] = {}
        full = memory.full
        change = by_saturation(settings, list(loads.values())) if model.count("ready") == current else 0
    else:
        change, full, numbers = _by_tokens(settings, memory, model, fresh, loads)
    wanted = min(max(current + change, model.min_instances, 1), model.max_instances)
    bounds = (max(model.min_instances, 1), model.max_instances)
    count, followed = follow(settings, memory.followed, current, wanted, bounds, now_s)
    if count != current:
        reason = "little_is_spare" if count > current else "much_is_spare"
    else:
        reason = "steady" if wanted == current else "stabilise"
    numbers = {**numbers, "wanted": float(wanted)}
    return mixed_plan(count, reason, numbers), Memory(samples=samples, full=full, followed=followed)


def _most(samples: Sequence[tuple[float, int, float, float]], id: int) -> tuple[float, float]:
    mine = [sample for sample in samples if sample[1] == id]
    return max(kv for _, _, kv, _ in mine), max(waiting for *_, waiting in mine)


def _by_tokens(
    settings: WvaSettings,
    memory: Memory,
    model: ModelView,
    fresh: Sequence[InstanceView],
    loads: dict[int, tuple[float, float]],
) -> tuple[int, tuple[tuple[int, float], ...], dict[str, float]]:
    inputs, outputs = _lengths(model)
    bucket = (outputs >= SHORT_OUTPUT) + (outputs >= LONG_OUTPUT)
    full = memory.full
    demand = model.waiting_input_tokens + model.waiting_interactive * outputs
    for one in fresh:
        kv, queue = loads[one.id]
        used = kv * one.kv_capacity_tokens
        demand += used + queue * inputs
        if queue >= settings.queue_threshold:
            full = (*full, (bucket, used))
    full = tuple(entry for which in range(3) for entry in [e for e in full if e[0] == which][-REMEMBERED:])
    seen = [used for which, used in full if which == bucket]
    usual = fmean(seen) if seen else sequence_tokens(settings, inputs, outputs)

    def capacity(one: InstanceView) -> float:
        kv, queue = loads[one.id]
        by_compute = kv * one.kv_capacity_tokens if queue >= settings.queue_threshold else usual
        return max(1.0, min(settings.kv_threshold * one.kv_capacity_tokens, by_compute))

    each = median(capacity(one) for one in fresh)
    change = by_tokens(settings, demand, each, ready=model.count("ready"), starting=model.count("starting"))
    return change, full, {"demand": demand, "capacity": each}


def _lengths(model: ModelView) -> tuple[float, float]:
    """Mean prompt and answer of what has run; of all classes alike before anything has."""
    mixes = [mix for mix in model.mixes if mix.finished] or list(model.mixes)
    weights = [max(1, mix.finished) for mix in mixes]
    inputs = sum(w * mix.input_tokens for w, mix in zip(weights, mixes, strict=True)) / sum(weights)
    outputs = sum(w * mix.output_tokens for w, mix in zip(weights, mixes, strict=True)) / sum(weights)
    return max(1.0, inputs), max(1.0, outputs)


def make_wva(settings: WvaSettings) -> Policy:
    return Policy(
        name=f"wva-{settings.analyzer}",
        settings=settings,
        fleet=decide_fleet,
        fleet_period_s=settings.sync_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
