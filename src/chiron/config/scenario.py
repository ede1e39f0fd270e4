"""The scenario file: one TOML file says everything that a comparison needs. docs/scenario.md explains each key.

Each section is a frozen dataclass: its fields are the keys, their docstrings the manual. ``load_scenario`` reads a file
into a ``Scenario``; ``config.build`` makes runs of it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from math import inf
from pathlib import Path
from typing import Any

from chiron.config.overrides import Override, apply_overrides, override_text
from chiron.config.policies import PolicyChoice, read_policies
from chiron.config.read import ConfigError, keys_of, named_tables, read_record, read_text, suggest
from chiron.config.sections import (
    BatchJobSection,
    CalibrationSection,
    ModelSection,
    ProgramSection,
    StreamSection,
    Telemetry,
)
from chiron.core.types import RequestClass
from chiron.fleet.model import ColdStart, Failures, Sleep
from chiron.policies.chiron.scheduled import CLAIRVOYANT, ScheduledSettings
from chiron.policies.registry import POLICIES

DEFAULT_POLICIES = ("chiron", "chiron-paper", "llumnix", "hpa-queue", "hpa-kv", "static")
"""What runs when neither the file nor the caller names policies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A scenario file, read and checked."""

    text: str
    """The file as written, plus the overrides: reading it again gives this scenario again."""
    directory: Path
    """What relative paths in the file are relative to."""
    name: str
    description: str = ""
    """One line: what the scenario shows."""
    seeds: tuple[int, ...] = (1,)
    """Each seed is one run of every policy; generators, cold starts and failures draw from it."""
    compare: tuple[str, ...] = ()
    """Labels or policy names to run by default; empty: the [policies] tables in their order, else the standard six."""
    scale: float = 1.0
    """Multiplies the rate of every stream and of all programs, and the requests of every batch job."""
    duration_s: float = inf
    """Requests and batch jobs that arrive later than this are left out."""
    horizon_s: float = inf
    """Stop here even if requests remain; else when the last one has ended."""
    grace_s: float = 7200.0
    """Without a horizon: stop this long after the last arrival or deadline."""
    kv_transfer_gb_per_s: float = 20.0
    """Host link of an instance: saves and restores the KV of evicted requests."""
    prefix_cache: bool = False
    """Engines keep what the next prompts of programs begin with; a prompt costs prefill only for the rest."""
    classes: Mapping[str, RequestClass]
    models: Mapping[str, ModelSection]
    gpus: Mapping[str, int] = field(default_factory=dict)
    """GPUs of each type that exist; a type not named is unlimited."""
    cold_start: ColdStart = field(default_factory=ColdStart)
    sleepers: Sleep = field(default_factory=Sleep)
    """Host memory in which instances can sleep."""
    failures: Failures = field(default_factory=Failures)
    telemetry: Telemetry = field(default_factory=Telemetry)
    workload: tuple[StreamSection, ...] = ()
    program: tuple[ProgramSection, ...] = ()
    batch_job: tuple[BatchJobSection, ...] = ()
    calibration: CalibrationSection | None = None
    """What ``chiron tune`` may tune on; None: it is told on the command line, or takes the first part."""
    history: tuple[StreamSection, ...] = ()
    """Streams before time 0: a past that every policy has lived through and may have learned from. Nothing of it is
    counted."""
    policies: Mapping[str, PolicyChoice] = field(default_factory=dict)
    """By label."""
    override: tuple[Override, ...] = ()
    """Applied in order, before anything is read."""

    def __post_init__(self) -> None:
        _require(bool(self.seeds), "seeds", self.seeds, "name at least one whole number")
        _require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "each seed once")
        _require(min(self.seeds) >= 0, "seeds", self.seeds, "seeds must be 0 or more")
        _require(self.scale > 0, "scale", self.scale, "must be above 0")
        _require(self.duration_s > 0, "duration", self.duration_s, "must be above 0")
        _require(self.horizon_s > 0, "horizon", self.horizon_s, "must be above 0")
        _require(self.kv_transfer_gb_per_s > 0, "kv_transfer_gb_per_s", self.kv_transfer_gb_per_s, "must be above 0")
        some = bool(self.workload or self.program or self.batch_job)
        _require(some, "workload", [], "add a [[workload]], a [[program]] or a [[batch_job]]")
        for gpu, count in self.gpus.items():
            _require(count >= 1, f"gpus.{gpu}", count, "must be 1 or more")
        for i, label in enumerate(self.compare):
            self.choice(label, f"compare[{i}]")
        entries = [(f"workload[{i}]", entry.model, entry.class_) for i, entry in enumerate(self.workload)]
        entries += [(f"program[{i}]", entry.model, entry.class_) for i, entry in enumerate(self.program)]
        entries += [(f"batch_job[{i}]", job.model, job.class_) for i, job in enumerate(self.batch_job)]
        entries += [(f"history[{i}]", entry.model, entry.class_) for i, entry in enumerate(self.history)]
        for path, model, cls in entries:
            _require_name(f"{path}.model", model, self.models)
            _require_name(f"{path}.class", cls, self.classes)
            if self.models[model].cascade is not None:
                fine = path.startswith(("workload", "history")) and self.classes[cls].interactive
                _require(fine, f"{path}.model", model, "a cascade is asked by interactive requests of streams only")
        self._check_cascades()
        if self.prefix_cache:
            for name, section in self.models.items():
                _require(section.stages is None, f"models.{name}.stages", "given", "not beside prefix_cache = true")
        for i, job in enumerate(self.batch_job):
            finite = job.deadline_s is not None or self.classes[job.class_].deadline_s < inf
            _require(finite, f"batch_job[{i}].deadline", "none", f"set it here or in classes.{job.class_}")

    def _check_cascades(self) -> None:
        served = self.served
        for name, section in self.models.items():
            if section.cascade is not None:
                first, then = section.cascade.first, section.cascade.then
                _require_name(f"models.{name}.cascade.first", first, served)
                _require_name(f"models.{name}.cascade.then", then, served)
                _require(first != then, f"models.{name}.cascade.then", then, "name another model than the first")

    @property
    def served(self) -> Mapping[str, ModelSection]:
        """Models that have instances."""
        return {name: section for name, section in self.models.items() if section.cascade is None}

    @property
    def labels(self) -> tuple[str, ...]:
        """What runs by default."""
        return self.compare or tuple(self.policies) or DEFAULT_POLICIES

    def with_overrides(self, *assignments: str) -> Scenario:
        """This scenario with values set, each ``path=value``."""
        text = "".join([self.text, *map(override_text, assignments)])
        return parse_scenario(text, directory=self.directory, name=self.name, file=self.name)

    def choice(self, label: str, path: str = "policy") -> PolicyChoice:
        """The policy of a label: one of the file's, or a policy by name with its defaults."""
        if label in self.policies:
            return self.policies[label]
        if label in POLICIES:
            return PolicyChoice(policy=label, settings=POLICIES[label].settings())
        if label == CLAIRVOYANT:
            return PolicyChoice(policy=CLAIRVOYANT, settings=ScheduledSettings())
        known = dict.fromkeys([*self.policies, *POLICIES, CLAIRVOYANT])
        raise ConfigError(f"{path}: unknown policy {label!r}; {suggest(label, known)}")


