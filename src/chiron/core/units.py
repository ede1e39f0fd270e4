"""Durations and sizes as people write them, read into seconds and bytes."""

from __future__ import annotations

import re
from math import isfinite

from chiron.core.errors import InputError

SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
ALLOWED = "a number of seconds, or numbers with the units ms, s, m, h, d from large to small, such as 45s, 10m, 1h30m"

BYTES: dict[str, int] = {"": 1, "b": 1} | {
    f"{letter}{infix}b": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("kmgt", start=1)
}
SIZES_ALLOWED = "a whole number of bytes, or a number with the unit kB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 32MiB"

_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+"
_WHOLE = re.compile(rf"(?:{_NUMBER})")
_PART = re.compile(rf"({_NUMBER})\s*(ms|s|m|h|d)\s*")


class SizeError(ValueError):
    """The text is not a size. The message says what is allowed."""


class DurationError(InputError):
    """The text is not a duration. The message says what is allowed."""


def parse_duration(value: str | float) -> float:
    """Seconds in ``value``: finite and not negative.

    ``"45s"``, ``"10m"``, ``"1h30m"``, ``"250ms"``, ``"2d"``; a bare number is seconds. Raises DurationError.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DurationError(f"duration {value!r}: expected {ALLOWED}")
    seconds = _parse_text(value) if isinstance(value, str) else float(value)
    if not isfinite(seconds) or seconds < 0:
        raise DurationError(f"duration {value!r} must be finite and not negative: {ALLOWED}")
    return seconds


def _parse_text(text: str) -> float:
    stripped = text.strip()
    if _WHOLE.fullmatch(stripped):
        return float(stripped)
    seconds, at, last = 0.0, 0, float("inf")
    while at < len(stripped):
        part = _PART.match(stripped, at)
        # Each unit once and from large to small, so that a slip such as "10m1h" is not read as something else.
        if part is None or SECONDS[part[2]] >= last:
            raise DurationError(f"duration {text!r}: expected {ALLOWED}")
        last = SECONDS[part[2]]
        seconds += float(part[1]) * last
        at = part.end()
    if at == 0:
        raise DurationError(f"duration {text!r}: expected {ALLOWED}")
    return seconds


def show_duration(seconds: float) -> str:
    """The same in its largest unit that divides it, such as ``30d``, as parse_duration reads it."""
    for unit, size in sorted(SECONDS.items(), key=lambda item: -item[1]):
        if size >= 1.0 and seconds and seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.10g}s"


def parse_size(text: str) -> int:
    """Bytes in ``"32MiB"``, ``"8 GB"`` or ``"1048576"``; whatever the case of the letters. Raises SizeError."""
    part = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    unit = None if part is None else BYTES.get(part[2].lower())
    if part is None or unit is None:
        raise SizeError(f"size {text!r}: expected {SIZES_ALLOWED}")
    return round(float(part[1]) * unit)
