"""What a run leaves behind: requests as columns, the fleet over time, decisions; optionally every event."""

from __future__ import annotations

import json
from array import array
from typing import TextIO

import numpy as np

from chiron.core.types import Decision, Instance, Request
from chiron.telemetry.event_log import decision_line
from chiron.telemetry.recording import Timeline
from chiron.telemetry.run_data import OUTCOMES, RequestTable
from chiron.workload.types import Workload

_UNFINISHED = OUTCOMES.index("unfinished")
_OUTCOME = {name: index for index, name in enumerate(OUTCOMES)}


class Recorder:
    """Implements the ``Journal`` port; request ids are rows of the workload."""

    def __init__(self, workload: Workload, events: TextIO | None = None) -> None:
        count = len(workload)
        timeline = Timeline()
        self.wants_events = events is not None
        self.observe = timeline.observe
        self.fleet = timeline.fleet
        self.batch_sizes = timeline.batch_sizes
        self.decisions = timeline.decisions
        self.plan_changes = timeline.plan_changes
        self.ended_count = 0
        self._timeline = timeline
        self._workload = workload
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
        self._timeline.decided(now_s, decision)
        if self._events is not None:
            self._write(decision_line(now_s, decision))

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None:
        if request is None and instance is not None:
            self._timeline.instance_event(now_s, name, instance)
        if self._events is None:
            return
        line: dict[str, object] = {"t": now_s, "event": name}
        if request is not None:
            line["request"] = request.id
            if name == "arrival":
                line |= {"model": request.model, "class": request.cls.name, "input_tokens": request.input_tokens}
                if request.program:
                    line["program"] = request.program
            elif name == "ended":
                line["outcome"] = request.outcome
                if request.refused_because:
                    line["reason"] = request.refused_because
        if instance is not None:
            line["instance"] = instance.id
            if request is None:
                line |= {"model": instance.model, "role": instance.role}
        self._write(line)

    # -- the rest ----------------------------------------------------------------------------------------------

    def table(self) -> RequestTable:
        """A row for each of the workload's."""
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

    def _write(self, line: dict[str, object]) -> None:
        assert self._events is not None
        self._events.write(json.dumps(line, separators=(",", ":")) + "\n")
