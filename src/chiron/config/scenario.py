"""The scenario file: one TOML file says everything that a comparison needs. docs/scenario.md explains each key.

Each section is a frozen dataclass: its fields are the keys, their docstrings the manual. ``load_scenario`` reads a file
into a ``Scenario``; ``config.build`` makes runs of it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from math import inf
from pathlib import Path
from typing import Any

from chiron.config.read import ConfigError, keys_of, read_record, suggest
from chiron.config.sections import BatchJobSection, ModelSection, StreamSection, Telemetry
from chiron.core.types import RequestClass
from chiron.policies.registry import POLICIES
from chiron.sim.setup import ColdStart, Failures

DEFAULT_POLICIES = ("chiron", "chiron-paper", "llumnix", "hpa-queue", "hpa-kv", "static")
"""What runs when neither the file nor the caller names policies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """One value set over the file's own, as ``--set path=value`` does."""

    path: str
    """Dotted, for example ``classes.chat.ttft`` or ``workload.0.rate_scale``."""
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChoice:
    """A policy with its settings, under the label that results show."""

    policy: str
    settings: Any


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
    """Multiplies the rate of every stream and the requests of every batch job."""
    duration_s: float = inf
    """Requests and batch jobs that arrive later than this are left out."""
    horizon_s: float = inf
    """Stop here even if requests remain; else when the last one has ended."""
    grace_s: float = 7200.0
    """Without a horizon: stop this long after the last arrival or deadline."""
    kv_transfer_gb_per_s: float = 20.0
    """Host link of an instance: saves and restores the KV of evicted requests."""
    classes: Mapping[str, RequestClass]
    models: Mapping[str, ModelSection]
    gpus: Mapping[str, int] = field(default_factory=dict)
    """GPUs of each type that exist; a type not named is unlimited."""
    cold_start: ColdStart = field(default_factory=ColdStart)
    failures: Failures = field(default_factory=Failures)
    telemetry: Telemetry = field(default_factory=Telemetry)
    workload: tuple[StreamSection, ...] = ()
    batch_job: tuple[BatchJobSection, ...] = ()
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
        _require(bool(self.workload or self.batch_job), "workload", [], "add a [[workload]] or a [[batch_job]]")
        for gpu, count in self.gpus.items():
            _require(count >= 1, f"gpus.{gpu}", count, "must be 1 or more")
        for i, label in enumerate(self.compare):
            self.choice(label, f"compare[{i}]")
        entries = [(f"workload[{i}]", entry.model, entry.class_) for i, entry in enumerate(self.workload)]
        entries += [(f"batch_job[{i}]", job.model, job.class_) for i, job in enumerate(self.batch_job)]
        for path, model, cls in entries:
            _require_name(f"{path}.model", model, self.models)
            _require_name(f"{path}.class", cls, self.classes)
        for i, job in enumerate(self.batch_job):
            finite = job.deadline_s is not None or self.classes[job.class_].deadline_s < inf
            _require(finite, f"batch_job[{i}].deadline", "none", f"set it here or in classes.{job.class_}")

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
        known = dict.fromkeys([*self.policies, *POLICIES])
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
        text, directory = _read_text(path), path.parent
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


def override_text(assignment: str) -> str:
    """``path=value`` as an [[override]] table, which can follow any TOML text. The value is TOML, or else text."""
    path, equals, value = assignment.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {assignment!r}: expected path=value, for example classes.chat.ttft=2s")
    return f"\n[[override]]\npath = {json.dumps(path.strip())}\nvalue = {_as_toml(value.strip())}\n"


def _as_toml(value: str) -> str:
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return json.dumps(value, ensure_ascii=False)
    return value if list(parsed) == ["value"] else json.dumps(value, ensure_ascii=False)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _read_scenario(table: dict[str, Any], text: str, directory: Path, name: str) -> Scenario:
    for i, entry in enumerate(_tables(table, "override")):
        override = read_record(Override, entry, f"override[{i}]")
        _apply(table, override, f"override[{i}] ({override.path})")
    keys = [key for key in keys_of(Scenario) if key not in ("text", "directory")]
    for key, value in table.items():
        if key not in keys:
            raise ConfigError(f"{key}: unknown key (value {value!r}); {suggest(key, keys)}")
    given = {
        "classes": {
            key: read_record(RequestClass, entry, f"classes.{key}", name=key)
            for key, entry in _named(table, "classes", required=True).items()
        },
        "policies": {key: _read_policy(key, entry) for key, entry in _named(table, "policies").items()},
    }
    rest = {key: value for key, value in table.items() if key not in given}
    return read_record(Scenario, {"name": name, **rest}, "", text=text, directory=directory, **given)


def _read_policy(label: str, table: object) -> PolicyChoice:
    path = f"policies.{label}"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: {table!r} must be a table of settings")
    policy = table.get("policy", label)
    if policy not in POLICIES:
        where = f"{path}.policy" if "policy" in table else path
        raise ConfigError(f"{where}: unknown policy {policy!r}; {suggest(str(policy), POLICIES)}")
    settings = {key: value for key, value in table.items() if key != "policy"}
    return PolicyChoice(policy=policy, settings=read_record(POLICIES[policy].settings, settings, path))


def _named(table: Mapping[str, Any], key: str, required: bool = False) -> Mapping[str, Any]:
    section = table.get(key, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"{key}: {section!r} must be tables by name, [{key}.NAME]")
    if required and not section:
        raise ConfigError(f"{key}: missing; add at least one [{key}.NAME]")
    return section


def _tables(table: Mapping[str, Any], key: str) -> list[Any]:
    entries = table.get(key, [])
    if not isinstance(entries, list):
        raise ConfigError(f"{key}: {entries!r} must be tables, [[{key}]]")
    return entries


def _apply(table: dict[str, Any], override: Override, path: str) -> None:
    """Set one value in place. Tables on the way are made; entries of lists must exist."""
    at: Any = table
    *parents, last = _parts(override.path, path)
    for part in parents:
        at = at[_index(at, part, path)] if isinstance(at, list) else at.setdefault(part, {})
        if not isinstance(at, dict | list):
            raise ConfigError(f"{path}: {part!r} is a value ({at!r}), not a table")
    if isinstance(at, list):
        at[_index(at, last, path)] = override.value
    else:
        at[last] = override.value


def _parts(dotted: str, path: str) -> list[str]:
    """The keys of a dotted TOML key: a name with dots in it is quoted, as in ``models."llama-3.1".initial``."""
    try:
        found: Any = tomllib.loads(f"{dotted} = 0")
    except tomllib.TOMLDecodeError:
        raise ConfigError(f"{path}: not a dotted path; quote names that have other letters than a-z 0-9 _ -") from None
    parts: list[str] = []
    while isinstance(found, dict):
        (key,) = found
        parts.append(key)
        found = found[key]
    return parts


def _index(entries: list[Any], part: str, path: str) -> int:
    if not part.isdecimal() or int(part) >= len(entries):
        raise ConfigError(f"{path}: {part!r} must be the number of an entry, 0 to {len(entries) - 1}")
    return int(part)


def _require(fine: bool, path: str, value: object, what: str) -> None:
    if not fine:
        raise ConfigError(f"{path}: {value!r}: {what}")


def _require_name(path: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ConfigError(f"{path}: unknown name {name!r}; {suggest(name, known)}")
