"""How long to wait before the next try."""

from __future__ import annotations

DOUBLINGS_MAX = 30
"""A larger power could not change the result, and overflows in the end."""


def doubled_s(first_s: float, max_s: float, doublings: int) -> float:
    """``first_s``, doubled so many times, and at most ``max_s``."""
    return float(min(max_s, first_s * 2.0 ** min(doublings, DOUBLINGS_MAX)))
