"""Every policy by name. A new one is a file beside the others and a line here."""

from __future__ import annotations

from typing import Any

from chiron.policies.chiron import ChironSettings, make_chiron
from chiron.policies.policy import Policy, PolicyEntry
from chiron.policies.rivals.static import StaticSettings, make_static

POLICIES: dict[str, PolicyEntry] = {
    "chiron": PolicyEntry(
        settings=ChironSettings,
        make=make_chiron,
        about="ours: learned batch sizes, forecast fleet, batch planned by deadline into spare capacity",
    ),
    "static": PolicyEntry(
        settings=StaticSettings,
        make=make_static,
        about="a fixed fleet, least outstanding requests first",
    ),
}


def make_policy(name: str, settings: Any = None) -> Policy:
    """The policy under these settings (its defaults if None). Raises KeyError with the names that exist."""
    entry = POLICIES.get(name)
    if entry is None:
        raise KeyError(f"unknown policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return entry.make(entry.settings() if settings is None else settings)
