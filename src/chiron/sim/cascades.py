"""Second calls of a cascade, each submitted when the first one has ended: as the gateway does, with what that has left
of the TTFT SLO, or with all of it again if nothing is left. A first call that gets no answer, or no instance in time,
is followed by one as well, also where it would have been sure: that one has its row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from math import inf

import numpy as np

from chiron.core.clock import VirtualClock
from chiron.core.types import Request
from chiron.telemetry.run_data import RequestTable
from chiron.workload.types import Cascades, Workload

LEFT_MIN_S = 0.001
"""Of a TTFT SLO; less is nothing."""


class CascadeCalls:
    """Implements the ``Ends`` port."""

    def __init__(
        self,
        workload: Workload,
        *,
        clock: VirtualClock,
        make: Callable[[int, float], Request],
        submit: Callable[[Request], None],
        cancel: Callable[[Request], None],
    ) -> None:
        """``make``: the request of a row that arrives at this time."""
        assert workload.cascades is not None
        self.coming = 0
        """Calls whose time to come is known and has not passed."""
        self.waits = workload.cascades.waits
        """Rows that come only after others."""
        self._workload = workload
        self._cascades: Cascades = workload.cascades
        self._then: list[int] = workload.cascades.then.tolist()
        self._other: list[int] = workload.cascades.other.tolist()
        self._wait_s: list[float] = workload.cascades.wait_s.tolist()
        self._asked_again: set[int] = set()
        """Rows of first calls that would have been sure and got no answer."""
        self._clock = clock
        self._make = make
        self._submit = submit
        self._cancel = cancel

    def asked(self, request: Request) -> None:
        """It has been submitted. Where it waits for an instance it does so no longer than it may."""
        if request.dispatch_s < 0.0 and request.outcome is None and self._wait_s[request.id] < inf:
            self._clock.call_later(self._wait_s[request.id], partial(self._waited, request))

    def _waited(self, request: Request) -> None:
        if request.dispatch_s < 0.0 and request.outcome is None:
            self._cancel(request)

    def ended(self, request: Request) -> None:
        """A first call that gave no answer is one that was not sure."""
        row = request.id
        after = self._then[row]
        if after < 0 and self._other[row] >= 0 and request.outcome != "finished" and row not in self._asked_again:
            self._asked_again.add(row)
            after = row
        if after >= 0:
            self.coming += 1
            self._clock.call_later(0.0, partial(self._arrive, after))

    def _arrive(self, row: int) -> None:
        self.coming -= 1
        now_s = self._clock.now_s
        request = self._make(row, now_s)
        if row in self._asked_again:
            request.model = self._workload.models[self._other[row]]
        left_s = request.ttft_slo_s - (now_s - float(self._cascades.start_s[row]))
        if left_s >= LEFT_MIN_S:
            request.ttft_slo_s = left_s
        self._submit(request)

    def table(self, planned: RequestTable) -> RequestTable:
        """Requests as their clients see them, in order of arrival; ``planned`` has a row for each call. Of two calls
        the second one is left, from the client's request on. An answer of the first model begins when it is found to
        do; it is taken to be decoded evenly."""
        cascades = self._cascades
        columns = {field.name: getattr(planned, field.name) for field in fields(RequestTable)}
        waited = cascades.waited_tokens(planned.output_tokens)
        gaps = np.maximum(planned.output_tokens - 1, 1)
        spent_s = np.where(waited > 0, (planned.finish_s - planned.first_token_s) * waited / gaps, 0.0)
        begun = (planned.first_token_s >= 0) & (planned.outcome == 0)
        again = np.zeros(len(begun), dtype=np.bool_)
        again[sorted(self._asked_again)] = True
        columns["first_token_s"] = np.where(begun & ~again, planned.first_token_s + spent_s, planned.first_token_s)
        columns["model"] = np.where(again, cascades.other, planned.model).astype(planned.model.dtype)
        columns["arrival_s"] = cascades.start_s
        return RequestTable(**{name: column[cascades.answers] for name, column in columns.items()})
