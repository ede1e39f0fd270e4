"""The closed loop: the calls of programs, each submitted once all that it waits for has ended, and a while after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from itertools import pairwise

import numpy as np

from chiron.core.clock import VirtualClock
from chiron.core.types import Request
from chiron.telemetry.run_data import ProgramPoint, RequestTable
from chiron.workload.types import Programs, Workload

NEVER = -1.0


class ProgramCalls:
    """Implements the ``Ends`` port. A program of which a call does not finish makes no more."""

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
        parents, begins = self._programs.parents.tolist(), self._programs.parents_from.tolist()
        self._of: list[int] = self._programs.of.tolist()
        self._waits = [end - begin for begin, end in pairwise(begins)]
        """Calls that each row still waits for."""
        self._then: dict[int, list[int]] = {}
        """Rows that wait for a row."""
        for row, (begin, end) in enumerate(pairwise(begins)):
            for parent in parents[begin:end]:
                self._then.setdefault(parent, []).append(row)
        self.waits = np.array(self._waits) > 0
        """Rows that come only after others."""
        self._arrival_s = np.where(self.waits, NEVER, workload.arrival_s)
        self._broken = np.zeros(len(self._programs), dtype=np.bool_)

    def ended(self, request: Request) -> None:
        row = request.id
        program = self._of[row]
        if program < 0:
            return
        if request.outcome != "finished":
            self._broken[program] = True
            return
        for after in self._then.get(row, ()):
            self._waits[after] -= 1
            if not self._waits[after]:
                self.coming += 1
                self._clock.call_later(float(self._programs.think_s[after]), partial(self._arrive, after))

    def _arrive(self, row: int) -> None:
        self.coming -= 1
        if self._broken[self._of[row]]:
            return
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

    def points(self, planned: RequestTable) -> tuple[ProgramPoint, ...]:
        """Every program that began by now, in order of arrival; ``planned`` has all rows."""
        programs, mine = self._programs, self._programs.of >= 0
        of = programs.of[mine]
        count = len(programs)
        finished = planned.outcome[mine] == 0
        tokens = np.bincount(of, weights=np.where(finished, planned.output_tokens[mine], 0), minlength=count)
        ends = np.full(count, NEVER)
        np.maximum.at(ends, of, np.where(finished, planned.finish_s[mine], NEVER))
        done = np.bincount(of, weights=finished, minlength=count)
        calls = np.bincount(of, minlength=count)
        begun = np.bincount(of, weights=self._arrival_s[mine] != NEVER, minlength=count) > 0
        return tuple(
            ProgramPoint(
                kind=programs.kinds[int(programs.kind[i])],
                start_s=float(programs.start_s[i]),
                finish_s=float(ends[i]) if done[i] == calls[i] else NEVER,
                deadline_s=float(programs.deadline_s[i]),
                calls=int(calls[i]),
                calls_finished=int(done[i]),
                output_tokens=int(tokens[i]),
            )
            for i in np.argsort(programs.start_s, kind="stable").tolist()
            if begun[i] and programs.start_s[i] <= self._clock.now_s
        )
