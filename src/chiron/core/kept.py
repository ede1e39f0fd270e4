"""Plain data that was kept by an earlier run, read field by field.

What is missing, of another type, not finite or out of range is left out, with a note; nothing raises. What an earlier
version, another program or a disk put there is not to be trusted further than that.
"""

from __future__ import annotations

from collections.abc import Iterator

NOTES_MAX = 20
"""Of one reading: a file that is wrong in every field says so often enough."""


class Kept:
    """One object of it."""

    def __init__(self, data: object, where: str, notes: list[str]) -> None:
        self._fields: dict[str, object] = {}
        self._where = where
        self._notes = notes
        if isinstance(data, dict):
            self._fields = {str(name): value for name, value in data.items()}
        else:
            self.drop("it is not an object")

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def drop(self, why: str, name: str = "") -> None:
        """Note that a field, or all of it, is left out."""
        if len(self._notes) < NOTES_MAX:
            self._notes.append(f"{self._where}{'.' if name else ''}{name}: {why}")

    def part(self, name: str) -> Kept:
        """An object inside; empty if there is none."""
        return Kept(self._fields.get(name, {}), f"{self._where}.{name}", self._notes)

    def parts(self) -> Iterator[tuple[str, Kept]]:
        """All fields, as objects."""
        for name in self._fields:
            yield name, self.part(name)

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self._fields.get(name)
        if _is_number(value, low, high):
            return float(value)  # type: ignore[arg-type]
        self.drop(f"{_shown(value)} is not a number in {low:g}..{high:g}", name)
        return None

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self._fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        self.drop(f"{_shown(value)} is not a whole number in {low}..{high}", name)
        return None

    def numbers(self, name: str, low: float, high: float, *, least: int, most: int) -> list[float] | None:
        """``least`` to ``most`` of them."""
        value = self._fields.get(name)
        if not isinstance(value, list) or not least <= len(value) <= most:
            self.drop(f"it is not a list of {least} to {most} numbers", name)
            return None
        if not all(_is_number(each, low, high) for each in value):
            self.drop(f"not all of it are numbers in {low:g}..{high:g}", name)
            return None
        return [float(each) for each in value]

    def rows(self, name: str, low: float, high: float, *, width: int, most: int) -> list[list[float]] | None:
        """Up to ``most`` lists of ``width`` numbers each."""
        value = self._fields.get(name)
        if not isinstance(value, list) or len(value) > most or not all(_is_row(row, low, high, width) for row in value):
            self.drop(f"it is not a list of at most {most} lists of {width} numbers in {low:g}..{high:g}", name)
            return None
        return [[float(each) for each in row] for row in value]

    def text(self, name: str, length_max: int) -> str | None:
        value = self._fields.get(name)
        if isinstance(value, str) and len(value) <= length_max:
            return value
        self.drop(f"it is not a text of at most {length_max} characters", name)
        return None


def _is_number(value: object, low: float, high: float) -> bool:
    """Not a number is in no range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_row(value: object, low: float, high: float, width: int) -> bool:
    return isinstance(value, list) and len(value) == width and all(_is_number(each, low, high) for each in value)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
