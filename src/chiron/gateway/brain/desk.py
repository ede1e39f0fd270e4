"""Admission: who may wait for an instance, and who is told what while a request waits.

A relay has read and sized a request (``relay.front``); here it meets the limits that all requests share: outages, the
queue's length, the shares of peers, the rates of keys. The control plane decides all that follows, and the request's
call, a ``ClientCall``, is told how it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import inf
from typing import Protocol

from chiron.core.ports import Completions, Queues
from chiron.core.types import Request, RequestClass
from chiron.gateway.relay.body import places
from chiron.gateway.relay.errors import ApiError, internal, timed_out, too_many, unavailable
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key
from chiron.gateway.relay.outages import Outages
from chiron.gateway.relay.turns import Turn
from chiron.gateway.relay.upstream import UpstreamFailure
from chiron.gateway.reporting.cascades import Cascades
from chiron.gateway.settings import LimitSettings
from chiron.net.clock import LiveClock
from chiron.net.shares import Shares

log = logging.getLogger("chiron.front")

AGAIN_MAX = 4
"""Times the queue's limit: so many requests of a model may wait that a brain before this one has taken, or that relays
have held for it."""


class ClientCall(Protocol):
    """A request whose client waits: ``Request.payload``, as far as the brain needs it."""

    number: int
    """Id of its request, once there is one."""
    request_id: str
    key_name: str
    program: str
    """The program of this key whose call it is; empty: it is of none."""
    sequences: int
    wait_max_s: float
    """How long the client wants it to wait for an instance."""
    error: UpstreamFailure | None
    """Why the last try failed."""
    refusal: ApiError | None
    """Why the gateway itself ended it."""
    turn: Turn | None
    """What it is to a cascade, if it is asked for one."""

    @property
    def peers(self) -> Sequence[str]:
        """Whose shares it counts against."""

    def remind(self, now_s: float, words: str) -> None:
        """Its client may be told what it waits for."""

    def ended(self, request: Request) -> None:
        """The control plane is done with it; the client may still wait for a word."""


class Desk:
    """Where requests of clients come in, and go out."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        completions: Completions,
        queues: Queues,
        keys: KeyRing,
        limits: LimitSettings,
        outages: Outages,
        next_id: Callable[[], int],
    ) -> None:
        self.open: dict[int, Request] = {}
        """Requests whose clients wait."""
        self._clock = clock
        self._completions = completions
        self._queues = queues
        self._keys = keys
        self._limits = limits
        self._outages = outages
        self._next_id = next_id
        self._shares = Shares(limits.queue_max, limits.peer_share)
        """Open requests by address and API key."""
        self.cascades = Cascades()

    def arrive(self, call: ClientCall, model: str, cls: RequestClass, key: Key, input_tokens: int) -> None:
        """A request has come. Raises ApiError if it is not taken."""
        self._check(call, model, cls)
        turn = call.turn
        if turn is None or not turn.counted:
            self._keys.take(key, self._clock.elapsed_s(), input_tokens)
        else:  # One request of a client is not refused half-way.
            self._keys.charge(key, input_tokens)
        if turn is not None:
            self.cascades.arrived(turn, cls.name)
        call.number = self._next_id()

        def submit() -> None:
            self._completions.submit(self._enter(call, model, cls, key, input_tokens, self._clock.now_s))

        self._post(call, submit)

    def arrive_again(
        self, call: ClientCall, model: str, cls: RequestClass, key: Key, input_tokens: int, *, ago_s: float, losses: int
    ) -> None:
        """It came so long ago, and a brain before this one had not placed it, or had lost it so often. It has been
        taken: limits do not hold for it, up to ``AGAIN_MAX``. Raises ApiError."""
        waiting = self._queues.clients_waiting(model, interactive=cls.interactive)
        if waiting >= AGAIN_MAX * self._limits.queue_max:
            raise too_many(f"{waiting} requests wait for {model!r} already.", self._limits.retry_after_s)
        call.number = self._next_id()

        def submit() -> None:
            request = self._enter(call, model, cls, key, input_tokens, max(0.0, self._clock.now_s - ago_s))
            request.retries = losses
            self._count_again(call, cls, key, input_tokens)
            self._completions.submit(request)

        self._post(call, submit)

    def adopt(
        self, call: ClientCall, model: str, cls: RequestClass, key: Key, input_tokens: int, *, ago_s: float, losses: int
    ) -> Request:
        """The same, but it runs (posted): the caller tells the control plane of it."""
        call.number = self._next_id()
        request = self._enter(call, model, cls, key, input_tokens, max(0.0, self._clock.now_s - ago_s))
        request.retries = losses
        self._count_again(call, cls, key, input_tokens)
        return request

    def _count_again(self, call: ClientCall, cls: RequestClass, key: Key, input_tokens: int) -> None:
        """What has been taken already. A cascade's second call is of a client's request that has been counted with the
        first one, perhaps by another brain: it is left out of the cascade's tallies, which would not add up."""
        turn = call.turn
        if turn is not None and turn.counted:
            self._keys.charge(key, input_tokens)
            call.turn = None
            return
        self._keys.count(key, self._clock.now_s, input_tokens)
        if turn is not None:
            self.cascades.arrived(turn, cls.name)

    def forget(self, request: Request) -> None:
        """It is not counted after all."""
        if self.open.pop(request.id, None) is not None:
            self._shares.add(request.payload.peers, -1)

    def _enter(
        self, call: ClientCall, model: str, cls: RequestClass, key: Key, input_tokens: int, arrival_s: float
    ) -> Request:
        request = Request(call.number, model, cls, arrival_s, input_tokens, call)
        request.pinned, request.flex = cls.interactive, not cls.interactive
        request.tenant, request.sequences = key.name, places(call.sequences)
        request.program = call.program
        self.open[request.id] = request
        self._shares.add(call.peers, 1)
        return request

    def _post(self, call: ClientCall, submit: Callable[[], None]) -> None:
        try:
            self._clock.post(submit)
        except Exception:
            log.exception("%s could not be submitted", call.request_id)
            if self.open.pop(call.number, None) is not None:
                self._shares.add(call.peers, -1)
            raise internal(call.request_id) from None

    def left(self, call: ClientCall) -> None:
        """Its client is gone: so is the need for an answer."""
        request = self.open.get(call.number)
        if request is not None:
            self._clock.post(lambda: self._completions.cancel(request))

    def ended(self, request: Request, tokens: int) -> None:
        """The control plane ended a request: its client gets an answer, and the client's key pays for ``tokens``. Of
        one that is called off they are what an engine has made so far: its client has most of it."""
        call: ClientCall = request.payload
        if self.open.pop(request.id, None) is not None:
            self._shares.add(call.peers, -1)
            self.charge(call, tokens)
            if call.turn is not None:
                self.cascades.ended(call.turn, request)
        call.ended(request)

    def shown(self, call: ClientCall, ago_s: float = 0.0) -> None:
        """What was held back of its answer goes to its client, since so long ago: it will do."""
        request = self.open.get(call.number)
        if request is not None and call.turn is not None:
            self.cascades.shown(call.turn, request, self._clock.elapsed_s() - ago_s)

    def charge(self, call: ClientCall, tokens: int) -> None:
        """Its key pays for output."""
        key = self._keys.named(call.key_name)
        if key is not None:
            self._keys.charge(key, tokens)

    def watch(self) -> None:
        """Once a second, posted: end what has waited or run too long."""
        now_s = self._clock.now_s
        limits = self._limits
        for request in list(self.open.values()):
            waited_s = now_s - request.arrival_s
            call: ClientCall = request.payload
            if waited_s > limits.request_timeout_s and request.interactive:
                call.refusal = timed_out(f"The answer took longer than {limits.request_timeout_s:g} s.")
                self._completions.cut_off(request)
            elif not request.interactive and now_s > request.deadline_s:
                call.refusal = timed_out("The deadline of the request's class has passed.")
                self._completions.cut_off(request)
            elif request.instance is None:
                self._watch_held(request, call, now_s)

    def _watch_held(self, request: Request, call: ClientCall, now_s: float) -> None:
        """A request that waits for an instance, and who waits for it."""
        limits, queued_s = self._limits, self._queued_s(request)
        outage = self._outages.now.get(request.model)
        wait_max_s = min(call.wait_max_s, limits.queue_wait_max_s if request.interactive else inf)
        if outage is not None and request.interactive:
            call.refusal = outage.refusal()
            self._completions.cut_off(request)
        elif queued_s > wait_max_s:
            why = self._outages.why_held(request.model, now_s)
            call.refusal = unavailable(f"No instance had room within {wait_max_s:g} s: {why}.", limits.retry_after_s)
            self._completions.cut_off(request)
        elif 0.0 < limits.held_notice_s <= queued_s:
            call.remind(now_s, self._outages.why_held(request.model, now_s))

    def _check(self, call: ClientCall, model: str, cls: RequestClass) -> None:
        """Raises ApiError where there is no room for it."""
        limits = self._limits
        if refusal := self._outages.refusal(model):
            raise refusal
        # Items of batches wait there too, and have a limit of their own.
        waiting = self._queues.clients_waiting(model, interactive=cls.interactive)
        if waiting >= limits.queue_max and not (cls.interactive and self._queues.shed_lost(model)):
            kind = "requests wait" if cls.interactive else "requests of the batch class wait"
            raise too_many(f"{waiting} {kind} for {model!r} already.", limits.retry_after_s)
        if waiting >= self._shares.each and (over := self._shares.over(call.peers, 1)):
            raise too_many(f"{waiting} requests wait for {model!r}, and {over} has its share.", limits.retry_after_s)

    def _queued_s(self, request: Request) -> float:
        """For how long it has waited for an instance: since it came, or since the last one lost it."""
        if request.instance is not None:
            return 0.0
        failure: UpstreamFailure | None = request.payload.error
        return self._clock.now_s - (request.arrival_s if failure is None else failure.at_s)
