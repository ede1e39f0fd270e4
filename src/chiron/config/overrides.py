"""Values set over a file's own: ``--set path=value`` on the command line, ``[[override]]`` tables in the file."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from typing import Any

from chiron.config.read import ConfigError, read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """One value set over the file's own, as ``--set path=value`` does."""

    path: str
    """Dotted, for example ``classes.chat.ttft`` or ``workload.0.rate_scale``."""
    value: Any


def override_text(assignment: str) -> str:
    """``path=value`` as an [[override]] table, which can follow any TOML text. The value is TOML, or else text."""
    path, equals, value = assignment.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {assignment!r}: expected path=value, for example classes.chat.ttft=2s")
    return f"\n[[override]]\npath = {json.dumps(path.strip())}\nvalue = {_as_toml(value.strip())}\n"


def apply_overrides(table: dict[str, Any]) -> None:
    """Set what the ``[[override]]`` tables of a file say, in place and in order."""
    entries = table.get("override", [])
    if not isinstance(entries, list):
        raise ConfigError(f"override: {entries!r} must be tables, [[override]]")
    for i, entry in enumerate(entries):
        override = read_record(Override, entry, f"override[{i}]")
        _apply(table, override, f"override[{i}] ({override.path})")


def _as_toml(value: str) -> str:
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return json.dumps(value, ensure_ascii=False)
    return value if list(parsed) == ["value"] else json.dumps(value, ensure_ascii=False)


def _apply(table: dict[str, Any], override: Override, path: str) -> None:
    """Set one value in place. Tables on the way are made; entries of lists must exist."""
    at: Any = table
    *parents, last = _parts(override.path, path)
    for part in parents:
        at = at[_index(at, part, path)] if isinstance(at, list) else at.setdefault(part, {})
        if not isinstance(at, dict | list):
            raise ConfigError(f"{path}: {part!r} is a value ({at!r}), not a table")
    if isinstance(at, list):
        at[_index(at, last, path)] = override.value
    else:
        at[last] = override.value


def _parts(dotted: str, path: str) -> list[str]:
    """The keys of a dotted TOML key: a name with dots in it is quoted, as in ``models."llama-3.1".initial``."""
    try:
        found: Any = tomllib.loads(f"{dotted} = 0")
    except tomllib.TOMLDecodeError:
        raise ConfigError(f"{path}: not a dotted path; quote names that have other letters than a-z 0-9 _ -") from None
    parts: list[str] = []
    while isinstance(found, dict):
        (key,) = found
        parts.append(key)
        found = found[key]
    return parts


def _index(entries: list[Any], part: str, path: str) -> int:
    if not part.isdecimal() or int(part) >= len(entries):
        raise ConfigError(f"{path}: {part!r} must be the number of an entry, 0 to {len(entries) - 1}")
    return int(part)
