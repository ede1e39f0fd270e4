"""From the tables of stages to the pipeline that an instance is, and to the command line that starts it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiron.config.read import ConfigError
from chiron.config.serve_sections import ServeInstanceSection, ServeStageSection
from chiron.core.types import InstanceKind, PipelineKind, StageKind
from chiron.engines.staged.errors import StagedModelError
from chiron.engines.staged.split import StageRange, check_split, read_range
from chiron.engines.staged.weights import ModelFiles, read_model_files

_GUESSED_BYTES_PER_S = 10e9
"""How fast a CPU reads weights: what a step of one token takes at the least, where no plan says it."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def stages_argument(section: ServeInstanceSection) -> str:
    """What the instance's process is told of its stages; empty: it has none."""
    if not section.stages:
        return ""
    return json.dumps([_argument(stage) for stage in section.stages])


def _argument(stage: ServeStageSection) -> dict[str, Any]:
    said: dict[str, Any] = {"layers": stage.layers, "min": stage.min, "max": stage.max, "device": stage.device}
    if stage.pace_s or stage.pace_per_sequence_s:
        said |= {"pace_ms": 1e3 * stage.pace_s, "pace_sequence_ms": 1e3 * stage.pace_per_sequence_s}
    if stage.kv_capacity_tokens is not None:
        said["kv_capacity_tokens"] = stage.kv_capacity_tokens
    return said


def pipeline_kind(section: ServeInstanceSection, kind: InstanceKind, path: str, directory: Path) -> PipelineKind:
    """Stages as policies see them, checked against the model. Raises ConfigError."""
    own = (directory / section.model_path).expanduser()
    try:
        files = read_model_files(own)
        ranges = [read_range(stage.layers) for stage in section.stages]
        check_split(ranges, files.architecture.layers)
        weights = [files.stage_bytes(each) for each in ranges]
    except StagedModelError as error:
        raise ConfigError(f"{path}.stages: {error}") from None
    times = _planned_times(section, path, directory)
    whole_tokens = section.kv_capacity_tokens
    stages = zip(section.stages, ranges, weights, strict=True)
    return PipelineKind(
        stages=tuple(_stage(stage, each, size, kind, files, times, whole_tokens) for stage, each, size in stages),
        token_bytes=files.architecture.hidden * _ITEM_BYTES[files.architecture.dtype],
    )


def _stage(
    stage: ServeStageSection,
    layers: StageRange,
    weight_bytes: int,
    kind: InstanceKind,
    files: ModelFiles,
    times: Mapping[str, tuple[tuple[int, float], ...]],
    whole_tokens: int | None,
) -> StageKind:
    """``whole_tokens``: KV of one replica, by the instance's key."""
    per_token = files.architecture.kv_bytes(len(layers), _ITEM_BYTES[files.architecture.dtype])
    fixed_s = weight_bytes / _GUESSED_BYTES_PER_S
    measured = times.get(str(layers)) or ((1, fixed_s), (32, 2 * fixed_s))
    return StageKind(
        name=str(layers),
        layers=(layers.begin, layers.end - 1),
        gpu=kind.gpu,
        gpus=stage.gpus,
        price_per_gpu_hour=stage.price_per_gpu_hour,
        weight_bytes=weight_bytes,
        kv_capacity_tokens=stage.kv_capacity_tokens or whole_tokens or max(64, int(1e9 / per_token)),
        max_num_seqs=kind.max_num_seqs,
        min_replicas=stage.min,
        max_replicas=stage.max,
        initial_replicas=stage.min,
        start_s=stage.start_s,
        step_times=tuple(
            (tokens, max(seconds, stage.pace_s + tokens * stage.pace_per_sequence_s, 1e-6))
            for tokens, seconds in measured
        ),
    )


def _planned_times(
    section: ServeInstanceSection, path: str, directory: Path
) -> Mapping[str, tuple[tuple[int, float], ...]]:
    """By the layers of each stage, from a plan."""
    if not section.stages_plan:
        return {}
    file = (directory / section.stages_plan).expanduser()
    try:
        planned = json.loads(file.read_text(encoding="utf-8"))
        found = {
            str(stage["layers"]): tuple(sorted((int(batch), float(s)) for batch, s in stage["step_s"].items()))
            for stage in planned["stages"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}.stages_plan: {section.stages_plan!r} is not what `chiron stages plan --json` writes: {error!r}"
        ) from None
    for stage in section.stages:
        if not found.get(str(read_range(stage.layers))):
            raise ConfigError(f"{path}.stages_plan: {section.stages_plan!r} has no stage of layers {stage.layers}")
    return found
