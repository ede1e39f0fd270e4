"""What the charts of a report are made of: lines, bands, rules, notes, as plotly's plain data."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np

from chiron.telemetry.palette import LIMIT_COLOUR
from chiron.telemetry.series import time_unit

Figure = dict[str, Any]


def timed(data: list[dict[str, Any]], end_s: float, title: str) -> Figure:
    """A figure over the whole run, so that charts line up."""
    per, unit = time_unit(end_s)
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": f"time, {unit}"}, "range": [0, figure(end_s / per)]},
            "yaxis": {"title": {"text": title}, "rangemode": "tozero"},
            "hovermode": "x unified",
        },
    }


def two_rows(made: Figure, title: str) -> Figure:
    """The same with a second, lower row that shares the time axis."""
    layout = made["layout"]
    layout["yaxis"]["domain"] = [0.46, 1]
    layout["yaxis2"] = {"title": {"text": title}, "domain": [0, 0.36], "rangemode": "tozero"}
    layout["xaxis"]["anchor"] = "y2"
    return made


def band(x: list[Any], y: Sequence[Any], name: str, colour: str) -> dict[str, Any]:
    """One layer of a stack."""
    line = {"width": 0, "shape": "hv", "color": colour}
    drawn = {"type": "scatter", "mode": "lines", "x": x, "y": list(y), "name": name, "stackgroup": "all"}
    return drawn | {"line": line, "fillcolor": colour}


def step(x: list[Any], y: Sequence[Any], name: str, colour: str, dash: str = "solid") -> dict[str, Any]:
    """A line that holds its value until the next point."""
    line = {"color": colour, "width": 1.8, "shape": "hv", "dash": dash}
    return {"type": "scatter", "mode": "lines", "x": x, "y": list(y), "name": name, "line": line}


def rule(
    x: float | None = None, y: float | None = None, colour: str = LIMIT_COLOUR, dash: str = "dash"
) -> dict[str, Any]:
    """A straight line across the chart at ``x`` or ``y``."""
    line = {"color": colour, "width": 1.4, "dash": dash}
    if x is not None:
        return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}
    return {"type": "line", "y0": y, "y1": y, "x0": 0, "x1": 1, "xref": "paper", "line": line}


def note(text: str, **place: Any) -> dict[str, Any]:
    """Words in the chart, without an arrow."""
    return {"text": text, "showarrow": False, "yanchor": "bottom", **place}


def ramp(colours: Sequence[str], n: int) -> list[str]:
    """``n`` colours spread evenly over the stops ``colours``."""
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours], dtype=float)
    at = np.linspace(0, len(stops) - 1, n)
    mixed = np.array([np.interp(at, np.arange(len(stops)), channel) for channel in stops.T]).round().astype(int)
    return ["#" + "".join(f"{part:02x}" for part in colour) for colour in mixed.T]


def numbers(values: Any) -> list[float | None]:
    """JSON numbers of four figures; null where not finite."""
    return [figure(float(v)) for v in values]


def figure(value: float) -> float | None:
    """One JSON number, short: a chart shows no more than six figures."""
    return float(f"{value:.6g}") if -inf < value < inf else None
