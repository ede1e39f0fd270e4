"""``llm-d-slo``: llm-d's scaling on latency against SLOs, a KEDA formula followed by an HPA.

Every 15 s, with n pods planned, r of them ready, and the worst of two latencies over its SLO::

    s_raw = max(P90 TTFT / TTFT SLO, P90 ITL / ITL SLO);   s = mean over 45 s of min(s_raw, 2)
    s > 0.55 : n + ceil(n (s c / 0.55 - 1)),  c = r / n while some start, else 1
    s < 0.40 : n - floor(n (1 - s / 0.40))
    else     : n

and an HPA that grows by at most max(100 %, 4 pods) in 60 s, to the least of the last 30 s, and shrinks by one pod in
120 s, to the most of the last 180 s.

Source: llm-d/llm-d, guides/workload-autoscaling/README.slo-aware.md. Its latencies are predicted by a model that is
trained online, or measured if there is none. Here they are predicted too, from the learned step times and the last
scrapes: for an instance, TTFT is the prefill of the prompts that wait and of a long one (the mean and 1.28 standard
deviations), or the time until as many slots as requests wait are free, if that is longer; ITL is its mean step. The
90th percentile is over instances, weighted by their requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isnan, sqrt
from typing import Annotated, Protocol

from chiron.policies.capacity import prefill_s
from chiron.policies.checks import above, at_least
from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model, held, mixed_plan, scraped
from chiron.policies.rivals.scalers.hpa import Windows, stabilised
from chiron.policies.views import ClassMix, FleetPlan, FleetView, InstanceView, ModelPlan, ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmdSloSettings:
    up_at: Annotated[float, Between(0.05, 1.5, log=True)] = 0.55
    """Latency over its SLO above which the fleet grows (the guide, as all but the last two)."""
    down_at: Annotated[float, Between(0.02, 1.0, log=True)] = 0.4
    """Below which it shrinks."""
    clamp: float = 2.0
    """Most of one sample."""
    smooth_s: float = 45.0
    """Window of the mean."""
    sync_s: float = 15.0
    stabilise_up_s: float = 30.0
    stabilise_down_s: Annotated[float, Between(60.0, 900.0, log=True)] = 180.0
    up_pods: int = 4
    up_percent: float = 100.0
    up_period_s: float = 60.0
    down_pods: int = 1
    down_period_s: float = 120.0
    stale_s: float = 30.0
    """A scrape older than this is missing. Our choice."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "down_at", "clamp", "smooth_s", "sync_s", "up_period_s", "down_period_s", "stale_s")
        at_least(0, self, "stabilise_up_s", "stabilise_down_s", "up_pods", "up_percent", "down_pods")
        if not self.down_at < self.up_at < self.clamp:
            raise ValueError(
                f"up_at is {self.up_at}; it must lie between down_at ({self.down_at}) and clamp ({self.clamp})"
            )
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs is {self.max_num_seqs}; it must be above 0")


