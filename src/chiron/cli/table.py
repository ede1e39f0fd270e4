"""Results as tables on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from chiron.telemetry.result import Result
from chiron.telemetry.verdict import PolicyRuns, Stat, verdict

Show = Callable[[float], str]


WIDTH_MIN = 120
"""Columns. A narrower terminal wraps the lines; cutting figures off would be worse."""


def results_console(stderr: bool) -> Console:
    """Wide enough for the table, whatever stdout is."""
    console = Console(stderr=stderr)
    return console if console.width >= WIDTH_MIN else Console(stderr=stderr, width=WIDTH_MIN)


def print_results(console: Console, results: Sequence[Result]) -> None:
    """One row per policy (mean, and range if several seeds ran), best first; then the verdict."""
    judged = verdict(results)
    console.print(comparison(results[0].scenario, judged.ranking))
    console.print()
    console.print(judged.headline, style="bold", highlight=False, soft_wrap=True)
    for note in judged.notes:
        console.print(note, highlight=False, soft_wrap=True)


FIGURES = (
    "GPU-\nhours",
    "over\nbound",
    "cost\n",
    "p99\nTTFT\ns",
    "p99\nITL\nms",
    "late\nbatch",
    "plan\nchanges",
    "re-\nversed",
    "peak\nGPUs",
)


def comparison(scenario: str, ranking: Sequence[PolicyRuns]) -> Table:
    classes = list(dict.fromkeys(name for p in ranking for r in p.results for name in r.summary["attainment"]))
    table = Table(title=f"scenario {scenario}", title_justify="left", pad_edge=False, box=None, header_style="bold")
    table.add_column("policy", no_wrap=True)
    attained = [f"{name}\nin SLO" for name in classes]
    for heading in [*attained, *FIGURES]:
        table.add_column(heading, justify="right", no_wrap=True)
    for runs in ranking:
        table.add_row(runs.policy, *_cells(runs, classes))
    return table


def _cells(runs: PolicyRuns, classes: Sequence[str]) -> list[str]:
    return [
        *(_cell(runs.stat("attainment", name), percent_down, "%", spread=True) for name in classes),
        _cell(runs.stat("gpu_hours"), "{:.2f}".format, spread=True),
        _cell(runs.over_bound, "{:.2f}".format, "x"),
        _cell(runs.stat("cost"), "{:.2f}".format),
        _worst(runs, "ttft_s", "{:.2f}".format, 1.0),
        _worst(runs, "itl_s", "{:.0f}".format, 1000.0),
        _cell(runs.stat("batch_late"), "{:,.0f}".format),
        _cell(runs.stat("scaling_actions"), "{:.0f}".format),
        _cell(runs.stat("reversals"), "{:.0f}".format),
        _cell(runs.stat("gpus_peak"), "{:.0f}".format),
    ]


def percent_down(share: float) -> str:
    """Per cent, rounded down: a single miss must not read as 100."""
    return f"{int(share * 1e4 + 1e-6) / 100:.2f}"


def _cell(stat: Stat | None, show: Show, unit: str = "", spread: bool = False) -> str:
    """The mean over seeds; with ``spread`` the lowest and highest beneath it."""
    if stat is None:
        return "-"
    text = show(stat.mean) + unit
    if not spread or stat.low == stat.high:
        return text
    return f"{text}\n{show(stat.low)}..{show(stat.high)}"


def _worst(runs: PolicyRuns, figure: str, show: Show, factor: float) -> str:
    """The p99 of the interactive class that fares worst; batch work was promised no latency."""
    names = [c.name for c in runs.results[0].classes if c.interactive]
    means = [stat.mean for name in names if (stat := runs.stat(figure, name, "p99")) is not None]
    return show(max(means) * factor) if means else "-"
