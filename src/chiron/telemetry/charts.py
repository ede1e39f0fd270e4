"""Charts that compare policies, as plotly figures: plain data that ``report.js`` draws in the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, log10, nan
from typing import Any

import numpy as np

from chiron.telemetry.marks import Figure, note, numbers, rule
from chiron.telemetry.palette import Look
from chiron.telemetry.series import SHORTEST_S, Cdf, latency_cdf, log_axis, measures
from chiron.telemetry.verdict import PolicyRuns, percent, seed_of


def tradeoff(runs: Sequence[PolicyRuns], looks: dict[str, Look], bound: float | None, target: float) -> Figure:
    """Attainment of the worst class against GPU-hours: one marker per policy and seed."""
    traces: list[dict[str, Any]] = []
    shares = {p.policy: [100 * min(r.summary["attainment"].values(), default=0.0) for r in p.results] for p in runs}
    for policy in runs:
        if policy.stat("gpu_hours") is None:
            continue
        look = looks[policy.policy]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": policy.policy,
                "x": numbers(nan if r.summary["gpu_hours"] is None else r.summary["gpu_hours"] for r in policy.results),
                "y": numbers(shares[policy.policy]),
                "text": [policy.policy + seed_of(r) for r in policy.results],
                "hovertemplate": "%{text}<br>%{x:.2f} GPU-hours<br>%{y:.2f} % in its worst class<extra></extra>",
                "marker": {"color": look.colour, "symbol": look.plotly_marker, "size": 13, "opacity": 0.9},
            }
        )
    width, height = tradeoff_span(runs, bound, target)
    shapes = [rule(y=100 * target)]
    notes = [note(f"target {percent(target)}", x=1, xref="paper", y=100 * target, xanchor="right", yanchor="top")]
    if bound:
        shapes.append(rule(x=bound, colour="ink", dash="solid"))
        notes.append(note(f"lower bound {bound:.2f}", x=bound, y=0.02, yref="paper", textangle=-90, xanchor="right"))
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "GPU-hours billed"}, "range": [0, width]},
            "yaxis": {"title": {"text": "within SLO, worst class, %"}, "range": height},
            "shapes": shapes,
            "annotations": notes,
            "hovermode": "closest",
        },
    }


def tradeoff_span(runs: Sequence[PolicyRuns], bound: float | None, target: float) -> tuple[float, tuple[float, float]]:
    """Right end in GPU-hours, and bottom and top in per cent, that show every run, the bound and the target."""
    hours = [figures.high for p in runs if (figures := p.stat("gpu_hours")) is not None]
    lowest = 100 * min(
        target, *(share for p in runs for r in p.results for share in r.summary["attainment"].values()), 1
    )
    room = (100 - lowest) * 0.08 + 0.1
    return 1.06 * max([*hours, bound or 0.0, 1e-3]), (lowest - room, 100 + room)


def latencies(runs: Sequence[PolicyRuns], looks: dict[str, Look]) -> list[Figure]:
    """A chart per class and promise: the distribution over requests, a line per policy (its first seed)."""
    first = runs[0].results[0]
    figures: list[Figure] = []
    for index, promised in enumerate(first.classes):
        if not (first.requests.cls == index).any():
            continue
        for measure, axis, limit in measures(first, index):
            curves = [latency_cdf(policy.results[0], index, measure) for policy in runs]
            lines = [cdf_line(p.policy, looks[p.policy], c, axis) for p, c in zip(runs, curves, strict=True)]
            figures.append(
                {
                    "title": f"{promised.name}: {axis.split(',')[0]}",
                    "data": lines[::-1],  # the winner on top
                    "layout": {
                        "xaxis": {"title": {"text": axis}, **scale(measure, curves, limit)},
                        "yaxis": {"title": {"text": "requests, %"}, "range": [0, 101]},
                        "shapes": [rule(x=limit)] if isfinite(limit) else [],
                        "hovermode": "closest",
                        "legend": {"traceorder": "reversed"},
                    },
                }
            )
    return figures


def scale(measure: str, curves: Sequence[Cdf], limit: float) -> dict[str, Any]:
    """The value axis: a share from zero; seconds over their decades, with plain numbers."""
    if measure == "deadline":
        return {"rangemode": "tozero"}
    low, high, ticks = log_axis(curves, limit)
    ends = [round(log10(low), 3), round(log10(high), 3)]
    return {"type": "log", "range": ends, "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def cdf_line(policy: str, look: Look, curve: Cdf, axis: str) -> dict[str, Any]:
    """One policy's distribution."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": policy,
        "x": numbers(np.maximum(curve.value, SHORTEST_S)),
        "y": numbers(100 * curve.share),
        "line": {"color": look.colour, "width": 2, "shape": "hv"},
        "hovertemplate": f"{policy}<br>%{{y:.1f}} % within %{{x:.3g}} ({axis})<extra></extra>",
    }
