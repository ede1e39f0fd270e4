"""From the tables of a model to what the gateway starts and the control plane counts.

What an engine usually is, and how it is started, stands in its row of ``engines.rows``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from chiron.config.read import ConfigError, construct
from chiron.config.serve_sections import ServeInstanceSection, ServeModelSection
from chiron.config.serve_sources import Given, profile_name, read_secret, read_source
from chiron.config.serve_stages import pipeline_kind
from chiron.core.types import InstanceKind
from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_store import load_profile
from chiron.engines.rows import ENGINES, EngineRow
from chiron.fleet.process.fleet import TOKEN_BUDGET, ProcessSource
from chiron.fleet.union import Source
from chiron.gateway.settings import KindSettings

KV_CAPACITY_GUESS = 262_144
"""Tokens of KV of an engine that has not told yet: some 16 GB of an 8B model's, on the large side, so that no prompt
is refused before the engine's metrics have been read."""
UNBOUNDED = 1_000_000
"""Instances of a kind that nothing but the model's own bound limits."""


def instance_bounds(section: ServeModelSection, kinds: Sequence[KindSettings], path: str) -> tuple[int, int]:
    """The least and the most instances of a model, with the defaults filled in."""
    endpoints = sum(kind.source.standing for kind in kinds)
    started = [kind for kind in kinds if kind.source.instances_max is None]
    room = max((ENGINES[kind.engine].max_instances for kind in started), default=0)
    most = section.max_instances if section.max_instances is not None else endpoints + room
    if not started and most > endpoints:
        raise ConfigError(
            f"{path}.max_instances: {most}; there are {endpoints} endpoints, and Chiron starts no engines here"
        )
    least = section.min_instances
    if least is None:
        least = min(most, 1 if started else endpoints)
    if least > most:
        raise ConfigError(f"{path}.min_instances: {least}; it must be 0 to max_instances ({most})")
    return least, most


def kind_settings(section: ServeInstanceSection, model: str, path: str, directory: Path) -> KindSettings:
    """One kind of instance of a model. Raises ConfigError for what cannot be started or reached."""
    row = ENGINES[section.engine]
    profile = _profile(section, row, path, directory)
    kind = _instance_kind(section, row, model, profile)
    if section.stages:
        pipeline = pipeline_kind(section, kind, path, directory)
        kind = replace(kind, pipeline=pipeline, gpus=sum(stage.gpus for stage in pipeline.stages))
    api_key = read_secret(section.api_key_file, f"{path}.api_key_file", directory)
    given = Given(section=section, row=row, kind=kind, model=model, path=path, directory=directory, api_key=api_key)
    source = read_source(given)
    starts_with_it = isinstance(source, ProcessSource) and any(TOKEN_BUDGET in word for word in source.command)
    kind = replace(kind, start_token_budget=starts_with_it)
    divided = section.started and row.context_per_seq > 0
    return construct(
        KindSettings,
        path,
        {
            "kind": _bounded(kind, section, source, path),
            "engine": section.engine,
            "source": source,
            "served_model_name": section.served_model_name,
            "api_key": api_key,
            "kv_capacity_known": bool(section.kv_capacity_tokens or profile or divided),
            "context_tokens": section.context_tokens,
            "profile": profile_name(section.profile or section.pace, directory),
        },
    )


def _instance_kind(section: ServeInstanceSection, row: EngineRow, model: str, profile: Profile | None) -> InstanceKind:
    seqs = section.max_num_seqs or (profile.max_num_seqs if profile else row.max_num_seqs)
    guess = seqs * row.context_per_seq or KV_CAPACITY_GUESS
    price = profile.price_per_gpu_hour if profile else 0.0
    return InstanceKind(
        name=f"{model}/{section.name or section.engine}",
        gpu=section.gpu or (profile.gpu if profile else row.gpu),
        gpus=section.gpus or (profile.tp if profile else 1),
        price_per_gpu_hour=price if section.price_per_gpu_hour is None else section.price_per_gpu_hour,
        kv_capacity_tokens=section.kv_capacity_tokens or (profile.kv_capacity_tokens if profile else guess),
        max_num_seqs=seqs,
        max_num_batched_tokens=section.max_num_batched_tokens
        or (profile.max_num_batched_tokens if profile else row.max_num_batched_tokens),
        live_token_budget=row.token_budget is not None,
        max_instances=section.max_instances or UNBOUNDED,
    )


def _bounded(kind: InstanceKind, section: ServeInstanceSection, source: Source, path: str) -> InstanceKind:
    """No more instances than the source can have."""
    most = source.instances_max
    if most is None:
        return kind
    if section.max_instances is not None and section.max_instances > most:
        raise ConfigError(f"{path}.max_instances: {section.max_instances}; there are {source.summary}")
    return replace(kind, max_instances=section.max_instances or most)


def _profile(section: ServeInstanceSection, row: EngineRow, path: str, directory: Path) -> Profile | None:
    """The profile that an engine has its timing from. One that is only paced keeps KV and limits of its own, so its
    profile is only read to find mistakes early."""
    for key in ("profile", "pace"):
        if getattr(section, key) and row.profile_key != key:
            owners = " or ".join(repr(each.name) for each in ENGINES.values() if each.profile_key == key)
            raise ConfigError(f"{path}.{key}: {getattr(section, key)!r}; it belongs to engine = {owners}")
    if row.profile_key == "profile" and not section.profile and section.started:
        raise ConfigError(
            f"{path}: profile is missing; {row.name} engines have the timing of one (chiron profile list)"
        )
    if not section.profile and not section.pace:
        return None
    try:
        profile = load_profile(profile_name(section.profile or section.pace, directory))
    except ProfileError as error:
        raise ConfigError(f"{path}.{'profile' if section.profile else 'pace'}: {error}") from None
    return profile if section.profile else None
