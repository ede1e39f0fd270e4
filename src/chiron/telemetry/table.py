"""The tables of a report: a row per policy, and a row per policy and class; several seeds show the mean and the range.

A column that no policy has a figure for is left out: a client sees no GPU. Each cell carries its column's name, which
the page shows before it where the screen is too narrow for a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from chiron.core.types import RequestClass
from chiron.telemetry.drawing import marker
from chiron.telemetry.format import NONE, Show, amount, milliseconds, percent, spread, whole
from chiron.telemetry.palette import Look
from chiron.telemetry.run_data import OUTCOMES, RunData
from chiron.telemetry.verdict import PolicyRuns, Stat, Verdict, program_kinds, staged, stat

LOST = OUTCOMES[1:]
"""How requests end that were not served."""
LOST_HELP = f"Requests that were {', '.join(LOST[:-1])} or {LOST[-1]}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A figure of each policy."""

    title: str
    help: str
    read: Callable[[PolicyRuns], Stat | None]
    show: Show
    target: float | None = None
    """What the figure must reach; set for attainment."""


def table(judged: Verdict, looks: dict[str, Look], *, target: float, bound: float | None) -> str:
    """The policies as HTML, best first, the lower bound last."""
    columns = with_data(columns_of(judged.ranking, target), judged.ranking)
    body = [row(p, columns, looks[p.policy], best=p.policy == judged.winner) for p in judged.ranking]
    return grid("Policies", ["policy", *(c.title for c in columns)], [*body, *floor(columns, bound)], columns)


def class_table(runs: Sequence[PolicyRuns], looks: dict[str, Look], *, target: float) -> str:
    """Every class of every policy: how its requests ended, and all that was measured of them."""
    columns_by_class = {c.name: class_columns(c, target) for c in asked(runs)}
    if not columns_by_class:
        return ""
    titles = [column.title for column in next(iter(columns_by_class.values()))]
    kept = [
        number
        for number, _ in enumerate(titles)
        if any(columns[number].read(p) is not None for columns in columns_by_class.values() for p in runs)
    ]
    rows = []
    for name, columns in columns_by_class.items():
        for p in runs:
            mine = [columns[number] for number in kept]
            rows.append(
                row(
                    p, mine, looks[p.policy], best=False, after=f" · {escape(name)}" if len(runs) > 1 else "", name=name
                )
            )
    heads = [columns_by_class[next(iter(columns_by_class))][number] for number in kept]
    return grid("Classes", ["class" if len(runs) == 1 else "policy · class", *(c.title for c in heads)], rows, heads)


