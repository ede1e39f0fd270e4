"""What settings are tuned on, and the proof that nothing of it is judged.

A calibration is a scenario and a part of it. Each part of a scenario names the requests that it takes as windows: from
when to when of which trace (known by its requests, so that a copy under another name or in another container is the
same), or of which generated stream or programs, and seed. Two parts that share a window share requests. What a policy
has lived through before time 0 it has seen too: of a calibration for the settings, of what is judged for the policy's
state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import inf, isfinite
from pathlib import Path

from chiron.config.build import HISTORY_FIRST, Part, source_of, workload_of
from chiron.config.read import ConfigError
from chiron.config.scenario import Scenario, load_scenario, scenario_files
from chiron.config.sections import StreamSection
from chiron.telemetry.format import span
from chiron.workload.load import trace_digest

FIRST_SHARE = 1 / 3
"""Of the workload's time, where nothing says what to tune on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Workloads to tune on."""

    scenario: Scenario
    part: Part

    @property
    def in_words(self) -> str:
        section = self.scenario.calibration
        if self.part == "calibration" and section is not None:
            return f"the first {span(section.first_s)} of {self.scenario.name}"
        return self.scenario.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Requests that a part of a scenario takes."""

    source: str
    """In words."""
    digest: str
    """Of the trace's requests, or of the generated stream with its seed."""
    start_s: float
    end_s: float

    def shares(self, other: Window) -> bool:
        return self.digest == other.digest and max(self.start_s, other.start_s) < min(self.end_s, other.end_s)


def calibrations(judged: Scenario, sources: Sequence[str], first_s: float | None) -> tuple[Scenario, list[Calibration]]:
    """The scenario as it is to be judged, and what to tune on: as told (``sources``, scenarios or traces; or the
    first seconds), else as the scenario's own ``calibration`` says, else its first third."""
    if sources and first_s is not None:
        raise ConfigError("give either --calibrate or --first")
    section = judged.calibration
    if sources:
        return judged, [_of_source(judged, source) for source in sources]
    if first_s is None and section is not None and section.scenarios:
        return judged, [_of_source(judged, str(source_of(judged, name))) for name in section.scenarios]
    if first_s is None and section is None:
        first_s = _third_s(judged)
    if first_s is not None:
        judged = with_first(judged, first_s)
    workload_of(judged, judged.seeds[0])  # Something must be left to judge.
    return judged, [Calibration(scenario=judged, part="calibration")]


def with_first(scenario: Scenario, first_s: float) -> Scenario:
    """The scenario, with its first seconds for tuning and the rest to be judged."""
    for i, stream in enumerate(scenario.workload):
        if stream.repeat > 1:
            raise ConfigError(
                f"workload[{i}].repeat: {stream.repeat}; what is played again would be tuned on and judged: "
                "calibrate on another scenario or trace"
            )
    return scenario.with_overrides(f"calibration={{ first = {first_s!r} }}")


def _third_s(scenario: Scenario) -> float:
    workload = workload_of(scenario, scenario.seeds[0])
    return float(f"{FIRST_SHARE * float(workload.arrival_s[-1]):.3g}")


def _of_source(judged: Scenario, source: str) -> Calibration:
    """A scenario by file or name, or the judged one with another trace."""
    if source in scenario_files() or Path(source).suffix == ".toml":
        scenario = load_scenario(source)
        first = scenario.calibration is not None and scenario.calibration.first_s > 0
        return Calibration(scenario=scenario, part="calibration" if first else "judged")
    place = Path(source)
    name = str(place.resolve()) if place.is_file() else source
    for i, stream in enumerate(judged.workload):
        if stream.generate is not None:
            raise ConfigError(
                f"--calibrate {source}: takes the place of traces, and workload[{i}] is generated; name a scenario"
            )
    if judged.program:
        raise ConfigError(
            f"--calibrate {source}: takes the place of traces, and program[0] would be tuned on and judged; name a "
            "scenario"
        )
    changes = {"trace": json.dumps(name), "format": '"auto"', "start": "0", "duration": "inf"}
    overrides = [f"workload.{i}.{key}={value}" for i in range(len(judged.workload)) for key, value in changes.items()]
    scenario = replace(judged.with_overrides(*overrides), name=f"{judged.name} with {place.name}", calibration=None)
    return Calibration(scenario=scenario, part="judged")


def check_apart(tuned_on: Sequence[Window], judged: Sequence[Window], what: str) -> None:
    """Raise ConfigError if they share requests."""
    for window in tuned_on:
        for other in judged:
            if window.shares(other):
                raise ConfigError(
                    f"{what}: {window.source} {_span(window, other)} is both tuned on and judged; settings that have "
                    "seen the answers prove nothing: calibrate on another trace or time"
                )


