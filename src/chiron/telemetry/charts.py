"""Charts that compare policies."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np

from chiron.telemetry import axes
from chiron.telemetry.format import amount, percent
from chiron.telemetry.marks import INK, Chart, Panel, Rule, Series, peak, steps
from chiron.telemetry.palette import Look
from chiron.telemetry.run_data import RunData
from chiron.telemetry.series import SHORTEST_S, Cdf, gpus_over_time, latency_cdf, log_axis, measures
from chiron.telemetry.verdict import PolicyRuns, seed_of

ROOM = 1.06
"""An axis ends this far beyond what it shows."""


def tradeoff(runs: Sequence[PolicyRuns], looks: dict[str, Look], bound: float | None, target: float) -> Chart | None:
    """Attainment of the worst class against GPU-hours: a marker per policy and seed. None without known GPUs."""
    series = []
    for policy in runs:
        known = [r for r in policy.results if r.summary["gpu_hours"] is not None]
        look = looks[policy.policy]
        if known:
            series.append(
                Series(
                    name=policy.policy,
                    colour=look.colour,
                    mark="dots",
                    shape=look.shape,
                    x=tuple(float(r.summary["gpu_hours"]) for r in known),
                    y=tuple(worst(r) for r in known),
                    texts=tuple(
                        f"{policy.policy}{seed_of(r)}: {amount(r.summary['gpu_hours'])} GPU-hours, "
                        f"{percent(worst(r))} in its worst class"
                        for r in known
                    ),
                )
            )
    if not series:
        return None
    rules = [Rule(name=f"target {percent(target)}", y=target)]
    if bound:
        rules.append(Rule(name=f"lower bound {amount(bound)}", x=bound, colour=INK, dash=""))
    hours = [*(x for s in series for x in s.x), bound or 0.0]
    return Chart(
        title="Attainment against GPU-hours",
        caption="Up and to the left is better. Equal steps upwards are ten times fewer missed requests each."
        + (" The solid line is the least GPU time with which any scheduler could meet every SLO." if bound else ""),
        x=axes.linear("GPU-hours billed", 0.0, ROOM * max(*hours, 1e-3)),
        panels=(
            Panel(
                y=axes.attainment("within SLO, worst class", [*(y for s in series for y in s.y), target]),
                series=tuple(series),
                rules=tuple(rules),
                height=340,
            ),
        ),
    )


def worst(result: RunData) -> float:
    """Attainment of the class that fares worst; 0 if nothing was asked."""
    shares: list[float] = list(result.summary["attainment"].values())
    return min(shares, default=0.0)


def fleets(runs: Sequence[PolicyRuns], looks: dict[str, Look], limit: int) -> Chart | None:
    """GPUs billed over time, a line per policy (its first seed), the best on top. None without a fleet."""
    firsts = [p.results[0] for p in runs if p.results[0].fleet]
    if not firsts:
        return None
    per, x = axes.time(max(duration(r) for r in firsts))
    series = []
    for result in firsts:
        times, gpus = gpus_over_time(result, limit)
        look = looks[result.policy]
        held = ([*times, duration(result)], [*gpus, gpus[-1]])
        series.append(steps(result.policy, look.colour, [t / per for t in held[0]], held[1], dash=look.dash))
    return Chart(
        title="Fleets of all policies" if len(firsts) > 1 else "Fleet",
        caption="" if seed_of(firsts[0]) == "" else f"GPUs of all models{seed_of(firsts[0])}.",
        x=x,
        panels=(
            Panel(y=axes.linear("GPUs billed", 0.0, ROOM * peak(series), whole=True), series=tuple(series), height=300),
        ),
    )


def duration(result: RunData) -> float:
    """Seconds of the run, or to its last fleet point."""
    return max(float(result.summary["sim_s"]), result.fleet[-1].t_s if result.fleet else 0.0)


def latencies(runs: Sequence[PolicyRuns], looks: dict[str, Look]) -> list[Chart]:
    """A chart per class and SLO: the distribution over requests, a line per policy (its first seed)."""
    first = runs[0].results[0]
    drawn: list[Chart] = []
    for index, shown in enumerate(first.classes):
        if not (first.requests.cls == index).any():
            continue
        for measure, title, limit in measures(first, index):
            curves = [latency_cdf(policy.results[0], index, measure) for policy in runs]
            if not any(len(curve.value) for curve in curves):
                continue
            series = tuple(cdf_line(p.policy, looks[p.policy], c) for p, c in zip(runs, curves, strict=True))
            drawn.append(
                Chart(
                    title=f"{shown.name}: {title.split(',')[0]}",
                    x=value_axis(measure, title, curves, limit),
                    panels=(
                        Panel(
                            y=share_axis(curves),
                            series=series,
                            rules=(Rule(name=f"SLO {limit:g} s" if measure != "deadline" else "deadline", x=limit),)
                            if isfinite(limit)
                            else (),
                            height=280,
                        ),
                    ),
                )
            )
    return drawn


def share_axis(curves: Sequence[Cdf]) -> axes.Axis:
    """From no request to all of them, with room for the few slowest."""
    ends = [float(s) for c in curves for s in c.share if s < 1]
    return axes.attainment("requests that were at least this fast", ends, from_zero=True)


def value_axis(measure: str, title: str, curves: Sequence[Cdf], limit: float) -> axes.Axis:
    """A share from zero; seconds over their decades, with plain numbers."""
    if measure == "deadline":
        ends = [float(c.value[-1]) for c in curves if len(c.value)]
        return axes.linear(title, 0.0, ROOM * max([*ends, *axes.finite([limit])]))
    low, high, ticks = log_axis(curves, limit)
    return axes.log(title, low, high, ticks)


def cdf_line(policy: str, look: Look, curve: Cdf) -> Series:
    """One policy's distribution."""
    values = np.maximum(curve.value, SHORTEST_S)
    return steps(policy, look.colour, values.tolist(), curve.share.tolist(), dash=look.dash)
