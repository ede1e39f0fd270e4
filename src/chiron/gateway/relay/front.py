"""The hot path: completions from clients to the control plane.

``handle`` is called by the HTTP server with a complete request. It answers bad ones at once and submits the others.
The control plane decides all that follows, and the request's call (``calls``) talks to the client.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from math import inf
from secrets import token_hex

from chiron.core.ports import Completions, Queues
from chiron.core.types import Request
from chiron.gateway.relay.admission import Models, admit
from chiron.gateway.relay.body import places
from chiron.gateway.relay.calls import FlexCall, RelayCall
from chiron.gateway.relay.cross_site import CrossSiteGuard
from chiron.gateway.relay.ending import refuse
from chiron.gateway.relay.errors import ApiError, internal, timed_out, too_many, unavailable
from chiron.gateway.relay.keys import Key, KeyRing
from chiron.gateway.relay.outages import Outages
from chiron.gateway.relay.upstream import UpstreamFailure
from chiron.gateway.settings import LimitSettings
from chiron.net.clock import LiveClock
from chiron.net.server import Incoming
from chiron.net.shares import Shares

log = logging.getLogger("chiron.front")

HOT_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
_WAIT = re.compile(rb'(?:^|[,;])\s*wait\s*=\s*"?([0-9]{1,9})"?\s*(?=$|[,;])', re.IGNORECASE)
"""In a ``Prefer`` header (RFC 7240): seconds that the client wants its request to wait."""


class Front:
    """Clients' side of the gateway, for completions."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        completions: Completions,
        queues: Queues,
        models: Models,
        keys: KeyRing,
        limits: LimitSettings,
        foreign: CrossSiteGuard,
        outages: Outages,
        next_id: Callable[[], int],
        responded: Callable[[int], None],
    ) -> None:
        self.open: dict[int, Request] = {}
        """Requests whose clients wait."""
        self.draining = False
        self._clock = clock
        self._completions = completions
        self._queues = queues
        self._models = models
        self._keys = keys
        self._limits = limits
        self._foreign = foreign
        self._outages = outages
        self._next_id = next_id
        self._responded = responded
        self._boot = token_hex(4)
        self._shares = Shares(limits.queue_max, limits.peer_share)
        """Open requests by address and API key."""

    def takes(self, incoming: Incoming) -> bool:
        """Whether this request is for the hot path, or to be refused unread."""
        return (incoming.method == b"POST" and incoming.path in HOT_PATHS) or (
            self._foreign.check(incoming) is not None
        )

    def screen(self, incoming: Incoming) -> Callable[[], None] | None:
        """Whether to read its body: a client without a key must not fill the memory. Returns what refuses it."""
        try:
            incoming.context = self._keys.check(incoming.header(b"authorization"))
        except ApiError as error:
            refused = error
            return lambda: self._refuse(incoming, refused)
        if incoming.context.name:
            incoming.peers = (*incoming.peers, f"API key {incoming.context.name!r}")
        return None

    def handle(self, incoming: Incoming) -> None:
        try:
            self._admit(incoming)
        except ApiError as error:
            self._refuse(incoming, error)

    def watch(self) -> None:
        """Once a second, posted: end what has waited or run too long."""
        now_s = self._clock.now_s
        limits = self._limits
        for request in list(self.open.values()):
            waited_s = now_s - request.arrival_s
            call: RelayCall | FlexCall = request.payload
            if waited_s > limits.request_timeout_s and request.interactive:
                call.refusal = timed_out(f"The answer took longer than {limits.request_timeout_s:g} s.")
                self._completions.cut_off(request)
            elif not request.interactive and now_s > request.deadline_s:
                call.refusal = timed_out("The deadline of the request's class has passed.")
                self._completions.cut_off(request)
            elif request.instance is None:
                self._watch_held(request, call, now_s)

    def _watch_held(self, request: Request, call: RelayCall | FlexCall, now_s: float) -> None:
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

    def ended(self, request: Request, tokens: int) -> None:
        """The control plane ended a request: its client gets an answer, and the client's key pays for ``tokens``. Of
        one that is called off they are what an engine has made so far: its client has most of it."""
        if self.open.pop(request.id, None) is not None:
            self._shares.add(request.payload.incoming.peers, -1)
            key = self._keys.named(request.payload.key_name)
            if key is not None:
                self._keys.charge(key, tokens)
        request.payload.ended(request)

    def _admit(self, incoming: Incoming) -> None:
        limits = self._limits
        if self.draining:
            raise unavailable("The gateway is shutting down.", limits.retry_after_s)
        if refusal := self._foreign.check(incoming):
            raise refusal
        key: Key = incoming.context or self._keys.check(incoming.header(b"authorization"))
        admitted = admit(incoming, key, self._models)
        cls = admitted.cls
        model = admitted.model.settings.name
        if refusal := self._outages.refusal(model):
            raise refusal
        # Items of batches wait there too, and have a limit of their own.
        waiting = self._queues.clients_waiting(model, interactive=cls.interactive)
        if waiting >= limits.queue_max and not (cls.interactive and self._queues.shed_lost(model)):
            kind = "requests wait" if cls.interactive else "requests of the batch class wait"
            raise too_many(f"{waiting} {kind} for {model!r} already.", limits.retry_after_s)
        if waiting >= self._shares.each and (over := self._shares.over(incoming.peers, 1)):
            raise too_many(f"{waiting} requests wait for {model!r}, and {over} has its share.", limits.retry_after_s)
        self._keys.take(key, self._clock.elapsed_s(), admitted.input_tokens)
        number = self._next_id()
        make = RelayCall if cls.interactive else FlexCall
        call = make(
            incoming,
            body=admitted.body,
            stream=admitted.stream,
            request_id=f"req-{self._boot}-{number:x}",
            key_name=key.name,
            responded=self._responded,
        )
        if (prefer := incoming.header(b"prefer")) and (said := _WAIT.search(prefer)):
            call.wait_max_s = float(said[1])

        def submit() -> None:
            request = Request(number, model, cls, self._clock.now_s, admitted.input_tokens, call)
            request.pinned, request.flex = cls.interactive, not cls.interactive
            request.tenant, request.sequences = key.name, places(call.sequences)
            self.open[number] = request
            self._shares.add(incoming.peers, 1)
            incoming.on_close = lambda: self._left(request)
            self._completions.submit(request)

        try:
            self._clock.post(submit)
        except Exception:
            log.exception("%s could not be submitted", call.request_id)
            if self.open.pop(number, None) is not None:
                self._shares.add(incoming.peers, -1)
            if not incoming.started:
                refuse(incoming, internal(call.request_id))

    def _refuse(self, incoming: Incoming, error: ApiError) -> None:
        refuse(incoming, error)
        self._responded(error.status)

    def _queued_s(self, request: Request) -> float:
        """For how long it has waited for an instance: since it came, or since the last one lost it."""
        if request.instance is not None:
            return 0.0
        failure: UpstreamFailure | None = request.payload.error
        return self._clock.now_s - (request.arrival_s if failure is None else failure.at_s)

    def _left(self, request: Request) -> None:
        """The client is gone: so is the need for an answer."""
        self._clock.post(lambda: self._completions.cancel(request))
