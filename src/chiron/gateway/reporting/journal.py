"""The gateway's journal: gets every event from the control plane, and keeps what is read later.

What happens to a request costs the loop's thread a row of some forty bytes each time, and one of sixty more at its end:
all that is known of it then, in one place, so that nobody has to look at the request again. Rows are written into a
grouped event log as they are, some hundred at a time, and counted some thousand at a time (``tally``), a step whenever
others are written, so that no request waits for all of it; ``settle`` sees to both when nothing more happens. Files,
Prometheus text and quantiles are made elsewhere or on request.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from math import inf
from typing import Any, Final

from chiron.core.types import Decision, Instance, Request
from chiron.gateway.reporting.event_writer import EventWriter
from chiron.gateway.reporting.groups import Group
from chiron.gateway.reporting.lines import ArrivalLine, EndLine, Line, RequestLine
from chiron.gateway.reporting.live_result import LiveRecorder, prompt_tokens
from chiron.gateway.reporting.tally import ClassTally, KeyTally, Tallies, noted
from chiron.policies.views import FleetPlan, FleetView, ModelPlan
from chiron.telemetry.advice import Standing
from chiron.telemetry.event_log import decision_line
from chiron.telemetry.packed_events import ARRIVAL, END, ENDED, EVENT, FIXED, INSTANCE, INSTANCE_AT, PLACED
from chiron.telemetry.run_data import OUTCOMES, DecisionPoint

DECISIONS_KEPT = 100
"""Of the newest, for the status; so many on batch sizes, and so many others."""
TOGETHER: Final = 64
"""Lines of an event log that is not grouped that are encoded together."""
ROWS: Final = 512
"""Rows that are written as one group."""
COUNTED_TOGETHER: Final = 8192
"""Rows that are counted together: fewer would cost more in all, for numpy's calls (docs/scale.md)."""
REASONS_MAX = 100
"""Kinds and reasons of decisions that are counted apart; what comes beyond is counted as ``other``. A reason that
holds an engine's error text must not make new metrics for ever."""

