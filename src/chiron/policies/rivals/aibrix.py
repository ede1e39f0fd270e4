"""``aibrix-apa``: AIBrix's own pod autoscaler, on the share of KV in use and on waiting requests, as its sample has it.

Every 10 s, for each metric, over its mean over pods in a window of 30 s; the larger number counts::

    u = mean / target
    u > 1 + tolerance up   : min(ceil(pods * u), ceil(rate up * pods))
    u < 1 - tolerance down : max(ceil(pods * u), floor(pods / rate down))
    else                   : pods

A rise is taken at once. A fall is stabilised over 300 s, by the *least* that was wanted meanwhile, as its code has it:
where Kubernetes takes the most, and so holds a fleet, this hurries.

Sources: vllm-project/aibrix, pkg/controller/podautoscaler (rules and defaults), samples/autoscaling/
multimetrics-apa.yaml (metrics, targets, window, tolerances). It knows no SLO. Requests go to the instance with the
fewest.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, inf

from chiron.policies.policy import Policy
from chiron.policies.views import FleetPlan, FleetView, ModelPlan, ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class AibrixSettings:
    kv_target: float = 0.5
    """Share of KV in use (AIBrix's sample, as the next four)."""
    waiting_target: float = 100.0
    """Waiting requests per pod."""
    window_s: float = 30.0
    """Of the means; the code's default is 180."""
    tolerance_up: float = 0.1
    tolerance_down: float = 0.2
    """The code's default is 0.1."""
    rate_up: float = 2.0
    """AIBrix's default, as the next three."""
    rate_down: float = 2.0
    stabilise_down_s: float = 300.0
    sync_s: float = 10.0
    stale_s: float = 30.0
    """A metric older than this is missing. Our choice."""
    max_num_seqs: int = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        for name in ("kv_target", "waiting_target", "window_s", "sync_s", "stale_s", "max_num_seqs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("tolerance_up", "tolerance_down", "stabilise_down_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("rate_up", "rate_down"):
            if not getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the autoscaler remembers of one model."""

    means: tuple[tuple[float, float, float], ...] = ()
    """(time, mean share of KV, mean waiting) in the window."""
    wanted: tuple[tuple[float, int], ...] = ()
    """(time, pods) over the time of stabilising."""


State = dict[str, Memory]


def desired_pods(settings: AibrixSettings, mean: float, target: float, pods: int) -> int:
    use = mean / target
    if use > 1.0 + settings.tolerance_up:
        return min(ceil(pods * use), ceil(settings.rate_up * pods))
    if use < 1.0 - settings.tolerance_down:
        return max(ceil(pods * use), floor(pods / settings.rate_down))
    return pods


def decide_fleet(settings: AibrixSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself: one autoscaler each."""
    state = state or {}
    plans: dict[str, ModelPlan] = {}
    memories: State = {}
    for model in view.models:
        memory = state.get(model.name) or Memory()
        plans[model.name], memories[model.name] = _decide_model(settings, memory, model, view.now_s)
    return plans, memories


def _decide_model(settings: AibrixSettings, memory: Memory, model: ModelView, now_s: float) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    ready = [i for i in model.instances if i.state == "ready"]
    fresh = [i for i in ready if i.sample_age_s <= settings.stale_s]
    # One that has just come up and was not scraped yet is not counted; one whose scrapes stopped is unknown.
    if not fresh or any(settings.stale_s < i.sample_age_s < inf for i in ready):
        return _plan(max(current, 1 if model.waiting_interactive else 0), "metrics_missing", {}), memory
    now = (
        now_s,
        sum(i.kv_used_tokens / i.kv_capacity_tokens for i in fresh) / len(fresh),
        sum(i.waiting for i in fresh) / len(fresh),
    )
    means = (*(m for m in memory.means if m[0] > now_s - settings.window_s), now)
    kv, waiting = (sum(m[column] for m in means) / len(means) for column in (1, 2))
    last = max(
        desired_pods(settings, kv, settings.kv_target, current),
        desired_pods(settings, waiting, settings.waiting_target, current),
    )
    wanted = (*(w for w in memory.wanted if w[0] > now_s - settings.stabilise_down_s), (now_s, last))
    settled = min(n for _, n in wanted) if last < current else last
    count = min(max(settled, model.min_instances, 1), model.max_instances)
    reason = "metric_above_target" if count > current else "metric_below_target" if count < current else "steady"
    numbers = {"kv": kv, "waiting": waiting, "wanted": float(last)}
    return _plan(count, reason, numbers), Memory(means=means, wanted=wanted)


def _plan(count: int, reason: str, numbers: dict[str, float]) -> ModelPlan:
    return ModelPlan(counts={"mixed": count}, reason=reason, numbers=numbers)


def make_aibrix(settings: AibrixSettings) -> Policy:
    return Policy(
        name="aibrix-apa",
        settings=settings,
        fleet=decide_fleet,
        fleet_period_s=settings.sync_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