def seen(calibration: Sequence[Calibration], seeds: Sequence[int] | None) -> list[Window]:
    """All requests of these calibrations, those of their histories too; each window once."""
    found = [
        window
        for each in calibration
        for window in (*windows(each.scenario, each.part, seeds), *history_windows(each.scenario, seeds))
    ]
    return list(dict.fromkeys(found))


def check_judged(tuned_on: Sequence[Window], judged: Scenario, seeds: Sequence[int] | None, what: str) -> None:
    """Raise ConfigError if what the scenario judges was tuned on, or is in the history that its policies live through
    first."""
    asked = windows(judged, "judged", seeds)
    for past in history_windows(judged, seeds):
        for other in asked:
            if past.shares(other):
                raise ConfigError(
                    f"{judged.name}: {past.source} and {other.source} share {_span(past, other)}; a policy that has "
                    "lived through what it is judged by proves nothing: end the history before it"
                )
    check_apart(tuned_on, asked, what)


def windows(scenario: Scenario, part: Part, seeds: Sequence[int] | None = None) -> list[Window]:
    """All requests of a part, but for those of batch jobs, whose lengths are drawn."""
    first_s = scenario.calibration.first_s if scenario.calibration is not None else 0.0
    span_s = (0.0, min(first_s, scenario.duration_s)) if part == "calibration" else (first_s, scenario.duration_s)
    streams = _windows(scenario, "workload", scenario.workload, span_s, 0, seeds)
    return [*streams, *_program_windows(scenario, span_s, seeds)]


def history_windows(scenario: Scenario, seeds: Sequence[int] | None = None) -> list[Window]:
    """All requests before time 0."""
    return _windows(scenario, "history", scenario.history, (0.0, inf), HISTORY_FIRST, seeds)


def _windows(
    scenario: Scenario,
    path: str,
    streams: Sequence[StreamSection],
    span_s: tuple[float, float],
    first: int,
    seeds: Sequence[int] | None,
) -> list[Window]:
    """``first``: number of the first stream, by which its draws are named."""
    of = "" if path == "workload" else f" of the {path}"
    found = []
    for number, stream in enumerate(streams):
        start_s, end_s = _covered(stream, *span_s)
        if start_s >= end_s:
            continue
        if stream.generate is None:
            digest = trace_digest(source_of(scenario, stream.trace), format=stream.format)
            found.append(Window(source=f"trace {stream.trace}{of}", digest=digest, start_s=start_s, end_s=end_s))
            continue
        for seed in seeds or scenario.seeds:
            drawn = f"{stream.generate!r} {stream.rate_scale * scenario.scale!r} {first + number} {seed}"
            digest = sha256(drawn.encode()).hexdigest()
            source = f"the generated {path}[{number}] of seed {seed}"
            found.append(Window(source=source, digest=digest, start_s=start_s, end_s=end_s))
    return found


def _program_windows(scenario: Scenario, span_s: tuple[float, float], seeds: Sequence[int] | None) -> list[Window]:
    """Programs that begin in these seconds. Each is taken whole."""
    found = []
    for number, section in enumerate(scenario.program):
        end_s = min(span_s[1], section.arrivals.duration_s)
        if span_s[0] >= end_s:
            continue
        drawn = replace(section, model="", class_="", name="", key="", deadline_s=inf)  # Labels: they draw nothing.
        for seed in seeds or scenario.seeds:
            digest = sha256(f"{drawn!r} {scenario.scale!r} {number} {seed}".encode()).hexdigest()
            source = f"program[{number}] of seed {seed}"
            found.append(Window(source=source, digest=digest, start_s=span_s[0], end_s=end_s))
    return found


def _covered(stream: StreamSection, begin_s: float, end_s: float) -> tuple[float, float]:
    """Of the stream's source, what arrives in these seconds of the scenario; all of it where it is repeated."""
    if stream.repeat > 1:
        return stream.start_s, stream.start_s + stream.duration_s
    first_s = max(0.0, begin_s - stream.offset_s)
    last_s = min(stream.duration_s, end_s - stream.offset_s)
    return stream.start_s + first_s, stream.start_s + last_s


def _span(one: Window, other: Window) -> str:
    """The time that both have."""
    return f"from {_at(max(one.start_s, other.start_s))} to {_at(min(one.end_s, other.end_s))}"


def _at(moment_s: float) -> str:
    return f"{moment_s / 60:.4g} min" if isfinite(moment_s) else "its end"
