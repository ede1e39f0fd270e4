"""Plain values, as TOML gives them, into frozen dataclasses: strictly, with errors that say where and what.

One dataclass is one table; its field names, types and defaults are the schema, and its ``__post_init__`` checks the
ranges. Three rules tie names to keys:

- a field ``hold_s`` is the key ``hold`` and reads a duration (``"45s"``, ``"10m"``, or a number of seconds); so does
  a field named ``at``. A rate such as ``gb_per_s`` is a number and keeps its name, and ``noise_s`` keeps it beside
  a field ``noise``;
- a whole number in a field ``body_max_bytes`` keeps its name and may also be text with a unit (``"32MiB"``);
- a trailing underscore is dropped: ``class_`` is the key ``class``.

A dataclass whose table does not map to its fields one by one has a class method ``from_table(table, path)``.

Why not a validation library: the settings of policies are standard-library dataclasses of other layers, which such a
library reads loosely (unknown keys pass) unless they carry its marks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from math import inf, isfinite
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from chiron.core.errors import InputError
from chiron.core.units import DurationError, SizeError, parse_duration, parse_size

T = TypeVar("T")


class ConfigError(InputError):
    """A scenario or a serve config cannot be used. The message names the path, the value and what is allowed."""


def suggest(word: str, allowed: Iterable[str]) -> str:
    """``did you mean 'theta'? allowed: ...``, for an error about an unknown word."""
    words = list(allowed)
    close = get_close_matches(word, words, n=2, cutoff=0.6) or _with_a_part_of(word, words)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}allowed: {', '.join(words) if words else 'nothing'}"


def _with_a_part_of(word: str, words: Sequence[str]) -> list[str]:
    """The first ones with a part of the unknown word, as ``keda-hpa`` has of ``kubernetes-hpa``."""
    parts = set(word.lower().split("-"))
    return [each for each in words if parts & set(each.split("-"))][:2]


def fields_by_key(kind: Any) -> dict[str, Field[Any]]:
    """Every key that a table of this dataclass may have, in order, with its field."""
    names = {field.name for field in fields(kind)}
    found = {}
    for field in fields(kind):
        short = field.name.removesuffix("_s") if is_duration(field.name) else field.name
        found[field.name if short != field.name and short in names else short.rstrip("_")] = field
    return found


def keys_of(kind: Any) -> list[str]:
    return list(fields_by_key(kind))


def read_record(kind: type[T], table: object, path: str, **given: object) -> T:
    """An instance of the dataclass ``kind`` from a table. ``given`` fields come from the caller and are no keys."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: {table!r} must be a table with the keys {', '.join(keys_of(kind))}")
    hints = get_type_hints(kind)
    known = {key: field for key, field in fields_by_key(kind).items() if field.name not in given}
    values = dict(given)
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{join(path, key)}: unknown key (value {value!r}); {suggest(key, known)}")
        field = known[key]
        if hints[field.name] is int and "bytes" in field.name.split("_") and isinstance(value, str):
            value = _read_size(value, join(path, key))
        values[field.name] = _read(
            hints[field.name], value, join(path, key), is_duration(field.name), field.default == inf
        )
    missing = [key for key, field in known.items() if field.name not in values and _required(field)]
    if missing:
        raise ConfigError(f"{path or 'scenario'}: missing {', '.join(missing)}")
    return construct(kind, path, values)


def construct(kind: type[T], path: str, values: Mapping[str, object]) -> T:
    """``kind(**values)``, its complaints turned into errors with a path."""
    try:
        return kind(**values)
    except ConfigError:
        raise
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{path or 'scenario'}: {error or 'these values contradict each other'}") from error


def read_value(kind: Any, value: object, path: str) -> Any:
    """``value`` as the type ``kind``: a number, text, bool, Literal, tuple, Mapping, dataclass or a union of them."""
    return _read(kind, value, path, seconds=False, infinite=False)


