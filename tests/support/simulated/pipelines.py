"""Pipelines of stages for tests: kinds, views and what a stage would report."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Any

from chiron.core.types import PipelineKind, RequestClass, StageKind
from chiron.policies.views import ClassMix, PipelineView, StageView

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.1)


def stage_kind(number: int, *, slope_s: float = 0.0001, base_s: float = 0.005, **changes: Any) -> StageKind:
    """Ten layers; a pass takes ``base_s`` and ``slope_s`` a token."""
    values: dict[str, Any] = {
        "name": f"s{number}",
        "layers": (10 * number, 10 * number + 9),
        "gpu": "a100",
        "price_per_gpu_hour": 2.0,
        "kv_capacity_tokens": 100_000,
        "step_times": tuple((tokens, base_s + slope_s * tokens) for tokens in (1, 64, 512, 2048)),
        **changes,
    }
    return StageKind(**values)


def pipeline_kind(*stages: StageKind, **changes: Any) -> PipelineKind:
    return PipelineKind(stages=stages, **changes)


def stage_view(kind: StageKind, planned: int = 1, **changes: Any) -> StageView:
    values: dict[str, Any] = {
        "kind": kind,
        "planned": planned,
        "ready": planned,
        "starting": 0,
        "draining": 0,
        "utilisation": nan,
        "step_s": nan,
        "batch_tokens": 0.0,
        "waiting": 0.0,
        "kv_used": 0.0,
        "start_s": 30.0,
        **changes,
    }
    return StageView(**values)


def chat_mix(**changes: Any) -> ClassMix:
    values: dict[str, Any] = {
        "cls": CHAT,
        "input_tokens": 500.0,
        "input_square": 400_000.0,
        "output_tokens": 200.0,
        "output_sd": 100.0,
        "finished": 100,
        **changes,
    }
    return ClassMix(**values)


def pipeline_view(stages: Sequence[StageView], **changes: Any) -> PipelineView:
    values: dict[str, Any] = {
        "now_s": 1000.0,
        "since_s": 5.0,
        "model": "m",
        "instance": 1,
        "kind": pipeline_kind(*(stage.kind for stage in stages)),
        "stages": tuple(stages),
        "sample_age_s": 0.2,
        "running": 0,
        "waiting": 0,
        "waiting_interactive": changes.get("waiting", 0),
        "context_tokens": 0.0,
        "arrival_rate": 0.0,
        "batch_due": (),
        "pipelines": 1,
        "mixes": (chat_mix(),),
        **changes,
    }
    return PipelineView(**values)


__all__ = ["CHAT", "chat_mix", "pipeline_kind", "pipeline_view", "stage_kind", "stage_view"]
