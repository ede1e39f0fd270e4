"""``hpa-queue``, ``hpa-kv``: the Kubernetes HorizontalPodAutoscaler on one metric averaged over pods.

The algorithm of ``autoscaling/v2`` for a metric of type Pods, with its default behaviour::

    ratio   = mean over ready pods / target;  |1 - ratio| <= tolerance keeps the present number
    desired = ceil(ratio * pods counted)
    missing : a pod whose metric is missing counts as on target when shrinking, as 0 when growing; one that is not
              ready yet counts as 0 when growing; if that flips the direction, keep
    settle  : shrink to the most that was wanted in the last 300 s; grow at once
    rate    : grow by at most max(4 pods, 100 %) in 15 s; shrink by at most 100 % in 15 s
    clamp   : to the model's bounds

The metric is the engine's waiting requests, or the share of its KV in use, as of the last scrape. Requests go to the
instance with the fewest outstanding: kinder than a Kubernetes Service, which picks at random or in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Literal, Protocol

from chiron.policies.checks import at_least
from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model, mixed_plan
from chiron.policies.views import FleetPlan, FleetView, InstanceView, ModelPlan, ModelView


def require_above_0(settings: object, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class HpaBehaviour:
    """How an HPA follows its metric, whatever it scales: Kubernetes' defaults."""

    sync_s: float = 15.0
    """Between decisions (Kubernetes' default, as all that follow)."""
    tolerance: float = 0.1
    stabilise_up_s: float = 0.0
    stabilise_down_s: Annotated[float, Between(60.0, 900.0, log=True)] = 300.0
    up_pods: int = 4
    up_percent: float = 100.0
    down_percent: float = 100.0
    rate_period_s: float = 15.0
    """Period of the three rates above."""
    stale_s: float = 30.0
    """A metric older than two syncs is missing."""

    def __post_init__(self) -> None:
        require_above_0(self, "sync_s", "rate_period_s", "stale_s")
        at_least(0, self, "tolerance", "stabilise_up_s", "stabilise_down_s", "up_pods", "up_percent")
        if not 0 <= self.down_percent <= 100:
            raise ValueError(f"down_percent is {self.down_percent}; it must lie in 0..100")


@dataclass(frozen=True, slots=True, kw_only=True)
class HpaSettings(HpaBehaviour):
    metric: Literal["queue", "kv"] = "queue"
    """Waiting requests per engine, or share of its KV in use."""
    target: Annotated[float, Between(0.05, 20.0, log=True)] = 5.0
    """Mean that the fleet is kept at. 5 waiting requests: the default of the vLLM production stack's chart."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        HpaBehaviour.__post_init__(self)
        require_above_0(self, "target", "max_num_seqs")


@dataclass(frozen=True, slots=True, kw_only=True)
class HpaKvSettings(HpaSettings):
    """On KV usage."""

    metric: Literal["queue", "kv"] = "kv"
    target: Annotated[float, Between(0.01, 0.9, log=True)] = 0.7
    """Share of KV in use: llm-d's guide for pool saturation."""


class Windows(Protocol):
    """The settings of ``HpaSettings`` that say for how long a recommendation counts."""

    @property
    def stabilise_up_s(self) -> float: ...

    @property
    def stabilise_down_s(self) -> float: ...


class Target(Protocol):
    """Those that say what the metric is held against."""

    @property
    def target(self) -> float: ...

    @property
    def tolerance(self) -> float: ...


