"""``stage-hpa``: a Kubernetes HorizontalPodAutoscaler on each stage, as arXiv 2507.18007 has it.

The algorithm is that of ``policies.rivals.scalers.hpa`` (``autoscaling/v2`` with its default behaviour), with a memory
of its own for each stage and no word between them. The metric is the share of the time that a stage's replicas work, or
the sequences that wait for it. The paper gives no thresholds, metrics or bounds: those here are Kubernetes' defaults,
and a target of 0.7, which is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from typing import Literal

from chiron.policies.rivals.scalers.hpa import HpaBehaviour, Memory, desired_pods, follow_within, require_above_0
from chiron.policies.views import PipelineView, StagePlan, StageView


@dataclass(frozen=True, slots=True, kw_only=True)
class StageHpaSettings(HpaBehaviour):
    metric: Literal["utilisation", "queue"] = "utilisation"
    """Share of the time that a stage's replicas work, or sequences that wait for each of them."""
    target: float = 0.7
    """Mean that each stage is kept at. Of our choice: the paper names none."""

    def __post_init__(self) -> None:
        HpaBehaviour.__post_init__(self)
        require_above_0(self, "target")


Memories = tuple[Memory, ...]


def decide_stages(
    settings: StageHpaSettings, state: Memories | None, view: PipelineView
) -> tuple[tuple[StagePlan, ...], Memories]:
    """Every stage by itself: one autoscaler each."""
    memories = state or tuple(Memory() for _ in view.stages)
    decided = [_decide(settings, memory, stage, view) for memory, stage in zip(memories, view.stages, strict=True)]
    return tuple(plan for plan, _ in decided), tuple(memory for _, memory in decided)


def _decide(
    settings: StageHpaSettings, memory: Memory, stage: StageView, view: PipelineView
) -> tuple[StagePlan, Memory]:
    current = stage.planned
    metric = _metric(settings, stage, view)
    fresh = view.sample_age_s <= settings.stale_s and not isnan(metric)
    # A Pods metric is one value for each pod; of a stage only their mean is known.
    metrics = [metric] * stage.ready if fresh else []
    wanted = desired_pods(settings, metrics, missing=0, unready=stage.starting, current=current)
    if wanted is None:
        return StagePlan(replicas=current, reason="metrics_missing"), memory
    count, memory = follow_within(
        settings, memory, current, wanted, (stage.kind.min_replicas, stage.kind.max_replicas), view.now_s
    )
    numbers = {"metric": metric, "target": settings.target, "wanted": float(wanted)}
    return StagePlan(replicas=count, reason=_reason(count, wanted, current), numbers=numbers), memory


def _metric(settings: StageHpaSettings, stage: StageView, view: PipelineView) -> float:
    if settings.metric == "utilisation":
        return stage.utilisation
    # Whoever waits for room waits for the stage that has least of it.
    fullest = max(each.kv_used for each in view.stages)
    in_front = view.waiting if stage.kv_used == fullest else 0
    return (stage.waiting + in_front) / max(1, stage.ready)


def _reason(count: int, wanted: int, current: int) -> str:
    if count > current:
        return "metric_above_target"
    if count < current:
        return "metric_below_target"
    if wanted < current:
        return "stabilise_down"
    return "limited" if wanted > current else "within_tolerance"
