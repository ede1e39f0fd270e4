"""Kinds of instances that are pipelines, from the ``stages`` table of a model."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isfinite

from chiron.config.sections import StageSection, StagesSection
from chiron.core.types import InstanceKind, PipelineKind, StageKind
from chiron.engines.layers import LayerProfile, check_ranges, even_split
from chiron.engines.profile import Profile
from chiron.engines.stage_profiles import whole_profile
from chiron.fleet.model import ColdStart

ACTIVATION_BYTES = 2
"""Of one value: bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipelines:
    """What the simulator needs of a model that runs as stages."""

    kind: InstanceKind
    profile: Profile
    """Of the whole, for what looks at an instance from outside."""
    stages: tuple[Profile, ...]


def pipelines(
    name: str, section: StagesSection, layered: LayerProfile, cold_start: ColdStart, initial: int | None = None
) -> Pipelines:
    """``name`` of the model; ``initial``: replicas of each stage that are up at time 0, where a stage does not say.
    Raises ProfileError: the split does not fit the model, or a stage no GPU."""
    sections = _stages(section, layered.layers)
    check_ranges([each.layer_range() for each in sections], layered.layers)
    profiles = tuple(
        layered.stage(
            *each.layer_range(),
            max_num_seqs=section.max_num_seqs,
            max_num_batched_tokens=section.max_num_batched_tokens,
            step_overhead_ms=section.step_overhead_s * 1000,
            request_overhead_ms=section.request_overhead_s * 1000,
            price_per_gpu_hour=each.price_per_gpu_hour,
        )
        for each in sections
    )
    kinds = tuple(
        _kind(each, profile, layered, cold_start, initial) for each, profile in zip(sections, profiles, strict=True)
    )
    pipeline = PipelineKind(
        stages=kinds,
        hop_s=section.hop_latency_s,
        hop_bytes_per_s=section.hop_gbit_per_s * 1e9 / 8,
        token_bytes=ACTIVATION_BYTES * layered.hidden,
        micro_batches_max=section.micro_batches_max,
    )
    most = max(each.max_replicas for each in kinds)
    whole = whole_profile(
        f"{name}/stages",
        profiles,
        max_num_seqs=section.max_num_seqs * min(each.max_replicas for each in kinds),
        step_tokens=section.max_num_batched_tokens * max(most, len(kinds)),
    )
    kind = InstanceKind(
        name=whole.name,
        gpu=layered.gpu,
        gpus=whole.tp,
        price_per_gpu_hour=whole.price_per_gpu_hour,
        kv_capacity_tokens=whole.kv_capacity_tokens,
        max_num_seqs=whole.max_num_seqs,
        max_num_batched_tokens=section.max_num_batched_tokens,
        weight_bytes=sum(each.weight_bytes for each in kinds),
        pipeline=pipeline,
    )
    return Pipelines(kind=kind, profile=whole, stages=profiles)


def gpus_most(kind: InstanceKind) -> int:
    """GPUs of one pipeline with all the replicas that it may have."""
    assert kind.pipeline is not None
    return sum(stage.gpus * stage.max_replicas for stage in kind.pipeline.stages)


def gpus_first(kind: InstanceKind) -> int:
    """GPUs of one pipeline that is up at time 0."""
    assert kind.pipeline is not None
    return sum(stage.gpus * stage.initial_replicas for stage in kind.pipeline.stages)


def replicas_for(instances: int, kind: InstanceKind) -> int:
    """Of each stage, for as many GPUs as so many engines on one GPU each."""
    assert kind.pipeline is not None
    return max(1, ceil(instances / len(kind.pipeline.stages)))


def _stages(section: StagesSection, layers: int) -> tuple[StageSection, ...]:
    if section.split is None:
        return section.stage
    return tuple(
        StageSection(layers=f"{first}-{last}", min=section.min, max=section.max)
        for first, last in even_split(layers, section.split)
    )


def _kind(
    section: StageSection, profile: Profile, layered: LayerProfile, cold: ColdStart, initial: int | None
) -> StageKind:
    first = section.initial or min(max(initial or section.min, section.min), section.max)
    weights = layered.weight_bytes(*section.layer_range())
    start_s = cold.node_start_s + cold.load_s(warm=False, weight_bytes=weights)
    return StageKind(
        name=section.name or section.layers,
        layers=section.layer_range(),
        gpu=layered.gpu,
        price_per_gpu_hour=profile.price_per_gpu_hour,
        weight_bytes=weights,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        max_num_seqs=profile.max_num_seqs,
        min_replicas=section.min,
        max_replicas=section.max,
        initial_replicas=first,
        start_s=start_s if isfinite(start_s) else 60.0,
        step_times=tuple((tokens, profile.base_s(tokens)) for tokens in (1, 16, 64, 128, 256, 512, 1024, 2048)),
        context_token_s=profile.c_ms_per_context_token / 1000.0,
    )