class Behaviour(Windows, Protocol):
    """Those that say how it is followed."""

    @property
    def up_pods(self) -> int: ...

    @property
    def up_percent(self) -> float: ...

    @property
    def down_percent(self) -> float: ...

    @property
    def rate_period_s(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the autoscaler remembers of one model."""

    wanted: tuple[tuple[float, int], ...] = ()
    """(time, pods wanted before settling) over the longer window."""
    changes: tuple[tuple[float, int], ...] = ()
    """(time, pods added or, negative, removed) within a rate period."""


State = dict[str, Memory]


def desired_pods(settings: Target, metrics: Sequence[float], *, missing: int, unready: int, current: int) -> int | None:
    """Pods wanted for these metrics of ready pods; None: no metric at all, so nothing can be said."""
    if not metrics:
        return None
    total, count = float(sum(metrics)), len(metrics)
    ratio = total / count / settings.target
    growing = ratio > 1.0
    if not missing and not (growing and unready):
        # Written as Kubernetes compares it: a ratio of exactly 1.1 is out of tolerance in floats, one of 0.9 is not.
        return current if abs(1.0 - ratio) <= settings.tolerance else ceil(ratio * count)
    count += missing + (unready if growing else 0)
    total += 0.0 if growing else missing * settings.target
    adjusted = total / count / settings.target
    flipped = adjusted < 1.0 if growing else adjusted > 1.0
    if abs(1.0 - adjusted) <= settings.tolerance or flipped:
        return current
    wanted = ceil(adjusted * count)
    against = wanted < current if adjusted > 1.0 else wanted > current
    return current if against else wanted


def stabilised(settings: Windows, wanted: Sequence[tuple[float, int]], current: int, now_s: float) -> int:
    """The last of ``wanted``, held against rises and falls that did not last."""
    last = wanted[-1][1]
    least = min((n for t, n in wanted if t > now_s - settings.stabilise_up_s), default=last)
    most = max((n for t, n in wanted if t > now_s - settings.stabilise_down_s), default=last)
    return min(max(current, min(last, least)), max(last, most))


def rate_limited(settings: Behaviour, wanted: int, current: int, changes: Sequence[int]) -> int:
    """``wanted`` as far as the rates allow; ``changes`` are those of the last period."""
    before = current - sum(changes)
    if wanted > current:
        limit = max(before + settings.up_pods, ceil(before * (1.0 + settings.up_percent / 100.0)))
        return min(wanted, max(limit, current))
    limit = int(before * (1.0 - settings.down_percent / 100.0))
    return max(wanted, min(limit, current))


def follow(settings: Behaviour, memory: Memory, model: ModelView, wanted: int, now_s: float) -> tuple[int, Memory]:
    """What becomes of a number of instances that the metrics ask for."""
    bounds = (max(model.min_instances, 1), model.max_instances)
    return follow_within(settings, memory, sum(model.planned.values()), wanted, bounds, now_s)


def follow_within(
    settings: Behaviour, memory: Memory, current: int, wanted: int, bounds: tuple[int, int], now_s: float
) -> tuple[int, Memory]:
    """What becomes of a number that the metrics ask for: stabilised, limited in its rate, and within bounds."""
    window_s = max(settings.stabilise_up_s, settings.stabilise_down_s)
    # The first recommendation on record is the size that was found.
    history = memory.wanted or ((now_s, current),)
    history = (*(w for w in history if w[0] > now_s - window_s), (now_s, wanted))
    settled = stabilised(settings, history, current, now_s)
    recent = tuple(c for c in memory.changes if c[0] > now_s - settings.rate_period_s)
    count = rate_limited(settings, settled, current, [change for _, change in recent])
    count = min(max(count, bounds[0]), bounds[1])
    if count != current:
        recent = (*recent, (now_s, count - current))
    return count, Memory(wanted=history, changes=recent)


def decide_fleet(settings: HpaSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself: one autoscaler each."""
    return each_model(_decide_model, Memory, settings, state, view)


def _decide_model(settings: HpaSettings, memory: Memory, model: ModelView, now_s: float) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    ready = [i for i in model.instances if i.state == "ready"]
    fresh = [i for i in ready if i.sample_age_s <= settings.stale_s]
    metrics = [_metric(settings, i) for i in fresh]
    wanted = desired_pods(
        settings, metrics, missing=len(ready) - len(fresh), unready=model.count("starting"), current=current
    )
    if wanted is None:
        return mixed_plan(current, "metrics_missing", {}), memory
    count, memory = follow(settings, memory, model, wanted, now_s)
    mean = sum(metrics) / len(metrics)
    reason = _reason(count, wanted, current)
    plan = mixed_plan(count, reason, {"metric": mean, "target": settings.target, "wanted": float(wanted)})
    return plan, memory


def _metric(settings: HpaSettings, instance: InstanceView) -> float:
    if settings.metric == "queue":
        return float(instance.waiting)
    return instance.kv_used_tokens / instance.kv_capacity_tokens


def _reason(count: int, wanted: int, current: int) -> str:
    if count > current:
        return "metric_above_target"
    if count < current:
        return "metric_below_target"
    if wanted < current:
        return "stabilise_down"
    return "limited" if wanted > current else "within_tolerance"


def make_hpa(settings: HpaSettings) -> Policy:
    return Policy(
        name=f"hpa-{settings.metric}",
        settings=settings,
        fleet=decide_fleet,
        fleet_period_s=settings.sync_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
