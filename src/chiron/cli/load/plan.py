"""The request stream that the options of ``chiron load`` describe: a scenario's, a trace's or a generated one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import Any

from chiron.cli.common.durations import seconds_of
from chiron.config.build import workload_of
from chiron.config.read import ConfigError, read_record, suggest
from chiron.config.scenario import load_scenario
from chiron.core.types import RequestClass
from chiron.load.plan import BATCH_AS, JobKey, Lengths, LoadPlan, make_plan, mixed
from chiron.workload.generate import KINDS, Arrivals, generate
from chiron.workload.lengths import IndependentLengths, parse_field_lengths
from chiron.workload.lengths import Lengths as Drawn
from chiron.workload.load import load_lengths, load_trace
from chiron.workload.types import Trace

CLASSES = {
    "chat": RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.1),
    "flex": RequestClass(name="flex", kind="batch", deadline_s=3600.0),
}
"""Known without --class."""
DURATION_DEFAULT_S = 60.0
"""Of generated arrivals."""
CONSTANT = "constant"
"""Evenly spaced."""
ARRIVALS = (CONSTANT, *(name for name in KINDS if name != "closed-loop"))
"""Kinds of generated arrivals that are a rate."""


FITS = {
    "--model": ("--trace", "--rate"),
    "--class-mix": ("--trace", "--rate"),
    "--class": ("--trace", "--rate"),
    "--start": ("--trace",),
    "--kind": ("--rate",),
    "--arrival": ("--rate",),
    "--lengths": ("--rate",),
    "--input-tokens": ("--rate",),
    "--output-tokens": ("--rate",),
    "--set": ("--scenario",),
    "--batch-jobs": ("--scenario",),
    "--batch-wait": ("--scenario",),
}
"""Sources that an option says something about; one that is not here fits them all."""
DRAWN = ("--input-tokens", "--output-tokens")
"""Lengths of generated requests where no observed ones are given."""


def check_options(given: Sequence[str]) -> None:
    """That there is one source, and that no other option of the command line would be ignored.

    Raises ConfigError.
    """
    sources = [name for name in ("--trace", "--scenario", "--rate") if name in given]
    if len(sources) != 1:
        had = " and ".join(sources) or "none of them"
        raise ConfigError(f"what to send: give one of --trace, --scenario, --rate; there is {had}")
    (source,) = sources
    for option in given:
        if source not in FITS.get(option, (source,)):
            raise ConfigError(_does_not_fit(option, source))
        if option in DRAWN and "--lengths" in given:
            raise ConfigError(f"{option} does not go with --lengths, which says both lengths; leave one of them out")


def _does_not_fit(option: str, source: str) -> str:
    theirs = "; a scenario names its own, --set changes them" if source == "--scenario" else ""
    return f"{option} does not go with {source}, it belongs to {' or '.join(FITS[option])}; leave it out{theirs}"


def scenario_plan(
    source: str,
    assignments: Sequence[str] | None,
    rate_scale: float,
    duration: str | None,
    seed: int,
    batch_as: str,
    lengths: Lengths,
) -> LoadPlan:
    """The very workload of the simulator."""
    if batch_as not in BATCH_AS:
        raise ConfigError(f"--batch-jobs {batch_as!r}; {suggest(batch_as, BATCH_AS)}")
    overrides = list(assignments or ())
    if rate_scale != 1.0:
        overrides.append(f"scale={rate_scale!r}")
    if duration is not None:
        seconds_of("--duration", duration)
        overrides.append(f"duration={json.dumps(duration)}")
    loaded = load_scenario(source, overrides)
    jobs = [
        JobKey(
            model=job.model,
            cls=job.class_,
            at_s=float(job.at_s),
            deadline_s=loaded.classes[job.class_].deadline_s if job.deadline_s is None else job.deadline_s,
        )
        for job in loaded.batch_job
    ]
    return make_plan(
        workload_of(loaded, seed),
        name=loaded.name,
        seed=seed,
        text=loaded.text,
        jobs=jobs,
        batch_as=batch_as,
        lengths=lengths,
    )


def from_trace(source: str, start: str, duration: str | None, rate_scale: float, seed: int) -> Trace:
    duration_s = inf if duration is None else seconds_of("--duration", duration)
    return load_trace(
        source, start_s=seconds_of("--start", start), duration_s=duration_s, rate_scale=rate_scale, seed=seed
    )


def drawn_lengths(source: str | None, input_tokens: str, output_tokens: str) -> Drawn:
    """Observed lengths by name or path, else the two given."""
    if source is not None:
        return load_lengths(source)
    return IndependentLengths(input=parse_field_lengths(input_tokens), output=parse_field_lengths(output_tokens))


def generated(
    kind: str,
    rate: float,
    settings: Sequence[str] | None,
    duration: str | None,
    rate_scale: float,
    lengths: Drawn,
    seed: int,
) -> Trace:
    """Arrivals of a kind, from ``KEY=VALUE`` settings."""
    if not 0.0 < rate < inf:
        raise ConfigError(f"--rate {rate:g}: must be a finite number above 0")
    given = dict(_pair(text, "--arrival", "=") for text in settings or ())
    if kind not in ARRIVALS:
        raise ConfigError(f"--kind {kind!r}; {suggest(kind, ARRIVALS)}")
    if kind == CONSTANT:
        kind, given = "gamma", {"cv": "0", **given}
    table = {name: _number(value) for name, value in given.items()} | {"rate": rate * rate_scale}
    arrivals: Arrivals = read_record(KINDS[kind], table, "--arrival")
    duration_s = DURATION_DEFAULT_S if duration is None else seconds_of("--duration", duration)
    return generate(arrivals, duration_s=duration_s, lengths=lengths, seed=seed)


def mixed_plan(
    trace: Trace,
    name: str,
    model: str | None,
    mix: str,
    classes: Sequence[str] | None,
    seed: int,
    lengths: Lengths,
) -> LoadPlan:
    if not model:
        raise ConfigError("--model is missing: name the model to request")
    known = CLASSES | dict(_class(text) for text in classes or ())
    shares = {}
    for part in mix.split(","):
        cls, share = _pair(part.strip(), "--class-mix", "=")
        shares[cls] = _number(share)
        if not isinstance(shares[cls], float | int):
            raise ConfigError(f"--class-mix {part!r}: the share must be a number above 0")
    workload = mixed(trace, model=model, mix=shares, classes=known, seed=seed)
    return make_plan(workload, name=name, seed=seed, text=trace.source, lengths=lengths)


def _class(text: str) -> tuple[str, RequestClass]:
    """``chat=ttft:2s,itl:100ms``; what is not named keeps the default of a known class."""
    name, rest = _pair(text, "--class", "=")
    table: dict[str, object] = dict(_pair(part.strip(), f"--class {name}", ":") for part in rest.split(",") if part)
    base = CLASSES.get(name)
    if base is not None and table.get("kind", base.kind) == base.kind:
        made = read_record(RequestClass, {"kind": base.kind, **table}, f"--class {name}", name=name)
        given = {f"{key}_s" for key in table}
        kept = {key: getattr(base, key) for key in ("ttft_s", "itl_s", "deadline_s") if key not in given}
        return name, replace(made, **kept)
    return name, read_record(RequestClass, {"kind": "interactive", **table}, f"--class {name}", name=name)


def _pair(text: str, option: str, sign: str) -> tuple[str, str]:
    name, found, value = text.partition(sign)
    if not found or not name.strip() or not value.strip():
        raise ConfigError(f"{option} {text!r}: expected NAME{sign}VALUE")
    return name.strip(), value.strip()


def _number(text: str) -> Any:
    """A number if it is one: the reader of settings judges the rest."""
    with suppress(ValueError):
        return float(text)
    return text