def grid(caption: str, titles: Sequence[str], rows: Sequence[str], columns: Sequence[Column]) -> str:
    """A table. The roles are said, because a table that is laid out as cards is none to a screen reader."""
    helps = ["", *(c.help for c in columns)]
    head = "".join(
        f'<th scope="col" role="columnheader"{f" title={chr(34)}{escape(h)}{chr(34)}" if h else ""}>{escape(t)}</th>'
        for t, h in zip(titles, helps, strict=True)
    )
    return (
        f'<table role="table" class="cards"><caption class="unseen">{escape(caption)}</caption>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )


def row(runs: PolicyRuns, columns: Sequence[Column], look: Look, *, best: bool, after: str = "", name: str = "") -> str:
    """One policy, or one class of it."""
    mark = marker(look.shape, look.colour)
    title = escape(name) if name and not after else f"{mark}{escape(runs.policy)}{after}"
    cells = "".join(cell(column, column.read(runs)) for column in columns)
    return f'<tr role="row"{" class=best" if best else ""}><th scope="row" role="rowheader">{title}</th>{cells}</tr>'


def cell(column: Column, figures: Stat | None) -> str:
    """One figure."""
    label = f'role="cell" data-label="{escape(column.title)}"'
    if figures is None:
        return f'<td {label} class="none">{NONE}</td>'
    text = column.show(figures.mean)
    beneath = spread(column.show, figures.low, figures.high)
    text += f'<span class="range">{beneath}</span>' if beneath else ""
    missed = column.target is not None and figures.low < column.target
    return f'<td {label} class="miss">{text}</td>' if missed else f"<td {label}>{text}</td>"


def floor(columns: Sequence[Column], bound: float | None) -> list[str]:
    """The row of the clairvoyant lower bound; none without one."""
    if bound is None:
        return []
    shown = {"GPU-hours": amount(bound), "× bound": "1.00"}
    texts = [(c.title, percent(1) if c.target is not None else shown.get(c.title, "")) for c in columns]
    cells = "".join(f'<td role="cell" data-label="{escape(title)}">{text}</td>' for title, text in texts)
    return [
        f'<tr role="row" class="bound"><th scope="row" role="rowheader">lower bound, every SLO met</th>{cells}</tr>'
    ]


def with_data(columns: Sequence[Column], runs: Sequence[PolicyRuns]) -> list[Column]:
    """Those that any policy has a figure for."""
    return [column for column in columns if any(column.read(p) is not None for p in runs)]


def asked(runs: Sequence[PolicyRuns]) -> list[RequestClass]:
    """The classes that had requests."""
    return [
        c for c in runs[0].results[0].classes if any(c.name in r.summary["attainment"] for p in runs for r in p.results)
    ]


def columns_of(runs: Sequence[PolicyRuns], target: float) -> list[Column]:
    """All there can be, for the classes that had requests."""
    classes = asked(runs)
    latency = [c for c in classes if c.interactive] or classes
    seen = any(p.stat("gpu_hours") is not None for p in runs)
    return [
        *(attained(f"{c.name} in SLO", c, target) for c in classes),
        *(column for kind in program_kinds(runs) for column in program_columns(kind, target)),
        figure("GPU-hours", "Billed from the start of loading.", amount, "gpu_hours"),
        Column(
            title="× bound",
            help="GPU-hours over the least that any scheduler needs for what this policy delivered.",
            read=lambda p: p.over_bound,
            show=amount,
        ),
        figure("cost", "In the currency of the prices given.", amount, "cost"),
        *(p99(c, *what) for c in latency for what in LATENCIES),
        *(client_columns() if not seen else ()),
        *(stage_columns() if seen and staged(runs) else ()),
        Column(title="not served", help=LOST_HELP, read=lost, show=whole),
        Column(
            title="late batch",
            help="Batch requests with a deadline that did not finish by it.",
            read=lambda p: p.stat("batch_late") if any(c.kind == "batch" for c in classes) else None,
            show=whole,
        ),
        figure("scaling actions", "Changes of a planned number of instances.", whole, "scaling_actions"),
        figure("reversals", "Changes against the direction of the one just before.", whole, "reversals"),
        figure("peak GPUs", "Most GPUs billed at once.", whole, "gpus_peak"),
    ]  # fmt: skip


LATENCIES = (("ttft_s", "p99 TTFT, s", "seconds", amount), ("itl_s", "p99 ITL, ms", "milliseconds", milliseconds))


def figure(title: str, help: str, show: Show, *keys: str) -> Column:
    """A figure of the summary."""
    return Column(title=title, help=help, show=show, read=lambda p: p.stat(*keys))


def attained(title: str, cls: RequestClass, target: float) -> Column:
    return Column(
        title=title,
        help="Share of the class's requests that met TTFT, ITL and deadline.",
        read=lambda p: p.stat("attainment", cls.name),
        show=percent,
        target=target,
    )


def p99(cls: RequestClass, key: str, title: str, unit: str, show: Show) -> Column:
    return figure(f"{cls.name} {title}", f"99th percentile, {unit}.", show, key, cls.name, "p99")


def client_columns() -> tuple[Column, ...]:
    """What a client can say of a server as a whole."""
    return (
        figure("requests/s", "Finished requests over the time of the run.", amount, "throughput_rps"),
        Column(
            title="output tokens/s",
            help="Output tokens of finished requests over the time of the run.",
            read=lambda p: over(p, tokens_per_s),
            show=amount,
        ),
    )


def program_columns(kind: str, target: float) -> tuple[Column, ...]:
    """Of programs as a whole, from their arrival to the end of their last call."""
    return (
        Column(
            title=f"{kind} programs in SLO",
            help="Share of the programs with a deadline of which all calls finished by it.",
            read=lambda p: p.stat("programs", kind, "attainment"),
            show=percent,
            target=target,
        ),
        *(
            figure(f"{kind} program {name}, s", "From its arrival to the end of its last call.", amount,
                   "programs", kind, "latency_s", name)
            for name in ("p50", "p99")
        ),
    )  # fmt: skip


def stage_columns() -> tuple[Column, ...]:
    """What pipelines of stages are judged by besides."""
    return (
        figure("output tokens/s", "Of finished requests, over the time of the run.", amount, "throughput_tokens_per_s"),
        figure("cold starts", "Instances and replicas of stages that were loaded anew.", whole, "cold_starts"),
    )


def class_columns(cls: RequestClass, target: float) -> list[Column]:
    """One class, in full."""
    return [
        Column(title="requests", help="", read=lambda p: over(p, lambda r: float(rows(r, cls).sum())), show=whole),
        *(
            Column(
                title=name,
                help=f"Requests of the class that were {name}.",
                read=lambda p, name=name: ended(p, cls, name),  # type: ignore[misc]
                show=whole,
            )
            for name in OUTCOMES
        ),
        attained("in SLO", cls, target),
        *(
            figure(f"{name} {what}, {unit}", "", show, key, cls.name, name)
            for key, what, unit, show in (("ttft_s", "TTFT", "s", amount), ("itl_s", "ITL", "ms", milliseconds))
            for name in ("p50", "p90", "p99")
        ),
        Column(
            title="output tokens/s",
            help="Of finished requests, over the time of the run.",
            read=lambda p: over(p, lambda r: tokens_per_s(r, cls)),
            show=amount,
        ),
    ]


def over(runs: PolicyRuns, read: Callable[[RunData], float]) -> Stat:
    """A figure of each run."""
    return stat([read(result) for result in runs.results])


def lost(runs: PolicyRuns) -> Stat:
    return over(runs, lambda r: float(sum(r.summary.get(name) or 0 for name in LOST)))


def ended(runs: PolicyRuns, cls: RequestClass, name: str) -> Stat | None:
    """Requests of a class that ended so; None where there is none, so that a column of zeros is left out."""
    found = over(runs, lambda r: float((rows(r, cls) & (r.requests.outcome == OUTCOMES.index(name))).sum()))
    return found if found.high or name == OUTCOMES[0] else None


def rows(result: RunData, cls: RequestClass) -> npt.NDArray[np.bool_]:
    mine: npt.NDArray[np.bool_] = result.requests.cls == [c.name for c in result.classes].index(cls.name)
    return mine


def tokens_per_s(result: RunData, cls: RequestClass | None = None) -> float:
    """Output tokens of finished requests over the time of the run."""
    done = result.requests.outcome == 0
    done = done if cls is None else done & rows(result, cls)
    seconds = float(result.summary["sim_s"])
    return float(result.requests.output_tokens[done].sum()) / seconds if seconds > 0 else 0.0