def named_tables(
    table: Mapping[str, Any], key: str, required: bool = False, *, allowed: Collection[str] = ()
) -> Mapping[str, Any]:
    """The tables ``[key.NAME]``, by name. ``allowed``: keys of such a table; a table in it under another key is the
    rest of a name with dots that was written without quotes."""
    section = table.get(key, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"{key}: {section!r} must be tables by name, [{key}.NAME]")
    if required and not section:
        raise ConfigError(f"{key}: missing; add at least one [{key}.NAME]")
    for name, entry in section.items():
        for rest, value in entry.items() if allowed and isinstance(entry, Mapping) else ():
            if rest not in allowed and isinstance(value, Mapping):
                whole = ".".join((name, rest, *_only_tables(value)))
                raise ConfigError(
                    f'{key}.{name}.{rest}: unknown key; a name with dots needs quotes: [{key}."{whole}"]; '
                    + suggest(rest, allowed)
                )
    return section


def _only_tables(table: Mapping[str, Any]) -> Iterator[str]:
    """The keys on the way down, while there is nothing but tables."""
    while table and all(isinstance(value, Mapping) for value in table.values()):
        key, table = next(iter(table.items()))
        yield key


def read_text(path: Path) -> str:
    """The text of a file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def is_duration(name: str) -> bool:
    """Whether a field of this name holds seconds."""
    return name == "at" or (name.endswith("_s") and not name.endswith("_per_s"))


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _read(kind: Any, value: object, path: str, seconds: bool, infinite: bool) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        from_table = getattr(kind, "from_table", None)
        return from_table(value, path) if from_table else read_record(kind, value, path)  # type: ignore[arg-type]
    if origin in (Union, UnionType):
        return _read_union(kind, value, path, seconds, infinite)
    if origin is Literal:
        return _read_choice(kind, value, path)
    if origin is tuple:
        return _read_list(kind, value, path, seconds)
    if origin is not None and issubclass(origin, Mapping):
        return _read_map(kind, value, path, seconds)
    return _read_scalar(kind, value, path, seconds, infinite)


def _read_scalar(kind: Any, value: object, path: str, seconds: bool, infinite: bool) -> Any:
    if kind is float and infinite and value == inf:
        return inf
    if kind is float and seconds:
        try:
            return parse_duration(value)  # type: ignore[arg-type]
        except DurationError as error:
            raise ConfigError(f"{path}: {error}") from None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and isfinite(value):  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    if kind in (bool, int, str) and type(value) is kind:
        return value
    raise ConfigError(f"{path}: {value!r} must be {_words(kind)}")


def _read_size(value: str, path: str) -> int:
    try:
        return parse_size(value)
    except SizeError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_choice(kind: Any, value: object, path: str) -> Any:
    # Compared with types, so that neither `true` nor 1.0 passes for 1.
    for choice in get_args(kind):
        if type(choice) is type(value) and choice == value:
            return choice
    raise ConfigError(f"{path}: {value!r}; {suggest(str(value), map(str, get_args(kind)))}")


def _read_list(kind: Any, value: object, path: str, seconds: bool) -> tuple[Any, ...]:
    item = get_args(kind)[0]
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{path}: {value!r} must be a list of {_words(item)}")
    return tuple(_read(item, entry, f"{path}[{i}]", seconds, False) for i, entry in enumerate(value))


def _read_map(kind: Any, value: object, path: str, seconds: bool) -> dict[str, Any]:
    item = get_args(kind)[1]
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: {value!r} must be a table of names, each with {_words(item)}")
    return {key: _read(item, entry, join(path, key), seconds, False) for key, entry in value.items()}


def _read_union(kind: Any, value: object, path: str, seconds: bool, infinite: bool) -> Any:
    members = [member for member in get_args(kind) if member is not type(None)]
    tables = [member for member in members if is_dataclass(member)]
    if isinstance(value, Mapping) and tables:
        return _read(tables[0], value, path, seconds, infinite)
    if len(members) == 1:
        return _read(members[0], value, path, seconds, infinite)
    for member in members:
        try:
            return _read(member, value, path, seconds, infinite)
        except ConfigError:
            continue
    raise ConfigError(f"{path}: {value!r} must be {' or '.join(map(_words, members))}")


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if is_dataclass(kind):
        return f"a table ({', '.join(keys_of(kind))})"
    names = {float: "a finite number", int: "a whole number", str: "text in quotes", bool: "true or false"}
    return names.get(kind, str(kind))
