"""The charts that a README or a paper shows, as PNG and SVG. Needs the extra ``report``; no display.

Equal results give equal files: SVG ids are salted with a constant and carry no date.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from chiron.core.types import ROLES
from chiron.telemetry import axes, charts
from chiron.telemetry.axes import Axis, nines, time_unit
from chiron.telemetry.errors import ReportError, need
from chiron.telemetry.format import amount, percent
from chiron.telemetry.html import full_bound
from chiron.telemetry.palette import LIMIT_COLOUR, ROLE_COLOURS, STARTING_COLOUR, Look, looks
from chiron.telemetry.run_data import RunData
from chiron.telemetry.series import SHORTEST_S, gpus_over_time, latency_cdf, log_axis, measures, thin_fleet
from chiron.telemetry.verdict import TARGET, PolicyRuns, verdict

INK = "#1d2430"
FORMATS = ("png", "svg", "pdf")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "axes.edgecolor": "#9aa5b3",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "legend.frameon": False,
    "svg.hashsalt": "chiron",
    "savefig.dpi": 150,
}

AT_LEAST = "requests at least this fast"

Runs = Sequence[PolicyRuns]


def write_figures(
    results: Sequence[RunData],
    directory: str | Path,
    *,
    formats: Sequence[str] = ("png", "svg"),
    target: float = TARGET,
) -> list[Path]:
    """Write ``overview`` and the single charts into ``directory``; returns the paths."""
    odd = [f for f in formats if f not in FORMATS]
    if odd or not formats:
        raise ReportError(f"formats is {list(formats)}; allowed are {', '.join(FORMATS)}")
    runs = verdict(results, target=target).ranking
    seen = looks([p.policy for p in runs])
    bound = full_bound(results, None)
    agg, figure = need("matplotlib.backends.backend_agg"), need("matplotlib.figure")
    folder = Path(directory)
    written: list[Path] = []
    with need("matplotlib").rc_context(STYLE):
        for name, (size, paint) in drawings(runs, seen, bound, target).items():
            canvas = figure.Figure(figsize=size, layout="constrained")
            agg.FigureCanvasAgg(canvas)
            paint(canvas)
            written += [save(canvas, folder / f"{name}.{ending}") for ending in formats]
    return written


Drawing = tuple[tuple[float, float], Callable[[Any], None]]


def drawings(runs: Runs, seen: dict[str, Look], bound: float | None, target: float) -> dict[str, Drawing]:
    """File name to size in inches and what to paint on the canvas."""
    panels = latency_panels(runs[0].results[0])

    def overview(canvas: Any) -> None:
        grid = canvas.subplots(2, 2)
        tradeoff(grid[0][0], runs, seen, bound, target)
        fleets(grid[0][1], runs, seen)
        chosen = panels[:2]
        for ax, (cls, measure) in zip(grid[1], chosen, strict=False):
            latency(ax, runs, seen, cls, measure)
        for ax in grid[1][len(chosen) :]:
            ax.set_axis_off()
        shared(canvas, [ax for row in grid for ax in row])

    made: dict[str, Drawing] = {
        "overview": ((11, 7.4), overview),
        "tradeoff": ((6.4, 4.2), lambda c: legend(tradeoff(c.subplots(), runs, seen, bound, target))),
        "fleets": ((7.6, 4), lambda c: legend(fleets(c.subplots(), runs, seen))),
    }
    for cls, measure in panels:
        name = f"{measure}-{safe(runs[0].results[0].classes[cls].name)}"
        made[name] = (
            (6.4, 4.2),
            lambda c, cls=cls, measure=measure: legend(latency(c.subplots(), runs, seen, cls, measure)),  # type: ignore[misc]
        )
    for policy in runs:
        if not policy.results[0].fleet:
            continue
        made[f"fleet-{safe(policy.policy)}"] = ((7.6, 4), lambda c, p=policy: roles(c, p))  # type: ignore[misc]
    return made


def latency_panels(result: RunData) -> list[tuple[int, str]]:
    """Class number and measure, interactive classes first: their two charts go into the overview."""
    asked = [i for i in range(len(result.classes)) if (result.requests.cls == i).any()]
    ordered = sorted(asked, key=lambda i: not result.classes[i].interactive)
    return [(i, measure) for i in ordered for measure, _, _ in measures(result, i)]


def tradeoff(ax: Any, runs: Runs, seen: dict[str, Look], bound: float | None, target: float) -> Any:
    """Attainment of the worst class against GPU-hours, a marker per policy and seed."""
    known = {p.policy: [r for r in p.results if r.summary["gpu_hours"] is not None] for p in runs}
    shares = [charts.worst(r) for results in known.values() for r in results]
    scale = axes.attainment("within SLO, worst class", [*shares, target])
    for policy, results in known.items():
        look = seen[policy]
        ax.scatter(
            [r.summary["gpu_hours"] for r in results],
            [nines(charts.worst(r), scale.top) for r in results],
            color=look.colour,
            marker=look.matplotlib_marker,
            s=70,
            label=policy,
            zorder=3,
            clip_on=False,
        )
    hours = [r.summary["gpu_hours"] for results in known.values() for r in results]
    ax.set_xlim(0, charts.ROOM * max([*hours, bound or 0.0, 1e-3]))
    attained(ax, scale)
    limit(ax.axhline, nines(target, scale.top), f"target {percent(target)}")
    if bound:
        ax.axvline(bound, color=INK, linewidth=1.2, label=f"lower bound {amount(bound)}")
    ax.set(title="SLO attainment against cost", xlabel="GPU-hours billed", ylabel=scale.title)
    return ax


def attained(ax: Any, scale: Axis) -> None:
    """The vertical axis as attainment, by decades of the share that misses."""
    ax.set_ylim(nines(scale.low, scale.top), scale.top)
    ax.set_yticks([nines(value, scale.top) for value, _ in scale.ticks], [text for _, text in scale.ticks])


def limit(line: Callable[..., Any], place: float, name: str) -> None:
    """An SLO: named in the legend, because words in a chart cover what it shows."""
    line(place, color=LIMIT_COLOUR, linestyle="--", linewidth=1, label=name)


def fleets(ax: Any, runs: Runs, seen: dict[str, Look]) -> Any:
    """GPUs billed over time, a line per policy (its first seed), the best on top."""
    end_s = max((charts.duration(p.results[0]) for p in runs if p.results[0].fleet), default=0.0)
    per, unit = time_unit(end_s)
    for depth, policy in enumerate(runs):
        times, gpus = gpus_over_time(policy.results[0])
        colour = seen[policy.policy].colour
        ax.step(times / per, gpus, where="post", color=colour, label=policy.policy, linewidth=1.6, zorder=9 - depth)
    ax.set_ylim(bottom=0)
    if end_s > 0:
        ax.set_xlim(0, end_s / per)
    ax.set(title="Fleet over time", xlabel=f"time, {unit}", ylabel="GPUs billed")
    return ax


def latency(ax: Any, runs: Runs, seen: dict[str, Look], cls: int, measure: str) -> Any:
    """Distribution over the requests of a class, a line per policy (its first seed), and the SLO."""
    first = runs[0].results[0]
    title, slo = next((title, slo) for name, title, slo in measures(first, cls) if name == measure)
    curves = [latency_cdf(policy.results[0], cls, measure) for policy in runs]
    scale = charts.share_axis(curves)
    for depth, (policy, curve) in enumerate(zip(runs, curves, strict=True)):
        ax.step(
            np.maximum(curve.value, SHORTEST_S),
            [nines(share, scale.top) for share in curve.share],
            where="post",
            color=seen[policy.policy].colour,
            label=policy.policy,
            zorder=9 - depth,
        )
    if measure == "deadline":
        ends = [float(c.value[-1]) for c in curves if len(c.value)]
        ax.set_xlim(0, charts.ROOM * max(*ends, slo, 0.0))
    else:
        low, high, ticks = log_axis(curves, slo)
        ax.set_xscale("log")
        ax.set_xlim(low, high)
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
    if isfinite(slo):
        limit(ax.axvline, slo, "SLO")
    attained(ax, scale)
    ax.set(
        title=f"{first.classes[cls].name}: {title.split(',')[0]}", xlabel=title, ylabel="requests at least this fast"
    )
    return ax


def roles(canvas: Any, policy: PolicyRuns) -> None:
    """One policy's instances by role, stacked, a row per model, with the plan."""
    result = policy.results[0]
    canvas.set_size_inches(7.6, 1.2 + 2.6 * len(result.models))
    per, unit = time_unit(max((p.t_s for p in result.fleet), default=0.0))
    for ax, model in zip(canvas.subplots(len(result.models), 1, squeeze=False)[:, 0], result.models, strict=True):
        points = thin_fleet([p for p in result.fleet if p.model == model], lambda p: p.gpus, 2000)
        x = [p.t_s / per for p in points]
        layers = [(str(role), ROLE_COLOURS[role], [p.ready.get(role, 0) for p in points]) for role in ROLES]
        layers.append(("starting", STARTING_COLOUR, [p.starting for p in points]))
        kept = [(name, colour, y) for name, colour, y in layers if any(y)]
        if kept:
            names, colours, heights = zip(*kept, strict=True)
            ax.stackplot(x, *heights, labels=names, colors=colours, step="post", linewidth=0)
        ax.step(x, [p.planned for p in points], where="post", color=INK, linewidth=1, ls=":", label="planned")
        ax.set_ylim(bottom=0)
        ax.set(title=f"{policy.policy}: {model}", xlabel=f"time, {unit}", ylabel="instances")
    shared(canvas, canvas.axes)


def legend(ax: Any) -> None:
    """Beneath the chart, where it covers nothing."""
    shared(ax.figure, [ax])


def shared(canvas: Any, every: Sequence[Any]) -> None:
    """One legend for all charts of a picture: each name once."""
    named: dict[str, Any] = {}
    for ax in every:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        canvas.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(5, len(named)), fontsize=9)


def save(canvas: Any, path: Path) -> Path:
    """Write one file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        canvas.savefig(path, metadata=dated.get(path.suffix[1:]))
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def safe(name: str) -> str:
    """``name`` as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
