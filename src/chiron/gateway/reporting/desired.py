"""How many instances there should be now, for whoever scales them in Chiron's place: KEDA, an HPA, a script.

A plan says how many instances a model should have; a workload of Kubernetes is one kind of instance. What runs stays
where it is, what is missing comes from the first kind that has room, and what is too much goes from the last kind: as
Chiron itself would do it, but for a drain's choice of the emptiest. An instance that drains is still there: the number
falls once it is gone, and once whatever takes pods away knows which.

Whoever scales by a number that nobody stands behind scales a fleet away. So there is none, and the reason in its place,
until the policy has decided upon a fleet that is known, and once it has stopped deciding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

from chiron.control.snapshot import ModelSnapshot, PlaneSnapshot
from chiron.core.types import InstanceKind, State
from chiron.fleet.port import FleetReport, KindReport
from chiron.gateway.reporting.event_writer import wall_time
from chiron.gateway.reporting.journal import LiveJournal
from chiron.gateway.reporting.status import StatusSources
from chiron.telemetry.decision_text import words

PLAN_AGE_MAX_S = 300.0
"""A plan that is older is nobody's any more: the longest period of a policy is a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """Of one model."""

    model: ModelSnapshot
    unknown: str = ""
    """Why there is no number; empty: there is one."""
    reason: str = ""
    """Of the plan."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Behind it."""
    kinds: Mapping[str, int] = field(default_factory=dict)
    """How many of each kind, by name; without a number: empty."""

    @property
    def total(self) -> int | None:
        return None if self.unknown else sum(self.kinds.values())


def desired(plane: PlaneSnapshot, journal: LiveJournal, around: StatusSources) -> tuple[Desired, ...]:
    """Of each model. O(instances)."""
    free = {gpu: float(count) for gpu, count in around.gpus_max.items()}
    for model in plane.models:
        for kind, count in _live(model).items():
            _use(free, kind, count)
    return tuple(_desired(model, plane.now_s, journal, around.fleet, free) for model in plane.models)


def _desired(
    model: ModelSnapshot, now_s: float, journal: LiveJournal, fleet: FleetReport, free: dict[str, float]
) -> Desired:
    plan, age_s = journal.plan_of(model.spec.name), now_s - journal.planned_s
    unseen = [kind.name for kind in model.spec.kinds if not fleet.kinds.get(kind.name, KindReport()).known]
    if unseen:
        return Desired(model=model, unknown=f"what runs of {', '.join(unseen)} is not known yet")
    if plan is None:
        return Desired(model=model, unknown="nothing has been decided yet")
    if age_s > PLAN_AGE_MAX_S:
        return Desired(model=model, unknown=f"nothing has been decided for {age_s:.0f} s")
    total = sum((model.advised or model.planned).values())
    return Desired(model=model, reason=plan.reason, numbers=plan.numbers, kinds=_split(model, total, fleet, free))


def _split(model: ModelSnapshot, total: int, fleet: FleetReport, free: dict[str, float]) -> dict[str, int]:
    """``free``: GPUs by type, of all models; what is taken or given back here is booked there."""
    live = _live(model)
    counts = {kind: live[kind] for kind in model.spec.kinds}
    surplus = sum(counts.values()) - total
    for kind in reversed(model.spec.kinds):
        cut = min(max(surplus, 0), counts[kind])
        counts[kind] -= cut
        surplus -= cut
        _use(free, kind, -cut)
    for _ in range(-surplus):
        room = [k for k in counts if counts[k] < k.max_instances and free.get(k.gpu, inf) >= k.gpus]
        come = [k for k in room if counts[k] < _most(k, fleet)]
        if not room:
            break
        counts[(come or room)[0]] += 1
        _use(free, (come or room)[0], 1)
    draining = _in(model, "draining")
    return {kind.name: max(count + draining[kind], _fewest(kind, fleet)) for kind, count in counts.items()}


def _live(model: ModelSnapshot) -> Counter[InstanceKind]:
    return _in(model, "starting", "ready")


def _in(model: ModelSnapshot, *states: State) -> Counter[InstanceKind]:
    return Counter(instance.kind for instance in model.instances if instance.state in states)


def _use(free: dict[str, float], kind: InstanceKind, count: int) -> None:
    if kind.gpu in free:
        free[kind.gpu] -= kind.gpus * count


def _most(kind: InstanceKind, fleet: FleetReport) -> float:
    report = fleet.kinds.get(kind.name)
    return inf if report is None or report.instances_max is None else report.instances_max


def _fewest(kind: InstanceKind, fleet: FleetReport) -> int:
    report = fleet.kinds.get(kind.name)
    return 0 if report is None else report.fewest


def desired_page(plane: PlaneSnapshot, journal: LiveJournal, around: StatusSources) -> dict[str, Any]:
    """The object of ``GET /chiron/desired``."""
    return {
        "at": wall_time(around.wall_origin_s + plane.now_s),
        "advise": around.advise,
        "models": [_page(each) for each in desired(plane, journal, around)],
    }


def _page(found: Desired) -> dict[str, Any]:
    model, why = found.model, found.unknown or words(found.reason)
    return {
        "model": model.spec.name,
        "desired": found.total,
        "reason": found.reason or None,
        "why": why,
        **_states(model, None),
        "min_instances": model.spec.min_instances,
        "max_instances": model.spec.max_instances,
        "numbers": {name: value if isfinite(value) else None for name, value in found.numbers.items()},
        "kinds": [
            {
                "model": model.spec.name,
                "kind": kind.name,
                "desired": found.kinds.get(kind.name),
                "reason": found.reason or None,
                "why": why,
                **_states(model, kind),
            }
            for kind in model.spec.kinds
        ],
    }


def _states(model: ModelSnapshot, kind: InstanceKind | None) -> dict[str, int]:
    states = Counter(each.state for each in model.instances if kind is None or each.kind == kind)
    return {"ready": states["ready"], "starting": states["starting"], "draining": states["draining"]}
