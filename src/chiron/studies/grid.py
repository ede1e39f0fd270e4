"""``chiron compare`` over a grid: loads x policies x seeds, with confidence intervals and paired differences.

At one load and seed every policy gets the same requests, so policies are compared seed by seed: the difference has far
less spread than the figures have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from chiron.config.build import setups
from chiron.config.read import ConfigError
from chiron.config.scenario import Scenario
from chiron.sim.setup import Setup
from chiron.studies.objective import TARGET, worst_class
from chiron.studies.runner import Runner
from chiron.studies.statistics import Estimate, estimate
from chiron.studies.trial import Outcome, Summary, trial

CELLS_MAX = 20_000
LOADS_MAX = 100
SEEDS_MAX = 1000
JUDGED_AFTER = 2
"""Seeds after which a policy may be out of the question (``Asked.early``)."""
HOPELESS = TARGET - 0.05
"""Attainment of the worst class below which, in each of those seeds, it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    loads: tuple[float, ...]
    """Each multiplies the scenario's own ``scale``."""
    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    """The policy that the others are compared with."""
    bound_each: bool = False
    """Also the lower bound of each run, for what it delivered; else only that of the workload."""
    early: bool = False
    """A policy that is out of the question at a load after its first seeds runs no more of them there: whichever policy
    it is, by ``hopeless``."""

    def __post_init__(self) -> None:
        if self.baseline not in self.policies:
            raise ConfigError(f"--baseline {self.baseline}: does not run; choose one of {', '.join(self.policies)}")
        if self.cells > CELLS_MAX:
            raise ConfigError(f"{self.cells} simulations are asked for; the most is {CELLS_MAX}")

    @property
    def cells(self) -> int:
        return len(self.loads) * len(self.policies) * len(self.seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One policy at one load, over seeds."""

    load: float
    policy: str
    runs: Mapping[int, Summary]
    """By seed; fewer than were asked for where some failed, or where the policy was out of the question early."""
    failed: Mapping[int, str] = field(default_factory=dict)
    attainment: Mapping[str, Estimate] = field(default_factory=dict)
    """By class."""
    worst: float = 0.0
    """Of the worst class in the worst seed."""
    gpu_hours: Estimate | None = None
    """None: every run failed."""
    cost: Estimate | None = None
    bound: float | None = None
    """Mean over its seeds of the GPU-hours that every SLO needs at least."""
    gpu_hours_over_baseline: Estimate | None = None
    """Mean over seeds of the difference as a share of the baseline's; None for the baseline."""
    attainment_over_baseline: Estimate | None = None
    """Likewise of the worst class's, in points."""


Place = tuple[float, str, int]
"""Load, policy, seed."""


def grid(scenario: Scenario, asked: Asked, runner: Runner) -> list[Cell]:
    """Every cell, load by load; policies in the order in which they are asked for."""
    made = dict(_setups(scenario, asked))
    first = [place for place in made if not asked.early or place[2] in asked.seeds[:JUDGED_AFTER]]
    runner.total = len(made)
    outcomes = _run(made, first, asked, runner)
    out = {
        (load, policy)
        for load in asked.loads
        for policy in asked.policies
        if asked.early and hopeless(list(_runs(outcomes, load, policy).values()))
    }
    more = [place for place in made if place not in outcomes and place[:2] not in out]
    runner.total = len(first) + len(more)
    outcomes |= _run(made, more, asked, runner)
    return [_cell(asked, load, policy, outcomes) for load in asked.loads for policy in asked.policies]


def hopeless(runs: Sequence[Summary]) -> bool:
    """Whether the first seeds say enough: the worst class is more than five points below the target in each."""
    return len(runs) == JUDGED_AFTER and all(worst_class(summary) < HOPELESS for summary in runs)


def _setups(scenario: Scenario, asked: Asked) -> Iterator[tuple[Place, Setup]]:
    for load in asked.loads:
        scaled = scenario.with_overrides(f"scale={scenario.scale * load!r}")
        for setup in setups(scaled, policies=asked.policies, seeds=asked.seeds):
            yield (load, setup.label, setup.seed), setup


def _run(made: Mapping[Place, Setup], places: Sequence[Place], asked: Asked, runner: Runner) -> dict[Place, Outcome]:
    """All policies have one workload at a load and seed, and so one bound: the first that runs there has it."""
    with_bound = {(load, seed): policy for load, policy, seed in reversed(places)}
    trials = [
        trial(
            made[load, policy, seed],
            name=f"{policy} at load {load:g}, seed {seed}",
            with_bound=asked.bound_each or with_bound[load, seed] == policy,
        )
        for load, policy, seed in places
    ]
    return dict(zip(places, runner.run(trials), strict=True))


def _runs(outcomes: Mapping[Place, Outcome], load: float, policy: str) -> dict[int, Summary]:
    return {
        seed: outcome.summary
        for (at, name, seed), outcome in outcomes.items()
        if (at, name) == (load, policy) and outcome.summary is not None
    }


def _cell(asked: Asked, load: float, policy: str, outcomes: Mapping[Place, Outcome]) -> Cell:
    runs = _runs(outcomes, load, policy)
    base = None if policy == asked.baseline else _runs(outcomes, load, asked.baseline)
    failed = {
        seed: outcome.error
        for (at, name, seed), outcome in outcomes.items()
        if (at, name) == (load, policy) and outcome.error
    }
    if not runs:
        return Cell(load=load, policy=policy, runs={}, failed=failed)
    bounds = _bounds(outcomes, load)
    known = [bounds[seed] for seed in runs if seed in bounds]
    summaries = list(runs.values())
    classes = list(dict.fromkeys(name for summary in summaries for name in summary["attainment"]))
    return Cell(
        load=load,
        policy=policy,
        runs=runs,
        failed=failed,
        attainment={
            name: estimate([s["attainment"][name] for s in summaries if name in s["attainment"]], least=0.0, most=1.0)
            for name in classes
        },
        worst=min(worst_class(summary) for summary in summaries),
        gpu_hours=estimate([summary["gpu_hours"] for summary in summaries], least=0.0),
        cost=_cost(summaries),
        bound=fmean(known) if known else None,
        gpu_hours_over_baseline=_paired(runs, base, lambda mine, theirs: mine["gpu_hours"] / theirs["gpu_hours"] - 1.0),
        attainment_over_baseline=_paired(runs, base, lambda mine, theirs: worst_class(mine) - worst_class(theirs)),
    )


def _bounds(outcomes: Mapping[Place, Outcome], load: float) -> dict[int, float]:
    """By seed, where a run that had it did not fail."""
    return {
        seed: float(outcome.summary["gpu_hours_bound_full"])
        for (at, _, seed), outcome in outcomes.items()
        if at == load and outcome.summary is not None and outcome.summary["gpu_hours_bound_full"] is not None
    }


def _cost(summaries: Sequence[Summary]) -> Estimate | None:
    costs = [summary["cost"] for summary in summaries if summary.get("cost") is not None]
    return estimate(costs, least=0.0) if costs else None


def _paired(runs: Mapping[int, Summary], base: Mapping[int, Summary] | None, differ: Any) -> Estimate | None:
    """Over the seeds that both ran."""
    if base is None:
        return None
    both = [seed for seed in runs if seed in base and base[seed]["gpu_hours"] > 0]
    return estimate([differ(runs[seed], base[seed]) for seed in both]) if both else None


def as_json(scenario: str, asked: Asked, cells: Sequence[Cell]) -> dict[str, Any]:
    """All figures, and every run's summary."""
    return {
        "scenario": scenario,
        "loads": list(asked.loads),
        "policies": list(asked.policies),
        "seeds": list(asked.seeds),
        "baseline": asked.baseline,
        "confidence": 0.95,
        "cells": [_cell_json(cell) for cell in cells],
    }


def _cell_json(cell: Cell) -> dict[str, Any]:
    def said(value: Estimate | None) -> dict[str, Any] | None:
        return None if value is None else value.as_json()

    return {
        "load": cell.load,
        "policy": cell.policy,
        "attainment": {name: value.as_json() for name, value in cell.attainment.items()},
        "attainment_worst": cell.worst,
        "gpu_hours": said(cell.gpu_hours),
        "gpu_hours_bound_full": cell.bound,
        "cost": said(cell.cost),
        "gpu_hours_over_baseline": said(cell.gpu_hours_over_baseline),
        "attainment_over_baseline": said(cell.attainment_over_baseline),
        "failed": {str(seed): error for seed, error in cell.failed.items()},
        "runs": {str(seed): dict(summary) for seed, summary in cell.runs.items()},
    }


def loads_of(text: str) -> tuple[float, ...]:
    """``"0.4,1,2.5"``. Raises ConfigError."""
    allowed = f"numbers above 0, each once, at most {LOADS_MAX}, such as 0.4,1,2.5"
    try:
        loads = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--loads {text!r}: must be {allowed}") from None
    if not all(0 < load < 1e9 for load in loads) or len(set(loads)) < len(loads) or len(loads) > LOADS_MAX:
        raise ConfigError(f"--loads {text!r}: must be {allowed}")
    return loads


def seeds_of(text: str) -> tuple[int, ...]:
    """``"1..5"``, ``"1,2,7"`` or both, ``"1..3,7"``. Raises ConfigError."""
    allowed = f"whole numbers from 0 on, each once, at most {SEEDS_MAX}, such as 1..5 or 1,2,7"
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if not first.isdecimal() or len(first) > 9 or (dots and (not last.isdecimal() or len(last) > 9)):
            raise ConfigError(f"--seeds {text!r}: must be {allowed}")
        span = range(int(first), int(last or first) + 1)
        if not span or len(found) + len(span) > SEEDS_MAX:
            raise ConfigError(f"--seeds {text!r}: must be {allowed}")
        found += span
    if len(set(found)) < len(found):
        raise ConfigError(f"--seeds {text!r}: must be {allowed}")
    return tuple(found)
