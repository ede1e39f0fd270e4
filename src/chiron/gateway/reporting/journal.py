"""The gateway's journal: gets every event from the control plane, and keeps what is read later.

An event costs the loop's thread a few microseconds: counters are incremented, a line for the event log is noted down.
Lines are encoded and summed ``TOGETHER`` at a time, which costs less than one by one, between other work, and holds the
loop for some 0.1 ms; ``settle`` sees to the rest when nothing more happens. Files, Prometheus text and quantiles are
made elsewhere or on request.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from math import inf
from typing import Any, Final

from chiron.core.types import Decision, Instance, Request, RequestClass
from chiron.gateway.reporting.event_writer import EventWriter
from chiron.gateway.reporting.lines import ArrivalLine, ArrivalRow, EndLine, EndRow, Line, RequestLine, RequestRow
from chiron.gateway.reporting.live_result import LiveRecorder
from chiron.gateway.reporting.tally import ClassTally, KeyTally, prompt_tokens
from chiron.policies.views import FleetPlan, FleetView, ModelPlan
from chiron.telemetry.event_log import decision_line
from chiron.telemetry.run_data import DecisionPoint

DECISIONS_KEPT = 100
"""Of the newest, for the status; so many on batch sizes, and so many others."""
TOGETHER: Final = 64
"""Lines of the event log that are encoded together."""
REASONS_MAX = 100
"""Kinds and reasons of decisions that are counted apart; what comes beyond is counted as ``other``. A reason that
holds an engine's error text must not make new metrics for ever."""

_NOBODY: Final = ClassTally(RequestClass(name="", kind="batch"))


def request_name(request: Request) -> str:
    """What clients and logs call it: ``payload.request_id`` if the driver gave one."""
    called: str | None = getattr(request.payload, "request_id", None)
    return called or str(request.id)


def key_name(request: Request) -> str:
    """Name of the API key it came with: ``payload.key_name``, empty without one. Never the key itself."""
    return getattr(request.payload, "key_name", "")


