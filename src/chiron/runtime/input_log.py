"""Everything that a control plane is told, in the order in which it took it, and everything that it did about it.

With the same policy and models the same inputs at the same points make the same decisions, to the last bit, which
``runtime.replay`` checks. A point is the time and the number of the control plane's own timers that have fired by then:
they may be due at the very moment at which something comes, and only the log knows which was first. An input that comes
while the control plane is still at another one (an item that follows one that ends) is marked by its depth.

The lines are those of the event log, so they are rotated, summed and read like it: ``in`` is an input, ``out`` what
became of it, ``decision`` a decision. What a request or an instance is told is as its adapter has left it at that
moment: tokens, first token, saved KV.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

from chiron.control.learned import Learned
from chiron.control.plane import ControlPlane
from chiron.core.clock import Callback, Timer, VirtualClock
from chiron.core.ports import (
    BatchAnnouncements,
    Completions,
    Engine,
    FleetEvents,
    FleetLimits,
    Journal,
    Queues,
    RemoteEngineEvents,
    RemoteFleetEvents,
    Samples,
    SleeperEvents,
    StageSamples,
)
from chiron.core.stages import PipelineSample, StageSample
from chiron.core.types import Decision, Instance, ModelSpec, Request, RequestClass, Role, Sample
from chiron.net.clock import LiveClock
from chiron.policies.policy import Policy
from chiron.policies.stages.registry import STAGE_POLICIES
from chiron.telemetry.event_log import decision_line

VERSION = 3
SAMPLE_FIELDS = tuple(Sample.__annotations__)
STAGE_FIELDS = tuple(StageSample.__annotations__)
PIPELINE_FIELDS = tuple(name for name in PipelineSample.__annotations__ if name != "stages")

Write = Callable[[Mapping[str, Any]], None]


class Inputs(
    Completions,
    BatchAnnouncements,
    Queues,
    RemoteEngineEvents,
    Samples,
    StageSamples,
    FleetEvents,
    RemoteFleetEvents,
    FleetLimits,
    SleeperEvents,
    Protocol,
):
    """Everything that the world tells a control plane."""

    def restore(self, learned: Learned, age_s: float) -> list[str]: ...

    def learned(self, wall_s: float) -> Learned: ...

    def take_over(self, settle_s: float) -> None: ...

    def adopt_instance(
        self,
        model: str,
        kind: str,
        role: Role,
        *,
        number: int,
        max_batch_size: int,
        attach: Callable[[Instance], Engine],
        found: bool,
    ) -> Instance | None: ...

    def adopt_running(
        self,
        instance: Instance,
        request: Request,
        *,
        epoch: int,
        tokens_done: int,
        dispatch_s: float,
        first_token_s: float,
    ) -> bool: ...

    def told_all(self) -> None: ...


class Point:
    """How far a control plane has come: which of its timers have fired, and what it is at."""

    __slots__ = ("depth", "fired")

    def __init__(self) -> None:
        self.fired = 0
        self.depth = 0

    @contextmanager
    def at_it(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def marked(self, callback: Callback) -> Callback:
        """A timer's callback that is counted, if it is the control plane's."""
        if not _module_of(callback).startswith("chiron.control."):
            return callback

        def fire() -> None:
            self.fired += 1
            with self.at_it():
                callback()

        return fire


def _module_of(callback: Callback) -> str:
    """Where it is from: a method that is compiled does not say so itself, but the object that it is of does."""
    owner = getattr(callback, "__self__", None)
    return str(getattr(callback if owner is None else type(owner), "__module__", ""))


class MarkedClock(VirtualClock):
    """A virtual clock that counts the control plane's timers."""

    def __init__(self, point: Point) -> None:
        super().__init__()
        self.point = point

    def call_at(self, when_s: float, callback: Callback) -> Timer:
        return super().call_at(when_s, self.point.marked(callback))


