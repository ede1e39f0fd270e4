"""``keda-hpa``: KEDA with a Kubernetes HPA, on requests that wait and requests in flight, as llm-d's guide sets it up.

Each of the two is a metric of type AverageValue, a total over the fleet::

    |1 - total / (target * pods)| <= tolerance keeps the present number;  else ceil(total / target)

and the larger of the two is followed as an HPA follows it (``hpa``): shrink to the most of the last 300 s, grow at once
by at most 100 % in 15 s. KEDA itself takes the last instance away, where bounds allow it, once nothing has waited or
been in flight for the cooldown, and starts one as soon as something waits.

Sources: kedacore/keda and kubernetes (policies and defaults); llm-d/llm-d, guides/workload-autoscaling/keda-epp
(metrics, targets, behaviour). The router of llm-d lets requests wait in front of the engines once these are saturated;
here they are dispatched at once and wait in the engines, so waiting is what these report, and what waits for the first
instance. It knows no SLO.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, inf
from typing import Annotated

from chiron.policies.checks import above, at_least
from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model, mixed_plan
from chiron.policies.rivals.scalers.hpa import Memory as HpaMemory
from chiron.policies.rivals.scalers.hpa import follow
from chiron.policies.views import FleetPlan, FleetView, ModelPlan, ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class KedaSettings:
    waiting_target: Annotated[float, Between(0.1, 20.0, log=True)] = 1.0
    """Waiting requests per pod (llm-d's guide)."""
    running_target: Annotated[float, Between(2.0, 200.0, log=True)] = 16.0
    """Requests in flight per pod (likewise)."""
    sync_s: float = 15.0
    """Between decisions (the HPA's, and the guide's polling interval)."""
    cooldown_s: float = 300.0
    """From the last request to none (KEDA's default, and the guide's)."""
    tolerance: float = 0.1
    """Kubernetes' default."""
    stabilise_up_s: float = 0.0
    """The guide, as the next five; its other overlay has 300."""
    stabilise_down_s: Annotated[float, Between(60.0, 900.0, log=True)] = 300.0
    up_pods: int = 0
    up_percent: float = 100.0
    down_percent: float = 100.0
    rate_period_s: float = 15.0
    stale_s: float = 30.0
    """A metric older than two syncs is missing."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "waiting_target", "running_target", "sync_s", "rate_period_s", "stale_s", "max_num_seqs")
        at_least(0, self, "cooldown_s", "tolerance", "stabilise_up_s", "stabilise_down_s", "up_pods", "up_percent")
        if not 0 <= self.down_percent <= 100:
            raise ValueError(f"down_percent is {self.down_percent}; it must lie in 0..100")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one model."""

    hpa: HpaMemory = field(default_factory=HpaMemory)
    active_s: float = -inf
    """When something last waited or was in flight."""


State = dict[str, Memory]


def wanted_pods(settings: KedaSettings, total: float, target: float, pods: int) -> int:
    """For a metric of type AverageValue."""
    if pods and abs(1.0 - total / (target * pods)) <= settings.tolerance:
        return pods
    return ceil(total / target)


def decide_fleet(settings: KedaSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself: a ScaledObject each."""
    return each_model(_decide_model, lambda: Memory(active_s=view.now_s), settings, state, view)


def _decide_model(settings: KedaSettings, memory: Memory, model: ModelView, now_s: float) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    ready = [i for i in model.instances if i.state == "ready"]
    running = sum(i.dispatched for i in model.instances) + model.waiting_interactive
    waiting = sum(i.waiting for i in ready) + model.waiting_interactive
    numbers = {"waiting": float(waiting), "running": float(running)}
    if running:
        memory = replace(memory, active_s=now_s)
    if current == 0:
        return mixed_plan(1 if running else 0, "activated" if running else "idle", numbers), memory
    if model.min_instances == 0 and now_s - memory.active_s >= settings.cooldown_s:
        return mixed_plan(0, "cooled_down", numbers), memory
    if any(settings.stale_s < i.sample_age_s < inf for i in ready):
        return mixed_plan(current, "metrics_missing", numbers), memory
    wanted = max(
        wanted_pods(settings, waiting, settings.waiting_target, current),
        wanted_pods(settings, running, settings.running_target, current),
    )
    count, hpa = follow(settings, memory.hpa, model, wanted, now_s)
    if count > current:
        reason = "metric_above_target"
    elif count < current:
        reason = "metric_below_target"
    else:
        reason = "steady" if wanted == current else "limited"
    return mixed_plan(count, reason, {**numbers, "wanted": float(wanted)}), replace(memory, hpa=hpa)


def make_keda(settings: KedaSettings) -> Policy:
    return Policy(
        name="keda-hpa",
        settings=settings,
        fleet=decide_fleet,
        fleet_period_s=settings.sync_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
