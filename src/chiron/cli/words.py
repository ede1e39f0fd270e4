"""Decisions and moments as people say them."""

from __future__ import annotations

REASONS = {
    "interactive_load": "interactive work, as it comes and as forecast, needs so many instances",
    "batch_deadlines": "queued batch work would miss its deadlines on the spare capacity of the interactive fleet",
    "load_fell": "for a while now, less has been enough",
    "itl_below_slo": "ITL leaves room below its SLO",
    "itl_above_slo": "ITL would exceed its SLO at that size",
    "no_itl_slo": "nothing that runs there has an ITL SLO",
}
"""Sentences for reasons that need one. All others read well enough as they are logged."""


def words(name: str) -> str:
    """A reason or the name of a number as logged, in words."""
    return REASONS.get(name, name.replace("_", " ").replace("-", " "))


def show_moment(t_s: float, *, hours: bool = False) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``; with ``hours`` always the latter."""
    minutes, seconds = divmod(round(t_s), 60)
    whole, minutes = divmod(minutes, 60)
    return f"{whole}:{minutes:02}:{seconds:02}" if hours or whole else f"{minutes}:{seconds:02}"
