"""Who gives way where the host memory for sleepers is short: one rule, for modelled fleets and for processes."""

from __future__ import annotations

from collections.abc import Mapping

_ROUNDING = 1e-9
"""Sums of sizes may differ from the whole by so much of it."""


def giving_way(
    kind: str,
    needed_gb: float,
    *,
    counts: Mapping[str, int],
    sizes_gb: Mapping[str, float],
    used_gb: float,
    memory_gb: float,
) -> list[str] | None:
    """Kinds, once for each of their sleepers that has to go, so that one more of ``kind`` has room: those that have
    more asleep than its own. None: there is no room for it. ``counts`` and ``sizes_gb`` by name of a kind."""
    left, gone = dict(counts), []
    while used_gb + needed_gb > memory_gb * (1.0 + _ROUNDING):
        most = max(left, key=lambda name: (left[name], name), default="")
        if left.get(most, 0) <= left.get(kind, 0) + 1:
            return None
        gone.append(most)
        left[most] -= 1
        used_gb -= sizes_gb[most]
    return gone
