"""Decisions and times as text for people."""

from __future__ import annotations

from collections.abc import Mapping

from chiron.telemetry.format import number

REASONS = {
    "interactive_load": "current and forecast interactive load needs this many instances",
    "batch_deadlines": "queued batch work would miss its deadlines on the spare capacity of the interactive fleet",
    "load_fell": "fewer instances have been enough for a while now",
    "smaller_token_budget": "instances whose steps are too long for the ITL SLO beside long prompts are to be replaced",
    "itl_below_slo": "ITL leaves room below its SLO",
    "itl_above_slo": "ITL would exceed its SLO at that size",
    "step_above_itl_slo": "beside long prompts a step of the whole budget takes longer than the ITL SLO",
    "step_within_itl_slo": "a longer step is within the ITL SLO again",
    "lengths_not_known": "too few prompts have been seen to say",
    "long_prompts_in_time": "with a smaller one, long prompts would miss their TTFT",
    "no_itl_slo": "nothing that runs there has an ITL SLO",
}
"""Sentences for reasons that need one. All others read well enough as they are logged."""

BRIEF = {
    "interactive_load": "interactive load needs this many",
    "batch_deadlines": "batch work would miss its deadlines",
    "load_fell": "fewer have been enough for a while",
    "smaller_token_budget": "instances with too long steps are replaced",
    "step_above_itl_slo": "full steps are longer than the ITL SLO",
}
"""Those of them that are long for a line of a screen."""

KINDS = {
    "fleet": "fleet",
    "role": "roles",
    "batch_size": "max batch size",
    "token_budget": "token budget",
    "reject": "refused",
    "migrate": "moved",
    "stage": "stage",
}
"""Kinds of decisions."""


def words(name: str) -> str:
    """A reason or the name of a number as logged, in words."""
    return REASONS.get(name, name.replace("_", " ").replace("-", " "))


def brief_words(name: str) -> str:
    """The same, short."""
    return BRIEF.get(name) or words(name)


def kind_words(kind: str) -> str:
    """A kind of decision."""
    return KINDS.get(kind) or words(kind)


def tell(
    kind: str,
    subject: str,
    before: float,
    after: float,
    reason: str,
    numbers: Mapping[str, float],
    *,
    brief: bool = False,
) -> str:
    """A decision in a sentence."""
    why = brief_words(reason) if brief else words(reason)
    change = f"{before:g} → {after:g}"
    if kind == "fleet":
        return f"{subject}: {change} instances: {why}"
    if kind == "role":
        roles = ", ".join(f"{numbers[r]:g} {r}" for r in ("interactive", "mixed", "batch") if numbers.get(r))
        return f"{subject}: roles now {roles or 'none'}: {why}"
    if kind == "batch_size":
        itl_s, slo_s = numbers.get("itl_s"), numbers.get("itl_slo_s")
        known = itl_s is not None and slo_s is not None and itl_s == itl_s and slo_s == slo_s
        measured = f" ({_ms(itl_s)} of {_ms(slo_s)} ms)" if known else ""
        return f"{subject}: max batch size {change}: {why}{measured}"
    if kind == "token_budget":
        where = "token budget of a step" if "#" in subject else "token budget of instances to come"
        return f"{subject}: {where} {change}: {why}"
    if kind == "stage":
        return f"{subject}: {change} replicas: {why}"
    if kind == "reject":
        return f"request {subject} refused: {why}"
    return f"{subject}: {words(kind)} {change}: {why}"


def _ms(seconds: float | None) -> str:
    assert seconds is not None
    return f"{seconds * 1000:.0f}"


def quantity(name: str, value: float) -> str:
    """A number behind a decision, with its name and unit."""
    unit = " s" if name.endswith("_s") else ""
    return f"{words(name.removesuffix('_s'))} {number(value)}{unit}"


def show_moment(t_s: float, *, hours: bool = False) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``; with ``hours`` always the latter."""
    minutes, seconds = divmod(round(t_s), 60)
    whole, minutes = divmod(minutes, 60)
    return f"{whole}:{minutes:02}:{seconds:02}" if hours or whole else f"{minutes}:{seconds:02}"
