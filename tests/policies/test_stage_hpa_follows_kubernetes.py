"""``stage-hpa`` is one HorizontalPodAutoscaler for each stage, which knows nothing of the others."""

from __future__ import annotations

from dataclasses import replace
from math import nan

import pytest

from chiron.policies.stages.hpa import StageHpaSettings, decide_stages
from chiron.policies.views import PipelineView
from pipelines import pipeline_view, stage_kind, stage_view


def replicas(settings: StageHpaSettings, view: PipelineView) -> list[int]:
    return [plan.replicas for plan in decide_stages(settings, None, view)[0]]


@pytest.mark.parametrize(
    ("planned", "utilisation", "wanted", "reason"),
    [
        (2, 0.70, 2, "within_tolerance"),
        (2, 0.76, 2, "within_tolerance"),  # 1.086: within a tenth
        (2, 0.78, 3, "metric_above_target"),
        (1, 1.00, 2, "metric_above_target"),
        (2, 0.20, 2, "stabilise_down"),  # It would be 1, once it has lasted for five minutes.
        (2, nan, 2, "metrics_missing"),
    ],
)
def test_a_stage_is_kept_at_its_target(planned: int, utilisation: float, wanted: int, reason: str) -> None:
    view = pipeline_view([stage_view(stage_kind(0), planned, utilisation=utilisation)])
    plan = decide_stages(StageHpaSettings(), None, view)[0][0]
    assert (plan.replicas, plan.reason) == (wanted, reason)


def test_stages_do_not_know_of_each_other() -> None:
    stages = [stage_view(stage_kind(i), utilisation=u) for i, u in enumerate([0.7, 1.0, 0.7])]
    assert replicas(StageHpaSettings(), pipeline_view(stages)) == [1, 2, 1]


def test_it_grows_by_four_pods_or_doubles_in_a_period_and_stays_within_bounds() -> None:
    kind = stage_kind(0, max_replicas=30)
    view = pipeline_view([stage_view(kind, 1, utilisation=0.7 * 20)])
    assert replicas(StageHpaSettings(), view) == [5]
    assert replicas(StageHpaSettings(), pipeline_view([stage_view(kind, 10, utilisation=7.0)])) == [20]
    assert replicas(StageHpaSettings(), pipeline_view([stage_view(kind, 20, utilisation=7.0)])) == [30]


def test_it_shrinks_to_the_most_of_the_last_five_minutes() -> None:
    view = pipeline_view([stage_view(stage_kind(0), 4, utilisation=0.2)])
    state = None
    seen = []
    for k in range(24):
        plans, state = decide_stages(StageHpaSettings(), state, replace(view, now_s=1000.0 + 15.0 * k))
        seen.append(plans[0].replicas)
    assert seen[:20] == [4] * 20
    assert seen[20:] == [2] * 4


def test_a_metric_older_than_two_syncs_is_missing() -> None:
    view = pipeline_view([stage_view(stage_kind(0), utilisation=1.0)], sample_age_s=31.0)
    assert replicas(StageHpaSettings(), view) == [1]


def test_by_queue_who_waits_for_room_waits_for_the_fullest_stage() -> None:
    stages = [stage_view(stage_kind(i), kv_used=kv) for i, kv in enumerate([0.2, 0.9])]
    settings = StageHpaSettings(metric="queue", target=5.0)
    assert replicas(settings, pipeline_view(stages, waiting=10)) == [1, 2]


def test_settings_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="target is 0"):
        StageHpaSettings(target=0)
