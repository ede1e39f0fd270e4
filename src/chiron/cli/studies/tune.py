"""``chiron tune``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from chiron.cli.common.durations import seconds_of
from chiron.cli.simulate.tables import results_console
from chiron.cli.studies.common import (
    JobsOption,
    RayOption,
    RayPythonOption,
    StudyFiguresOption,
    check_figures,
    check_file,
    executor,
    running,
    write_whole,
)
from chiron.config.read import ConfigError
from chiron.config.scenario import Scenario, load_scenario
from chiron.studies.calibration import Calibration, calibrations, check_judged, seen
from chiron.studies.search import explored
from chiron.studies.settings_file import TOP, ranking, settings_text
from chiron.studies.tune import Budget, Tuned, expected_trials, tunable_choice, workloads
from chiron.studies.tune import tune as tune_policy
from chiron.telemetry import axes
from chiron.telemetry.chart_files import write_charts
from chiron.telemetry.format import amount, counted, listed, percent
from chiron.telemetry.marks import Chart, Panel, Rule, Series
from chiron.telemetry.palette import COLOURS

INTERRUPTED = 130
ROOM = 1.06
"""An axis ends this far beyond what it shows."""


def tune(
    scenario: Annotated[
        list[str],
        typer.Argument(metavar="SCENARIO...", help="What the settings are for, and will be judged by: file or name."),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", help="A policy, or a label of the (first) scenario. Repeatable."),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            "--calibrate",
            "-c",
            metavar="SOURCE",
            help="What to tune on: a scenario, or a trace for the scenario's streams. Repeatable. Default: the "
            "scenario's [calibration], else its first third.",
        ),
    ] = None,
    first: Annotated[
        str | None, typer.Option("--first", metavar="TIME", help="Tune on the first part of the workload, such as 20m.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", "-s", min=0, help="Seeds of the simulations. Repeatable.")
    ] = None,
    trials: Annotated[int, typer.Option("--trials", "-n", help="Candidates to try, for each policy.")] = 32,
    target: Annotated[float, typer.Option("--target", help="Share of each class that must be within its SLO.")] = 0.99,
    search_seed: Annotated[int, typer.Option("--search-seed", min=0, help="Of the search.")] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.toml", help="Where settings go.")] = Path(
        "tuned.toml"
    ),
    figures: StudyFiguresOption = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set a value of the scenario. Repeatable.")
    ] = None,
    jobs: JobsOption = "auto",
    ray: RayOption = "",
    ray_python: RayPythonOption = "",
) -> None:
    """Search the settings of a policy, on requests that are not judged; write them with the search behind them.

    Sought are the fewest GPU-hours with 99 % of every class within its SLO. Every policy gets the same budget. Stopped
    at any moment and started again it goes on: trials are kept in FILE.trials.jsonl.

    Examples:

    - `chiron tune azure -p llumnix --trials 40 --out llumnix.toml`, then `chiron compare azure -p llumnix --settings llumnix.toml`

    - `chiron tune my.toml -p chiron -p hpa-queue --calibrate last-week.csv`
    """  # noqa: E501
    budget = Budget(trials=trials, seed=search_seed, target=target)
    check_file(out, "--out")
    check_figures(figures)
    where = executor(jobs, ray, ray_python)
    first_s = None if first is None else seconds_of("--first", first)
    judged, sources = _sources(scenario, set_ or [], calibrate or [], first_s, seed)
    labels = list(dict.fromkeys(policy or judged[0].labels[:1]))
    choices = {label: tunable_choice(judged[0], label)[0] for label in labels}
    on = workloads(sources, seed)
    count = counted(len(on.setups), "workload")
    typer.echo(f"tuned on {listed([each.in_words for each in sources])} ({count})", err=True)
    found: list[Tuned] = []
    journal = out.with_name(f"{out.name}.trials.jsonl")
    about = {"command": shlex.join(["chiron", *sys.argv[1:]]), "version": version("chiron-serving")}
    lost: list[Tuned] = []
    try:
        with running(where, journal, "tune") as runner:
            runner.total = expected_trials(on, len(labels), budget)
            for label, choice in choices.items():
                tuned = tune_policy(label, choice, on, budget, runner)
                if tuned.best.score is None or not tuned.best.score.gpu_hours < float("inf"):
                    lost.append(tuned)
                    continue
                found.append(tuned)
                write_whole(out, settings_text(found, sources, seed, budget, **about))
    except KeyboardInterrupt:
        typer.echo(f"stopped: what is done is in {journal}; the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if figures is not None:
        write_charts({f"tune-{tuned.label}": trials_chart(tuned, target) for tuned in found}, figures)
    console = results_console(stderr=False)
    for tuned in found:
        _print(console, tuned)
    if found:
        console.print(f"settings: {out}", highlight=False, soft_wrap=True)
    if lost:
        words = [f"--policy {each.label}: every candidate failed: {'; '.join(each.errors[:3])}" for each in lost]
        raise ConfigError("; ".join(words))


def _sources(
    scenarios: Sequence[str],
    set_: Sequence[str],
    calibrate: Sequence[str],
    first_s: float | None,
    seeds: list[int] | None,
) -> tuple[list[Scenario], list[Calibration]]:
    """The scenarios as they will be judged, and what to tune on, which share no request."""
    judged, sources = [], []
    for name in scenarios:
        scenario, found = calibrations(load_scenario(name, set_), calibrate, first_s)
        judged.append(scenario)
        sources += [each for each in found if not calibrate or len(judged) == 1]
    tuned_on = seen(sources, seeds)
    for scenario in judged:
        check_judged(tuned_on, scenario, seeds, scenario.name)
    return judged, sources


def _print(console: Console, tuned: Tuned) -> None:
    """The best trials, and the settings as they were."""
    table = Table(title=tuned.label, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("trial", justify="right")
    for heading in ("worst class", "over bound", "GPU-hours"):
        table.add_column(heading, justify="right", no_wrap=True)
    for setting in tuned.space:
        table.add_column(setting.name, justify="right")
    ranked = [each for each in ranking(tuned) if each.score is not None and not each.score.stopped]
    shown = ranked[:TOP] + [each for each in ranked[TOP:] if each.number == 0]
    for each in shown:
        assert each.score is not None
        name = f"{each.number + 1}{' (as it was)' if each.number == 0 else ''}"
        figures = (percent(each.score.attainment), f"{each.score.cost:.2f}x", amount(each.score.gpu_hours))
        table.add_row(name, *figures, *(str(value) for value in each.values.values()))
    console.print(table)
    if tuned.stopped:
        words = f"{tuned.stopped} of {len(tuned.candidates)} trials could not become the best and were stopped."
        console.print(words, highlight=False, soft_wrap=True)
    best = tuned.best
    assert best.score is not None
    if best.score.shortfall > 0:
        words = "No trial kept the target in every run; the best one misses least, then costs least."
        console.print(words, highlight=False, soft_wrap=True)
    for error in tuned.errors[:3]:
        console.print(f"failed: {error}", highlight=False, soft_wrap=True)
    console.print()


def trials_chart(tuned: Tuned, target: float) -> Chart:
    """Every trial: attainment of the worst class against GPU-hours."""
    half, known = explored(len(tuned.candidates)), len(tuned.starts)
    groups = {
        "as it was": tuned.candidates[:1],
        "known before": tuned.candidates[1:known],
        "tried everywhere": tuned.candidates[known:half],
        "steps around the best": tuned.candidates[half:],
        "chosen": (tuned.best,),
    }
    series = []
    for number, (name, group) in enumerate(groups.items()):
        scores = [
            each.score
            for each in group
            if each.score is not None and each.score.shortfall < float("inf") and not each.score.stopped
        ]
        series.append(
            Series(
                name=name,
                colour=COLOURS[number],
                mark="dots",
                shape=("square", "triangle", "circle", "diamond", "star")[number],
                x=tuple(score.cost for score in scores),
                y=tuple(score.attainment for score in scores),
            )
        )
    shares = [share for one in series for share in one.y]
    return Chart(
        title=f"{tuned.label}: {counted(len(tuned.candidates), 'trial')}",
        x=axes.linear("GPU-hours over the lower bound", 0.0, ROOM * max(place for one in series for place in one.x)),
        panels=(
            Panel(
                y=axes.attainment("within SLO, worst class", [*shares, target]),
                series=tuple(series),
                rules=(Rule(name=f"target {percent(target)}", y=target),),
            ),
        ),
    )
