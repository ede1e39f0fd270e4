"""Charts of one policy's run over time. Times are from the start of the run; what has nothing to show is None."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan

import numpy as np

from chiron.core.types import ROLES
from chiron.telemetry import axes
from chiron.telemetry.format import counted
from chiron.telemetry.marks import INK, Chart, Panel, Rule, Series, layer, peak, ramp, steps
from chiron.telemetry.palette import (
    DRAINING_COLOUR,
    GROUP_COLOURS,
    INSTANCE_COLOURS,
    LIMIT_COLOUR,
    ROLE_COLOURS,
    STARTING_COLOUR,
)
from chiron.telemetry.run_data import BatchSizePoint, DecisionPoint, FleetPoint
from chiron.telemetry.series import POINTS_MAX, thin, thin_fleet

INSTANCES_DRAWN = 5
"""Lines in the chart of max batch sizes: more cannot be followed."""
STAGES_DRAWN = 8
"""Lines in the chart of replicas of stages."""
GROUP_BANDS = 8
"""Layers in the chart of the queue; groups with neighbouring deadlines share one."""
ROOM = 1.06


def fleet(points: Sequence[FleetPoint], end_s: float, limit: int = POINTS_MAX) -> Chart | None:
    """Instances by role and state, stacked, and the number that the policy wants."""
    kept = thin_fleet(points, lambda p: p.gpus, limit)
    if not kept:
        return None
    per, x_axis = axes.time(end_s)
    x = [p.t_s / per for p in kept]
    wanted = [
        *((str(role), ROLE_COLOURS[role], [p.ready.get(role, 0) for p in kept]) for role in ROLES),
        ("starting", STARTING_COLOUR, [p.starting for p in kept]),
        ("draining", DRAINING_COLOUR, [p.draining for p in kept]),
    ]
    series = [layer(name, colour, x, y) for name, colour, y in wanted if any(y)]
    series.append(steps("planned", INK, x, [p.planned for p in kept], dash="2 2.5"))
    y_axis = axes.linear("instances", 0.0, ROOM * peak(series), whole=True)
    return Chart(title="Fleet by role", x=x_axis, panels=(Panel(y=y_axis, series=tuple(series), height=280),))


def pressure(points: Sequence[FleetPoint], end_s: float, limit: int = POINTS_MAX) -> Chart | None:
    """Interactive backpressure against its target, batch backpressure (queued groups that would be late) beneath. A
    panel of what a policy does not have, or that was 0 throughout, is left out."""
    per, x_axis = axes.time(end_s)
    lines: dict[str, Series] = {}
    for name, label, colour, dash in (
        ("ibp", "IBP", ROLE_COLOURS["mixed"], ""),
        ("ibp_target", "IBP target", LIMIT_COLOUR, "5 4"),
        ("bbp", "BBP", ROLE_COLOURS["batch"], ""),
    ):
        kept = thin_fleet(points, lambda p, name=name: getattr(p, name), limit)  # type: ignore[misc]
        y = [float(getattr(p, name)) for p in kept]
        if any(isfinite(value) for value in y):
            lines[name] = steps(label, colour, [p.t_s / per for p in kept], y, dash=dash)
    panels = []
    if "ibp" in lines:
        shown = tuple(lines[name] for name in ("ibp", "ibp_target") if name in lines)
        y_axis = axes.linear("IBP, busy share of interactive and mixed instances", 0.0, ROOM * peak(shown))
        panels.append(Panel(y=y_axis, series=shown, height=200))
    if "bbp" in lines and peak([lines["bbp"]]) > 0:
        y_axis = axes.linear("BBP, groups that would be late", 0.0, ROOM * peak([lines["bbp"]]), whole=True)
        panels.append(Panel(y=y_axis, series=(lines["bbp"],), height=140))
    if not panels:
        return None
    never = "bbp" in lines and peak([lines["bbp"]]) == 0
    return Chart(
        title="Backpressure",
        caption="BBP was 0 throughout: no queued batch group would have been late." if never else "",
        x=x_axis,
        panels=tuple(panels),
    )


def queue(points: Sequence[FleetPoint], end_s: float, limit: int = POINTS_MAX) -> Chart | None:
    """Requests that wait: batch groups by their deadline, and interactive ones on top."""
    kept = thin_fleet(points, lambda p: p.waiting_batch + p.waiting_interactive, limit)
    if not any(p.waiting_batch + p.waiting_interactive for p in kept):
        return None
    per, x_axis = axes.time(end_s)
    unit = axes.time_unit(end_s)[1]
    x = [p.t_s / per for p in kept]
    bins = deadline_bins({due for p in kept for due, _ in p.groups})
    series = []
    for shade, (first, last) in zip(ramp(GROUP_COLOURS, len(bins)), bins, strict=True):
        y = [sum(n for due, n in p.groups if first <= due <= last) for p in kept]
        series.append(layer(f"due {span(first, last, per, unit)}", shade, x, y))
    # At most 16 groups are recorded: the rest of the queue is still shown.
    rest = [max(0, p.waiting_batch - sum(n for _, n in p.groups)) for p in kept]
    if any(rest):
        series.append(layer("other batch", STARTING_COLOUR, x, rest))
    if any(p.waiting_interactive for p in kept):
        series.append(layer("interactive", ROLE_COLOURS["interactive"], x, [p.waiting_interactive for p in kept]))
    due = [last for first, last in bins if first == last <= end_s]
    rules = tuple(Rule(name="deadline" if last == due[0] else "", x=last / per) for last in due)
    return Chart(
        title="Queue by deadline",
        caption="Batch groups, the earliest deadline darkest." if bins else "",
        x=x_axis,
        panels=(
            Panel(
                y=axes.linear("requests waiting", 0.0, ROOM * peak(series), whole=True),
                series=tuple(series),
                rules=rules,
            ),
        ),
    )


def batch_sizes(points: Sequence[BatchSizePoint], end_s: float, limit: int = POINTS_MAX) -> Chart | None:
    """Max batch size of the instances that changed it most, and beneath it their ITL over its SLO."""
    per, x_axis = axes.time(end_s)
    changes: dict[int, list[BatchSizePoint]] = {}
    for point in points:
        if point.max_batch_size or point.instance_id in changes:  # Of very long runs beginnings are forgotten.
            changes.setdefault(point.instance_id, []).append(point)
    if not changes:
        return None
    chosen = sorted(changes, key=lambda i: (-len(changes[i]), i))[:INSTANCES_DRAWN]
    sizes, ratios = [], []
    for colour, instance in zip(ramp(INSTANCE_COLOURS, len(chosen)), sorted(chosen), strict=True):
        every = to_its_end(changes[instance], end_s)
        caps = np.array([float(p.max_batch_size) for p in every])
        kept = [every[i] for i in thin(caps, max(30, limit // max(1, len(chosen))))]
        x = [p.t_s / per for p in kept]
        name = f"instance {instance}"
        sizes.append(steps(name, colour, x, [float(p.max_batch_size) for p in kept]))
        ratio = tuple(p.itl_s / p.itl_slo_s if isfinite(p.itl_slo_s) and p.itl_slo_s > 0 else nan for p in kept)
        if any(isfinite(value) for value in ratio):
            ratios.append(Series(name=name, colour=colour, x=tuple(x), y=ratio, mark="dots", listed=False))
    size_axis = axes.linear("max batch size, sequences", 0.0, ROOM * peak(sizes), whole=True)
    panels = [Panel(y=size_axis, series=tuple(sizes), height=220)]
    if ratios:
        ratio_axis = axes.linear("ITL over its SLO: below 1 it is met", 0.0, ROOM * max(1.0, peak(ratios)))
        panels.append(Panel(y=ratio_axis, series=tuple(ratios), rules=(Rule(name="SLO", y=1.0),), height=140))
    some = f"The {len(chosen)} instances that changed it most, of {counted(len(changes), 'instance')}."
    return Chart(
        title="Max batch sizes" + (", and ITL against its SLO" if ratios else ""),
        caption=some if len(changes) > len(chosen) else "",
        x=x_axis,
        panels=tuple(panels),
    )


def to_its_end(points: Sequence[BatchSizePoint], end_s: float) -> list[BatchSizePoint]:
    """One instance's points with its last size held until it was gone, or until the run's end."""
    *before, last = points
    if last.max_batch_size == 0:
        return [*before, replace(last, max_batch_size=before[-1].max_batch_size)]
    return [*points, replace(last, t_s=max(end_s, last.t_s), itl_s=nan)]


def deadline_bins(deadlines: set[float]) -> list[tuple[float, float]]:
    """Ranges (first, last) of neighbouring deadlines, at most ``GROUP_BANDS`` of them."""
    ordered = np.array(sorted(deadlines))
    parts = np.array_split(ordered, min(GROUP_BANDS, len(ordered))) if len(ordered) else []
    return [(float(part[0]), float(part[-1])) for part in parts]


def span(first: float, last: float, per: float, unit: str) -> str:
    """A range of deadlines in words."""
    if not isfinite(last):
        return "never" if not isfinite(first) else f"from {first / per:.3g} {unit}"
    shown = [f"{value / per:.3g}" for value in (first, last)]
    return f"{shown[0]} {unit}" if shown[0] == shown[1] else f"{shown[0]} to {shown[1]} {unit}"


def stages(decisions: Sequence[DecisionPoint], model: str, end_s: float) -> Chart | None:
    """Replicas of each stage as planned, of the pipelines and stages whose plan changed; None without any."""
    changes: dict[str, list[DecisionPoint]] = {}
    for decision in decisions:
        changed = decision.before != decision.after
        if decision.kind == "stage" and changed and decision.subject.startswith(f"{model}#"):
            changes.setdefault(decision.subject.removeprefix(f"{model}#"), []).append(decision)
    if not changes:
        return None
    per, x_axis = axes.time(end_s)
    names = sorted(changes, key=lambda name: (-len(changes[name]), name))[:STAGES_DRAWN]
    shown = [name for name in changes if name in names]
    series = []
    for colour, name in zip(ramp(INSTANCE_COLOURS, len(shown)), shown, strict=True):
        points = changes[name]
        x = [0.0, *(d.t_s / per for d in points), end_s / per]
        series.append(steps(name, colour, x, [points[0].before, *(d.after for d in points), points[-1].after]))
    some = f" The {len(shown)} that changed most, of {len(changes)}." if len(shown) < len(changes) else ""
    return Chart(
        title="Replicas of stages",
        caption=f"Pipeline and layers; stages that are not shown stayed as they were.{some}",
        x=x_axis,
        panels=(Panel(y=axes.linear("replicas planned", 0.0, ROOM * peak(series), whole=True), series=tuple(series)),),
    )


FleetChart = Callable[[Sequence[FleetPoint], float, int], Chart | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Points of one model, as the charts take them."""

    fleet: Sequence[FleetPoint]
    batch_sizes: Sequence[BatchSizePoint]
    end_s: float


def all_charts(parts: Parts, limit: int) -> list[Chart | None]:
    """In the order of the page."""
    fleets: Sequence[FleetChart] = (pressure, queue)
    return [
        fleet(parts.fleet, parts.end_s, limit),
        batch_sizes(parts.batch_sizes, parts.end_s, limit),
        *(chart(parts.fleet, parts.end_s, limit) for chart in fleets),
    ]
