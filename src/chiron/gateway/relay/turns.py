"""A request's part in a cascade: for which client's request a model is asked, and why."""

from __future__ import annotations

from typing import Final, NamedTuple

UNSURE: Final = "unsure"
"""The first model's answer was not confident enough."""
FAILED: Final = "failed"
"""The first model gave no answer: refused, lost, too late, or nothing could serve it."""
UNJUDGED: Final = "unjudged"
"""Its answer has no log-probabilities, or would have none: of tool calls, and of several answers at once."""
TOO_LONG: Final = "too_long"
"""The prompt does not fit the first model's engines."""
REASONS: Final = (UNSURE, FAILED, UNJUDGED, TOO_LONG)
"""Why a cascade's second model is asked."""


class Turn(NamedTuple):
    """Of a request that is asked for a cascade."""

    cascade: str
    """Its name."""
    reason: str
    """Why this is its second model; empty: it is the first."""
    before_s: float
    """Since the client's request came."""
    counted: bool
    """The client's request has been counted with the call before this one: only its tokens are new to its key."""
    ttft_s: float
    """The client's TTFT SLO, from that moment."""
    streams: bool
    """The client reads a stream: its first token counts, and not all of its answer."""
