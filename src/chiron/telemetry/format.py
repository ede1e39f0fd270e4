"""Figures as text: the same on the terminal, on the page, in pictures and in notebooks.

A share is rounded down, and shows as many nines as it has: a miss never reads as a hit, nor a shortfall as a target
met. Only all of them is 100 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor

Show = Callable[[float], str]
NONE = "–"
"""An unknown figure."""
DIGITS_MAX = 6


def percent(share: float) -> str:
    """A share as per cent, rounded down: ``98.97 %``, ``99.996 %``."""
    digits = 2
    while 1 - 10.0 ** -(digits + 2) < share < 1 and digits < DIGITS_MAX:
        digits += 1
    return percent_at(share, digits)


def percent_at(share: float, digits: int) -> str:
    """The same with at most so many digits after the point: for what is not an attainment."""
    units = floor(share * 10 ** (digits + 2) + 1e-9)
    text = f"{units / 10**digits:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits else text} %"


def amount(value: float) -> str:
    """Three figures or so."""
    if 0 < value < 0.0995:
        return f"{value:.3f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds: whole ones from 100 on."""
    shown = seconds * 1000
    return f"{shown:,.0f}" if shown >= 100 else f"{shown:.1f}"


def known(show: Show, value: float | None) -> str:
    """A figure, or the sign for an unknown one."""
    return NONE if value is None or value != value else show(value)


def whole(value: float) -> str:
    """A count; a mean over seeds may have a fraction."""
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.1f}"


def spread(show: Show, low: float, high: float) -> str:
    """A range with its unit once; empty where both ends show the same."""
    first, last = show(low), show(high)
    return "" if first == last else f"{first.removesuffix(' %')}–{last}"


def span(seconds: float) -> str:
    """A duration in a unit that shows it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.2f} h"


def counted(n: int, one: str, many: str = "") -> str:
    """``1 model``, ``2 models``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def number(value: float) -> str:
    """A number of a decision: whole ones whole, others with three figures, nothing in scientific notation."""
    if value != value or value in (float("inf"), float("-inf")):
        return NONE
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 3 if abs(value) < 0.1 else 2 if abs(value) < 10 else 1
    return f"{value:,.{digits}f}" if abs(value) >= 0.001 else f"{value:.2g}"
