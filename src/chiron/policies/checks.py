"""Bounds of settings, as ``__post_init__`` checks them: a ValueError names the setting, its value and the bound."""

from __future__ import annotations


def above(least: int, settings: object, *names: str) -> None:
    """Greater than that; NaN is not."""
    for name in names:
        value = getattr(settings, name)
        if not value > least:
            raise ValueError(f"{name} is {value}; it must be above {least}")


def at_least(least: int, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be {least} or more")