class MarkedLiveClock(LiveClock):
    """The same, live."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        point: Point,
        *,
        wall_s: float | None = None,
        time_s: Callable[[], float] | None = None,
        ahead_s: float = 0.0,
    ) -> None:
        super().__init__(loop, wall_s=wall_s, time_s=time_s, ahead_s=ahead_s)
        self.point = point

    def call_at(self, when_s: float, callback: Callback) -> Timer:
        return super().call_at(when_s, self.point.marked(callback))


def described(
    policy: Policy,
    models: Sequence[ModelSpec],
    classes: Sequence[RequestClass],
    gpus_max: Mapping[str, int] | None,
    *,
    advise: bool = False,
    sleeps: bool = False,
) -> dict[str, Any]:
    """What a replay needs to make the same control plane; for the first line of each file. As text, because JSON
    proper has no infinity. ``sleeps``: instances of its fleet can sleep."""
    setup = {
        "version": VERSION,
        "policy": policy.name,
        "settings": asdict(policy.settings),
        "stages": _stages(policy),
        "models": [asdict(model) for model in models],
        "classes": [asdict(cls) for cls in classes],
        "gpus_max": dict(gpus_max) if gpus_max is not None else None,
        "advise": advise,
        **({"sleeps": True} if sleeps else {}),
    }
    return {"replay": json.dumps(setup)}


def _stages(policy: Policy) -> dict[str, Any] | None:
    """The policy below it for stages of pipelines, if it has one of those that have names."""
    name = next((name for name, entry in STAGE_POLICIES.items() if entry.decide is policy.stages), None)
    return None if name is None else {"policy": name, "settings": asdict(policy.stages_settings)}


class RecordedInputs:
    """Stands in front of a control plane; implements ``Inputs``."""

    def __init__(self, *, clock: VirtualClock, point: Point, write: Write) -> None:
        self.plane: ControlPlane
        """Set once it exists."""
        self._clock = clock
        self._point = point
        self._write = write
        self._most: dict[str, int] = {}

    def _take(self, kind: str, *about: object) -> None:
        self._write(
            {
                "t": self._clock.now_s,
                "event": "in",
                "n": self._point.fired,
                "d": self._point.depth,
                "k": kind,
                "a": about,
            }
        )

    def start(self) -> None:
        """The log is open: what comes from now on is in it."""
        self._take("start")

    def begin(self, initial: Mapping[str, int], *, attached: bool) -> None:
        """The first instances are asked for, or are up already."""
        self._take("begin", dict(initial), attached)

    def restore(self, learned: Learned, age_s: float) -> list[str]:
        self._take("restore", learned.to_bytes().decode(), age_s)
        return self.plane.restore(learned, age_s)

    def learned(self, wall_s: float) -> Learned:
        return self.plane.learned(wall_s)

    # -- what another control plane did ------------------------------------------------------------------------

    def take_over(self, settle_s: float) -> None:
        self._take("take_over", settle_s)
        with self._point.at_it():
            self.plane.take_over(settle_s)

    def adopt_instance(
        self,
        model: str,
        kind: str,
        role: Role,
        *,
        number: int,
        max_batch_size: int,
        attach: Callable[[Instance], Engine],
        found: bool = True,
    ) -> Instance | None:
        self._take("adopt_instance", model, kind, role, number, max_batch_size, found)
        with self._point.at_it():
            return self.plane.adopt_instance(
                model, kind, role, number=number, max_batch_size=max_batch_size, attach=attach, found=found
            )

    def adopt_running(
        self,
        instance: Instance,
        request: Request,
        *,
        epoch: int,
        tokens_done: int,
        dispatch_s: float,
        first_token_s: float,
    ) -> bool:
        self._take(
            "adopt_running",
            *_described(request),
            instance.id,
            epoch,
            tokens_done,
            dispatch_s,
            first_token_s,
        )
        with self._point.at_it():
            return self.plane.adopt_running(
                instance,
                request,
                epoch=epoch,
                tokens_done=tokens_done,
                dispatch_s=dispatch_s,
                first_token_s=first_token_s,
            )

    def told_all(self) -> None:
        self._take("told_all")
        with self._point.at_it():
            self.plane.told_all()

    # -- clients and batch jobs --------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        self._take("submit", *_described(request))
        with self._point.at_it():
            self.plane.submit(request)

    def cancel(self, request: Request) -> None:
        self._take("cancel", request.id)
        with self._point.at_it():
            self.plane.cancel(request)

    def cut_off(self, request: Request) -> None:
        self._take("cut_off", request.id)
        with self._point.at_it():
            self.plane.cut_off(request)

    def announce_batch(
        self, model: str, deadline_s: float, cls: str, requests: int, input_tokens: int, input_square: float
    ) -> None:
        self._take("announce_batch", model, deadline_s, cls, requests, input_tokens, input_square)
        with self._point.at_it():
            self.plane.announce_batch(model, deadline_s, cls, requests, input_tokens, input_square)

    def clients_waiting(self, model: str, *, interactive: bool) -> int:
        return self.plane.clients_waiting(model, interactive=interactive)

    def shed_lost(self, model: str) -> bool:
        self._take("shed_lost", model)
        with self._point.at_it():
            return self.plane.shed_lost(model)

    # -- engines and scrapes -----------------------------------------------------------------------------------

    def _told(self, kind: str, request: Request, *more: object) -> None:
        self._take(kind, request.id, *left_by_adapter(request), *more)

    def first_token(self, request: Request) -> None:
        self._told("first_token", request)
        with self._point.at_it():
            self.plane.first_token(request)

    def prefilled(self, request: Request) -> None:
        self._told("prefilled", request)
        with self._point.at_it():
            self.plane.prefilled(request)

    def finished(self, request: Request) -> None:
        self._told("finished", request)
        with self._point.at_it():
            self.plane.finished(request)

    def evicted(self, request: Request) -> None:
        self._told("evicted", request)
        with self._point.at_it():
            self.plane.evicted(request)

    def lost(self, request: Request) -> None:
        self._told("lost", request)
        with self._point.at_it():
            self.plane.lost(request)

    def refused(self, request: Request, reason: str) -> None:
        self._told("refused", request, reason)
        with self._point.at_it():
            self.plane.refused(request, reason)

    def failed(self, request: Request, reason: str) -> None:
        self._told("failed", request, reason)
        with self._point.at_it():
            self.plane.failed(request, reason)

    def avoid(self, instance: Instance, for_s: float) -> None:
        self._take("avoid", instance.id, for_s)
        with self._point.at_it():
            self.plane.avoid(instance, for_s)

    def sampled(self, samples: Iterable[Sample]) -> None:
        samples = list(samples)
        self._take("sampled", [[getattr(sample, name) for name in SAMPLE_FIELDS] for sample in samples])
        with self._point.at_it():
            self.plane.sampled(samples)

    def stages_sampled(self, instance: Instance, sample: PipelineSample) -> None:
        stages = [[getattr(stage, name) for name in STAGE_FIELDS] for stage in sample.stages]
        self._take("stages_sampled", instance.id, stages, [getattr(sample, name) for name in PIPELINE_FIELDS])
        with self._point.at_it():
            self.plane.stages_sampled(instance, sample)

    def capacity_told(self, instance: Instance, kv_capacity_tokens: int) -> None:
        self._take("capacity_told", instance.id, kv_capacity_tokens)
        with self._point.at_it():
            self.plane.capacity_told(instance, kv_capacity_tokens)

    # -- fleets ------------------------------------------------------------------------------------------------

    def instance_ready(self, instance: Instance, engine: Engine) -> None:
        if instance.source:
            self._take("instance_ready_from", instance.id, instance.began_s, instance.source)
        else:
            self._take("instance_ready", instance.id, instance.began_s)
        with self._point.at_it():
            self.plane.instance_ready(instance, engine)

    def instance_failed(self, instance: Instance) -> None:
        held = [*instance.requests.values(), *instance.evicting.values()]
        self._take("instance_failed", instance.id, [[request.id, *left_by_adapter(request)] for request in held])
        with self._point.at_it():
            self.plane.instance_failed(instance)

    def kinds_limited(self, most: Mapping[str, int]) -> None:
        if most or self._most:  # Told each second, and nearly always of none.
            self._take("kinds_limited", dict(most))
        self._most = dict(most)
        with self._point.at_it():
            self.plane.kinds_limited(most)

    def kinds_found(self, found: Mapping[str, int]) -> None:
        if found:
            self._take("kinds_found", dict(found))
        with self._point.at_it():
            self.plane.kinds_found(found)

    def instance_asleep(self, instance: Instance) -> None:
        self._take("instance_asleep", instance.id)
        with self._point.at_it():
            self.plane.instance_asleep(instance)

    def kinds_asleep(self, asleep: Mapping[str, int]) -> None:
        self._take("kinds_asleep", dict(asleep))
        with self._point.at_it():
            self.plane.kinds_asleep(asleep)

    def instance_leaving(self, instance: Instance) -> None:
        self._take("instance_leaving", instance.id)
        with self._point.at_it():
            self.plane.instance_leaving(instance)


def _described(request: Request) -> tuple[object, ...]:
    """A request as it came."""
    cls = request.cls
    return (
        request.id,
        request.model,
        (cls.name, cls.kind, cls.ttft_s, cls.itl_s, cls.deadline_s, cls.weight),
        request.arrival_s,
        request.input_tokens,
        request.deadline_s,
        request.max_output_tokens,
        request.pinned,
        request.flex,
        request.tenant,
        request.sequences,
        request.tokens_done,
        request.retries,
        request.program,
    )


def left_by_adapter(request: Request) -> tuple[float, ...]:
    """What an engine's adapter may have written into a request before it tells of it."""
    return (request.tokens_done, request.first_token_s, request.kv_saved_tokens, request.kv_saved_on)


class RecordedOutputs:
    """Implements the ``Journal`` port: writes what is decided and done, and passes it on."""

    wants_events = True

    def __init__(self, journal: Journal, write: Write) -> None:
        self._journal = journal
        self._write = write

    def decided(self, now_s: float, decision: Decision) -> None:
        self._write(decision_line(now_s, decision))
        self._journal.decided(now_s, decision)

    def ended(self, request: Request) -> None:
        self._journal.ended(request)

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None:
        self._write(output_line(now_s, name, request, instance))
        if request is None or self._journal.wants_events:
            self._journal.event(now_s, name, request, instance)


def output_line(now_s: float, name: str, request: Request | None, instance: Instance | None) -> dict[str, Any]:
    """An event as the log has it: of which request and instance, and of which placement."""
    about: list[object] = [
        None if request is None else request.id,
        None if instance is None else instance.id,
        None if request is None else request.epoch,
    ]
    if name == "ended" and request is not None:
        about.append(request.outcome)
    return {"t": now_s, "event": "out", "k": name, "a": about}
