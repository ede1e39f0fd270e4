"""The status of a ``ChironModel``: what became of it, and how its model is doing. Pure over the objects given.

Ratios are text, as the API's conventions want it of numbers that are not whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from chiron.control.snapshot import ModelSnapshot
from chiron.fleet.kubernetes.pods import words as short_line
from chiron.fleet.port import KindReport
from chiron.gateway.chiron_models.objects import ModelResource
from chiron.gateway.reporting.event_writer import wall_time
from chiron.gateway.reporting.journal import LiveJournal
from chiron.gateway.reporting.status import StatusSources
from chiron.telemetry.decision_text import words
from chiron.telemetry.run_data import DecisionPoint

MESSAGE_MAX = 1000
FIELDS = (
    "observedGeneration",
    "model",
    "ready",
    "starting",
    "draining",
    "planned",
    "advised",
    "ibp",
    "ibpTarget",
    "bbp",
    "attainment",
    "classes",
    "lastDecision",
)
"""All but the conditions. One that is not known is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    type: str
    status: bool
    reason: str
    """One word in upper camel case."""
    message: str


def accepted(resource: ModelResource, refusal: str) -> Condition:
    """``refusal``: why it was refused; empty: it was not."""
    if refusal:
        return Condition(type="Accepted", status=False, reason="Invalid", message=refusal[:MESSAGE_MAX])
    return Condition(type="Accepted", status=True, reason="Accepted", message="the gateway serves it")


def resource_status(
    resource: ModelResource,
    conditions: list[Condition],
    report: Mapping[str, Any],
    before: Mapping[str, Any],
    now: str,
) -> dict[str, Any]:
    """The whole status as a merge patch: null removes. ``before``: the one that it replaces."""
    changed = {str(each.get("type")): each for each in _list(before.get("conditions")) if isinstance(each, Mapping)}
    return {
        **dict.fromkeys(FIELDS),
        **report,
        "observedGeneration": resource.generation,
        "conditions": [
            {
                "type": each.type,
                "status": str(each.status),
                "reason": each.reason,
                "message": each.message,
                "observedGeneration": resource.generation,
                "lastTransitionTime": _since(changed.get(each.type), each, now),
            }
            for each in conditions
        ],
    }


def is_news(wanted: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return {key: value for key, value in wanted.items() if value is not None} != dict(before)


def model_report(model: ModelSnapshot, journal: LiveJournal, around: StatusSources) -> tuple[dict[str, Any], Condition]:
    """How it is doing, and whether it is ready. O(its instances)."""
    name, plan = model.spec.name, journal.plan_of(model.spec.name)
    states = Counter(each.state for each in model.instances)
    tallies = journal.tallies_of(name)
    attained, judged = sum(t.attained for t in tallies), sum(t.attained + t.missed for t in tallies)
    last = next((each for each in reversed(journal.decisions) if (each.kind, each.subject) == ("fleet", name)), None)
    report: dict[str, Any] = {
        "model": name,
        "ready": states["ready"],
        "starting": states["starting"],
        "draining": states["draining"],
        "planned": sum(model.planned.values()),
        "advised": sum(model.advised.values()) if around.advise and model.advised else None,
        "ibp": _ratio(plan.ibp) if plan else None,
        "ibpTarget": _ratio(plan.ibp_target) if plan else None,
        "bbp": round(plan.bbp) if plan and isfinite(plan.bbp) else None,
        "attainment": _share(attained, judged),
        "classes": [
            {key: value for key, value in each.items() if value is not None}
            for each in (
                {
                    "name": tally.cls.name,
                    "arrived": tally.arrived,
                    "attained": tally.attained,
                    "missed": tally.missed,
                    "attainment": _share(tally.attained, tally.attained + tally.missed),
                }
                for tally in tallies
            )
        ],
        "lastDecision": _decision(last, around) if last else None,
    }
    return report, _ready(model, around)


def _ready(model: ModelSnapshot, around: StatusSources) -> Condition:
    kinds = [around.fleet.kinds.get(kind.name, KindReport()) for kind in model.spec.kinds]
    note = next((note for kind in kinds for note in kind.notes), "")
    if model.is_ready:
        message = short_line(note or "an instance is ready")  # Never empty: API servers of old take that for null.
        return Condition(type="Ready", status=True, reason="InstanceReady", message=message)
    outage = around.outages.get(model.spec.name)
    if outage:
        return Condition(type="Ready", status=False, reason="Outage", message=short_line(note or outage))
    if not sum(model.planned.values()):
        why = "the first request starts an instance"
        return Condition(type="Ready", status=False, reason="ScaledToZero", message=short_line(note or why))
    return Condition(type="Ready", status=False, reason="Starting", message=short_line(note or "no instance is ready"))


def _decision(point: DecisionPoint, around: StatusSources) -> dict[str, Any]:
    change = f"{point.before:g} -> {point.after:g} instances"
    return {
        "time": wall_time(around.wall_origin_s + point.t_s)[:19] + "Z",
        "text": short_line(f"{change}: {words(point.reason)}"),
        "reason": point.reason,
    }


def _since(before: Mapping[str, Any] | None, condition: Condition, now: str) -> str:
    same = before is not None and before.get("status") == str(condition.status)
    since = before.get("lastTransitionTime") if same and before is not None else None
    return since if isinstance(since, str) else now


def _share(part: int, whole: int) -> str | None:
    return f"{100 * part / whole:.1f}%" if whole else None


def _ratio(value: float) -> str | None:
    return f"{value:.2f}" if isfinite(value) else None


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
