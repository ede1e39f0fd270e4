"""Profiles as files: one flat JSON object each, read strictly; the packaged ones by name.

Packaged profiles are in ``chiron/data/profiles/MODEL/GPU/tpN.json`` and are named by that path. Everything that can
be wrong with a file (unknown, missing or doubled key, wrong type, value out of range) is a ``ProfileError`` that names
the file, the key, the value and what is allowed.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from chiron.engines.profile import Profile, ProfileError

PACKAGED = Path(str(files("chiron"))) / "data" / "profiles"

_NUMBERS = "tuple[int, ...]"
# Annotations are text (``from __future__ import annotations``) and only these occur.
_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "str": ("a string", (str,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    _NUMBERS: ("a list of whole numbers", (list,)),
}


@cache
def profile_names() -> tuple[str, ...]:
    """Names of the packaged profiles, sorted."""
    return tuple(sorted(path.relative_to(PACKAGED).with_suffix("").as_posix() for path in PACKAGED.rglob("*.json")))


def load_profile(name_or_path: str | Path) -> Profile:
    """The packaged profile of that name, else the profile in that JSON file. Raises ProfileError."""
    text = str(name_or_path)
    if text in profile_names():
        return _read(PACKAGED / f"{text}.json")
    path = Path(name_or_path)
    if path.is_file():
        return _read(path)
    if path.suffix == ".json":
        raise ProfileError(f"profile file {text}: no such file")
    close = get_close_matches(text, profile_names(), n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise ProfileError(
        f"profile {text!r} is neither packaged nor a file{hint} (packaged: {', '.join(profile_names()) or 'none'})"
    )


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write a profile as JSON; ``load_profile`` reads an equal one back."""
    Path(path).write_text(profile_json(profile), encoding="utf-8")


def profile_json(profile: Profile) -> str:
    """The file of a profile: one key a line, in the order of the dataclass."""
    return json.dumps(asdict(profile), indent=2, ensure_ascii=False) + "\n"


def parse_profile(text: str, where: str) -> Profile:
    """The profile in a JSON text; ``where`` is the file's name in error messages."""
    try:
        data = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, where))
    except json.JSONDecodeError as error:
        raise ProfileError(
            f"profile file {where}: line {error.lineno} column {error.colno} is not JSON: {error.msg}"
        ) from None
    if not isinstance(data, dict):
        raise ProfileError(f"profile file {where}: expected one JSON object, found {type(data).__name__}")
    _check_keys(data, where)
    for field in fields(Profile):
        if field.name in data:
            _check_type(field.name, data[field.name], str(field.type), where)
        if field.name in data and field.type == _NUMBERS:
            data[field.name] = tuple(data[field.name])
    try:
        return Profile(**data)
    except ProfileError as error:
        raise ProfileError(f"profile file {where}: {error}") from None


def _read(path: Path) -> Profile:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"profile file {path}: cannot be read: {error}") from None
    return parse_profile(text, str(path))


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ProfileError(f"profile file {where}: key {key!r} occurs twice")
        data[key] = value
    return data


def _check_keys(data: dict[str, Any], where: str) -> None:
    allowed = [field.name for field in fields(Profile)]
    for key in data:
        if key not in allowed:
            close = get_close_matches(key, allowed, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ProfileError(f"profile file {where}: unknown key {key!r}; {hint}allowed: {', '.join(allowed)}")
    missing = [field.name for field in fields(Profile) if field.default is MISSING and field.name not in data]
    if missing:
        raise ProfileError(f"profile file {where}: missing {', '.join(repr(name) for name in missing)}")


def _check_type(key: str, value: Any, annotation: str, where: str) -> None:
    expected, types = _TYPES[annotation]
    # JSON's true is Python's 1; as a number of GPUs it is a mistake.
    inside = value if annotation == _NUMBERS and isinstance(value, list) else ()
    if isinstance(value, bool) or not isinstance(value, types) or any(type(each) is not int for each in inside):
        raise ProfileError(f"profile file {where}: {key} is {json.dumps(value)}; expected {expected}")
