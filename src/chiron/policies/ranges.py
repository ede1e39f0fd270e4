"""The range in which a setting may be tuned, declared with the setting::

    target: Annotated[float, Between(0.05, 20.0, log=True)] = 5.0

A setting without a range is never tuned: it says what a policy is, or how often it looks. ``chiron tune`` searches
the unit cube; a range says which value a place in 0..1 stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from math import exp, isfinite, log
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

Value = float | int | bool | str
"""Of a setting that can be tuned."""

DIGITS = 4
"""Significant digits of a tuned number: more would only look exact."""


@dataclass(frozen=True, slots=True)
class Between:
    """A number from ``least`` to ``most``, both included; ``log``: each doubling is as likely as the next one."""

    least: float
    most: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (isfinite(self.least) and isfinite(self.most) and self.least < self.most):
            raise ValueError(f"range {self.least} to {self.most}: least must be below most, and both finite")
        if self.log and not self.least > 0:
            raise ValueError(f"range {self.least} to {self.most}: a logarithmic one must begin above 0")

    def __str__(self) -> str:
        return f"{self.least:g} to {self.most:g}" + (" (logarithmic)" if self.log else "")

    def value(self, place: float) -> float:
        """The number at ``place`` in 0..1."""
        if self.log:
            return exp(log(self.least) + place * (log(self.most) - log(self.least)))
        return self.least + place * (self.most - self.least)

    def place(self, value: float) -> float:
        """Where ``value`` is; one beyond the range is at its end."""
        inside = min(max(value, self.least), self.most)
        if self.log:
            return (log(inside) - log(self.least)) / (log(self.most) - log(self.least))
        return (inside - self.least) / (self.most - self.least)


@dataclass(frozen=True, slots=True)
class AnyOf:
    """One of a few values."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if len(set(self.values)) < 2:
            raise ValueError(f"values {self.values}: name two or more, each once")

    def __str__(self) -> str:
        return " or ".join(map(repr, self.values))

    def value(self, place: float) -> Value:
        return self.values[min(int(place * len(self.values)), len(self.values) - 1)]

    def place(self, value: Value) -> float:
        number = self.values.index(value) if value in self.values else 0
        return (number + 0.5) / len(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunable:
    """One setting with its range."""

    name: str
    """Dotted where it is in a table of its own: ``packing.batch_reserve``."""
    kind: type
    range: Between | AnyOf

    def value(self, place: float) -> Value:
        found = self.range.value(min(max(place, 0.0), 1.0))
        if self.kind is int and isinstance(self.range, Between):
            return round(found)  # type: ignore[arg-type]
        return float(f"{found:.{DIGITS}g}") if isinstance(found, float) else found

    def place(self, value: Any) -> float:
        return self.range.place(value)


def tunables(settings: type[Any], prefix: str = "") -> tuple[Tunable, ...]:
    """Every setting of a policy that has a range, in the order of their declaration, those of nested tables too."""
    hints = get_type_hints(settings, include_extras=True)
    found: list[Tunable] = []
    for field in fields(settings):
        hint = hints[field.name]
        if get_origin(hint) is Annotated:
            kind, *marks = get_args(hint)
            found += [_tunable(prefix + field.name, kind, mark) for mark in marks if isinstance(mark, Between | AnyOf)]
        elif is_dataclass(hint) and isinstance(hint, type):
            found += tunables(hint, f"{prefix}{field.name}.")
    return tuple(found)


def _tunable(name: str, kind: Any, mark: Between | AnyOf) -> Tunable:
    if isinstance(mark, Between) and kind not in (int, float):
        raise TypeError(f"{name}: a range of numbers belongs to an int or a float, not to {kind}")
    if (
        isinstance(mark, Between)
        and kind is int
        and not (mark.least == int(mark.least) and mark.most == int(mark.most))
    ):
        raise TypeError(f"{name}: a whole number needs whole ends, not {mark.least} and {mark.most}")
    return Tunable(name=name, kind=kind if isinstance(kind, type) else object, range=mark)


def with_values(settings: T, values: Mapping[str, Value]) -> T:
    """The settings with some of them set, by dotted name. Raises ValueError if they contradict each other."""
    own = {name: value for name, value in values.items() if "." not in name}
    nested: dict[str, dict[str, Value]] = {}
    for name, value in values.items():
        if "." in name:
            table, _, rest = name.partition(".")
            nested.setdefault(table, {})[rest] = value
    tables = {name: with_values(getattr(settings, name), part) for name, part in nested.items()}
    return replace(settings, **own, **tables)  # type: ignore[type-var]


def value_of(settings: Any, name: str) -> Value:
    """The setting of a dotted name."""
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings  # type: ignore[no-any-return]


def with_defaults(settings: type[T], name: str, module: str, values: Mapping[str, Value]) -> type[T]:
    """A settings type called ``name`` whose defaults are these values where they are given."""
    tuned = with_values(settings(), values)
    hints = get_type_hints(settings, include_extras=True)
    changed = dict.fromkeys(key.partition(".")[0] for key in values)
    body = {
        "__module__": module,
        "__qualname__": name,
        "__doc__": f"{settings.__name__} with the values that the tuning found.",
        "__annotations__": {key: hints[key] for key in changed},
        **{key: getattr(tuned, key) for key in changed},
    }
    made: type[T] = type(name, (settings,), body)
    return dataclass(frozen=True, slots=True, kw_only=True)(made)
