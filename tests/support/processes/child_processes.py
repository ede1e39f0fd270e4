"""This process's children, but for servers that a fixture keeps for the whole session."""

from __future__ import annotations

import psutil

KEPT: set[int] = set()
"""Servers of the session, by process id."""


def children() -> list[psutil.Process]:
    """What a test has started and left, zombies included."""
    return [child for child in psutil.Process().children() if child.pid not in KEPT]