class Behaviour(Windows, Protocol):
    """The settings that say how a recommendation is followed: an HPA with pods and periods for either direction."""

    @property
    def up_pods(self) -> int: ...

    @property
    def up_percent(self) -> float: ...

    @property
    def up_period_s(self) -> float: ...

    @property
    def down_pods(self) -> int: ...

    @property
    def down_period_s(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """What following recommendations needs to remember."""

    wanted: tuple[tuple[float, int], ...] = ()
    """(time, pods) in the windows of stabilising."""
    changes: tuple[tuple[float, int], ...] = ()
    """(time, pods added or, negative, removed) in the periods of the rates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one model."""

    samples: tuple[tuple[float, float], ...] = ()
    """(time, saturation, clamped) in the window of the mean."""
    followed: Followed = field(default_factory=Followed)


State = dict[str, Memory]


def desired_pods(settings: LlmdSloSettings, saturation: float, planned: int, ready: int) -> int:
    if saturation > settings.up_at:
        credit = ready / planned if 0 < ready < planned else 1.0
        # With the credit the formula may ask for less than there is; the guide wants that of the lower branch only.
        return planned + max(0, ceil(planned * (saturation * credit / settings.up_at - 1.0)))
    if saturation < settings.down_at:
        return planned - floor(planned * (1.0 - saturation / settings.down_at))
    return planned


def rate_limited(
    settings: Behaviour, wanted: int, current: int, changes: Sequence[tuple[float, int]], now_s: float
) -> int:
    """``wanted`` as far as the rates allow."""
    up = sum(count for at_s, count in changes if count > 0 and at_s > now_s - settings.up_period_s)
    down = sum(count for at_s, count in changes if count < 0 and at_s > now_s - settings.down_period_s)
    if wanted > current:
        before = current - up
        most = max(before + settings.up_pods, ceil(before * (1.0 + settings.up_percent / 100.0)))
        return min(wanted, max(most, current))
    return max(wanted, min(current - down - settings.down_pods, current))


def follow(
    settings: Behaviour, followed: Followed, current: int, wanted: int, bounds: tuple[int, int], now_s: float
) -> tuple[int, Followed]:
    """What becomes of a number that was recommended: stabilised, limited in its rate, and within bounds."""
    window_s = max(settings.stabilise_up_s, settings.stabilise_down_s)
    # The first recommendation on record is the size that was found.
    history = followed.wanted or ((now_s, current),)
    history = (*(w for w in history if w[0] > now_s - window_s), (now_s, wanted))
    period_s = max(settings.up_period_s, settings.down_period_s)
    changes = tuple(c for c in followed.changes if c[0] > now_s - period_s)
    count = rate_limited(settings, stabilised(settings, history, current, now_s), current, changes, now_s)
    count = min(max(count, bounds[0]), bounds[1])
    if count != current:
        changes = (*changes, (now_s, count - current))
    return count, Followed(wanted=history, changes=changes)


def saturation(model: ModelView, instances: Sequence[InstanceView]) -> float:
    """The worse of two predicted latencies over its SLO: of the tightest interactive classes that are used. 0 without
    requests."""
    mixes = [mix for mix in model.mixes if mix.cls.interactive]
    used = [mix for mix in mixes if mix.finished] or mixes
    if not used:
        return 0.0
    tightest = min(used, key=lambda mix: mix.cls.ttft_s)
    ttfts = [(_ttft_s(model, tightest, one), one.dispatched) for one in instances]
    itls = [(0.0 if isnan(one.itl_s) else one.itl_s, one.dispatched) for one in instances]
    return max(
        quantile(ttfts, 0.9) / tightest.cls.ttft_s,
        quantile(itls, 0.9) / min(mix.cls.itl_s for mix in used),
    )


def _ttft_s(model: ModelView, mix: ClassMix, one: InstanceView) -> float:
    spread = sqrt(max(0.0, mix.input_square - mix.input_tokens**2))
    long = mix.input_tokens + 1.28 * spread
    prefill = prefill_s(model.step_times, one.waiting_tokens + long, long * long)
    itl_s = 0.0 if isnan(one.itl_s) else one.itl_s
    slots_s = one.waiting * mix.output_tokens * itl_s / max(1, one.running)
    return max(prefill, slots_s)


def quantile(values: Sequence[tuple[float, int]], share: float) -> float:
    """The least value that ``share`` of the weight does not exceed; 0 without weight."""
    left = share * sum(weight for _, weight in values)
    if left <= 0.0:
        return 0.0
    for value, weight in sorted(values):
        left -= weight
        if left <= 0.0:
            return value
    return max(value for value, _ in values)


def decide_fleet(settings: LlmdSloSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself: a ScaledObject each."""
    return each_model(_decide_model, Memory, settings, state, view)


def _decide_model(
    settings: LlmdSloSettings, memory: Memory, model: ModelView, now_s: float
) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    fresh = scraped(model, settings.stale_s)
    if fresh is None:
        return held(model), memory
    raw = min(saturation(model, fresh), settings.clamp)
    samples = (*(s for s in memory.samples if s[0] > now_s - settings.smooth_s), (now_s, raw))
    smooth = sum(value for _, value in samples) / len(samples)
    bounds = (max(model.min_instances, 1), model.max_instances)
    wanted = min(max(desired_pods(settings, smooth, current, model.count("ready")), bounds[0]), bounds[1])
    count, followed = follow(settings, memory.followed, current, wanted, bounds, now_s)
    if count > current:
        reason = "latency_above_target"
    elif count < current:
        reason = "latency_below_target"
    else:
        reason = "steady" if wanted == current else "stabilise"
    numbers = {"saturation": smooth, "wanted": float(wanted)}
    return mixed_plan(count, reason, numbers), Memory(samples=samples, followed=followed)


def make_llmd_slo(settings: LlmdSloSettings) -> Policy:
    return Policy(
        name="llm-d-slo",
        settings=settings,
        fleet=decide_fleet,
        fleet_period_s=settings.sync_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
