"""The gateway before the simulator's engines, in process: no sockets to engines, no processes, any event loop.

Everything of the live path is real but the engines: admission, the control plane, calls and their answers. Under a loop
with virtual time this is how the tests show that the live control plane decides as the simulated one does. Output
lengths come from a function, because these engines generate nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import orjson

from chiron.control.plane import ControlPlane
from chiron.core.ports import EngineEvents, Journal
from chiron.core.types import Instance, ModelSpec, Request, RequestClass, Sample
from chiron.engines.model import EngineModel, StepTimes
from chiron.engines.profile import Profile
from chiron.fleet.model import ColdStart, Failures, FleetModel
from chiron.fleet.port import FleetReport
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.cross_site import ForeignPages
from chiron.gateway.relay.front import Front
from chiron.gateway.relay.keys import KeyRing
from chiron.gateway.relay.outages import Outages
from chiron.gateway.relay.upstream import UpstreamCall
from chiron.gateway.settings import LimitSettings
from chiron.net.client import Call
from chiron.net.clock import LiveClock
from chiron.policies.policy import Policy
from chiron.policies.views import FleetPlan, FleetView

OutputLength = Callable[[Request], int]
"""True output length of a request, tokens."""


class EmulatedEngine:
    """An ``EngineModel`` that answers calls; implements the ``Engine`` port.

    The model engine gets requests of its own, so that a payload can be both a call (here) and a length (there).
    """

    def __init__(self, model: EngineModel, plane: EngineEvents, output_length: OutputLength) -> None:
        self.model = model
        self.instance = model.instance
        self._plane = plane
        self._output_length = output_length
        self._pairs: dict[int, tuple[Request, Request]] = {}

    def start(self, request: Request) -> None:
        inner = Request(
            request.id,
            request.model,
            request.cls,
            request.arrival_s,
            request.input_tokens,
            self._output_length(request),
            request.deadline_s,
        )
        for name in ("tokens_done", "kv_saved_tokens", "kv_saved_on", "evictions"):
            setattr(inner, name, getattr(request, name))
        inner.instance = self.instance
        inner.instance_saved = request.instance_saved
        self._pairs[request.id] = request, inner
        request.pinned = False  # These engines move a request with its tokens; its client notices nothing.
        self.model.start(inner)

    def evict(self, request: Request) -> None:
        pair = self._pairs.get(request.id)
        if pair is not None:
            pair[1].outcome = request.outcome
            self.model.evict(pair[1])

    def set_max_batch_size(self, max_batch_size: int) -> None:
        self.model.set_max_batch_size(max_batch_size)

    def sample(self) -> Sample:
        return self.model.sample()

    def fail(self) -> None:
        self._pairs.clear()
        self.model.fail()

    # -- what the model engine reports -------------------------------------------------------------------------

    def first_token(self, inner: Request) -> None:
        request = self._pairs[inner.id][0]
        if request.outcome is None and request.first_token_s < 0.0:
            call: UpstreamCall = request.payload
            call.begin(_NO_CALL, 200, [(b"content-type", b"text/event-stream")])
            call.data(_event(call.path, "", None))
        request.kv_saved_tokens = inner.kv_saved_tokens
        self._plane.first_token(request)

    def finished(self, inner: Request) -> None:
        request = self._take(inner)
        if request.outcome is None:
            call: UpstreamCall = request.payload
            call.data(_event(call.path, " word" * request.tokens_done, "length") + b"data: [DONE]\n\n")
            call.end()
        self._plane.finished(request)

    def evicted(self, inner: Request) -> None:
        self._plane.evicted(self._take(inner))

    def refused(self, inner: Request, reason: str) -> None:
        self._plane.refused(self._take(inner), reason)

    def _take(self, inner: Request) -> Request:
        request = self._pairs.pop(inner.id)[0]
        for name in ("tokens_done", "kv_saved_tokens", "kv_saved_on"):
            setattr(request, name, getattr(inner, name))
        return request


class EmulatedGateway:
    """Front, control plane, emulated fleet and engines on one clock. ``front.handle`` takes requests."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        specs: Sequence[ModelSpec],
        served: Models,
        classes: Sequence[RequestClass],
        policy: Policy,
        profiles: Mapping[str, Profile],
        cold_start: ColdStart,
        journal: Journal,
        output_length: OutputLength,
        failures: Failures | None = None,
        seed: int = 0,
        gpus_max: Mapping[str, int] | None = None,
        scrape_period_s: float = 1.0,
        scrape_delay_s: float = 0.2,
        kv_transfer_gb_per_s: float = 20.0,
        limits: LimitSettings | None = None,
        keys: KeyRing | None = None,
        observer: Callable[[FleetView, FleetPlan], None] | None = None,
    ) -> None:
        self.clock = clock
        self.engines: list[EmulatedEngine] = []
        """Every engine there ever was."""
        self._profiles = profiles
        self._times = {name: StepTimes(profile) for name, profile in profiles.items()}
        self._output_length = output_length
        self._bandwidth = kv_transfer_gb_per_s * 1e9
        self._scrape_period_s = scrape_period_s
        self._scrape_delay_s = scrape_delay_s
        self._specs = specs
        self.fleet = FleetModel(
            clock=clock, cold_start=cold_start, failures=failures, seed=seed, make_engine=self._make_engine
        )
        self.plane = ControlPlane(
            clock=clock,
            fleet=self.fleet,
            journal=journal,
            ends=self,
            models=specs,
            classes=classes,
            policy=policy,
            gpus_max=gpus_max,
            observer=observer,
        )
        self.fleet.listener = self.plane
        keys = keys or KeyRing()
        self.front = Front(
            clock=clock,
            completions=self.plane,
            queues=self.plane,
            models=served,
            keys=keys,
            limits=limits or LimitSettings(),
            foreign=ForeignPages(keys, None),
            outages=Outages(plane=self.plane, report=FleetReport),
            next_id=itertools.count().__next__,
            responded=lambda status: None,
        )

    def begin(self, initial: Mapping[str, int]) -> None:
        """Posted: take over the first instances, ready at once, and start the loops."""
        for spec in self._specs:
            self.plane.adopt(spec.name, initial.get(spec.name, spec.min_instances), self.fleet.attach_running)
        self.plane.begin()
        self.clock.call_later(self._scrape_period_s, self._scrape)
        self.fleet.begin()

    def ended(self, request: Request) -> None:
        """The ``Ends`` port."""
        self.front.ended(request, request.tokens_done)

    # -- the rest ----------------------------------------------------------------------------------------------

    def _make_engine(self, instance: Instance) -> EmulatedEngine:
        profile = self._profiles[instance.kind.name]
        relay = _Listener()
        model = EngineModel(
            clock=self.clock,
            instance=instance,
            profile=profile,
            times=self._times[instance.kind.name],
            listener=relay,
            kv_seconds_per_token=profile.kv_bytes_per_token / self._bandwidth if self._bandwidth > 0 else 0.0,
        )
        relay.engine = engine = EmulatedEngine(model, self.plane, self._output_length)
        self.engines.append(engine)
        return engine

    def _scrape(self) -> None:
        alive = self.fleet.engines
        samples = [engine.sample() for engine in self.engines if engine.instance.id in alive]
        self.clock.call_later(self._scrape_delay_s, lambda: self.plane.sampled(samples))
        self.clock.call_later(self._scrape_period_s, self._scrape)


class _Listener:
    """Engine model and emulated engine need each other; this stands in until the second exists."""

    engine: EmulatedEngine

    def first_token(self, request: Request) -> None:
        self.engine.first_token(request)

    def finished(self, request: Request) -> None:
        self.engine.finished(request)

    def evicted(self, request: Request) -> None:
        self.engine.evicted(request)

    def refused(self, request: Request, reason: str) -> None:
        self.engine.refused(request, reason)


class _NoCall:
    """There is no connection to pause."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def cancel(self) -> None: ...


_NO_CALL: Call = _NoCall()  # type: ignore[assignment]


def _event(path: bytes, text: str, reason: str | None) -> bytes:
    chat = path.endswith(b"/chat/completions")
    said = {"delta": {"content": text}} if chat else {"text": text}
    kind = "chat.completion.chunk" if chat else "text_completion"
    return (
        b"data: " + orjson.dumps({"object": kind, "choices": [{"index": 0, "finish_reason": reason} | said]}) + b"\n\n"
    )
