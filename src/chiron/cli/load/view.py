"""A load run on a terminal: while it goes, and afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from chiron.telemetry.format import amount, known, milliseconds, percent

if TYPE_CHECKING:
    from chiron.load.record import Progress

LINE_PERIOD_S = 5.0
"""Without a terminal, a line this often."""
ERRORS_SHOWN = 8


class LoadView:
    """Shows progress on stderr: a live view on a terminal, else a line every few seconds."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._next_line_s = LINE_PERIOD_S

    def __enter__(self) -> LoadView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def waiting(self, text: str) -> None:
        """Nothing is sent yet."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def show(self, progress: Progress) -> None:
        if self._live is not None:
            self._live.update(screen(progress, self._title), refresh=True)
        elif progress.elapsed_s >= self._next_line_s:
            self._next_line_s = progress.elapsed_s + LINE_PERIOD_S
            self._console.print(line(progress), highlight=False, soft_wrap=True, markup=False)


def line(progress: Progress) -> str:
    """Progress in one line."""
    errors = sum(progress.errors.values())
    parts = [
        elapsed(progress),
        f"sent {progress.sent:,} of {progress.planned:,}",
        f"running {progress.running:,}",
        f"done {progress.done:,}",
        f"{progress.sent_per_s:.1f} requests/s",
        *([f"{errors:,} errors"] if errors else []),
        *(
            f"{cls.name} TTFT p50 {cls.ttft_p50_s:.2f} p99 {cls.ttft_p99_s:.2f} s"
            for cls in progress.classes
            if not isnan(cls.ttft_p50_s)
        ),
        *progress.jobs,
    ]
    return ", ".join(parts)


def elapsed(progress: Progress) -> str:
    """How far the run is."""
    if progress.elapsed_s < progress.total_s:
        return f"{progress.elapsed_s:.0f} s of {progress.total_s:.0f} s"
    return f"{progress.elapsed_s:.0f} s, waiting for answers"


def screen(progress: Progress, title: str) -> RenderableType:
    """Progress as a small screen."""
    state = "stopping: waiting for answers" if progress.stopping else "ctrl-C stops sending and reports"
    head = Table.grid(padding=(0, 2))
    head.add_row(Text(title, style="bold"), Text(state, style="yellow" if progress.stopping else "dim"))
    bar = Table.grid(padding=(0, 2))
    done_s = min(progress.elapsed_s, progress.total_s)
    bar.add_row(
        ProgressBar(total=max(progress.total_s, 1e-9), completed=done_s, width=40),
        elapsed(progress),
        f"sent {progress.sent:,} / {progress.planned:,}",
        f"running {progress.running:,}",
        f"done {progress.done:,}",
        f"{progress.sent_per_s:.1f}/s",
    )
    parts: list[RenderableType] = [head, bar, _classes(progress)]
    parts += [Text(job) for job in progress.jobs]
    if progress.not_sent:
        parts.append(Text(f"NOT SENT: {progress.not_sent:,} (too many in flight)", style="bold red"))
    if progress.late_max_s > 0.05:
        parts.append(Text(f"latest send {progress.late_max_s:.2f} s after its time", style="yellow"))
    ranked = sorted(progress.errors.items(), key=lambda pair: -pair[1])[:ERRORS_SHOWN]
    if ranked:
        parts.append(Text("errors: " + ", ".join(f"{kind} {count:,}" for kind, count in ranked), style="red"))
    return Group(*parts)


def _classes(progress: Progress) -> Table:
    table = _table("class", "planned", "sent", "done", "failed", "TTFT p50 s", "TTFT p99 s", "ITL p50 ms")
    for cls in progress.classes:
        table.add_row(
            cls.name,
            f"{cls.planned:,}",
            f"{cls.sent:,}",
            f"{cls.done:,}",
            Text(f"{cls.failed:,}", style="red" if cls.failed else ""),
            known(amount, cls.ttft_p50_s),
            known(amount, cls.ttft_p99_s),
            known(milliseconds, cls.itl_p50_s),
        )
    return table


def print_figures(console: Console, figures: Mapping[str, Any]) -> None:
    """The table of classes, then jobs, tokens, errors and warnings."""
    table = _table(
        "class", "requests", "finished", "in SLO", "TTFT p50", "p90", "p99 s", "ITL p50", "p99 ms", "gap p99 ms",
        "tokens/s", "errors",
    )  # fmt: skip
    for name, cls in figures["classes"].items():
        table.add_row(
            name,
            f"{cls['requests']:,}",
            f"{cls['finished']:,}",
            known(percent, cls["attainment"]),
            *(known(amount, cls["ttft_s"][share]) for share in ("p50", "p90", "p99")),
            *(known(milliseconds, cls["itl_s"][share]) for share in ("p50", "p99")),
            known(milliseconds, cls["gap_p99_s"]["p50"]),
            known(amount, cls["tokens_per_s"]),
            f"{cls['requests'] - cls['finished']:,}",
        )
    console.print(table)
    late, tokens = figures["late_s"], figures["tokens"]
    said = [
        f"{figures['sent']:,} requests in {figures['wall_s']:.1f} s to {figures['url']}; sent late by "
        f"{known(milliseconds, late['p99'])} ms at p99, {known(milliseconds, late['max'])} ms at most; "
        f"generator {figures['cpu_share']:.0%} of a core; stream {figures['digest']}",
        f"tokens counted by the server: prompts {tokens['input']:,} (wanted {tokens['input_wanted']:,}), "
        f"outputs {tokens['output']:,} (wanted {tokens['output_wanted']:,})",
    ]
    for kind, seen in figures["programs"].items():
        took = seen["latency_s"]
        met = "" if seen["attainment"] is None else f", {percent(seen['attainment'])} in SLO"
        said.append(
            f"programs {kind}: {seen['finished']:,} of {seen['programs']:,} finished{met}; from their arrival to the "
            f"end of the last call {known(amount, took['p50'])} s at p50, {known(amount, took['p99'])} s at p99"
        )
    for job in figures["jobs"]:
        ended = (
            "" if job["submitted_s"] < 0 else f", {job['ended_s'] - job['submitted_s']:.1f} s from submission to end"
        )
        said.append(
            f"batch job {job['id'] or '(none)'}: {job['status']}, {job['results']:,} result lines for "
            f"{job['requests']:,} items, {job['failed']:,} failed{ended}"
        )
    for kind, count in sorted(figures["errors"].items(), key=lambda pair: -pair[1]):
        example = figures["examples"].get(kind)
        said.append(f"{count:,} x {kind}" + (f": {example}" if example else ""))
    for sentence in said:
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    for warning in figures["warnings"]:
        console.print(f"warning: {warning}", style="bold yellow", highlight=False, soft_wrap=True, markup=False)


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
