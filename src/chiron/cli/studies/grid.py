"""``chiron compare`` over a grid: what it prints and writes."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from chiron.cli.simulate.tables import results_console
from chiron.cli.studies.common import check_figures, running, write_whole
from chiron.config.read import ConfigError
from chiron.config.scenario import Scenario
from chiron.studies.executors import Executor
from chiron.studies.grid import Asked, Cell, as_json, grid
from chiron.studies.statistics import Estimate
from chiron.telemetry import axes
from chiron.telemetry.chart_files import write_charts
from chiron.telemetry.format import NONE, amount, counted, percent
from chiron.telemetry.marks import INK, Chart, Panel, Rule, Series
from chiron.telemetry.palette import looks
from chiron.telemetry.study_page import chart_section, study_page, table_section
from chiron.telemetry.verdict import CLAIRVOYANT, TARGET

FAILED = 1
INTERRUPTED = 130
ROOM = 1.06
"""An axis ends this far beyond what it shows."""
CAPTION = (
    "Means over seeds, with the half-width of their 95 % confidence interval. Against the baseline: mean over seeds of "
    "the difference in GPU-hours on the same requests, with its interval; an interval that holds 0 is no difference."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridOutputs:
    json: str | None
    report: Path | None
    figures: Path | None
    out: Path | None
    """Directory of the journal, and of result and page."""

    def check(self) -> None:
        check_figures(self.figures)
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out {self.out}: is a file; name a directory")


def compare_grid(scenario: Scenario, asked: Asked, where: Executor, outputs: GridOutputs) -> None:
    """Simulate the grid, print and write it. What was done is kept when it is stopped."""
    outputs.check()
    journal = None
    if outputs.out is not None:
        outputs.out.mkdir(parents=True, exist_ok=True)
        journal = outputs.out / "trials.jsonl"
    try:
        with running(where, journal, f"{scenario.name}") as runner:
            cells = grid(scenario, asked, runner)
    except KeyboardInterrupt:
        kept = f"what is done is in {journal}; the same command goes on from there" if journal else "nothing is kept"
        typer.echo(f"stopped: {kept}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _write(scenario, asked, cells, outputs)
    failed = [(cell, seed, error) for cell in cells for seed, error in cell.failed.items()]
    for cell, seed, error in failed:
        typer.echo(f"failed: {cell.policy} at load {cell.load:g}, seed {seed}: {error}", err=True)
    if failed:
        raise typer.Exit(FAILED)


def _write(scenario: Scenario, asked: Asked, cells: Sequence[Cell], outputs: GridOutputs) -> None:
    text = json.dumps(as_json(scenario.name, asked, cells), indent=1) + "\n"
    _print(results_console(stderr=outputs.json == "-"), scenario, asked, cells)
    if outputs.json == "-":
        sys.stdout.write(text)
    elif outputs.json is not None:
        write_whole(Path(outputs.json), text)
    page = None
    if outputs.report is not None or outputs.out is not None:
        page = grid_page(scenario, asked, cells, shlex.join(["chiron", *sys.argv[1:]]))
    if outputs.figures is not None:
        charts = {f"load-{load:g}": tradeoff([c for c in cells if c.load == load], load) for load in asked.loads}
        write_charts(charts, outputs.figures)
    if outputs.report is not None and page is not None:
        write_whole(outputs.report, page)
    if outputs.out is not None and page is not None:
        write_whole(outputs.out / "grid.json", text)
        write_whole(outputs.out / "grid.html", page)


def _print(console: Console, scenario: Scenario, asked: Asked, cells: Sequence[Cell]) -> None:
    for load in asked.loads:
        here = [cell for cell in cells if cell.load == load]
        table = Table(
            title=f"scenario {scenario.name}, load {load:g}", title_justify="left", box=None, pad_edge=False,
            header_style="bold",
        )  # fmt: skip
        headings = headings_of(here, asked)
        table.add_column(headings[0], no_wrap=True)
        for heading in headings[1:]:
            table.add_column(heading, justify="right")
        for cell in here:
            table.add_row(*row_of(cell, here))
        console.print(table)
        console.print(verdict_of(here, load), style="bold", highlight=False, soft_wrap=True)
        console.print()


def headings_of(cells: Sequence[Cell], asked: Asked) -> list[str]:
    return ["policy", *(f"{name} in SLO" for name in classes_of(cells)), "worst", "GPU-hours", "x bound",
            f"GPU-hours against {asked.baseline}", "worst class, points"]  # fmt: skip


def row_of(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    bound = cell.gpu_hours.mean / cell.bound if cell.gpu_hours is not None and cell.bound else None
    most = max(len(each.runs) for each in cells)
    return [
        cell.policy if len(cell.runs) == most else f"{cell.policy} ({counted(len(cell.runs), 'seed')})",
        *(half(cell.attainment.get(name), percent, lambda width: f"{100 * width:.2f}") for name in classes_of(cells)),
        percent(cell.worst) if cell.runs else "failed",
        half(cell.gpu_hours, amount, amount),
        NONE if bound is None else f"{bound:.2f}",
        interval(cell.gpu_hours_over_baseline, lambda share: f"{100 * share:+.1f}", " %"),
        interval(cell.attainment_over_baseline, lambda share: f"{100 * share:+.2f}", ""),
    ]


def half(value: Estimate | None, show: Callable[[float], str], width: Callable[[float], str]) -> str:
    """Mean and half-width of the interval."""
    if value is None:
        return NONE
    if value.low is None or value.high is None or value.low == value.high:
        return show(value.mean)
    return f"{show(value.mean)} ±{width(max(value.mean - value.low, value.high - value.mean))}"


def interval(value: Estimate | None, show: Callable[[float], str], unit: str) -> str:
    """Mean and ends of the interval."""
    if value is None:
        return NONE
    ends = f" ({show(value.low)} to {show(value.high)})" if value.low is not None and value.high is not None else ""
    return f"{show(value.mean)}{unit}{ends}"


def classes_of(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell.attainment))


def verdict_of(cells: Sequence[Cell], load: float) -> str:
    """Which policy keeps the target with the fewest GPU-hours at a load."""
    # It knows the future and competes with nobody.
    cells = [cell for cell in cells if cell.policy != CLAIRVOYANT] or cells
    keeping = [cell for cell in cells if cell.runs and not cell.failed and cell.worst >= TARGET]
    if not keeping:
        best = max(cells, key=lambda cell: cell.worst)
        return (
            f"At load {load:g} no policy keeps {percent(TARGET)} of every class in every seed; closest is "
            f"{best.policy} with {percent(best.worst)}."
        )
    best = min(keeping, key=lambda cell: cell.gpu_hours.mean if cell.gpu_hours is not None else 0.0)
    assert best.gpu_hours is not None
    return (
        f"At load {load:g} {best.policy} keeps {percent(TARGET)} of every class in every seed with the fewest "
        f"GPU-hours, {amount(best.gpu_hours.mean)}."
    )


def grid_page(scenario: Scenario, asked: Asked, cells: Sequence[Cell], command: str) -> str:
    """One HTML page: a table and a figure for each load."""
    sections = []
    for load in asked.loads:
        here = [cell for cell in cells if cell.load == load]
        sections.append(
            table_section(f"Load {load:g}", headings_of(here, asked), [row_of(c, here) for c in here], CAPTION)
        )
        sections.append(chart_section("", [tradeoff(here, load)]))
    subtitle = (
        f"{counted(len(asked.policies), 'policy', 'policies')}, {counted(len(asked.loads), 'load')}, "
        f"{counted(len(asked.seeds), 'seed')}"
    )
    answers = [verdict_of([cell for cell in cells if cell.load == load], load) for load in asked.loads]
    return study_page(f"{scenario.name} over a grid", subtitle, answers[0], answers[1:], sections, command)


def tradeoff(cells: Sequence[Cell], load: float) -> Chart:
    """Attainment of each class against GPU-hours at one load: a dot per policy and seed."""
    seen = looks([cell.policy for cell in cells])
    hours = [run["gpu_hours"] for cell in cells for run in cell.runs.values()]
    bounds = [cell.bound for cell in cells if cell.bound]
    floor = sum(bounds) / len(bounds) if bounds else None
    panels = []
    for name in classes_of(cells):
        series = []
        for cell in cells:
            runs = [(seed, run) for seed, run in cell.runs.items() if name in run["attainment"]]
            look = seen[cell.policy]
            series.append(
                Series(
                    name=cell.policy,
                    colour=look.colour,
                    mark="dots",
                    shape=look.shape,
                    x=tuple(float(run["gpu_hours"]) for _, run in runs),
                    y=tuple(float(run["attainment"][name]) for _, run in runs),
                    texts=tuple(
                        f"{cell.policy}, seed {seed}: {amount(run['gpu_hours'])} GPU-hours, "
                        f"{percent(run['attainment'][name])} of {name}"
                        for seed, run in runs
                    ),
                )
            )
        rules = [Rule(name=f"target {percent(TARGET)}", y=TARGET)]
        if floor is not None:
            rules.append(Rule(name=f"lower bound {amount(floor)}", x=floor, colour=INK, dash=""))
        shares = [share for one in series for share in one.y]
        y = axes.attainment(f"{name} within SLO", [*shares, TARGET])
        panels.append(Panel(y=y, series=tuple(series), rules=tuple(rules)))
    return Chart(
        title=f"Attainment by class against GPU-hours, load {load:g}",
        caption="Up and to the left is better; a dot per policy and seed.",
        x=axes.linear("GPU-hours billed", 0.0, ROOM * max([*hours, floor or 0.0, 1e-3])),
        panels=tuple(panels),
    )