_DONE: Final = object()
_EVENT_SIZE: Final = EVENT.size
_END_SIZE: Final = END.size
_pack_event: Final = EVENT.pack_into
_pack_end: Final = END.pack_into
_pack_instance: Final = INSTANCE.pack_into
_OUTCOMES: Final = {name: place for place, name in enumerate(OUTCOMES)}


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
        self._tallies = Tallies()
        self._of: list[tuple[str, str]] = []
        """Model and class of each place among the tallies, from the first arrival on."""
        self._places: dict[str, dict[str, int]] = {}
        """By model and class."""
        self._key_names = [""]
        self._key_places = {"": 0}
        """Few: the config has them. Those that had a request, and nobody."""
        self._tallies.keys[""] = KeyTally()
        self._events = list(FIXED)
        self._event_numbers = {name: number for number, name in enumerate(FIXED)}
        self._rows = bytearray(ROWS * _EVENT_SIZE)
        self._rows_end = 0
        self._ends = bytearray(ROWS * _END_SIZE)
        self._ends_end = 0
        self._arrived = -1
        """Id of the request whose arrival is the last row; -1: it is something else."""
        self._arrived_s = 0.0
        self._requests: list[str] = []
        """What the request of each row is called, if it will be written."""
        self._reasons: list[str] = []
        """Of requests in these rows that were refused."""
        self._uncounted: list[tuple[bytes, bytes]] = []
        """Rows and their ends, as they were closed: few at a time if much else stands between them in the log."""
        self._uncounted_bytes = 0
        """Of rows."""
        self._counting: Iterator[None] | None = None
        """Steps that are left of counting those before them."""
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
        self._standing = Standing()
        if recorder is not None:
            recorder.settle = self.count
        self.log_to(writer)

    def log_to(self, writer: EventWriter | None) -> None:
        """Write events there from now on; None: nowhere."""
        self.settle()
        self.writer = writer
        if writer is not None:
            writer.standing = lambda: self._standing.now
        self._groups = writer is not None and writer.grouped
        self._has_lines = writer is not None and not writer.grouped

    # -- the Journal port --------------------------------------------------------------------------------------

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None:
        if request is None:
            assert instance is not None
            self._instance_event(now_s, name, instance)
        elif name == "dispatch" and request.id == self._arrived and now_s == self._arrived_s and instance is not None:
            self._placed(instance)
            if self._has_lines:
                self._line(now_s, name, request, instance)
        elif name != "ended":  # ``ended`` says more.
            number = self._event_numbers.get(name)
            if number is None:
                number = self._event_number(name)
            arrives = number == ARRIVAL
            key = self._key_place(key_name(request)) if arrives else 0
            self._row(now_s, number, request, instance, key, request.input_tokens)
            if arrives and self._rows_end:
                self._arrived, self._arrived_s = request.id, now_s
            if self._has_lines:
                self._line(now_s, name, request, instance)

    def ended(self, request: Request) -> None:
        key, prompt = key_name(request), prompt_tokens(request)
        outcome = request.outcome
        assert outcome is not None
        reason = -1
        if request.refused_because:
            reason = len(self._reasons)
            self._reasons.append(request.refused_because)
        at = self._ends_end
        _pack_end(
            self._ends,
            at,
            request.dispatch_s,
            request.first_token_s,
            request.deadline_s,
            request.ttft_slo_s,
            request.itl_slo_s,
            request.tokens_done,
            request.evictions,
            request.retries,
            reason,
            _OUTCOMES[outcome],
        )
        self._ends_end = at + _END_SIZE
        self._row(request.finish_s, ENDED, request, request.instance, self._key_place(key), prompt)
        if self._has_lines:
            self._note(_end_line(request, request_name(request), key, prompt))

    def decided(self, now_s: float, decision: Decision) -> None:
        self._hand_over()
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
        self._standing.decided(decision)
        if self.writer is not None:
            self.writer.write(decision_line(now_s, decision))

    # -- the rest ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Hand the writer what was noted down, and count it."""
        self.count()
        self._hand_over()

    def begin_to_count(self) -> None:
        """As ``settle``, but the counting is left to ``count_on``."""
        self._hand_over()
        if self._counting is None and self._uncounted:
            self._counting = self._steps()

    def count_on(self) -> bool:
        """Take a step of the counting; whether there are more."""
        self._count_some()
        return self._counting is not None

    def count(self) -> None:
        """All that was noted down."""
        self._hand_over()
        for _ in self._counting or ():
            pass
        for _ in self._steps():
            pass
        self._counting = None

    def _steps(self) -> Iterator[None]:
        """Counts all rows that are closed."""
        if self._uncounted:
            rows, ends = zip(*self._uncounted, strict=True)
            self._uncounted, self._uncounted_bytes = [], 0
            happened = noted(b"".join(rows), b"".join(ends))
            yield
            yield from self._tallies.add(happened)
            if self.recorder is not None:
                self.recorder.add(happened, self._of)

    @property
    def tallies(self) -> dict[tuple[str, str], ClassTally]:
        """By model and class, from the first arrival on, up to now."""
        self.count()
        return self._tallies.of

    @property
    def keys(self) -> dict[str, KeyTally]:
        """By name of the API key, from its first request that ended on; "" without one."""
        self.count()
        return {name: tally for name, tally in self._tallies.keys.items() if tally.requests}

    def observe(self, view: FleetView, plan: FleetPlan) -> None:
        self.plans, self.planned_s = plan, view.now_s
        if self.recorder is not None:
            self.recorder.timeline.observe(view, plan)

    def responded(self, status: int, count: int = 1) -> None:
        """So many HTTP answers with this status went out."""
        self.responses[status] += count

    def note(self, now_s: float, name: str, facts: dict[str, Any]) -> None:
        """An event of the gateway itself, such as ``drain``, for the event log."""
        self._hand_over()
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

    def _row(
        self, now_s: float, number: int, request: Request, instance: Instance | None, key: int, tokens: int
    ) -> None:
        at = self._rows_end
        _pack_event(
            self._rows,
            at,
            now_s,
            request.arrival_s,
            tokens,
            -1 if instance is None else instance.id,
            self._place(request),
            key,
            number,
        )
        self._rows_end = at = at + _EVENT_SIZE
        self._arrived = -1
        if self._groups:
            called = request.called
            if not called:
                request.called = called = request_name(request)
            self._requests.append(called)
        if at == ROWS * _EVENT_SIZE:
            self._close_rows()
            self._count_some()

    def _placed(self, instance: Instance) -> None:
        """The request that has just come: its arrival and its dispatch are one row."""
        end = self._rows_end
        _pack_instance(self._rows, end - _EVENT_SIZE + INSTANCE_AT, instance.id)
        self._rows[end - 1] = PLACED
        self._arrived = -1

    def _hand_over(self) -> None:
        """To the writer, so that what comes next stands behind it."""
        if self._rows_end:
            self._close_rows()
        lines = self._lines
        if lines:
            self._lines = []
            if self.writer is not None:
                self.writer.write_lines(lines)
        self._count_some()

    def _count_some(self) -> None:
        """One step, if there is anything to count."""
        if self._counting is None and self._uncounted_bytes >= COUNTED_TOGETHER * _EVENT_SIZE:
            self._counting = self._steps()
        if self._counting is not None and next(self._counting, _DONE) is _DONE:
            self._counting = None

    def _close_rows(self) -> None:
        rows, ends = bytes(self._rows[: self._rows_end]), bytes(self._ends[: self._ends_end])
        self._rows_end = self._ends_end = 0
        self._arrived = -1
        self._uncounted.append((rows, ends))
        self._uncounted_bytes += len(rows)
        requests, self._requests = self._requests, []
        reasons, self._reasons = self._reasons, []
        if self._groups and self.writer is not None:
            group = Group(
                rows=rows,
                ends=ends,
                requests=requests,
                of=self._of,
                keys=self._key_names,
                events=self._events,
                reasons=reasons,
            )
            self.writer.write_group(group)

    def _line(self, now_s: float, name: str, request: Request, instance: Instance | None) -> None:
        called = request_name(request)
        if name == "arrival":
            model, cls, key = request.model, request.class_name, key_name(request)
            self._note(ArrivalLine(now_s, name, called, model, cls, request.input_tokens, key))
        else:
            self._note(RequestLine(now_s, name, called, instance.id if instance is not None else None))

    def _note(self, line: Line) -> None:
        lines = self._lines
        lines.append(line)
        if len(lines) >= TOGETHER:
            self._hand_over()

    def _instance_event(self, now_s: float, name: str, instance: Instance) -> None:
        self._hand_over()
        self._standing.happened(name, instance.model, instance.id)
        if self.writer is not None:
            role = instance.role
            self.writer.write(
                {"t": now_s, "event": name, "instance": instance.id, "model": instance.model, "role": role}
            )
        if self.recorder is not None:
            self.recorder.instance_event(now_s, name, instance)

    def _place(self, request: Request) -> int:
        """Of its model and class among the tallies."""
        model, name = request.model, request.class_name
        places = self._places.get(model)
        if places is None:
            places = self._places[model] = {}
        place = places.get(name)
        if place is None:
            place = places[name] = len(self._of)
            self._of.append((model, name))
            self._tallies.of[model, name] = ClassTally(request.cls)
        return place

    def _key_place(self, key: str) -> int:
        place = self._key_places.get(key)
        if place is None:
            place = self._key_places[key] = len(self._key_names)
            self._key_names.append(key)
            self._tallies.keys[key] = KeyTally()
        return place

    def _event_number(self, name: str) -> int:
        number = self._event_numbers[name] = len(self._events)
        self._events.append(name)
        return number


def _end_line(request: Request, called: str, key: str, prompt: int) -> EndLine:
    arrival_s, first_s, finish_s = request.arrival_s, request.first_token_s, request.finish_s
    dispatch_s, tokens, instance = request.dispatch_s, request.tokens_done, request.instance
    return EndLine(
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
