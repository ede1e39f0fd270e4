"""What a run leaves behind besides its requests: the fleet over time, batch sizes, decisions.

The simulator and the gateway record alike, so that both give the same report and the same answers to ``explain``.
"""

from __future__ import annotations

from collections import deque
from math import nan

from chiron.core.types import Decision, Instance
from chiron.policies.views import FleetPlan, FleetView, ModelView
from chiron.telemetry.run_data import BatchSizePoint, DecisionPoint, FleetPoint


class Timeline:
    """Points in order of time. With ``points_max``, each kind keeps its newest ones only."""

    def __init__(self, points_max: int | None = None) -> None:
        self.fleet: deque[FleetPoint] = deque(maxlen=points_max)
        self.batch_sizes: deque[BatchSizePoint] = deque(maxlen=points_max)
        self.decisions: deque[DecisionPoint] = deque(maxlen=points_max)
        self.plan_changes: deque[tuple[float, str, int, int]] = deque(maxlen=points_max)
        """Seconds, model, planned instances before and after."""
        self._alive: set[int] = set()
        """Instances that have been ready and are not gone."""

    def decided(self, now_s: float, decision: Decision) -> None:
        numbers = dict(decision.numbers)
        self.decisions.append(
            DecisionPoint(
                t_s=now_s,
                kind=decision.kind,
                subject=decision.subject,
                before=decision.before,
                after=decision.after,
                reason=decision.reason,
                numbers=numbers,
            )
        )
        if decision.kind == "fleet":
            self.plan_changes.append((now_s, decision.subject, int(decision.before), int(decision.after)))
        elif decision.kind == "batch_size":
            model, _, instance = decision.subject.rpartition("#")
            self.batch_sizes.append(
                BatchSizePoint(
                    t_s=now_s,
                    instance_id=int(instance),
                    model=model,
                    max_batch_size=int(decision.after),
                    running=int(numbers.get("running", 0)),
                    itl_s=numbers.get("itl_s", nan),
                    itl_slo_s=numbers.get("itl_slo_s", nan),
                )
            )

    def instance_event(self, now_s: float, name: str, instance: Instance) -> None:
        """``ready`` begins the instance's line of max batch sizes, ``gone`` and ``failed`` end it."""
        begins, ends = name == "ready", name in ("gone", "failed")
        if (begins and instance.id not in self._alive) or (ends and instance.id in self._alive):
            self._alive ^= {instance.id}
            self.batch_sizes.append(
                BatchSizePoint(
                    t_s=now_s,
                    instance_id=instance.id,
                    model=instance.model,
                    max_batch_size=instance.max_batch_size if begins else 0,
                    running=0,
                    itl_s=nan,
                    itl_slo_s=nan,
                )
            )

    def observe(self, view: FleetView, plan: FleetPlan) -> None:
        """The fleet at a tick, and what the policy made of it."""
        for model in view.models:
            self.fleet.append(fleet_point(view.now_s, model, plan))


def fleet_point(now_s: float, model: ModelView, plan: FleetPlan) -> FleetPoint:
    """One model's fleet at a tick."""
    ready = {"interactive": 0, "mixed": 0, "batch": 0}
    running_interactive = running = starting = draining = 0
    for instance in model.instances:
        if instance.state == "ready":
            ready[instance.role] += 1
        elif instance.state == "starting":
            starting += 1
        else:
            draining += 1
        running_interactive += instance.dispatched_interactive
        running += instance.dispatched
    made = plan.get(model.name)
    return FleetPoint(
        t_s=now_s,
        model=model.name,
        ready=ready,
        starting=starting,
        draining=draining,
        gpus=sum(instance.gpus for instance in model.instances),
        planned=sum(made.counts.values()) if made else sum(model.planned.values()),
        running_interactive=running_interactive,
        running_batch=running - running_interactive,
        waiting_interactive=model.waiting_interactive,
        waiting_batch=sum(g.requests for g in model.groups),
        ibp=made.ibp if made else nan,
        ibp_target=made.ibp_target if made else nan,
        bbp=made.bbp if made else nan,
        groups=tuple((g.deadline_s, g.requests) for g in model.groups[:16]),
    )
