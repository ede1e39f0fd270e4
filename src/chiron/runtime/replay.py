"""A control plane is told again what another one was told, and must do the same: every decision, every placement, each
number to the last bit.

The log is read in order. What the control plane does is compared with the next line; an input is applied once as many
of its timers have fired as had then. The first difference ends the replay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan
from typing import Any

import msgspec
import orjson

from chiron.control.actuators import DirectActuators, NullActuators
from chiron.control.learned import Learned, LearnedError, from_bytes
from chiron.core.stages import PipelineSample, StageSample
from chiron.core.types import Decision, Engine, Instance, ModelSpec, Request, RequestClass, Role, Sample, StartSource
from chiron.policies.advise import advising
from chiron.policies.policy import Policy
from chiron.policies.registry import POLICIES
from chiron.policies.stages.registry import STAGE_POLICIES, with_stages
from chiron.runtime.assembly import Assembly
from chiron.runtime.input_lines import Line, ReplayError, checked, shown
from chiron.runtime.input_log import (
    PIPELINE_FIELDS,
    SAMPLE_FIELDS,
    STAGE_FIELDS,
    VERSION,
    MarkedClock,
    Point,
    output_line,
)
from chiron.telemetry.event_log import decision_line

IDLE_TIMERS_MAX = 100_000
"""Timers that fire between two lines: those of some days without a request or a sample."""


class _DiffersError(Exception):
    """What is done is not what the log has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What came of a replay."""

    inputs: int
    decisions: int
    placements: int
    ends_s: float
    difference: str
    """The first one, in words; empty: there is none."""
    learned: Learned
    """By the control plane that was told again, up to there."""


def replay(
    lines: Iterable[Line],
    make: Callable[[str, Any], Policy] | None = None,
    *,
    idle_timers_max: int = IDLE_TIMERS_MAX,
) -> Replayed:
    """``lines`` of one run, in order, as ``read_event_log`` reads them. ``make`` makes the policy of a name and its
    settings; default: the one that it is. Raises ReplayError."""
    return _Replay(iter(lines), make or _make, idle_timers_max).run()


def _make(name: str, settings: Any) -> Policy:
    return POLICIES[name].make(settings)


class _Replay:
    """Fleet, engines, ends and journal of the control plane that is told again."""

    listener: Any = None
    wants_events = True

    def __init__(self, lines: Iterator[Line], make: Callable[[str, Any], Policy], idle_timers_max: int) -> None:
        self._lines = lines
        self._idle_timers_max = idle_timers_max
        self._next: Line | None = None
        self._make = make
        self._point = Point()
        self._clock = MarkedClock(self._point)
        self._requests: dict[int, Request] = {}
        self._instances: dict[int, Instance] = {}
        self._inputs = self._decisions = self._placements = 0
        self._idle = 0
        """Timers that have fired since the line before."""

    def run(self) -> Replayed:
        self._assemble(next(self._lines, {}))
        self._advance()
        if self._next is not None and self._next.get("k") != "start":
            raise ReplayError("the log does not have the beginning of its run: it was rotated away")
        difference = ""
        try:
            while self._next is not None:
                if self._next["event"] == "in":
                    self._apply_next()
                else:
                    self._fire(self._next)
        except _DiffersError as error:
            difference = str(error)
        return Replayed(
            inputs=self._inputs,
            decisions=self._decisions,
            placements=self._placements,
            ends_s=self._clock.now_s,
            difference=difference,
            learned=self.plane.learned(0.0),
        )

    def _assemble(self, head: Line) -> None:
        try:
            setup = json.loads(head["replay"])
            if setup["version"] != VERSION:
                raise ReplayError(f"an input log of version {shown(setup['version'])}; this is version {VERSION}")
            entry = POLICIES.get(setup["policy"])
            if entry is None:
                raise ReplayError(f"policy {shown(setup['policy'])} is unknown; known are {', '.join(POLICIES)}")
            settings = msgspec.convert(setup["settings"], entry.settings)
            models = msgspec.convert(setup["models"], list[ModelSpec])
            self._classes = {cls.name: cls for cls in msgspec.convert(setup["classes"], list[RequestClass])}
            gpus_max = msgspec.convert(setup["gpus_max"], dict[str, int] | None)
            below = msgspec.convert(setup["stages"], dict[str, Any] | None)
            entry_below = STAGE_POLICIES[below["policy"]] if below is not None else None
            settings_below = msgspec.convert(below["settings"], entry_below.settings) if below and entry_below else None
        except (KeyError, TypeError, ValueError, RecursionError, msgspec.ValidationError) as error:
            raise ReplayError(f"this is no input log (telemetry.input_log writes one): {error}") from None
        policy = self._make(setup["policy"], settings)
        if below is not None:
            policy = with_stages(policy, below["policy"], settings_below)
        self._assembly = Assembly(
            clock=self._clock,
            fleet=self,
            journal=self,
            ends=_Ends(self),
            models=models,
            classes=list(self._classes.values()),
            policy=advising(policy) if setup["advise"] else policy,
            gpus_max=gpus_max,
            actuators=NullActuators() if setup["advise"] else DirectActuators(),
            sleepers=self if setup.get("sleeps") else None,
        )
        self.plane = self._assembly.plane

    # -- the log -----------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        self._next = None
        for line in self._lines:
            if line["event"] == "dropped":
                raise ReplayError(f"at {line['t']} s {shown(line.get('lines'))} lines of the log were lost")
            if line["event"] in ("in", "out", "decision"):
                self._next = checked(line, self._clock.now_s)
                self._idle = 0
                return

    def _made(self, line: Line) -> None:
        """The control plane has done this."""
        if self._next is None:
            return  # The log ends before.
        line = orjson.loads(orjson.dumps(line))
        if line != self._next:
            raise _DiffersError(f"the log has {shown(self._next)}, the replay made {shown(line)}")
        self._decisions += line["event"] == "decision"
        self._placements += line.get("k") == "dispatch"
        self._advance()

    def _fire(self, line: Line) -> None:
        """The control plane's next timer, from which this is to come."""
        due_s = self._clock.next_s()
        if due_s is None or due_s > line["t"]:
            raise _DiffersError(f"the log has {shown(line)}, the replay made nothing of the kind")
        self._idle += 1
        if self._idle > self._idle_timers_max:
            raise ReplayError(
                f"{self._idle_timers_max:,} timers fired before {shown(line)}: no gateway is idle for so long"
            )
        self._clock.step()

    def _apply_next(self) -> None:
        line = self._next
        assert line is not None
        while self._point.fired < line["n"]:
            self._fire(line)
            if self._next is not line:  # It was taken while a timer was at work.
                return
        # Timers that are due at this very moment, and had not fired then, fire after.
        self._clock.now_s = line["t"]
        self.apply()

    def apply(self) -> None:
        """The input that is next."""
        line = self._next
        assert line is not None
        self._advance()
        self._inputs += 1
        try:
            with self._point.at_it():
                getattr(self, f"_in_{line['k']}")(*line["a"])
        except (KeyError, LearnedError) as error:
            raise _DiffersError(
                f"the log has {shown(line)}, of which the replay knows nothing: {shown(str(error))}"
            ) from None

    def inside(self) -> None:
        """What came while the control plane was at this."""
        while self._next is not None and self._next["event"] == "in" and self._next["d"] >= self._point.depth > 0:
            self.apply()

    def _in_start(self) -> None:
        """The first line."""

    # -- inputs ------------------------------------------------------------------------------------------------

    def _in_begin(self, initial: Mapping[str, int], attached: bool) -> None:
        try:
            self._assembly.begin(initial, attach=self._attach if attached else None)
        except ValueError as error:  # More than the GPU limits allow.
            raise _DiffersError(f"the log begins with {shown(dict(initial))}: {error}") from None

    def _in_restore(self, learned: str, age_s: float) -> None:
        self.plane.restore(from_bytes(learned.encode()), age_s)

    def _in_submit(self, *about: Any) -> None:
        self.plane.submit(self._request(*about))

    def _in_take_over(self, settle_s: float) -> None:
        self.plane.take_over(settle_s)

    def _in_adopt_instance(
        self, model: str, kind: str, role: Role, number: int, max_batch_size: int, found: bool
    ) -> None:
        self.plane.adopt_instance(
            model, kind, role, number=number, max_batch_size=max_batch_size, attach=self._attach, found=found
        )

    def _in_adopt_running(self, *about: Any) -> None:
        *request, number, epoch, tokens_done, dispatch_s, first_token_s = about
        self.plane.adopt_running(
            self._instances[number],
            self._request(*request),
            epoch=epoch,
            tokens_done=tokens_done,
            dispatch_s=dispatch_s,
            first_token_s=first_token_s,
        )

    def _in_told_all(self) -> None:
        self.plane.told_all()

    def _request(
        self,
        number: int,
        model: str,
        cls: list[Any],
        arrival_s: float,
        input_tokens: int,
        deadline_s: float | None,
        max_output_tokens: int | None,
        pinned: bool,
        flex: bool,
        tenant: str,
        sequences: int,
        tokens_done: int,
        retries: int,
        program: str,
    ) -> Request:
        request = self._requests.get(number)
        if request is None:
            request = Request(
                number, model, self._class(cls), arrival_s, input_tokens, None, _far(deadline_s), max_output_tokens
            )
            request.pinned, request.flex, request.tenant = pinned, flex, tenant
            request.sequences, request.tokens_done, request.retries = sequences, tokens_done, retries
            request.program = program
            self._requests[number] = request
        return request

    def _class(self, told: list[Any]) -> RequestClass:
        name, kind, *times, weight = told
        ttft_s, itl_s, deadline_s = (_far(time_s) for time_s in times)
        cls = RequestClass(name=name, kind=kind, ttft_s=ttft_s, itl_s=itl_s, deadline_s=deadline_s, weight=weight)
        return self._classes[name] if self._classes.get(name) == cls else cls

    def _in_cancel(self, number: int) -> None:
        self.plane.cancel(self._requests[number])

    def _in_cut_off(self, number: int) -> None:
        self.plane.cut_off(self._requests[number])

    def _in_announce_batch(
        self, model: str, deadline_s: float | None, cls: str, requests: int, tokens: int, square: float
    ) -> None:
        self.plane.announce_batch(model, _far(deadline_s), cls, requests, tokens, square)

    def _in_shed_lost(self, model: str) -> None:
        self.plane.shed_lost(model)

    def _told(self, number: int, tokens: int, first_token_s: float, saved: int, saved_on: int) -> Request:
        request = self._requests[number]
        request.tokens_done, request.first_token_s = tokens, first_token_s
        request.kv_saved_tokens, request.kv_saved_on = saved, saved_on
        return request

    def _in_first_token(self, *about: Any) -> None:
        self.plane.first_token(self._told(*about))

    def _in_prefilled(self, *about: Any) -> None:
        self.plane.prefilled(self._told(*about))

    def _in_finished(self, *about: Any) -> None:
        self.plane.finished(self._told(*about))

    def _in_evicted(self, *about: Any) -> None:
        self.plane.evicted(self._told(*about))

    def _in_lost(self, *about: Any) -> None:
        self.plane.lost(self._told(*about))

    def _in_refused(self, *about: Any) -> None:
        self.plane.refused(self._told(*about[:-1]), about[-1])

    def _in_failed(self, *about: Any) -> None:
        self.plane.failed(self._told(*about[:-1]), about[-1])

    def _in_avoid(self, number: int, for_s: float) -> None:
        self.plane.avoid(self._instances[number], for_s)

    def _in_sampled(self, samples: list[list[Any]]) -> None:
        self.plane.sampled([Sample(**dict(zip(SAMPLE_FIELDS, map(_figure, each), strict=True))) for each in samples])

    def _in_stages_sampled(self, number: int, stages: list[list[Any]], rest: list[Any]) -> None:
        told = tuple(StageSample(**dict(zip(STAGE_FIELDS, map(_figure, each), strict=True))) for each in stages)
        sample = PipelineSample(stages=told, **dict(zip(PIPELINE_FIELDS, map(_figure, rest), strict=True)))
        self.plane.stages_sampled(self._instances[number], sample)

    def _in_capacity_told(self, number: int, tokens: int) -> None:
        self.plane.capacity_told(self._instances[number], tokens)

    def _in_instance_ready(self, number: int, began_s: float) -> None:
        instance = self._instances[number]
        instance.began_s = began_s
        self.plane.instance_ready(instance, self._attach(instance))

    def _in_instance_ready_from(self, number: int, began_s: float, source: StartSource) -> None:
        self._instances[number].source = source
        self._in_instance_ready(number, began_s)

    def _in_instance_failed(self, number: int, held: list[list[Any]]) -> None:
        for each in held:
            self._told(*each)
        self.plane.instance_failed(self._instances[number])

    def _in_kinds_limited(self, most: Mapping[str, int]) -> None:
        self.plane.kinds_limited(most)

    def _in_kinds_found(self, found: Mapping[str, int]) -> None:
        self.plane.kinds_found(found)

    def _in_instance_asleep(self, number: int) -> None:
        self.plane.instance_asleep(self._instances[number])

    def _in_kinds_asleep(self, asleep: Mapping[str, int]) -> None:
        self.plane.kinds_asleep(asleep)

    def _in_instance_leaving(self, number: int) -> None:
        self.plane.instance_leaving(self._instances[number])

    # -- the Fleet, Engine and Journal ports -------------------------------------------------------------------

    def _attach(self, instance: Instance) -> Engine:
        self._instances[instance.id] = instance
        instance.heard_late = True
        return self

    def create(self, instance: Instance) -> None:
        self._instances[instance.id] = instance

    def remove(self, instance: Instance) -> None:
        """It may still be told of."""

    def sleep(self, instance: Instance) -> None:
        """Answered by the log."""

    def keep_asleep(self, kind: str, most: int) -> None:
        """Likewise."""

    def start(self, request: Request) -> None:
        """It is in the log as ``dispatch``. (A far end that cannot be reached may say so at once.)"""
        self.inside()

    def evict(self, request: Request) -> None:
        """Answered by the log."""

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """It is in the log as a decision."""

    def set_max_num_batched_tokens(self, max_num_batched_tokens: int) -> None:
        """Likewise."""

    def scale(self, replicas: Sequence[int]) -> None:
        """So is this."""

    def decided(self, now_s: float, decision: Decision) -> None:
        self._made(decision_line(now_s, decision))

    def ended(self, request: Request) -> None:
        """Said as an event."""

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None:
        self._made(output_line(now_s, name, request, instance))


class _Ends:
    """The ``Ends`` port: who waited for a request may ask for another at once."""

    def __init__(self, replaying: _Replay) -> None:
        self._replaying = replaying

    def ended(self, request: Request) -> None:
        self._replaying.inside()


def _far(time_s: float | None) -> float:
    """JSON has no infinity."""
    return inf if time_s is None else time_s


def _figure(told: Any) -> Any:
    """Nor what is not a number, which an engine may say."""
    return nan if told is None else told
