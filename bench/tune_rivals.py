"""Fair tuning of the rivals, on calibration scenarios that share no request with the published ones.

    python bench/tune_rivals.py              search, then write tuned.json and the constants of the -tuned policies
    python bench/tune_rivals.py --static azure.toml     the smallest static fleet that attains 99 %, for one scenario

Every rival gets the same: a grid over the settings that its users turn, on three calibration scenarios with two seeds
each. A candidate's attainment in a scenario is that of its worst class, counted up to 99 %; its cost is its GPU-hours
over the least that any candidate of any rival needed there. Chosen is the cheapest within a point of the best mean
attainment, or one that attains more at a cost within 3 % of that: more than 99 % earns nothing, and other seeds change
the mean by a point or more. One setting serves all published scenarios, as ours does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from chiron.config.build import setups
from chiron.config.read import ConfigError
from chiron.config.scenario import load_scenario
from chiron.sim.many import Run, default_jobs, run_many
from chiron.sim.setup import Setup

COMMAND = "python bench/tune_rivals.py"
HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "src" / "chiron"
CALIBRATION = ("api-8b", "waves-8b", "api-70b")
ATTAINMENT_ENOUGH = 0.99
SEEDS = (1, 2)
NEAR_BEST = 0.01
"""Candidates within this much of the best attainment compete on cost."""
NEAR_CHEAPEST = 0.03
"""Those within this share of the cheapest of them compete on attainment."""

Values = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One candidate over the calibration scenarios."""

    policy: str
    values: Values
    attainment: tuple[float, ...]
    """Worst class's, by scenario, uncapped; mean over the seeds, as the next."""
    gpu_hours: tuple[float, ...]

    @property
    def mean_capped(self) -> float:
        return fmean(min(a, ATTAINMENT_ENOUGH) for a in self.attainment)

    def cost(self, least: Sequence[float]) -> float:
        """Mean GPU-hours over the least seen in each scenario."""
        return fmean(g / unit for g, unit in zip(self.gpu_hours, least, strict=True))


def best(scores: Sequence[Score], least: Sequence[float]) -> Score:
    top = max(s.mean_capped for s in scores)
    good = [s for s in scores if s.mean_capped >= top - NEAR_BEST]
    cheapest = min(s.cost(least) for s in good)
    return max((s for s in good if s.cost(least) <= cheapest * (1.0 + NEAR_CHEAPEST)), key=lambda s: s.mean_capped)


# -- the grids -----------------------------------------------------------------------------------------------------

UP_OF_EXPERIMENT = (5, 10, 25, 45, 65, 85)
"""Llumnix's own sweep of the scale-up threshold, y = x + 50."""
UP_BEYOND = (150, 400, 1000, 1500, 2500)
"""KV caches here hold tens of times the blocks of a 7B model on a 24 GB GPU, so freeness is larger throughout."""
SEQS = (64, 128, 512)
"""Besides 256."""


def first_round() -> dict[str, list[Values]]:
    """The settings that decide most, by policy."""
    own = [{"scale_up_blocks": float(x), "scale_down_blocks": x + 50.0} for x in UP_OF_EXPERIMENT]
    beyond = [
        {"scale_up_blocks": float(x), "scale_down_blocks": float(y)} for x in UP_BEYOND for y in (x + 50, 2 * x, 4 * x)
    ]
    thetas: list[Values] = [{"theta": t} for t in (0.2, 1 / 3, 0.5, 0.6, 0.75, 0.9)]
    return {
        "llumnix": own + beyond,
        "hpa-queue": [{"target": t} for t in (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)],
        "hpa-kv": [{"target": t} for t in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)],
        "chiron-paper": thetas,
    }


def second_round(found: Mapping[str, Score]) -> dict[str, list[Values]]:
    """Max batch sizes around what the first round found; chiron-paper finds its own."""
    return {
        name: [{**found[name].values, "max_num_seqs": n} for n in SEQS] for name in ("llumnix", "hpa-queue", "hpa-kv")
    }


# -- running -------------------------------------------------------------------------------------------------------


