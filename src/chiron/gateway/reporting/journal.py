"""The gateway's journal: gets every event from the control plane, and keeps what is read later.

An event costs the loop's thread a few microseconds: counters are incremented, a line for the event log is queued.
Files, Prometheus text and quantiles are made elsewhere or on request.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from chiron.core.types import Decision, Instance, Request, RequestClass
from chiron.gateway.reporting.event_writer import EventWriter
from chiron.gateway.reporting.live_result import LiveRecorder
from chiron.gateway.reporting.tally import ClassTally, KeyTally, prompt_tokens
from chiron.policies.views import FleetPlan, FleetView, ModelPlan
from chiron.telemetry.event_log import decision_line
from chiron.telemetry.run_data import DecisionPoint

DECISIONS_KEPT = 100
"""Of the newest, for the status; so many on batch sizes, and so many others."""
REASONS_MAX = 100
"""Kinds and reasons of decisions that are counted apart; what comes beyond is counted as ``other``. A reason that
holds an engine's error text must not make new metrics for ever."""


def request_name(request: Request) -> str:
    """What clients and logs call it: ``payload.request_id`` if the driver gave one."""
    return getattr(request.payload, "request_id", None) or str(request.id)


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
        name_of: Callable[[Request], str] = request_name,
        key_of: Callable[[Request], str] = key_name,
    ) -> None:
        self.writer = writer
        self.recorder = recorder
        self.tallies: dict[tuple[str, str], ClassTally] = {}
        """By model and class, from the first arrival on."""
        self.keys: dict[str, KeyTally] = {}
        """By name of the API key, from its first request that ended on; "" without one. Few: the config has them."""
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
        self._write = writer.write if writer is not None else None
        self._name_of = name_of
        self._key_of = key_of

    def log_to(self, writer: EventWriter | None) -> None:
        """Write events there from now on; None: nowhere."""
        self.writer = writer
        self._write = writer.write if writer is not None else None

    # -- the Journal port --------------------------------------------------------------------------------------

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None:
        write = self._write
        if request is None:
            assert instance is not None
            if write is not None:
                write(
                    {
                        "t": now_s,
                        "event": name,
                        "instance": instance.id,
                        "model": instance.model,
                        "role": instance.role,
                    }
                )
            if self.recorder is not None:
                self.recorder.instance_event(now_s, name, instance)
        elif name == "arrival":
            self._tally(request.model, request.cls).arrival(now_s)
            if self.recorder is not None:
                self.recorder.arrived(request)
            if write is not None:
                write(
                    {
                        "t": now_s,
                        "event": name,
                        "request": self._name_of(request),
                        "model": request.model,
                        "class": request.cls.name,
                        "input_tokens": request.input_tokens,
                        "key": self._key_of(request),
                    }
                )
        elif name != "ended":  # ``ended`` says more.
            if name == "first_token":
                self._tally(request.model, request.cls).first_token(now_s, request)
            elif name == "evicted":
                self._tally(request.model, request.cls).evictions += 1
            if write is not None:
                on = instance.id if instance is not None else None
                write({"t": now_s, "event": name, "request": self._name_of(request), "instance": on})

    def ended(self, request: Request) -> None:
        self._tally(request.model, request.cls).end(request)
        key = self._key_of(request)
        tally = self.keys.get(key)
        if tally is None:
            tally = self.keys[key] = KeyTally()
        tally.end(request)
        if self.recorder is not None:
            self.recorder.ended(request)
        if self._write is not None:
            self._write(self._end_line(request))

    def decided(self, now_s: float, decision: Decision) -> None:
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
        if self._write is not None:
            self._write(decision_line(now_s, decision))

    # -- the rest ----------------------------------------------------------------------------------------------

    def observe(self, view: FleetView, plan: FleetPlan) -> None:
        self.plans, self.planned_s = plan, view.now_s
        if self.recorder is not None:
            self.recorder.timeline.observe(view, plan)

    def responded(self, status: int, count: int = 1) -> None:
        """So many HTTP answers with this status went out."""
        self.responses[status] += count

    def note(self, now_s: float, name: str, facts: dict[str, Any]) -> None:
        """An event of the gateway itself, such as ``drain``, for the event log."""
        if self._write is not None:
            self._write({"t": now_s, "event": name, **facts})

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
        if self.writer is not None:
            self.writer.close()

    def _tally(self, model: str, cls: RequestClass) -> ClassTally:
        tally = self.tallies.get((model, cls.name))
        if tally is None:
            tally = self.tallies[model, cls.name] = ClassTally(cls)
        return tally

    def _end_line(self, request: Request) -> dict[str, Any]:
        arrival_s, first_s, finish_s = request.arrival_s, request.first_token_s, request.finish_s
        dispatch_s, tokens, instance = request.dispatch_s, request.tokens_done, request.instance
        return {
            "t": finish_s,
            "event": "ended",
            "request": self._name_of(request),
            "model": request.model,
            "class": request.cls.name,
            "key": self._key_of(request),
            "outcome": request.outcome,
            "reason": request.refused_because or None,
            "instance": instance.id if instance is not None else None,
            "input_tokens": prompt_tokens(request),
            "output_tokens": tokens,
            "queue_s": dispatch_s - arrival_s if dispatch_s >= 0.0 else None,
            "ttft_s": first_s - arrival_s if first_s >= 0.0 else None,
            "itl_s": (finish_s - first_s) / (tokens - 1) if tokens > 1 and first_s >= 0.0 else None,
            "duration_s": finish_s - arrival_s,
            "evictions": request.evictions,
            "retries": request.retries,
        }
