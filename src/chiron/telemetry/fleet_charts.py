"""Charts of one policy's run over time, as plotly figures. Times are from the start of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite, nan

import numpy as np

from chiron.core.types import ROLES
from chiron.telemetry.marks import Figure, band, figure, numbers, ramp, rule, step, timed, two_rows
from chiron.telemetry.palette import (
    DRAINING_COLOUR,
    GROUP_COLOURS,
    INSTANCE_COLOURS,
    LIMIT_COLOUR,
    ROLE_COLOURS,
    STARTING_COLOUR,
)
from chiron.telemetry.result import BatchSizePoint, FleetPoint
from chiron.telemetry.series import POINTS_MAX, thin, thin_fleet, time_unit

INSTANCES_DRAWN = 5
"""Lines in the chart of max batch sizes: more cannot be followed."""
GROUP_BANDS = 10
"""Bands in the chart of the queue; groups with neighbouring deadlines share one."""


def fleet(points: Sequence[FleetPoint], end_s: float, limit: int = POINTS_MAX) -> Figure:
    """Instances by role and state, stacked, and the number that the policy wants."""
    kept = thin_fleet(points, lambda p: p.gpus, limit)
    per = time_unit(end_s)[0]
    x = [figure(p.t_s / per) for p in kept]
    bands = [
        *((str(role), ROLE_COLOURS[role], [p.ready.get(role, 0) for p in kept]) for role in ROLES),
        ("starting", STARTING_COLOUR, [p.starting for p in kept]),
        ("draining", DRAINING_COLOUR, [p.draining for p in kept]),
    ]
    data = [band(x, y, name, colour) for name, colour, y in bands if any(y)]
    data.append(step(x, [p.planned for p in kept], "planned", "ink", dash="dot"))
    return timed(data, end_s, "instances")


def pressure(points: Sequence[FleetPoint], end_s: float, limit: int = POINTS_MAX) -> Figure:
    """Interactive backpressure against its target, batch backpressure (queued groups that would be late) beneath."""
    per = time_unit(end_s)[0]
    data = []
    for key, name, colour, axis in (
        ("ibp", "IBP", ROLE_COLOURS["interactive"], "y"),
        ("ibp_target", "IBP target", LIMIT_COLOUR, "y"),
        ("bbp", "BBP", ROLE_COLOURS["batch"], "y2"),
    ):
        kept = thin_fleet(points, lambda p, key=key: getattr(p, key), limit)  # type: ignore[misc]
        y = numbers(getattr(p, key) for p in kept)
        if any(value is not None for value in y):
            dash = "dash" if key == "ibp_target" else "solid"
            x = [figure(p.t_s / per) for p in kept]
            data.append(step(x, y, name, colour, dash=dash) | {"yaxis": axis})
    return two_rows(timed(data, end_s, "IBP (busy / all)"), "BBP, groups")


def queue(points: Sequence[FleetPoint], end_s: float, limit: int = POINTS_MAX) -> Figure:
    """Requests that wait: batch groups by their deadline, and interactive ones on top."""
    kept = thin_fleet(points, lambda p: p.waiting_batch + p.waiting_interactive, limit)
    per, unit = time_unit(end_s)
    x = [figure(p.t_s / per) for p in kept]
    bins = deadline_bins({due for p in kept for due, _ in p.groups})
    data = []
    for shade, (first, last) in zip(ramp(GROUP_COLOURS, len(bins)), bins, strict=True):
        y = [sum(n for due, n in p.groups if first <= due <= last) for p in kept]
        data.append(band(x, y, f"due {span(first, last, per, unit)}", shade))
    # At most 16 groups are recorded: the rest of the queue is still shown.
    rest = [max(0, p.waiting_batch - sum(n for _, n in p.groups)) for p in kept]
    if any(rest):
        data.append(band(x, rest, "other batch", STARTING_COLOUR))
    data.append(band(x, [p.waiting_interactive for p in kept], "interactive", ROLE_COLOURS["interactive"]))
    made = timed(data, end_s, "requests waiting")
    made["layout"]["shapes"] = [rule(x=last / per) for first, last in bins if first == last <= end_s]
    return made


def batch_sizes(points: Sequence[BatchSizePoint], end_s: float, limit: int = POINTS_MAX) -> Figure:
    """Max batch size of the instances that changed it most, and beneath it their ITL over its SLO."""
    per = time_unit(end_s)[0]
    changes: dict[int, list[BatchSizePoint]] = {}
    for point in points:
        if point.max_batch_size or point.instance_id in changes:  # Of very long runs beginnings are forgotten.
            changes.setdefault(point.instance_id, []).append(point)
    chosen = sorted(changes, key=lambda i: (-len(changes[i]), i))[:INSTANCES_DRAWN]
    data = []
    for colour, instance in zip(ramp(INSTANCE_COLOURS, len(chosen)), sorted(chosen), strict=True):
        every = to_its_end(changes[instance], end_s)
        sizes = np.array([float(p.max_batch_size) for p in every])
        kept = [every[i] for i in thin(sizes, max(30, limit // max(1, len(chosen))))]
        x = [figure(p.t_s / per) for p in kept]
        name = f"instance {instance}"
        ratio = numbers(p.itl_s / p.itl_slo_s if isfinite(p.itl_slo_s) else np.nan for p in kept)
        data.append(step(x, [p.max_batch_size for p in kept], name, colour))
        dots = {"type": "scatter", "mode": "markers", "x": x, "y": ratio, "yaxis": "y2", "showlegend": False}
        data.append(dots | {"name": name, "marker": {"color": colour, "size": 4}})
    made = two_rows(timed(data, end_s, "max batch size, sequences"), "ITL / its SLO")
    made["layout"]["yaxis2"]["rangemode"] = "tozero"
    made["layout"]["shapes"] = [rule(y=1.0) | {"yref": "y2"}]
    made["drawn"], made["instances"] = len(chosen), len(changes)
    return made


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


Chart = Callable[[Sequence[FleetPoint], float, int], Figure]
FLEET_CHARTS: dict[str, Chart] = {"fleet": fleet, "pressure": pressure, "queue": queue}
"""Charts of one model's fleet, by the id of their place in the page."""
