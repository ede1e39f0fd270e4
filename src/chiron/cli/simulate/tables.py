"""Results as tables on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from chiron.telemetry.format import NONE, Show, amount, milliseconds, percent, spread, whole
from chiron.telemetry.result import Result
from chiron.telemetry.verdict import PolicyRuns, Stat, program_kinds, staged, verdict

WIDTH_MIN = 120
"""Columns. A narrower terminal wraps the lines; cutting figures off would be worse."""


def results_console(stderr: bool) -> Console:
    """Wide enough for the table, whatever stdout is. Names are a user's: no markup is read in them."""
    console = Console(stderr=stderr, markup=False)
    return console if console.width >= WIDTH_MIN else Console(stderr=stderr, markup=False, width=WIDTH_MIN)


def print_results(console: Console, results: Sequence[Result]) -> None:
    """One row per policy (mean, and range if several seeds ran), best first; then the verdict."""
    judged = verdict(results)
    console.print(comparison(results[0].scenario, judged.ranking))
    console.print()
    if program_kinds(judged.ranking):
        console.print(programs(judged.ranking))
        console.print()
    console.print(judged.headline, style="bold", highlight=False, soft_wrap=True)
    for note in judged.notes:
        console.print(note, highlight=False, soft_wrap=True)


def comparison(scenario: str, ranking: Sequence[PolicyRuns]) -> Table:
    """A row per policy. Columns without any known figure are left out: a client sees no GPU."""
    classes = list(dict.fromkeys(name for p in ranking for r in p.results for name in r.summary["attainment"]))
    table = Table(title=f"scenario {scenario}", title_justify="left", pad_edge=False, box=None, header_style="bold")
    table.add_column("policy", no_wrap=True)
    columns = [(heading, [read(runs) for runs in ranking]) for heading, read in _columns(classes, staged(ranking))]
    known = [(heading, cells) for heading, cells in columns if any(cell != NONE for cell in cells)]
    for heading, _ in known:
        table.add_column(heading, justify="right", no_wrap=True)
    for row, runs in enumerate(ranking):
        table.add_row(runs.policy, *(cells[row] for _, cells in known))
    return table


def programs(ranking: Sequence[PolicyRuns]) -> Table:
    """A row per kind of program and policy: programs as a whole, from their arrival to the end of their last call."""
    table = Table(title="programs", title_justify="left", pad_edge=False, box=None, header_style="bold")
    for heading in ("kind", "policy"):
        table.add_column(heading, no_wrap=True)
    for heading in ("programs", "finished", "in SLO", "p50 s", "p90 s", "p99 s", "p50 s/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in program_kinds(ranking):
        for runs in ranking:
            cells = [
                _cell(runs.stat("programs", kind, *keys), show)
                for *keys, show in (
                    ("programs", whole),
                    ("finished", whole),
                    ("attainment", percent),
                    ("latency_s", "p50", amount),
                    ("latency_s", "p90", amount),
                    ("latency_s", "p99", amount),
                    ("token_latency_s", "p50", amount),
                )
            ]
            table.add_row(kind, runs.policy, *cells)
    return table


def _columns(classes: Sequence[str], stages: bool) -> list[tuple[str, Callable[[PolicyRuns], str]]]:
    """Heading and what stands beneath it. ``stages``: with what pipelines of stages are judged by besides."""
    attained: list[tuple[str, Callable[[PolicyRuns], str]]] = [
        (f"{name}\nin SLO", lambda runs, name=name: _cell(runs.stat("attainment", name), percent, ranged=True))  # type: ignore[misc]
        for name in classes
    ]
    return [
        *attained,
        ("GPU-\nhours", lambda runs: _cell(runs.stat("gpu_hours"), amount, ranged=True)),
        ("× bound\n", lambda runs: _cell(runs.over_bound, amount)),
        ("cost\n", lambda runs: _cell(runs.stat("cost"), amount)),
        *([("p50\nTTFT\ns", lambda runs: _worst(runs, "ttft_s", amount, "p50"))] if stages else []),
        ("p99\nTTFT\ns", lambda runs: _worst(runs, "ttft_s", amount)),
        *([("p50\nITL\nms", lambda runs: _worst(runs, "itl_s", milliseconds, "p50"))] if stages else []),
        ("p99\nITL\nms", lambda runs: _worst(runs, "itl_s", milliseconds)),
        *([("tokens\n/s", lambda runs: _cell(runs.stat("throughput_tokens_per_s"), whole))] if stages else []),
        *([("cold\nstarts", lambda runs: _cell(runs.stat("cold_starts"), whole))] if stages else []),
        ("late\nbatch", _late),
        ("plan\nchanges", lambda runs: _cell(runs.stat("scaling_actions"), whole)),
        ("re-\nversed", lambda runs: _cell(runs.stat("reversals"), whole)),
        ("peak\nGPUs", lambda runs: _cell(runs.stat("gpus_peak"), whole)),
    ]


def _cell(stat: Stat | None, show: Show, *, ranged: bool = False) -> str:
    """The mean over seeds; with ``ranged`` the lowest and highest beneath it."""
    if stat is None:
        return NONE
    beneath = spread(show, stat.low, stat.high) if ranged else ""
    return f"{show(stat.mean)}\n{beneath}" if beneath else show(stat.mean)


def _worst(runs: PolicyRuns, figure: str, show: Show, quantile: str = "p99") -> str:
    """The quantile of the interactive class that fares worst; batch work has no latency SLO."""
    names = [c.name for c in runs.results[0].classes if c.interactive]
    means = [stat.mean for name in names if (stat := runs.stat(figure, name, quantile)) is not None]
    return show(max(means)) if means else NONE


def _late(runs: PolicyRuns) -> str:
    """Of batch requests, if there were any."""
    batch = {c.name for c in runs.results[0].classes if c.kind == "batch"}
    some = any(batch & r.summary["attainment"].keys() for r in runs.results)
    return _cell(runs.stat("batch_late"), whole) if some else NONE
