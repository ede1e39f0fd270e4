"""Runs from a scenario: its workload (once per seed), its fleet, and one ``Setup`` per policy and seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Literal

import numpy as np

from chiron.config.pipelines import Pipelines, gpus_first, gpus_most, pipelines, replicas_for
from chiron.config.policies import check_can_be_made
from chiron.config.read import ConfigError, fields_by_key, is_duration
from chiron.config.scenario import Scenario
from chiron.config.sections import (
    GenerateSection,
    InstanceSection,
    LengthsSection,
    ModelSection,
    ProgramSection,
    StreamSection,
)
from chiron.core.types import InstanceKind, ModelSpec
from chiron.engines.layers import layer_profile_names, load_layer_profile, weight_bytes
from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_store import load_profile
from chiron.policies.registry import POLICIES
from chiron.sim.initial import initial_instances
from chiron.sim.setup import Setup
from chiron.workload.build import BatchJob, Stream, build_workload
from chiron.workload.errors import WorkloadError
from chiron.workload.generate import Arrivals, ClosedLoop, generate
from chiron.workload.lengths import ConstantTokens, IndependentLengths, Lengths, LognormalTokens
from chiron.workload.load import load_lengths, load_trace
from chiron.workload.predicted import with_predictions
from chiron.workload.programs import ProgramShape, ProgramStream
from chiron.workload.select import begins_s, kept
from chiron.workload.transform import concat
from chiron.workload.types import Trace, Workload

STREAMS_PER_SEED = 1000
"""Streams of one seed that draw independently of those of the next."""
HISTORY_FIRST = STREAMS_PER_SEED // 2
"""Number of the first stream of the history among those of its seed."""


Part = Literal["judged", "calibration"]
"""Of a scenario whose ``calibration`` says that the first part of its workload is for tuning: the rest, or that part.
Without it all of the workload is judged."""


def setups(
    scenario: Scenario,
    policies: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    part: Part = "judged",
) -> list[Setup]:
    """One setup per policy and seed, all seeds of the first policy first (defaults: the scenario's).

    Those of one seed share their workload. Raises ConfigError, WorkloadError, ProfileError or OSError.
    """
    labels = policies or scenario.labels
    choices = {label: check_can_be_made(scenario.choice(label), f"policy {label!r}") for label in labels}
    chosen = list(dict.fromkeys(seeds or scenario.seeds))
    calibrated_s = scenario.calibration.first_s if scenario.calibration is not None else 0.0
    begins_s = calibrated_s if part == "judged" else 0.0
    if scenario.horizon_s <= begins_s:
        raise ConfigError(f"horizon: {scenario.horizon_s:g} s; it must be above calibration.first ({begins_s:g} s)")
    workloads = {seed: workload_of(scenario, seed, part=part) for seed in chosen}
    pasts = {seed: history_of(scenario, seed) for seed in chosen}
    staged = dict.fromkeys(bool(choice.stages) for choice in choices.values())
    by_seed = {
        (seed, stages): _served(scenario, workloads[seed], stages=stages) for seed in chosen for stages in staged
    }
    return [
        Setup(
            scenario=scenario.name,
            scenario_text=scenario.text,
            models=served.specs,
            profiles=served.profiles,
            stages=served.stages,
            initial=served.initial,
            gpus_max=dict(scenario.gpus),
            workload=_predicted(workloads[seed], choice.settings, seed),
            history=pasts[seed],
            policy=choice.policy,
            settings=choice.settings,
            stage_policy=choice.stages,
            stage_settings=choice.stage_settings,
            label=label,
            seed=seed,
            cold_start=scenario.cold_start,
            sleep=scenario.sleepers,
            failures=scenario.failures,
            scrape_period_s=scenario.telemetry.scrape_period_s,
            scrape_delay_s=scenario.telemetry.scrape_delay_s,
            kv_transfer_gb_per_s=scenario.kv_transfer_gb_per_s,
            prefix_cache=scenario.prefix_cache,
            horizon_s=scenario.horizon_s - begins_s,
            grace_s=scenario.grace_s,
        )
        for label, choice in choices.items()
        for seed in chosen
        for served in (by_seed[seed, bool(choice.stages)],)
    ]


def _predicted(workload: Workload, settings: object, seed: int) -> Workload:
    """With what the policy's length predictor says, if it has one and asks it."""
    error = getattr(settings, "length_error", None)
    asks = getattr(settings, "predicts", True)
    return with_predictions(workload, error, seed=seed) if asks and error is not None else workload


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    """What the models of one seed run on."""

    specs: tuple[ModelSpec, ...]
    profiles: Mapping[str, Profile]
    stages: Mapping[str, tuple[Profile, ...]]
    initial: Mapping[str, int]


def _served(scenario: Scenario, workload: Workload, *, stages: bool) -> _Served:
    """``stages``: models that can run as stages do."""
    if stages and not any(section.stages for section in scenario.served.values()):
        raise ConfigError("policies: one of them has stages, and no model does; add [models.NAME.stages]")
    as_stages = {
        name: made
        for name, section in scenario.served.items()
        if stages and section.stages is not None
        for made in (_pipelines(scenario, workload, name, section),)
    }
    fleet = {
        name: [(as_stages[name].kind, as_stages[name].profile)]
        if name in as_stages
        else _kinds(scenario, name, section)
        for name, section in scenario.served.items()
    }
    profiles = _by_kind(fleet)
    _check_sleepers(scenario, fleet)
    # In the workload's order, so that its model numbers count in both.
    names = sorted(fleet, key=lambda name: workload.models.index(name) if name in workload.models else len(fleet))
    specs = tuple(_spec(name, scenario.models[name], fleet[name]) for name in names)
    whole = [spec for spec in specs if spec.name not in as_stages]
    initial = _initial(scenario, workload, whole, profiles, _gpus_left(scenario, as_stages))
    initial |= {spec.name: spec.min_instances for spec in specs if spec.name in as_stages}
    return _Served(
        specs=specs,
        profiles=profiles,
        stages={made.kind.name: made.stages for made in as_stages.values()},
        initial=initial,
    )


def _check_sleepers(scenario: Scenario, fleet: Mapping[str, list[tuple[InstanceKind, Profile]]]) -> None:
    """Whoever sleeps has a size, and a name by which it is told from other models' sleepers."""
    if not scenario.sleepers.host_memory_gb > 0:
        return
    models: dict[str, str] = {}
    for name, kinds in fleet.items():
        for i, (kind, _) in enumerate(kinds):
            if models.setdefault(kind.name, name) != name:
                raise ConfigError(
                    f"models.{name}.instances[{i}]: the name {kind.name!r} is one of models.{models[kind.name]} too, "
                    "and sleepers are told apart by it; give this one a name of its own"
                )
            if not scenario.sleepers.gb(kind):
                raise ConfigError(
                    f"sleepers.sleeper_gb: not given, and how large the weights of {kind.name!r} (models.{name}) are "
                    "is not known; give what one sleeper takes, in GB"
                )


def _pipelines(scenario: Scenario, workload: Workload, name: str, section: ModelSection) -> Pipelines:
    assert section.stages is not None
    with _at(f"models.{name}.stages"), _value_at(f"models.{name}.stages"):
        layered = load_layer_profile(source_of(scenario, section.stages.profile))
        made = pipelines(name, section.stages, layered, scenario.cold_start)
        if section.initial == "auto":
            # As many GPUs as the same rule gives engines on one GPU each.
            spec = ModelSpec(name=name, kinds=(made.kind,), max_instances=gpus_most(made.kind))
            instances = initial_instances(workload, spec, made.profile)
            limit = scenario.gpus.get(made.kind.gpu)
            if limit is not None:
                instances = min(instances, max(1, limit // len(made.stages)) * len(made.stages))
        else:
            instances = section.initial * len(made.stages)
        each = replicas_for(-(-instances // section.stages.min_pipelines), made.kind)
        return pipelines(name, section.stages, layered, scenario.cold_start, each)


def _gpus_left(scenario: Scenario, as_stages: Mapping[str, Pipelines]) -> dict[str, int]:
    """Of those that exist, what pipelines do not have at time 0."""
    left = dict(scenario.gpus)
    for gpu, count in scenario.gpus.items():
        first = {
            name: gpus_first(made.kind) * section.min_pipelines
            for name, made in as_stages.items()
            if made.kind.gpu == gpu and (section := scenario.models[name].stages) is not None
        }
        left[gpu] -= sum(first.values())
        if left[gpu] < 0:
            raise ConfigError(
                f"gpus.{gpu}: {count}; the stages of {', '.join(first)} have {sum(first.values())} at time 0: lower "
                "initial, or the stages' min"
            )
    return left


@contextmanager
def _value_at(path: str) -> Iterator[None]:
    """Likewise of kinds, whose errors are those of values."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def workload_of(scenario: Scenario, seed: int, *, part: Part = "judged") -> Workload:
    """The requests of one seed: streams, programs and batch jobs, scaled, and cut at the scenario's duration."""
    streams, jobs = _streams(scenario, "workload", scenario.workload, seed, 0), []
    programs = []
    for i, section in enumerate(scenario.program):
        with _at(f"program[{i}]"):
            programs.append(_program(scenario, section))
    for i, job in enumerate(scenario.batch_job):
        cls = scenario.classes[job.class_]
        with _at(f"batch_job[{i}]"):
            jobs.append(
                BatchJob(
                    model=job.model,
                    cls=cls,
                    at_s=job.at_s,
                    requests=max(1, round(job.requests * scenario.scale)),
                    deadline_s=cls.deadline_s if job.deadline_s is None else job.deadline_s,
                    lengths=_lengths(scenario, job.lengths),
                )
            )
    with _at("workload"):
        whole = _cut(build_workload(streams, jobs, programs, seed=seed), "duration", 0.0, scenario.duration_s)
        first_s = scenario.calibration.first_s if scenario.calibration is not None else 0.0
        if first_s == 0.0:
            return whole
        span = (0.0, first_s) if part == "calibration" else (first_s, inf)
        return _cut(whole, "calibration.first", *span)


def history_of(scenario: Scenario, seed: int) -> Workload | None:
    """The requests before time 0 of one seed, on a clock of their own that begins at 0; None: there are none."""
    if not scenario.history:
        return None
    streams = _streams(scenario, "history", scenario.history, seed, HISTORY_FIRST)
    with _at("history"):
        return build_workload(streams, [], seed=seed, first=HISTORY_FIRST)


def _streams(scenario: Scenario, path: str, sections: Sequence[StreamSection], seed: int, first: int) -> list[Stream]:
    """``first``: number of the first of them, by which their draws are named."""
    streams = []
    for i, section in enumerate(sections):
        with _at(f"{path}[{i}]"):
            trace = _trace(scenario, section, seed, first + i)
            cls = scenario.classes[section.class_]
            cascade = scenario.models[section.model].cascade
            shape = cascade.shape() if cascade is not None else None
            streams.append(Stream(trace=trace, model=section.model, cls=cls, tenant=section.key, cascade=shape))
    return streams


def _program(scenario: Scenario, section: ProgramSection) -> ProgramStream:
    return ProgramStream(
        kind=section.name or section.class_,
        model=section.model,
        cls=scenario.classes[section.class_],
        arrivals=_faster(section.arrivals.arrivals, scenario.scale),
        duration_s=section.arrivals.duration_s,
        shape=ProgramShape(
            steps=section.steps,
            branches=section.branches,
            first=_field(section.first),
            added=_field(section.added),
            output=_field(section.output),
            think_s=section.think_s,
            input_max=section.input_max,
        ),
        deadline_s=section.deadline_s,
        tenant=section.key,
    )


def policy_rows() -> list[tuple[str, str, dict[str, str]]]:
    """Name, what it does, and the default of each setting as a scenario file would have it, of every policy."""
    return [(name, entry.about, settings_of(entry.settings())) for name, entry in POLICIES.items()]


def settings_of(settings: object) -> dict[str, str]:
    """Settings by the keys and in the words of a scenario file."""
    flat: dict[str, str] = {}
    for key, field in fields_by_key(settings).items():
        value = getattr(settings, field.name)
        if is_dataclass(value):
            flat |= {f"{key}.{name}": text for name, text in settings_of(value).items()}
        elif isinstance(value, float) and isfinite(value) and is_duration(field.name):
            flat[key] = f'"{value:g}s"'
        else:
            flat[key] = str(value).lower() if isinstance(value, bool) else repr(value)
    return flat


@contextmanager
def _at(path: str) -> Iterator[None]:
    """Put the path of a section in front of what others say about its values."""
    try:
        yield
    except (WorkloadError, ProfileError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _trace(scenario: Scenario, stream: StreamSection, seed: int, number: int) -> Trace:
    factor = stream.rate_scale * scenario.scale
    if stream.generate is not None:
        trace = _generated(scenario, stream.generate, factor, seed, f"stream {number}")
    else:
        trace = load_trace(
            source_of(scenario, stream.trace),
            format=stream.format,
            start_s=stream.start_s,
            duration_s=stream.duration_s,
            rate_scale=factor,
            seed=seed * STREAMS_PER_SEED + number,
        )
    if stream.repeat > 1:
        trace = concat([trace] * stream.repeat)
    return replace(trace, arrival_s=trace.arrival_s + stream.offset_s)


def _generated(scenario: Scenario, section: GenerateSection, factor: float, seed: int, name: str) -> Trace:
    return generate(
        _faster(section.arrivals, factor),
        duration_s=section.duration_s,
        lengths=_lengths(scenario, section.lengths),
        seed=seed,
        name=name,
    )


def _faster(arrivals: Arrivals, factor: float) -> Arrivals:
    if isinstance(arrivals, ClosedLoop):
        return replace(arrivals, users=max(1, round(arrivals.users * factor)))
    return replace(arrivals, rate=arrivals.rate * factor)


def _lengths(scenario: Scenario, lengths: str | LengthsSection) -> Lengths:
    if isinstance(lengths, str):
        return load_lengths(source_of(scenario, lengths))
    return IndependentLengths(input=_field(lengths.input), output=_field(lengths.output))


def _field(tokens: int | LognormalTokens) -> ConstantTokens | LognormalTokens:
    return ConstantTokens(tokens=tokens) if isinstance(tokens, int) else tokens


def source_of(scenario: Scenario, name: str) -> str | Path:
    """A path relative to the scenario file if there is such a file, else the name as it is."""
    path = scenario.directory / name
    return path if path.is_file() else name


def _cut(workload: Workload, key: str, start_s: float, end_s: float) -> Workload:
    """Requests that arrive from ``start_s`` on and before ``end_s``, and the calls of programs that begin then, as if
    they began at 0. ``key``: who wants it."""
    if (start_s, end_s) == (0.0, inf):
        return workload
    if workload.programs is not None or workload.cascades is not None:
        at_s = begins_s(workload)
        rows = (at_s >= start_s) & (at_s < end_s)
        if not rows.any():
            raise ConfigError(f"{key}: from {start_s:g} s to {end_s:g} s no request or program begins")
        return kept(workload, rows, earlier_s=start_s)
    first, last = (int(np.searchsorted(workload.arrival_s, bound)) for bound in (start_s, end_s))
    if first == last and end_s < inf:
        begins = float(workload.arrival_s[0])
        raise ConfigError(f"{key}: {end_s:g} s holds no request; the first arrives at {begins:g} s")
    if first == last:
        ends = float(workload.arrival_s[-1])
        raise ConfigError(f"{key}: {start_s:g} s leaves no request; the last arrives at {ends:g} s")
    return kept(workload, slice(first, last), earlier_s=start_s)


def _kinds(scenario: Scenario, model: str, section: ModelSection) -> list[tuple[InstanceKind, Profile]]:
    if not section.instances:
        raise ConfigError(f"models.{model}.instances: missing; only a policy with stages can run this model without")
    pairs = []
    for i, instance in enumerate(section.instances):
        with _at(f"models.{model}.instances[{i}]"):
            profile = _adapted(_whole_model(scenario, instance.profile), instance)
            pairs.append((_kind(profile, instance), profile))
    return pairs


def _whole_model(scenario: Scenario, name: str) -> Profile:
    """A profile; of a packaged one by layer, all its layers on one GPU."""
    if name in layer_profile_names():
        layered = load_layer_profile(name)
        return replace(layered.stage(0, layered.layers - 1, max_num_seqs=1024), name=name)
    return load_profile(source_of(scenario, name))


def _adapted(profile: Profile, instance: InstanceSection) -> Profile:
    """The profile with what the scenario changes of it."""
    changes: dict[str, object] = {
        name: value
        for name in ("price_per_gpu_hour", "max_num_seqs", "max_num_batched_tokens", "kv_capacity_tokens")
        if (value := getattr(instance, name)) is not None
    }
    if instance.step_overhead_s is not None:
        changes["step_overhead_ms"] = instance.step_overhead_s * 1000
    if instance.request_overhead_s is not None:
        changes["request_overhead_ms"] = instance.request_overhead_s * 1000
    if instance.captured_sizes:
        changes["captured_sizes"] = instance.captured_sizes
    if instance.admission_s is not None:
        changes["admission_ms"] = instance.admission_s * 1000
    return replace(profile, **changes)  # type: ignore[arg-type]


def _kind(profile: Profile, instance: InstanceSection) -> InstanceKind:
    return InstanceKind(
        name=instance.name or profile.name,
        gpu=profile.gpu,
        gpus=profile.tp,
        price_per_gpu_hour=profile.price_per_gpu_hour,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=profile.max_num_batched_tokens,
        live_token_budget=instance.live_token_budget,
        max_instances=instance.max_instances,
        weight_bytes=weight_bytes(profile),
    )


def _by_kind(fleet: Mapping[str, list[tuple[InstanceKind, Profile]]]) -> dict[str, Profile]:
    profiles: dict[str, Profile] = {}
    for model, pairs in fleet.items():
        names = [kind.name for kind, _ in pairs]
        for i, (kind, profile) in enumerate(pairs):
            if names.count(kind.name) > 1 or profiles.setdefault(kind.name, profile) != profile:
                raise ConfigError(
                    f"models.{model}.instances[{i}]: the name {kind.name!r} already stands for another kind of "
                    "instance; give this one a name of its own"
                )
    return profiles


def _spec(name: str, section: ModelSection, pairs: Sequence[tuple[InstanceKind, Profile]]) -> ModelSpec:
    kinds = tuple(kind for kind, _ in pairs)
    staged = section.stages if kinds[0].pipeline is not None else None
    return ModelSpec(
        name=name,
        kinds=kinds,
        min_instances=staged.min_pipelines if staged else section.min_instances,
        max_instances=staged.max_pipelines if staged else section.max_instances,
    )


def _initial(
    scenario: Scenario,
    workload: Workload,
    specs: Sequence[ModelSpec],
    profiles: Mapping[str, Profile],
    left: dict[str, int],
) -> dict[str, int]:
    """Ready instances at time 0 by model, within what is left of what exists."""
    initial = {}
    for spec in specs:
        kind, wanted = spec.kinds[0], scenario.models[spec.name].initial
        count = initial_instances(workload, spec, profiles[kind.name]) if wanted == "auto" else wanted
        room = min(kind.max_instances, int(left.get(kind.gpu, inf) // kind.gpus) if kind.gpu in left else 1_000_000)
        if wanted != "auto" and count > room:
            raise ConfigError(
                f"models.{spec.name}.initial: {count} instances of {kind.name} do not fit; there is room for {room}"
            )
        initial[spec.name] = min(count, room)
        if kind.gpu in left:
            left[kind.gpu] -= initial[spec.name] * kind.gpus
    return initial