class LiveJournal:
    """Implements the ``Journal`` port; ``observe`` is the control plane's observer."""

    wants_events = True

    def __init__(
        self,
        *,
        writer: EventWriter | None = None,
        recorder: LiveRecorder | None = None,
    ) -> None:
        self.writer: EventWriter | None = None
        self.recorder = recorder
        self.tallies: dict[tuple[str, str], ClassTally] = {}
        """By model and class, from the first arrival on."""
        self.keys: dict[str, KeyTally] = {}
        """By name of the API key, from its first request that ended on; "" without one. Few: the config has them."""
        self._lines: list[Line] = []
        """Not yet with the writer."""
        self.decisions: deque[DecisionPoint] = deque(maxlen=DECISIONS_KEPT)
        self.batch_sizes: deque[DecisionPoint] = deque(maxlen=DECISIONS_KEPT)
        """Decisions on batch sizes have a ring of their own: they are many and would push the others out."""
        self.decision_counts: Counter[tuple[str, str]] = Counter()
        """By kind and reason."""
        self.responses: Counter[int] = Counter()
        """HTTP answers by status, as the gateway reports them with ``responded``."""
        self.plans: FleetPlan = {}
        """What the policy wanted at the last tick."""
        self.planned_s = -inf
        """When that was."""
        self._model = self._class = ""
        """Of the request that was counted last, as the next one."""
        self._last = _NOBODY
        self.log_to(writer)

    def log_to(self, writer: EventWriter | None) -> None:
        """Write events there from now on; None: nowhere."""
        self.settle()
        self.writer = writer
        grouped = writer is not None and writer.grouped
        self._arrival_line: type[ArrivalLine] = ArrivalRow if grouped else ArrivalLine
        self._request_line: type[RequestLine] = RequestRow if grouped else RequestLine
        self._end_line: type[EndLine] = EndRow if grouped else EndLine

    # -- the Journal port --------------------------------------------------------------------------------------

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None:
        if request is None:
            assert instance is not None
            self._instance_event(now_s, name, instance)
        elif name == "arrival":
            self._tally(request).arrival(now_s)
            if self.recorder is not None:
                self.recorder.arrived(request)
            if self.writer is not None:
                called, cls, key = request_name(request), request.class_name, key_name(request)
                self._note(self._arrival_line(now_s, name, called, request.model, cls, request.input_tokens, key))
        elif name != "ended":  # ``ended`` says more.
            if name == "first_token":
                self._tally(request).first_token(now_s, request)
            elif name == "evicted":
                self._tally(request).evictions += 1
            if self.writer is not None:
                on = instance.id if instance is not None else None
                self._note(self._request_line(now_s, name, request_name(request), on))

    def ended(self, request: Request) -> None:
        key, prompt = key_name(request), prompt_tokens(request)
        self._tally(request).end(request, prompt)
        self._key_tally(key).end(request, prompt)
        if self.recorder is not None:
            self.recorder.ended(request, prompt)
        if self.writer is not None:
            self._note(_end_line(self._end_line, request, request_name(request), key, prompt))

    def decided(self, now_s: float, decision: Decision) -> None:
        self.settle()
        point = DecisionPoint(
            t_s=now_s,
            kind=decision.kind,
            subject=decision.subject,
            before=decision.before,
            after=decision.after,
            reason=decision.reason,
            numbers=dict(decision.numbers),
        )
        (self.batch_sizes if decision.kind == "batch_size" else self.decisions).append(point)
        named = (decision.kind, decision.reason)
        if named not in self.decision_counts and len(self.decision_counts) >= REASONS_MAX:
            named = (decision.kind, "other")
        self.decision_counts[named] += 1
        if self.recorder is not None:
            self.recorder.timeline.decided(now_s, decision)
        if self.writer is not None:
            self.writer.write(decision_line(now_s, decision))

    # -- the rest ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Hand the writer what was noted down."""
        lines = self._lines
        if lines:
            self._lines = []
            if self.writer is not None:
                self.writer.write_lines(lines)

    def observe(self, view: FleetView, plan: FleetPlan) -> None:
        self.plans, self.planned_s = plan, view.now_s
        if self.recorder is not None:
            self.recorder.timeline.observe(view, plan)

    def responded(self, status: int, count: int = 1) -> None:
        """So many HTTP answers with this status went out."""
        self.responses[status] += count

    def note(self, now_s: float, name: str, facts: dict[str, Any]) -> None:
        """An event of the gateway itself, such as ``drain``, for the event log."""
        self.settle()
        if self.writer is not None:
            self.writer.write({"t": now_s, "event": name, **facts})

    @property
    def dropped_lines(self) -> int:
        """Lines that the event log lacks: the queue or the disk was full."""
        return self.writer.dropped + self.writer.lost if self.writer is not None else 0

    def plan_of(self, model: str) -> ModelPlan | None:
        return self.plans.get(model)

    def tallies_of(self, model: str) -> Sequence[ClassTally]:
        return [tally for (name, _), tally in self.tallies.items() if name == model]

    def close(self) -> None:
        """Write what is queued. The figures stay readable."""
        self.settle()
        if self.writer is not None:
            self.writer.close()

    def _note(self, line: Line) -> None:
        lines = self._lines
        lines.append(line)
        if len(lines) >= TOGETHER:
            self.settle()

    def _instance_event(self, now_s: float, name: str, instance: Instance) -> None:
        self.settle()
        if self.writer is not None:
            role = instance.role
            self.writer.write(
                {"t": now_s, "event": name, "instance": instance.id, "model": instance.model, "role": role}
            )
        if self.recorder is not None:
            self.recorder.instance_event(now_s, name, instance)

    def _tally(self, request: Request) -> ClassTally:
        model, name = request.model, request.class_name
        if name == self._class and model == self._model:
            return self._last
        tally = self.tallies.get((model, name))
        if tally is None:
            tally = self.tallies[model, name] = ClassTally(request.cls)
        self._model, self._class, self._last = model, name, tally
        return tally

    def _key_tally(self, key: str) -> KeyTally:
        tally = self.keys.get(key)
        if tally is None:
            tally = self.keys[key] = KeyTally()
        return tally


def _end_line(line: type[EndLine], request: Request, called: str, key: str, prompt: int) -> EndLine:
    arrival_s, first_s, finish_s = request.arrival_s, request.first_token_s, request.finish_s
    dispatch_s, tokens, instance = request.dispatch_s, request.tokens_done, request.instance
    return line(
        finish_s,
        "ended",
        called,
        request.model,
        request.class_name,
        key,
        request.outcome,
        request.refused_because or None,
        instance.id if instance is not None else None,
        prompt,
        tokens,
        dispatch_s - arrival_s if dispatch_s >= 0.0 else None,
        first_s - arrival_s if first_s >= 0.0 else None,
        (finish_s - first_s) / (tokens - 1) if tokens > 1 and first_s >= 0.0 else None,
        finish_s - arrival_s,
        request.evictions,
        request.retries,
    )
