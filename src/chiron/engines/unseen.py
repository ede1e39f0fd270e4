"""Answers in one piece: their first token cannot be seen, so two times are presumed.

The gateway's client of an engine goes by these, and so does its model in the simulator.
"""

from __future__ import annotations

from math import isfinite

from chiron.core.types import Instance, Request

PRESUMED_PREFILLS = 1.5
"""Prefill is presumed over after this many times the instance's waiting prefill."""


def presumed_prefill_s(instance: Instance) -> float:
    """Seconds from the start of a request, which the instance's waiting prefill includes."""
    return PRESUMED_PREFILLS * instance.prefill_backlog_s


def presumed_first_token_s(request: Request, finish_s: float) -> float:
    """When the first token counts as seen: so that TTFT and ITL are both met exactly when the whole took no longer than
    both SLOs allow together."""
    allowed_s = request.itl_slo_s * max(0, request.tokens_done - 1)
    return max(request.dispatch_s, finish_s - allowed_s) if isfinite(allowed_s) else request.dispatch_s
