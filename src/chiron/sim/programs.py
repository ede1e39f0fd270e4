"""The closed loop: the calls of programs, each submitted once all that it waits for has ended, and a while after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial

import numpy as np

from chiron.core.clock import VirtualClock
from chiron.core.types import Request
from chiron.telemetry.programs import lost_calls, program_points
from chiron.telemetry.run_data import ProgramPoint, RequestTable
from chiron.telemetry.summary import LostCalls
from chiron.workload.calls import CallOrder
from chiron.workload.types import Programs, Workload

NEVER = -1.0


class ProgramCalls:
    """Implements the ``Ends`` port."""

    def __init__(
        self,
        workload: Workload,
        *,
        clock: VirtualClock,
        make: Callable[[int, float], Request],
        submit: Callable[[Request], None],
    ) -> None:
        """``make``: the request of a row that arrives at this time."""
        assert workload.programs is not None
        self.coming = 0
        """Calls whose time to come is known and has not passed."""
        self._workload = workload
        self._programs: Programs = workload.programs
        self._clock = clock
        self._make = make
        self._submit = submit
        self._order = CallOrder(workload.programs)
        self.waits = self._order.waits
        """Rows that come only after others."""
        self._arrival_s = np.where(self.waits, NEVER, workload.arrival_s)

    def ended(self, request: Request) -> None:
        for row in self._order.ended(request.id, finished=request.outcome == "finished"):
            self.coming += 1
            self._clock.call_later(float(self._programs.think_s[row]), partial(self._arrive, row))

    def _arrive(self, row: int) -> None:
        self.coming -= 1
        if not self._order.is_off(row):
            now_s = self._clock.now_s
            self._arrival_s[row] = now_s
            self._submit(self._make(row, now_s))

    # -- afterwards --------------------------------------------------------------------------------------------

    def table(self, planned: RequestTable) -> RequestTable:
        """The calls that were made, with the requests of their own, in order of arrival; ``planned`` has all rows."""
        made = np.flatnonzero(self._arrival_s != NEVER)
        order = made[np.argsort(self._arrival_s[made], kind="stable")]
        arrival_s = self._arrival_s[order]
        allowed_s = np.array([cls.deadline_s for cls in self._workload.classes])[planned.cls[order]]
        deadline_s = np.where(self.waits[order], arrival_s + allowed_s, planned.deadline_s[order])
        columns = {field.name: getattr(planned, field.name)[order] for field in fields(RequestTable)}
        return RequestTable(**(columns | {"arrival_s": arrival_s, "deadline_s": deadline_s}))

    def lost(self, planned: RequestTable, horizon_s: float) -> LostCalls:
        """Calls that never came, and would have been possible before the horizon; ``planned`` has all rows."""
        programs = self._programs
        rows = lost_calls(programs.of, self._arrival_s != NEVER, planned.outcome)
        rows = rows[programs.earliest_s[rows] < horizon_s]
        return LostCalls(model=planned.model[rows], cls=planned.cls[rows])

    def points(self, planned: RequestTable) -> tuple[ProgramPoint, ...]:
        """Every program that began by now, in order of arrival; ``planned`` has all rows."""
        programs = self._programs
        return program_points(
            kinds=programs.kinds,
            kind=programs.kind,
            start_s=programs.start_s,
            deadline_s=programs.deadline_s,
            of=programs.of,
            came=(self._arrival_s != NEVER) & (self._arrival_s <= self._clock.now_s),
            finished=planned.outcome == 0,
            finish_s=planned.finish_s,
            output_tokens=planned.output_tokens,
        )
