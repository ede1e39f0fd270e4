"""One simulation of a study, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from chiron.sim.run import simulate
from chiron.sim.setup import Setup
from chiron.workload.types import Programs, Workload

Summary = Mapping[str, Any]
"""The summary of a run (``telemetry.summary``) without ``wall_s``: the same wherever it was simulated."""

NOT_IN_KEY = ("scenario", "scenario_text", "label", "workload")
"""Fields of a setup that are names, and the workload, which counts by its content."""
BOUNDS = ("gpu_hours_bound", "gpu_hours_bound_full", "cost_bound")
CODE = ("core", "control", "engines", "fleet", "policies", "runtime", "sim", "telemetry", "workload")
"""Packages that a simulation runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A simulation to do. Two with equal keys have equal results."""

    setup: Setup
    name: str
    """For messages."""
    with_bound: bool = False
    """Also the lower bound of GPU-hours; it takes a while."""
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a trial ended: with a summary, or with an error in words."""

    summary: Summary | None = None
    error: str = ""
    details: str = ""


def trial(setup: Setup, *, name: str = "", with_bound: bool = False) -> Trial:
    named = name or f"{setup.label or setup.policy}, seed {setup.seed}"
    return Trial(setup=setup, name=named, with_bound=with_bound, key=_key(setup, with_bound))


def simulated(setup: Setup, *, with_bound: bool) -> Summary:
    summary = dict(simulate(setup, with_bound=with_bound).summary)
    del summary["wall_s"]
    # Without a bound they are 0, which reads as a figure.
    return summary if with_bound else summary | dict.fromkeys(BOUNDS)


def workload_digest(workload: Workload | Programs) -> str:
    """Of the requests, as they are."""
    digest = sha256()
    for field in fields(workload):
        value = getattr(workload, field.name)
        if isinstance(value, Programs):
            value = workload_digest(value)
        digest.update(field.name.encode())
        digest.update(np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def _key(setup: Setup, with_bound: bool) -> str:
    """Of all that the result depends on: requests, fleet, policy, seed, and the code."""
    digest = sha256(f"{code_digest()} {with_bound} {workload_digest(setup.workload)}".encode())
    for field in fields(setup):
        if field.name not in NOT_IN_KEY:
            value = getattr(setup, field.name)
            # The text of an array leaves out most of it.
            text = workload_digest(value) if isinstance(value, Workload) else repr(value)
            digest.update(f"{field.name}={text}\n".encode())
    return digest.hexdigest()[:32]


@cache
def code_digest() -> str:
    """Of the source that simulates: what was computed by another version is computed anew."""
    digest = sha256()
    for path in _sources():
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    root = Path(str(resources.files("chiron")))
    for package in CODE:
        yield from sorted((root / package).rglob("*.py"))
