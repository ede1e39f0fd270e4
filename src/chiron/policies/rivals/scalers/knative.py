"""``knative-kpa``: the Knative pod autoscaler, on requests in flight.

Every 2 s, over the requests in flight on all pods and those that wait for one, averaged over a stable window of 60 s
and a panic window of 6 s::

    pods(window) = ceil(average / (target * utilisation)), within floor(ready / 2) .. ceil(1000 * ready)
    panic        : begins when pods(panic window), unbounded, is twice the ready pods or more; ends when that has not
                   been so for a stable window. Meanwhile the most that either window has asked for, never less
    else         : pods(stable window), and the most of that within ``scale_down_delay_s``
    zero         : where bounds allow it, once nothing has been in flight for a stable window and the grace period

Sources: knative/serving, pkg/autoscaler/scaling/autoscaler.go and config/core/configmaps/autoscaler.yaml. It knows no
SLO. Knative puts its own queue in front of each pod; here requests go to the instance with the fewest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor, inf
from typing import Annotated

from chiron.policies.checks import above, at_least
from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model
from chiron.policies.views import FleetPlan, FleetView, ModelPlan, ModelView

PANIC_OVER = -inf


@dataclass(frozen=True, slots=True, kw_only=True)
class KnativeSettings:
    target: Annotated[float, Between(2.0, 300.0, log=True)] = 100.0
    """Requests in flight per pod (Knative's default, as all that follow but the last)."""
    utilisation: float = 0.7
    """Share of the target that is aimed at."""
    stable_window_s: Annotated[float, Between(30.0, 600.0, log=True)] = 60.0
    panic_window_share: float = 0.1
    """Panic window over the stable one."""
    panic_threshold: float = 2.0
    """Panic when that many times the ready pods are needed."""
    max_up: float = 1000.0
    """Most ready pods are multiplied with in one decision."""
    max_down: float = 2.0
    """Most they are divided by."""
    scale_down_delay_s: Annotated[float, Between(0.0, 600.0)] = 0.0
    zero_grace_s: float = 30.0
    tick_s: float = 2.0
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "target", "stable_window_s", "panic_threshold", "tick_s", "max_num_seqs")
        for name in ("utilisation", "panic_window_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        above(1, self, "max_up", "max_down")
        at_least(0, self, "scale_down_delay_s", "zero_grace_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the autoscaler remembers of one model."""

    flights: tuple[tuple[float, int], ...] = ()
    """(time, requests in flight) over the stable window."""
    panic_s: float = PANIC_OVER
    """When there was last a reason to panic; ``PANIC_OVER``: there is no panic."""
    panic_pods: int = 0
    """Most that was asked for in this panic."""
    asked: tuple[tuple[float, int], ...] = ()
    """(time, pods) over the delay of scaling down."""
    idle_since_s: float = inf
    """Since when no pod is asked for."""


State = dict[str, Memory]


def decide_fleet(settings: KnativeSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself: one autoscaler each."""
    return each_model(_decide_model, Memory, settings, state, view)


def desired_pods(
    settings: KnativeSettings, memory: Memory, *, stable: float, panic: float, ready: int, now_s: float
) -> tuple[int, Memory]:
    """Pods for these averages, before bounds and zero."""
    pods = max(1, ready)
    target = settings.target * settings.utilisation
    least, most = floor(pods / settings.max_down), ceil(settings.max_up * pods)
    by_panic = ceil(panic / target)
    by_stable = min(max(ceil(stable / target), least), most)
    if by_panic / pods >= settings.panic_threshold:
        memory = replace(memory, panic_s=now_s)
    elif now_s - memory.panic_s > settings.stable_window_s:
        memory = replace(memory, panic_s=PANIC_OVER, panic_pods=0)
    count = by_stable
    if memory.panic_s != PANIC_OVER:
        count = max(by_stable, min(max(by_panic, least), most), memory.panic_pods)
        memory = replace(memory, panic_pods=count)
    asked = (*(a for a in memory.asked if a[0] > now_s - settings.scale_down_delay_s), (now_s, count))
    return max(pods for _, pods in asked), replace(memory, asked=asked)


def _decide_model(
    settings: KnativeSettings, memory: Memory, model: ModelView, now_s: float
) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    flight = model.waiting_interactive + sum(instance.dispatched for instance in model.instances)
    began_s = now_s - settings.stable_window_s
    memory = replace(memory, flights=(*(f for f in memory.flights if f[0] > began_s), (now_s, flight)))
    stable = _average(memory, began_s)
    panic = _average(memory, now_s - settings.panic_window_share * settings.stable_window_s)
    asked, memory = desired_pods(settings, memory, stable=stable, panic=panic, ready=model.count("ready"), now_s=now_s)
    memory = replace(memory, idle_since_s=min(memory.idle_since_s, now_s) if asked == 0 else inf)
    may_be_empty = asked == 0 and (current == 0 or now_s - memory.idle_since_s >= settings.zero_grace_s)
    count = min(max(asked, model.min_instances, 0 if may_be_empty else 1), model.max_instances)
    if memory.panic_s != PANIC_OVER:
        reason = "panic"
    elif count > current:
        reason = "concurrency_above_target"
    else:
        reason = "concurrency_below_target" if count < current else "steady"
    numbers = {"stable": stable, "panic": panic, "asked": float(asked)}
    return ModelPlan(counts={"mixed": count}, reason=reason, numbers=numbers), memory


def _average(memory: Memory, since_s: float) -> float:
    seen = [flight for at_s, flight in memory.flights if at_s > since_s]
    return sum(seen) / len(seen)


def make_knative(settings: KnativeSettings) -> Policy:
    return Policy(
        name="knative-kpa",
        settings=settings,
        fleet=decide_fleet,
        fleet_period_s=settings.tick_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