class Bench:
    """The calibration setups, made once, and every score so far."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.scores: list[Score] = []
        self._bases: dict[tuple[str, str, int], Setup] = {}

    def run(self, grid: Mapping[str, Sequence[Values]]) -> None:
        candidates = [(policy, values) for policy, rows in grid.items() for values in rows]
        runs = [
            Run(setup=self._setup(policy, scenario, seed, values))
            for policy, values in candidates
            for scenario in CALIBRATION
            for seed in SEEDS
        ]
        figures: list[tuple[float, float]] = [(0.0, 0.0)] * len(runs)
        for ended, done in enumerate(run_many(runs, jobs=self.jobs), 1):
            if done.result is None:
                raise SystemExit(f"{done.run.name}: {done.error}\n{done.details}")
            summary = done.result.summary
            figures[done.index] = min(summary["attainment"].values()), summary["gpu_hours"]
            print(f"\r{ended}/{len(runs)} runs", end="", file=sys.stderr)
        print(file=sys.stderr)
        cells = iter(figures)
        for policy, values in candidates:
            rows = [[next(cells) for _ in SEEDS] for _ in CALIBRATION]
            self.scores.append(
                Score(
                    policy=policy,
                    values=values,
                    attainment=tuple(fmean(attainment for attainment, _ in row) for row in rows),
                    gpu_hours=tuple(fmean(gpu_hours for _, gpu_hours in row) for row in rows),
                )
            )

    def best(self, policy: str) -> Score:
        return best([s for s in self.scores if s.policy == policy], self.least())

    def least(self) -> list[float]:
        """Fewest GPU-hours of any candidate in each scenario."""
        return [min(s.gpu_hours[i] for s in self.scores) for i in range(len(CALIBRATION))]

    def _setup(self, policy: str, scenario: str, seed: int, values: Values) -> Setup:
        if (policy, scenario, seed) not in self._bases:
            loaded = load_scenario(HERE / "calibration" / f"{scenario}.toml")
            for setup in setups(loaded, policies=list(first_round()), seeds=SEEDS):
                self._bases[setup.policy, scenario, setup.seed] = setup
        base = self._bases[policy, scenario, seed]
        return replace(base, settings=replace(base.settings, **values))


def best_static(source: str | Path) -> dict[str, Any]:
    """The fewest instances (the same of each model) whose worst class attains enough, by bisection; the most that
    are allowed if none does."""
    (base,) = setups(load_scenario(source), policies=["static"])

    def figures(instances: int) -> tuple[float, float]:
        started = {name: min(instances, count) for name, count in base.initial.items()}
        setup = replace(base, initial=started, settings=replace(base.settings, instances=instances))
        (done,) = run_many([Run(setup=setup)], jobs=1)
        if done.result is None:
            raise SystemExit(f"{done.run.name}: {done.error}\n{done.details}")
        return min(done.result.summary["attainment"].values()), done.result.summary["gpu_hours"]

    low, high = 1, max(m.max_instances for m in base.models)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if figures(middle)[0] >= ATTAINMENT_ENOUGH else (middle + 1, high)
    attainment, gpu_hours = figures(low)
    return {"instances": low, "attainment": round(attainment, 4), "gpu_hours": round(gpu_hours, 3)}


# -- writing -------------------------------------------------------------------------------------------------------

CONSTANTS = {
    "LLUMNIX_SCALE_UP_BLOCKS": ("llumnix", "scale_up_blocks", 10.0),
    "LLUMNIX_SCALE_DOWN_BLOCKS": ("llumnix", "scale_down_blocks", 60.0),
    "LLUMNIX_MAX_NUM_SEQS": ("llumnix", "max_num_seqs", 256),
    "HPA_QUEUE_TARGET": ("hpa-queue", "target", 5.0),
    "HPA_QUEUE_MAX_NUM_SEQS": ("hpa-queue", "max_num_seqs", 256),
    "HPA_KV_TARGET": ("hpa-kv", "target", 0.7),
    "HPA_KV_MAX_NUM_SEQS": ("hpa-kv", "max_num_seqs", 256),
    "CHIRON_PAPER_THETA": ("chiron-paper", "theta", 1 / 3),
}
"""Constant of ``rivals/tuned.py``: policy, setting, and its value where the grid left it alone."""


def constants(found: Mapping[str, Score]) -> str:
    """The text of ``rivals/tuned.py``."""
    lines = [
        '"""Values found by ``python bench/tune_rivals.py``, which writes this file; do not edit it by hand."""',
        "",
    ]
    for name, (policy, setting, default) in CONSTANTS.items():
        value = found[policy].values.get(setting, default)
        lines.append(f"{name}: {type(value).__name__} = {value!r}")
    return "\n".join(lines) + "\n"


def record(bench: Bench, found: Mapping[str, Score], static: Mapping[str, Any]) -> dict[str, Any]:
    """What ``tuned.json`` holds: what was chosen, and every candidate behind it."""
    least = bench.least()
    return {
        "command": COMMAND,
        "criterion": (
            f"cheapest within {NEAR_BEST:g} of the best mean attainment of the worst class, counted up to "
            f"{ATTAINMENT_ENOUGH:g}; among those within {NEAR_CHEAPEST:g} of its cost, the best attainment"
        ),
        "seeds": list(SEEDS),
        "scenarios": [f"bench/calibration/{name}.toml" for name in CALIBRATION],
        "chosen": {name: _row(score, least) for name, score in found.items()},
        "static": dict(static),
        "candidates": {name: [_row(s, least) for s in bench.scores if s.policy == name] for name in found},
    }


def _row(score: Score, least: Sequence[float]) -> dict[str, Any]:
    return {
        "settings": {key: round(value, 6) for key, value in score.values.items()},
        "attainment": [round(a, 4) for a in score.attainment],
        "gpu_hours": [round(g, 3) for g in score.gpu_hours],
        "cost": round(score.cost(least), 3),
    }


def tune(jobs: int) -> None:
    started = time.monotonic()
    bench = Bench(jobs)
    bench.run(first_round())
    bench.run(second_round({name: bench.best(name) for name in first_round()}))
    found = {name: bench.best(name) for name in first_round()}
    static = {name: best_static(HERE / "calibration" / f"{name}.toml") for name in CALIBRATION}
    (PACKAGE / "policies" / "rivals" / "tuned.py").write_text(constants(found), encoding="utf-8")
    text = json.dumps(record(bench, found, static), indent=1) + "\n"
    (PACKAGE / "data" / "tuned.json").write_text(text, encoding="utf-8")
    for name, score in found.items():
        print(name, _row(score, bench.least()))
    for name, row in static.items():
        print("static", name, row)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", metavar="SCENARIO", help="only find the best static fleet of this scenario")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="runs at once (default: the cores)")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs is {arguments.jobs}; it must be 1 or more")
    if arguments.static is None:
        tune(arguments.jobs)
        return 0
    try:
        print(json.dumps(best_static(arguments.static)))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
