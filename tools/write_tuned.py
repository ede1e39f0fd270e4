"""Writes ``policies/rivals/tuned.py`` from ``data/tuned.toml``: ``python tools/write_tuned.py`` (``make tune`` does).

Policies read no files, so what ``chiron tune`` found is source for them; a test holds both to each other. ``chiron``
was tuned with the same budget, for comparison only: its defaults stand.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from chiron.config.policies import read_policies
from chiron.policies.ranges import tunables, value_of

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "chiron"
FOUND = PACKAGE / "data" / "tuned.toml"
WRITTEN = PACKAGE / "policies" / "rivals" / "tuned.py"
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


def main() -> None:
    table = tomllib.loads(FOUND.read_text(encoding="utf-8"))
    WRITTEN.write_text(text_of(values_of(table)), encoding="utf-8")


if __name__ == "__main__":
    main()
