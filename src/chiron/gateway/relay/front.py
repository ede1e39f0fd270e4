"""The hot path: completions from clients to the brain.

``handle`` is called by the HTTP server with a complete request. It answers bad ones at once and hands the others, read
and sized, to a ``Desk``: the brain's own in one process, or one at the other end of a connection. The request's call
(``calls``) talks to the client.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import Callable
from secrets import token_hex
from typing import NamedTuple, Protocol

from chiron.core.types import RequestClass
from chiron.gateway.relay.admission import Admitted, Models, admit
from chiron.gateway.relay.calls import FlexCall, RelayCall
from chiron.gateway.relay.cascade import Cascaded, FirstCall
from chiron.gateway.relay.cross_site import CrossSiteGuard
from chiron.gateway.relay.ending import refuse
from chiron.gateway.relay.errors import NO_MODEL, ApiError, unavailable
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key
from chiron.net.server import Incoming

log = logging.getLogger("chiron.front")

HOT_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
WAIT_MAX_S = 5.0
"""For so long a request for a model that is not known waits for a brain that may have it."""
WAITING_MAX = 1000
_WAIT = re.compile(rb'(?:^|[,;])\s*wait\s*=\s*"?([0-9]{1,9})"?\s*(?=$|[,;])', re.IGNORECASE)
"""In a ``Prefer`` header (RFC 7240): seconds that the client wants its request to wait."""


class Desk(Protocol):
    """Where requests go once they are read."""

    def arrive(
        self, call: RelayCall | FlexCall | FirstCall, model: str, cls: RequestClass, key: Key, input_tokens: int
    ) -> None:
        """Raises ApiError if it is known at once that the request is not taken."""

    def left(self, call: RelayCall | FlexCall | FirstCall) -> None:
        """Its client is gone."""

    def shown(self, call: FirstCall) -> None:
        """What was held back of its answer goes to its client from now on."""


class _Waiting(NamedTuple):
    incoming: Incoming
    timer: asyncio.TimerHandle


class Front:
    """Clients' side of the gateway, for completions."""

    def __init__(
        self,
        *,
        desk: Desk,
        models: Models,
        keys: KeyRing,
        foreign: CrossSiteGuard,
        responded: Callable[[int], None],
        retry_after_s: float,
        models_may_come: Callable[[], bool] = lambda: False,
    ) -> None:
        """``models_may_come``: models may be served that are not known here yet; ``look_again`` once they are."""
        self.draining = False
        self._desk = desk
        self._models = models
        self._keys = keys
        self._foreign = foreign
        self._responded = responded
        self._retry_after_s = retry_after_s
        self._ids = itertools.count(1)
        self._boot = token_hex(4)
        self._models_may_come = models_may_come
        self._waiting: dict[int, _Waiting] = {}
        """Requests for models that are not known, by ids of theirs."""

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
            refused = _alone(error)
            return lambda: self._refuse(incoming, refused)
        if incoming.context.name:
            incoming.peers = (*incoming.peers, f"API key {incoming.context.name!r}")
        return None

    def handle(self, incoming: Incoming) -> None:
        try:
            self._admit(incoming)
        except ApiError as error:
            if error.code == NO_MODEL and self._models_may_come() and len(self._waiting) < WAITING_MAX:
                self._wait(incoming, _alone(error))
            else:
                self._refuse(incoming, _alone(error))

    def look_again(self) -> None:
        """All models are known that are served."""
        for number, waiting in list(self._waiting.items()):
            self._forget(number)
            self.handle(waiting.incoming)

    def _wait(self, incoming: Incoming, error: ApiError) -> None:
        number = id(incoming)

        def give_up() -> None:
            self._forget(number)
            self._refuse(incoming, error)

        timer = asyncio.get_running_loop().call_later(WAIT_MAX_S, give_up)
        self._waiting[number] = _Waiting(incoming, timer)
        incoming.on_close = lambda: self._forget(number)

    def _forget(self, number: int) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            waiting.timer.cancel()
            waiting.incoming.on_close = None

    def _admit(self, incoming: Incoming) -> None:
        if self.draining:
            raise unavailable("The gateway is shutting down.", self._retry_after_s)
        if refusal := self._foreign.check(incoming):
            raise refusal
        key: Key = incoming.context or self._keys.check(incoming.header(b"authorization"))
        admitted = admit(incoming, key, self._models)
        cls = admitted.cls
        desk = self._desk
        if admitted.model.settings.cascade is not None:
            self._cascade(incoming, key, admitted)
            return
        make = RelayCall if cls.interactive else FlexCall
        call = make(
            incoming,
            body=admitted.body,
            stream=admitted.stream,
            request_id=f"req-{self._boot}-{next(self._ids):x}",
            key_name=key.name,
            responded=self._responded,
        )
        if (wait_s := _wait_s(incoming)) is not None:
            call.wait_max_s = wait_s
        call.program = admitted.program
        incoming.on_close = lambda: desk.left(call)
        desk.arrive(call, admitted.model.settings.name, cls, key, admitted.input_tokens)

    def _cascade(self, incoming: Incoming, key: Key, admitted: Admitted) -> None:
        Cascaded(
            incoming,
            admitted=admitted,
            key=key,
            desk=self._desk,
            models=self._models,
            request_id=f"req-{self._boot}-{next(self._ids):x}",
            wait_s=_wait_s(incoming),
            responded=self._responded,
            refuse=self._refuse,
        ).begin()

    def _refuse(self, incoming: Incoming, error: ApiError) -> None:
        if not incoming.started:
            refuse(incoming, error)
            self._responded(error.status)


def _wait_s(incoming: Incoming) -> float | None:
    """How long the client wants its request to wait for an instance, if it says."""
    if (prefer := incoming.header(b"prefer")) and (said := _WAIT.search(prefer)):
        return float(said[1])
    return None


def _alone(error: ApiError) -> ApiError:
    """Without the frames that it came through: where one of them refers to it, only the garbage collector would free
    the request and its connection."""
    return error.with_traceback(None)
