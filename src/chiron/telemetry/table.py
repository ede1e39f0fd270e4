"""The table of a report: a row per policy, a column per figure; several seeds show the mean and the range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from chiron.telemetry.palette import Look
from chiron.telemetry.verdict import PolicyRuns, Stat, Verdict, amount, percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A figure of each policy."""

    title: str
    help: str
    read: Callable[[PolicyRuns], Stat | None]
    show: Callable[[float], str]
    target: float | None = None
    """Below it in any seed a cell is marked as a miss."""


def table(judged: Verdict, looks: dict[str, Look], *, target: float, bound: float | None) -> str:
    """The table as HTML, best policy first, the lower bound last."""
    columns = columns_of(judged.ranking, target)
    head = "".join(f'<th scope="col" title="{escape(c.help)}">{escape(c.title)}</th>' for c in columns)
    body = "".join(row(p, columns, looks[p.policy], best=p.policy == judged.winner) for p in judged.ranking)
    body += floor(columns, bound)
    return f'<table><thead><tr><th scope="col">policy</th>{head}</tr></thead><tbody>{body}</tbody></table>'


def row(runs: PolicyRuns, columns: Sequence[Column], look: Look, *, best: bool) -> str:
    """One policy."""
    name = f'<span class="dot" style="background:{look.colour}"></span>{escape(runs.policy)}'
    cells = "".join(cell(column, column.read(runs)) for column in columns)
    return f'<tr{" class=best" if best else ""}><th scope="row">{name}</th>{cells}</tr>'


def cell(column: Column, figures: Stat | None) -> str:
    """One figure."""
    if figures is None:
        return '<td class="none">–</td>'
    text = column.show(figures.mean)
    if figures.n > 1:
        low, high = column.show(figures.low), column.show(figures.high)
        if low != high:
            text += f'<span class="range">{low.removesuffix(" %")}–{high}</span>'
    missed = column.target is not None and figures.low < column.target
    return f'<td class="miss">{text}</td>' if missed else f"<td>{text}</td>"


def floor(columns: Sequence[Column], bound: float | None) -> str:
    """The row of the clairvoyant lower bound; empty if there is none."""
    if bound is None:
        return ""
    shown = {"GPU-hours": amount(bound), "× bound": "1.00"}
    cells = "".join(
        f"<td>{percent(1) if c.target is not None else shown.get(c.title, '')}</td>" for c in columns
    )  # fmt: skip
    return f'<tr class="bound"><th scope="row">lower bound, every SLO met</th>{cells}</tr>'


def columns_of(runs: Sequence[PolicyRuns], target: float) -> list[Column]:
    """The columns, for the classes that had requests."""
    first = runs[0].results[0]
    asked = [c for c in first.classes if any(c.name in r.summary["attainment"] for p in runs for r in p.results)]
    latency = [c for c in asked if c.interactive] or asked
    return [
        *(
            Column(
                title=f"{c.name} in SLO",
                help="Share of the class's requests that met TTFT, ITL and deadline.",
                read=lambda p, name=c.name: p.stat("attainment", name),  # type: ignore[misc]
                show=percent,
                target=target,
            )
            for c in asked
        ),
        Column(
            title="GPU-hours",
            help="Billed from the start of loading.",
            read=lambda p: p.stat("gpu_hours"),
            show=amount,
        ),
        Column(
            title="× bound",
            help="GPU-hours over the least that any scheduler needs for what this policy delivered.",
            read=lambda p: p.over_bound,
            show=amount,
        ),
        Column(title="cost", help="In the currency of the prices given.", read=lambda p: p.stat("cost"), show=amount),
        *(
            Column(
                title=f"{c.name} {title}",
                help=f"99th percentile, {unit}.",
                read=lambda p, key=key, name=c.name: p.stat(key, name, "p99"),  # type: ignore[misc]
                show=show,
            )
            for c in latency
            for key, title, unit, show in (
                ("ttft_s", "p99 TTFT, s", "seconds", amount),
                ("itl_s", "p99 ITL, ms", "milliseconds", milliseconds),
            )
        ),
        *(
            Column(title=title, help=help, read=lambda p, key=key: p.stat(key), show=whole)  # type: ignore[misc]
            for title, help, key in (
                ("late batch", "Batch requests with a deadline that did not finish by it.", "batch_late"),
                ("scaling actions", "Changes of a planned number of instances.", "scaling_actions"),
                ("reversals", "Changes against the direction of the one just before.", "reversals"),
                ("peak GPUs", "Most GPUs billed at once.", "gpus_peak"),
            )
        ),
    ]


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds."""
    return f"{seconds * 1000:,.0f}"


def whole(value: float) -> str:
    """A count; a mean over seeds may have a fraction."""
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.1f}"