def load_scenario(source: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """A scenario from a file, or by the name of a packaged one; ``overrides`` are ``path=value``.

    Raises ConfigError, which names the file, the path in it, the value and what is allowed.
    """
    packaged = scenario_files()
    name = str(source)
    path = Path(source)
    if name in packaged and not path.is_file():
        text, directory = packaged[name].read_text(encoding="utf-8"), Path()
    elif path.is_file():
        text, directory = read_text(path), path.parent
    else:
        raise ConfigError(f"scenario {name!r} is neither a file nor a packaged scenario; {suggest(name, packaged)}")
    text = "".join([text, *map(override_text, overrides)])
    return parse_scenario(text, directory=directory, name=path.stem, file=name)


def parse_scenario(text: str, *, directory: Path, name: str = "scenario", file: str = "scenario") -> Scenario:
    """A scenario from TOML text. ``name`` is used when the text has none; ``file`` is named in errors."""
    try:
        table = tomllib.loads(text)
        return _read_scenario(table, text, directory, name)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def scenario_files() -> dict[str, Traversable]:
    """The packaged scenarios, by name."""
    folder = resources.files("chiron") / "data" / "scenarios"
    found = {entry.name.removesuffix(".toml"): entry for entry in folder.iterdir() if entry.name.endswith(".toml")}
    return dict(sorted(found.items()))


def _read_scenario(table: dict[str, Any], text: str, directory: Path, name: str) -> Scenario:
    apply_overrides(table)
    keys = [key for key in keys_of(Scenario) if key not in ("text", "directory")]
    for key, value in table.items():
        if key not in keys:
            raise ConfigError(f"{key}: unknown key (value {value!r}); {suggest(key, keys)}")
    given = {
        "classes": {
            key: read_record(RequestClass, entry, f"classes.{key}", name=key)
            for key, entry in named_tables(table, "classes", True, allowed=keys_of(RequestClass)).items()
        },
        "policies": read_policies(table),
    }
    rest = {key: value for key, value in table.items() if key not in given}
    return read_record(Scenario, {"name": name, **rest}, "", text=text, directory=directory, **given)


def _require(fine: bool, path: str, value: object, what: str) -> None:
    if not fine:
        raise ConfigError(f"{path}: {value!r}: {what}")


def _require_name(path: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ConfigError(f"{path}: unknown name {name!r}; {suggest(name, known)}")
