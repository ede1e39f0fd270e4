"""Chiron from Python: what the command line does, as functions that return values.

    import chiron
    results = chiron.compare("demo", policies=["chiron", "llumnix"])
    print(results[0].summary["gpu_hours"])
    chiron.report(results, "report.html")

``scenario`` is a path, the name of a packaged scenario, or a loaded ``Scenario``. Bad input raises a ValueError that
names the field, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from chiron.config.build import setups
from chiron.config.scenario import Scenario, load_scenario, scenario_files
from chiron.sim.bound import Bound
from chiron.sim.bound import bound as bound_of_setup
from chiron.sim.many import Progress, Run, run_many
from chiron.telemetry.html import write_report
from chiron.telemetry.result import Result
from chiron.telemetry.store import load_result, save_result

__all__ = [
    "Bound",
    "Result",
    "RunFailedError",
    "Scenario",
    "bound",
    "compare",
    "load_result",
    "load_scenario",
    "report",
    "save_result",
    "scenarios",
    "simulate",
]


class RunFailedError(RuntimeError):
    """Some runs failed, by a fault of the program. ``results`` holds those that did not."""

    def __init__(self, message: str, results: Sequence[Result]) -> None:
        super().__init__(message)
        self.results = list(results)


def scenarios() -> list[str]:
    """Names of the packaged scenarios."""
    return list(scenario_files())


def simulate(
    scenario: str | Path | Scenario,
    policy: str | None = None,
    seed: int | None = None,
    *,
    overrides: Sequence[str] = (),
) -> Result:
    """One policy, one seed (default: the scenario's first of each)."""
    loaded = _loaded(scenario, overrides)
    policies = [policy or loaded.labels[0]]
    (result,) = compare(loaded, policies, [loaded.seeds[0] if seed is None else seed], jobs=1)
    return result


def compare(
    scenario: str | Path | Scenario,
    policies: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Each policy on each seed, in that order (defaults: the scenario's); ``jobs`` at a time, default the cores.

    ``overrides`` are ``path=value``, as for ``--set``. ``progress(run, fraction)`` hears of each run by number.
    """
    runs = [Run(setup=setup) for setup in setups(_loaded(scenario, overrides), policies=policies, seeds=seeds)]
    with closing(run_many(runs, jobs=jobs, progress=progress)) as ends:
        done = sorted(ends, key=lambda end: end.index)
    results = [end.result for end in done if end.result is not None]
    failed = [end for end in done if end.result is None]
    if failed:
        raise RunFailedError(
            "\n".join(f"{end.run.name}: {end.error}\n{end.details}".rstrip() for end in failed), results
        )
    return results


def bound(scenario: str | Path | Scenario, seed: int | None = None, *, overrides: Sequence[str] = ()) -> Bound:
    """The fewest GPU-hours that any scheduler could need for the scenario."""
    loaded = _loaded(scenario, overrides)
    seeds = [loaded.seeds[0] if seed is None else seed]
    (setup,) = setups(loaded, policies=loaded.labels[:1], seeds=seeds)
    return bound_of_setup(setup)


def report(results: Iterable[Result], path: str | Path) -> Path:
    """Write one self-contained HTML page about the results of one scenario."""
    write_report(list(results), Path(path))
    return Path(path)


def _loaded(scenario: str | Path | Scenario, overrides: Sequence[str]) -> Scenario:
    if isinstance(scenario, Scenario):
        return scenario.with_overrides(*overrides)
    return load_scenario(scenario, overrides)
