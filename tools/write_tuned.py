"""Writes ``policies/rivals/tuned.py`` from ``data/tuned.toml``: ``python tools/write_tuned.py`` (``make tune`` does).

Policies read no files, so what ``chiron tune`` found is source for them; a test holds both to each other. ``chiron``
was tuned with the same budget, for comparison only: its defaults stand.

``python tools/write_tuned.py FILE...`` first takes over the policies of files that ``chiron tune`` wrote for a few of
them, each with the command that found it and what it was searched for.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chiron.config.policies import read_policies
from chiron.policies.ranges import tunables, value_of

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "chiron"
FOUND = PACKAGE / "data" / "tuned.toml"
WRITTEN = PACKAGE / "policies" / "rivals" / "tuned.py"
START = re.compile(r"^(\[policies\.|\[\[first|\[\[calibration)", re.MULTILINE)
END = re.compile(r"^(\[\[first|\[\[calibration)", re.MULTILINE)
"""Where a policy's tables begin or the last one's end; and the latter alone."""
COMPARED = ("chiron",)
"""Tuned to be compared with, not to be used."""


def values_of(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tuned values by policy and name of the setting."""
    found = {name: choice for name, choice in read_policies(table).items() if name not in COMPARED}
    return {
        name: {each.name: value_of(choice.settings, each.name) for each in tunables(type(choice.settings))}
        for name, choice in found.items()
    }


def text_of(values: dict[str, dict[str, Any]]) -> str:
    lines = [
        '"""What the fair tuning found (``make tune``, data/tuned.toml); made by tools/write_tuned.py."""',
        "",
        "TUNED: dict[str, dict[str, float | int | bool]] = {",
    ]
    for name, settings in values.items():
        lines += [f'    "{name}": {{', *(f'        "{key}": {value!r},' for key, value in settings.items()), "    },"]
    return "\n".join([*lines, "}"]) + "\n"


def taken_over(text: str, other: str) -> str:
    """The file, with the policies of another one in place of its own, or beside them. Each says what it was searched
    for and on; the requests that either has seen are kept, so that none of them can be judged."""
    table, found = tomllib.loads(text), tomllib.loads(other)
    for name in found["policies"]:
        header = f"[search.{json.dumps(name)}]\n"
        said = [f"command = {json.dumps(found['command'])}"]
        if found["objective"] != table["objective"]:
            said.append(f"objective = {json.dumps(found['objective'])}")
        block = _block(other, name).replace(header, header + "\n".join(said) + "\n")
        if name in table["policies"]:
            text = text.replace(_block(text, name), block)
        else:
            start = END.search(text).start()  # type: ignore[union-attr]
            text = text[:start] + block + text[start:]
    kept = table["calibration"]
    return text + "".join(_window(each) for each in found["calibration"] if each not in kept)


def _window(each: dict[str, Any]) -> str:
    lines = [f"{key} = {json.dumps(value) if isinstance(value, str) else repr(value)}" for key, value in each.items()]
    return "\n".join(["", "[[calibration]]", *lines, ""])


def _block(text: str, name: str) -> str:
    """All tables of a policy."""
    start = text.index(f"[policies.{json.dumps(name)}]\n")
    return text[start : next(match.start() for match in START.finditer(text) if match.start() > start)]


def main(files: Sequence[str]) -> None:
    text = FOUND.read_text(encoding="utf-8")
    for file in files:
        text = taken_over(text, Path(file).read_text(encoding="utf-8"))
    FOUND.write_text(text, encoding="utf-8")
    WRITTEN.write_text(text_of(values_of(tomllib.loads(text))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
