"""Settings that were tuned, with the search behind them, as a TOML file: ``chiron compare -p NAME --settings FILE``.

``[policies.NAME]`` is what a scenario file would have. ``[search.NAME]`` says how the values were found, and
``[[calibration]]`` which requests they have seen: a scenario that judges by those is refused.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from chiron.config.policies import read_policies
from chiron.config.read import ConfigError, fields_by_key, read_record, read_text
from chiron.config.scenario import Scenario
from chiron.policies.ranges import Value
from chiron.studies.calibration import Calibration, Window, check_judged, seen, with_first
from chiron.studies.objective import IN_WORDS, STEP
from chiron.studies.search import Candidate, Values
from chiron.studies.tune import Budget, Tuned

TOP = 5
"""Best trials that are kept with the search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """A window, as the file has it."""

    source: str
    digest: str
    start: float
    end: float = inf


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsFile:
    path: Path
    policies: Mapping[str, Any]
    """Tables of policies by label, as in a scenario."""
    seen: tuple[Window, ...]
    first: Mapping[str, float]
    """Scenarios of which the first seconds were tuned on, by name."""


def settings_text(
    found: Sequence[Tuned],
    calibration: Sequence[Calibration],
    seeds: Sequence[int] | None,
    budget: Budget,
    **about: str,
) -> str:
    """The file. ``about``: more lines at its top, such as command and version."""
    lines = ["# Written by chiron tune: settings, and the search that found them."]
    lines += [f"{key} = {_toml(value)}" for key, value in about.items()]
    lines += [f"objective = {_toml(IN_WORDS.format(target=budget.target, step=STEP))}"]
    for tuned in found:
        lines += ["", *_policy_table(tuned), "", *_search_table(tuned, calibration, budget)]
    for each in calibration:
        section = each.scenario.calibration
        if each.part == "calibration" and section is not None:
            lines += ["", "[[first]]", f"scenario = {_toml(each.scenario.name)}", f"seconds = {section.first_s!r}"]
    for window in seen(calibration, seeds):
        lines += ["", "[[calibration]]", f"source = {_toml(window.source)}", f"digest = {_toml(window.digest)}"]
        lines += [f"start = {window.start_s!r}", f"end = {window.end_s!r}"]
    return "\n".join(lines) + "\n"


def _policy_table(tuned: Tuned) -> list[str]:
    lines = [f"[policies.{_toml(tuned.label)}]"]
    if tuned.label != tuned.choice.policy:
        lines.append(f"policy = {_toml(tuned.choice.policy)}")
    return lines + [f"{_key(type(tuned.choice.settings), name)} = {_toml(v)}" for name, v in tuned.values.items()]


def _search_table(tuned: Tuned, calibration: Sequence[Calibration], budget: Budget) -> list[str]:
    label = _toml(tuned.label)
    best = tuned.best
    lines = [
        f"[search.{label}]",
        f"seed = {budget.seed}",
        f"trials = {len(tuned.candidates)}",
        f"stopped = {tuned.stopped}",
    ]
    lines += [f"target = {budget.target!r}", f"best = {best.number + 1}"]
    lines += [f"calibration = {_toml([each.in_words for each in calibration])}"]
    lines += [f"ranges = {_toml([f'{each.name}: {each.range}' for each in tuned.space])}"]
    lines += [f"starts = {_toml([_in_words(values) for values in tuned.starts])}"]
    for candidate in ranking(tuned)[:TOP]:
        if candidate.score is None or candidate.score.stopped:
            continue
        lines += ["", f"[[search.{label}.top]]", f"trial = {candidate.number + 1}"]
        lines += [
            f"shortfall = {_toml(round(candidate.score.shortfall, 6))}",
            f"shortfall_worst = {_toml(round(candidate.score.worst_shortfall, 6))}",
            f"gpu_hours_over_bound = {_toml(round(candidate.score.cost, 4))}",
            f"attainment = {_toml(round(candidate.score.attainment, 6))}",
            f"gpu_hours = {_toml(round(candidate.score.gpu_hours, 4))}",
        ]
        kind = type(tuned.choice.settings)
        lines += [f"settings.{_key(kind, name)} = {_toml(v)}" for name, v in candidate.values.items()]
    return lines


def _in_words(values: Values) -> str:
    return ", ".join(f"{name} = {_toml(value)}" for name, value in values.items())


def ranking(tuned: Tuned) -> list[Candidate]:
    """Candidates, best first."""
    return sorted(tuned.candidates, key=lambda each: (each.rank, each.number))


def read_settings(path: Path) -> SettingsFile:
    """Raises ConfigError, which names the file, the key and what is allowed."""
    text = read_text(path)
    try:
        table = tomllib.loads(text)
        policies = table.get("policies")
        if not isinstance(policies, Mapping) or not policies:
            raise ConfigError("policies: missing; `chiron tune` writes a table for each policy")
        read_policies(table)
        seen = [read_record(_Seen, entry, f"calibration[{i}]") for i, entry in enumerate(_tables(table, "calibration"))]
        first = [read_record(_First, entry, f"first[{i}]") for i, entry in enumerate(_tables(table, "first"))]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return SettingsFile(
        path=path,
        policies=policies,
        seen=tuple(Window(source=s.source, digest=s.digest, start_s=s.start, end_s=s.end) for s in seen),
        first={each.scenario: each.seconds for each in first},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _First:
    scenario: str
    seconds: float


def apply_settings(scenario: Scenario, file: SettingsFile, seeds: Sequence[int] | None) -> Scenario:
    """The scenario with the file's policies; what they were tuned on is not judged. Raises ConfigError if it is."""
    first_s = file.first.get(scenario.name)
    made = scenario.with_overrides(*_assignments(file.policies))
    if scenario.calibration is not None:
        made = with_first(made, scenario.calibration.first_s) if scenario.calibration.first_s else made
    elif first_s is not None:
        made = with_first(made, first_s)
    check_judged(file.seen, made, seeds, str(file.path))
    return made


def _assignments(policies: Mapping[str, Any]) -> list[str]:
    """Each value as ``--set`` has it. Those of a table in a table go one by one, beside what the scenario sets."""
    return [
        f"policies.{json.dumps(label)}.{key}={_toml(value)}"
        for label, table in policies.items()
        for key, value in _flat(table)
    ]


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in table.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return found


def _tables(table: Mapping[str, Any], key: str) -> list[Any]:
    entries = table.get(key, [])
    if not isinstance(entries, list):
        raise ConfigError(f"{key}: {entries!r} must be tables, [[{key}]]")
    return entries


def _key(kind: type[Any], name: str) -> str:
    """A setting's dotted name as keys of a scenario file."""
    own, _, rest = name.partition(".")
    key, field = next((key, field) for key, field in fields_by_key(kind).items() if field.name == own)
    return f"{key}.{_key(type(field.default), rest)}" if rest else key


def _toml(value: Value | list[str]) -> str:
    if isinstance(value, float) and value in (inf, -inf):
        return "inf" if value > 0 else "-inf"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
