"""The charts that a README or a paper shows, as PNG and SVG. Needs the extra ``report``; no display.

Equal results give equal files: SVG ids are salted with a constant and carry no date.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np

from chiron.core.types import ROLES
from chiron.telemetry.charts import tradeoff_span
from chiron.telemetry.errors import ReportError, need
from chiron.telemetry.html import full_bound
from chiron.telemetry.palette import LIMIT_COLOUR, ROLE_COLOURS, STARTING_COLOUR, Look, looks
from chiron.telemetry.result import Result
from chiron.telemetry.series import SHORTEST_S, gpus_over_time, latency_cdf, log_axis, measures, thin_fleet, time_unit
from chiron.telemetry.verdict import TARGET, PolicyRuns, percent, verdict

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

Runs = Sequence[PolicyRuns]


def write_figures(
    results: Sequence[Result],
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
        axes = canvas.subplots(2, 2)
        tradeoff(axes[0][0], runs, seen, bound, target)
        fleets(axes[0][1], runs, seen)
        chosen = panels[:2]
        for ax, (cls, measure) in zip(axes[1], chosen, strict=False):
            latency(ax, runs, seen, cls, measure)
        for ax in axes[1][len(chosen) :]:
            ax.set_axis_off()
        handles, labels = axes[0][1].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))

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


def latency_panels(result: Result) -> list[tuple[int, str]]:
    """Class number and measure, interactive classes first: their two charts go into the overview."""
    asked = [i for i in range(len(result.classes)) if (result.requests.cls == i).any()]
    ordered = sorted(asked, key=lambda i: not result.classes[i].interactive)
    return [(i, measure) for i in ordered for measure, _, _ in measures(result, i)]


def tradeoff(ax: Any, runs: Runs, seen: dict[str, Look], bound: float | None, target: float) -> Any:
    """Attainment of the worst class against GPU-hours, a marker per policy and seed."""
    for policy in runs:
        look = seen[policy.policy]
        ax.scatter(
            [nan if r.summary["gpu_hours"] is None else r.summary["gpu_hours"] for r in policy.results],
            [100 * min(r.summary["attainment"].values(), default=0.0) for r in policy.results],
            color=look.colour,
            marker=look.matplotlib_marker,
            s=70,
            label=policy.policy,
            zorder=3,
        )
    width, height = tradeoff_span(runs, bound, target)
    ax.set_xlim(0, width)
    ax.set_ylim(*height)
    ax.axhline(100 * target, color=LIMIT_COLOUR, linestyle="--", linewidth=1)
    note(ax, f"target {percent(target)}", (0.995, 100 * target), ax.get_yaxis_transform(), ha="right", va="top")
    if bound:
        ax.axvline(bound, color="#1d2430", linewidth=1.2)
        spot = (bound, 0.03)
        note(ax, f"lower bound {bound:.2f} ", spot, ax.get_xaxis_transform(), ha="right", va="bottom", rotation=90)
    ax.set(title="SLO attainment against cost", xlabel="GPU-hours billed", ylabel="within SLO, worst class, %")
    return ax


def fleets(ax: Any, runs: Runs, seen: dict[str, Look]) -> Any:
    """GPUs billed over time, a line per policy (its first seed), the best on top."""
    per, unit = time_unit(max((p.t_s for runs_ in runs for p in runs_.results[0].fleet), default=0.0))
    for depth, policy in enumerate(runs):
        times, gpus = gpus_over_time(policy.results[0])
        colour = seen[policy.policy].colour
        ax.step(times / per, gpus, where="post", color=colour, label=policy.policy, linewidth=1.6, zorder=9 - depth)
    ax.set_ylim(bottom=0)
    ax.set(title="Fleet over time", xlabel=f"time, {unit}", ylabel="GPUs billed")
    return ax


def latency(ax: Any, runs: Runs, seen: dict[str, Look], cls: int, measure: str) -> Any:
    """Distribution over the requests of a class, a line per policy (its first seed), and the SLO."""
    first = runs[0].results[0]
    axis, limit = next((axis, limit) for name, axis, limit in measures(first, cls) if name == measure)
    curves = [latency_cdf(policy.results[0], cls, measure) for policy in runs]
    for depth, (policy, curve) in enumerate(zip(runs, curves, strict=True)):
        colour = seen[policy.policy].colour
        ax.step(
            np.maximum(curve.value, SHORTEST_S),
            100 * curve.share,
            where="post",
            color=colour,
            label=policy.policy,
            zorder=9 - depth,
        )
    if measure == "deadline":
        ends = [float(c.value[-1]) for c in curves if len(c.value)]
        ax.set_xlim(0, 1.06 * max(*ends, limit, 0.0))
    else:
        low, high, ticks = log_axis(curves, limit)
        ax.set_xscale("log")
        ax.set_xlim(low, high)
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
    if isfinite(limit):
        ax.axvline(limit, color=LIMIT_COLOUR, linestyle="--", linewidth=1)
        note(ax, "SLO ", (limit, 0.03), ax.get_xaxis_transform(), ha="right", va="bottom")
    ax.set_ylim(0, 101)
    ax.set(title=f"{first.classes[cls].name}: {axis.split(',')[0]}", xlabel=axis, ylabel="requests, %")
    return ax


def roles(canvas: Any, policy: PolicyRuns) -> None:
    """One policy's instances by role, stacked, a row per model, with the plan."""
    result = policy.results[0]
    canvas.set_size_inches(7.6, 1.2 + 2.6 * len(result.models))
    per, unit = time_unit(max((p.t_s for p in result.fleet), default=0.0))
    for ax, model in zip(canvas.subplots(len(result.models), 1, squeeze=False)[:, 0], result.models, strict=True):
        points = thin_fleet([p for p in result.fleet if p.model == model], lambda p: p.gpus, 2000)
        x = [p.t_s / per for p in points]
        layers = [[p.ready.get(role, 0) for p in points] for role in ROLES] + [[p.starting for p in points]]
        colours = [*(ROLE_COLOURS[role] for role in ROLES), STARTING_COLOUR]
        ax.stackplot(x, *layers, labels=[*ROLES, "starting"], colors=colours, step="post", linewidth=0)
        ax.step(x, [p.planned for p in points], where="post", color="#1d2430", linewidth=1, ls=":", label="planned")
        ax.set_ylim(bottom=0)
        ax.set(title=f"{policy.policy}: {model}", xlabel=f"time, {unit}", ylabel="instances")
        legend(ax)


def note(ax: Any, text: str, spot: tuple[float, float], transform: Any, **style: Any) -> None:
    """Small words in the chart."""
    ax.text(*spot, text, transform=transform, fontsize=8.5, color="#4c5666", in_layout=False, **style)


def legend(ax: Any) -> None:
    """The legend beneath the title, if there is anything to name."""
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        ax.legend(handles, labels, loc="best", fontsize=9)


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
