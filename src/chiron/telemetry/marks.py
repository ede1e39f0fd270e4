"""What charts are made of, as values: lines, layers, dots, rules. ``drawing.py`` makes HTML of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from chiron.telemetry.axes import Axis
from chiron.telemetry.palette import LIMIT_COLOUR

INK = "currentColor"
"""The page's text colour, light or dark."""
Mark = Literal["step", "layer", "dots"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points in order of ``x``; a nan in ``y`` is a gap. A step holds its value until the next point; layers of one
    panel are stacked in their order."""

    name: str
    colour: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    mark: Mark = "step"
    dash: str = ""
    """As SVG has it: lengths of dashes and gaps."""
    shape: str = "circle"
    """Of dots."""
    texts: tuple[str, ...] = ()
    """What each dot says."""
    listed: bool = True
    """In the legend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A straight line across the panel at ``x`` or ``y``; ``name`` is in the legend."""

    name: str = ""
    x: float | None = None
    y: float | None = None
    colour: str = LIMIT_COLOUR
    dash: str = "5 4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One plot over the chart's x axis."""

    y: Axis
    series: tuple[Series, ...]
    rules: tuple[Rule, ...] = ()
    height: int = 240
    """CSS pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Panels one above another, which share an x axis."""

    title: str
    x: Axis
    panels: tuple[Panel, ...]
    caption: str = ""


def steps(
    name: str, colour: str, x: Sequence[float], y: Sequence[float], *, dash: str = "", listed: bool = True
) -> Series:
    """A line that holds its value until the next point."""
    return Series(name=name, colour=colour, x=tuple(x), y=tuple(y), dash=dash, listed=listed)


def layer(name: str, colour: str, x: Sequence[float], y: Sequence[float]) -> Series:
    """One layer of a stack."""
    return Series(name=name, colour=colour, x=tuple(x), y=tuple(y), mark="layer")


def peak(series: Sequence[Series]) -> float:
    """The highest point, layers stacked; 0 without one."""
    single = [value for s in series if s.mark != "layer" for value in s.y if value == value]
    layers = [np.nan_to_num(np.array(s.y, dtype=float)) for s in series if s.mark == "layer" and s.y]
    stacked = [float(np.sum(layers, axis=0).max())] if layers else []
    return max([*single, *stacked], default=0.0)


def ramp(colours: Sequence[str], n: int) -> list[str]:
    """``n`` colours spread evenly over the stops ``colours``."""
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours], dtype=float)
    at = np.linspace(0, len(stops) - 1, n)
    mixed = np.array([np.interp(at, np.arange(len(stops)), channel) for channel in stops.T]).round().astype(int)
    return ["#" + "".join(f"{part:02x}" for part in colour) for colour in mixed.T]
