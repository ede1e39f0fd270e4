"""Axes: the position of a value between two ends, and the ticks.

Attainment has an axis of its own. What matters is how many requests miss: from 99 to 99.9 % is ten times fewer, and as
far as from 90 to 99. So the axis is the logarithm of the share that misses, labelled with the share that does not.
Where nothing misses a logarithm has no end; all is drawn at the axis' top, one step above what can be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10
from typing import Literal

from chiron.telemetry.format import percent

TOP_GAP = 0.4
"""Decades between the smallest share of misses that can be seen and none."""
NINES_MIN, NINES_MAX = 2.0, 5.0
"""Decades of an axis of attainment, at least and at most."""
TIME_STEPS = {
    "s": (1, 2, 5, 10, 15, 20, 30, 60),
    "min": (1, 2, 5, 10, 15, 20, 30, 60),
    "h": (0.5, 1, 2, 3, 4, 6, 12, 24, 48, 72, 168),
}
"""Seconds and minutes are counted in dozens, hours in days."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """``low`` and ``high`` are values; of a log axis above 0."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    scale: Literal["linear", "log", "nines"] = "linear"
    top: float = 0.0
    """Of an axis of attainment: where all is drawn, in decades."""

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one; what lies beyond is drawn at the end."""
        low, high = self._at(self.low), self._at(self.high)
        return min(1.0, max(0.0, (self._at(value) - low) / (high - low))) if high > low else 0.5

    def _at(self, value: float) -> float:
        if self.scale == "log":
            return log10(max(value, self.low))
        return nines(value, self.top) if self.scale == "nines" else value


def linear(title: str, low: float, high: float, *, steps: Sequence[float] = (), whole: bool = False) -> Axis:
    """Round ticks, about five; ``steps``: distances that are allowed. ``whole``: of things that are counted."""
    high = high if high > low else low + 1.0
    rough = (high - low) / 5
    step = next((step for step in steps if step >= rough), None) or _round_step(rough)
    step = max(1.0, step) if whole else step
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    ticks = tuple((n * step, f"{n * step:,.10g}") for n in range(first, last + 1))
    return Axis(title=title, low=low, high=high, ticks=ticks)


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is not smaller."""
    decade = 10.0 ** floor(log10(rough))
    return next(factor * decade for factor in (1, 2, 2.5, 5, 10) if factor * decade >= rough * (1 - 1e-9))


def time(end_s: float) -> tuple[float, Axis]:
    """Seconds per unit, and the axis from 0 to ``end_s`` in that unit."""
    per, unit = time_unit(end_s)
    return per, linear(f"time, {unit}", 0.0, max(end_s, 1e-9) / per, steps=TIME_STEPS[unit])


def time_unit(last_s: float) -> tuple[float, str]:
    """Seconds per unit, and the unit, for an axis that ends at ``last_s``."""
    return (1.0, "s") if last_s <= 300 else (60.0, "min") if last_s <= 3 * 3600 else (3600.0, "h")


def log(title: str, low: float, high: float, ticks: Sequence[float]) -> Axis:
    return Axis(title=title, low=low, high=high, ticks=tuple((tick, f"{tick:,g}") for tick in ticks), scale="log")


def nines(share: float, top: float) -> float:
    """Decades of the share that misses, from 0 at none attained; ``top`` where nothing misses."""
    return top if share >= 1 else min(top, -log10(1 - max(share, 0.0)))


def nines_top(misses: Sequence[float]) -> float:
    """Where to draw 100 %: above the smallest of the shares that miss, within bounds."""
    seen = [-log10(miss) for miss in misses if 0 < miss <= 1]
    return min(NINES_MAX, max(NINES_MIN, *seen, 0.0)) + TOP_GAP


def attainment(title: str, shares: Sequence[float], *, from_zero: bool = False) -> Axis:
    """An axis on which all ``shares`` can be told apart; it begins at a round share below them."""
    top = nines_top([1 - share for share in shares])
    marks = [0.0, 0.5, 0.9, *(1 - 10.0**-n for n in range(2, 6))]
    least = 0.0 if from_zero else min(shares, default=0.0)
    # At least a decade is shown, also where nearly nothing misses.
    far = [mark for mark in marks if nines(mark, top) <= top - TOP_GAP - 0.9]
    low = max((mark for mark in far if mark <= least - (1 - least) * 0.08), default=0.0)
    ticks = [(mark, percent(round(mark, 6))) for mark in marks if mark >= low and nines(mark, top) <= top - TOP_GAP / 2]
    return Axis(title=title, low=low, high=1.0, ticks=(*ticks, (1.0, percent(1.0))), scale="nines", top=top)


def finite(values: Sequence[float]) -> list[float]:
    """Those that can be drawn."""
    return [value for value in values if isfinite(value)]
