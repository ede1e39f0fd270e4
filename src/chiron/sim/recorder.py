"""What a run leaves behind: requests as columns, the fleet over time, decisions; optionally every event."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from math import nan
from typing import TextIO

import numpy as np

from chiron.core.types import Decision, Instance, Request
from chiron.policies.views import FleetPlan, FleetView, ModelView
from chiron.telemetry.result import OUTCOMES, BatchSizePoint, DecisionPoint, FleetPoint, RequestTable
from chiron.workload.types import Workload

_UNFINISHED = OUTCOMES.index("unfinished")
_OUTCOME = {name: index for index, name in enumerate(OUTCOMES)}


class Recorder:
    """Implements the ``Journal`` port; request ids are rows of the workload."""

    def __init__(self, workload: Workload, gpus_of: Mapping[str, int], events: TextIO | None = None) -> None:
        count = len(workload)
        self.wants_events = events is not None
        self.fleet: list[FleetPoint] = []
        self.batch_sizes: list[BatchSizePoint] = []
        self.decisions: list[DecisionPoint] = []
        self.plan_changes: list[tuple[float, str, int, int]] = []
        self.ended_count = 0
        self._workload = workload
        self._gpus_of = gpus_of
        self._events = events
        self._dispatch = array("d", [-1.0]) * count
        self._first_token = array("d", [-1.0]) * count
        self._finish = array("d", [-1.0]) * count
        self._outcome = array("b", [_UNFINISHED]) * count
        self._evictions = array("h", [0]) * count

    # -- the Journal port --------------------------------------------------------------------------------------

    def ended(self, request: Request) -> None:
        row = request.id
        self.ended_count += 1
        self._dispatch[row] = request.dispatch_s
        self._first_token[row] = request.first_token_s
        self._finish[row] = request.finish_s
        assert request.outcome is not None
        self._outcome[row] = _OUTCOME[request.outcome]
        if request.evictions:
            self._evictions[row] = min(request.evictions, 32767)

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
        if self._events is not None:
            self._write(
                {
                    "t": now_s,
                    "event": "decision",
                    "kind": decision.kind,
                    "subject": decision.subject,
                    "before": decision.before,
                    "after": decision.after,
                    "reason": decision.reason,
                    "numbers": {name: None if value != value else value for name, value in numbers.items()},
                }
            )

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None:
        line: dict[str, object] = {"t": now_s, "event": name}
        if request is not None:
            line["request"] = request.id
            if name == "arrival":
                line |= {"model": request.model, "class": request.cls.name, "input_tokens": request.input_tokens}
            elif name == "ended":
                line["outcome"] = request.outcome
        if instance is not None:
            line["instance"] = instance.id
            if request is None:
                line |= {"model": instance.model, "role": instance.role}
        self._write(line)

    # -- the rest ----------------------------------------------------------------------------------------------

    def observe(self, view: FleetView, plan: FleetPlan) -> None:
        """The fleet at a tick, and what the policy made of it."""
        for model in view.models:
            self.fleet.append(self._fleet_point(view.now_s, model, plan))

    def table(self) -> RequestTable:
        workload = self._workload
        return RequestTable(
            model=workload.model.astype(np.int16),
            cls=workload.cls.astype(np.int16),
            arrival_s=workload.arrival_s,
            dispatch_s=np.frombuffer(self._dispatch, dtype=np.float64),
            first_token_s=np.frombuffer(self._first_token, dtype=np.float64),
            finish_s=np.frombuffer(self._finish, dtype=np.float64),
            deadline_s=workload.deadline_s,
            input_tokens=workload.input_tokens,
            output_tokens=workload.output_tokens,
            outcome=np.frombuffer(self._outcome, dtype=np.int8),
            evictions=np.frombuffer(self._evictions, dtype=np.int16),
        )

    def _fleet_point(self, now_s: float, model: ModelView, plan: FleetPlan) -> FleetPoint:
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
            gpus=len(model.instances) * self._gpus_of[model.name],
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

    def _write(self, line: dict[str, object]) -> None:
        assert self._events is not None
        self._events.write(json.dumps(line, separators=(",", ":")) + "\n")
