"""One relay in a process of its own, as the brain knows it: its connection, and what it carries.

A client's request is a ``FarCall`` here: its bytes and its client are at the relay. What is placed for it is a
``FarRun``, known by the placement's number from ``Place`` to its one end; what a relay says of any other number is late
or doubled, and is dropped and counted (``RelayLink.late``). Nothing above knows how many relays there are: to the desk,
the control plane and the instances' engines a ``FarCall`` is a call like any other.

A relay that dies takes its clients with it: their requests are cancelled, and what ran for them has ended. One that
comes back to the brain that it has just lost goes on where it was (``RelayLink.before``): what runs is the same
placement, and what has ended is told again. What a relay says is taken in by ``hearing``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

from chiron.core.types import Instance, Request
from chiron.gateway.batch.call import BatchCall
from chiron.gateway.brain.desk import Desk
from chiron.gateway.instances.engine import InstanceEngine, Placed, restart
from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import FRAME_MAX_BYTES, UNREAD_MAX_BYTES, ProtocolError, Seldom, Wire
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.calls import REMIND_S
from chiron.gateway.relay.errors import ApiError, internal
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.turns import Turn
from chiron.gateway.relay.upstream import UpstreamFailure
from chiron.gateway.settings import PEER_NAME
from chiron.net.clock import LiveClock
from chiron.net.peer_process import PeerProcess

log = logging.getLogger("chiron.relays")

ENDS_KEPT = 4096
"""Of requests of one relay, the last: whether it has heard of them is not known until it says something."""
ITEM_MAX_BYTES = FRAME_MAX_BYTES - (1 << 20)
"""Of the body of a batch item that is sent to a relay."""
ITEMS_MAX_BYTES = UNREAD_MAX_BYTES // 2
"""Of the bodies of items at one relay: all may be handed over before it has read the first."""


class FarCall:
    """A client's request at a relay: ``Request.payload``; implements ``ClientCall``."""

    __slots__ = (
        "_reminded_s",
        "collected",
        "error",
        "here",
        "key_name",
        "link",
        "number",
        "paid_tokens",
        "peers",
        "program",
        "prompt_bytes",
        "prompt_tokens",
        "refusal",
        "request_id",
        "run",
        "sequences",
        "streams",
        "turn",
        "wait_max_s",
    )

    def __init__(self, link: RelayLink, said: m.Arrive, turn: Turn | None = None) -> None:
        self.link = link
        self.here = said.number
        """The relay's number for it."""
        self.number = 0
        self.request_id = said.request_id
        self.key_name = said.key
        self.program = said.program
        self.peers: Sequence[str] = said.peers
        self.sequences = said.sequences
        self.streams = said.streams
        self.prompt_bytes = said.prompt_bytes
        self.prompt_tokens = 0
        self.collected = said.collected
        self.wait_max_s = said.wait_max_s
        self.error: UpstreamFailure | None = None
        self.refusal: ApiError | None = None
        self.run: FarRun | None = None
        """Its placement, while it has one."""
        self.turn = turn
        """What it is to a cascade, if it is asked for one."""
        self.paid_tokens = 0
        """Output tokens that its key had paid for when it ended."""
        self._reminded_s = -inf

    def remind(self, now_s: float, words: str) -> None:
        if self.streams and now_s - self._reminded_s >= REMIND_S:
            self._reminded_s = now_s
            self.link.wire.post(m.Remind(self.here, words[: m.TEXT_MAX]))

    def abandon(self) -> None:
        """Its end cannot be told as it should be: its client gets an error."""
        self.link.calls.pop(self.here, None)
        self.link.wire.send(m.End(self.here, "failed", refusal=refusal_of(internal(self.request_id))))

    def ended(self, request: Request) -> None:
        seen = self.run.placed.tokens if self.run is not None else 0
        self.paid_tokens = request.tokens_done or seen
        self.link.ended(self, request)


class FarRun:
    """A placement that a relay carries; implements ``Carrier``."""

    __slots__ = ("asked", "engine", "link", "placed")

    def __init__(self, link: RelayLink, engine: InstanceEngine, placed: Placed) -> None:
        self.link = link
        self.engine = engine
        self.placed = placed
        self.asked = False
        """The relay was told to stop it."""

    def evict(self) -> None:
        if self.link.gone:
            self.link.forget(self)
            self.engine.evicted(self.placed, self.placed.tokens if self.placed.request.outcome is not None else 0)
        elif not self.asked:
            self.asked = True
            self.link.wire.send(m.Evict(self.placed.number))

    def drop(self) -> int:
        call: FarCall | BatchCall = self.placed.request.payload
        self.link.forget(self)
        return self.placed.tokens if call.collected and self.engine.row.resumes else 0


class Adoption(Protocol):
    """What a brain does with what relays tell of the one before it."""

    def adopt_instance(self, said: m.Known) -> InstanceEngine | None:
        """An instance that this brain does not know. None: it cannot be taken over."""

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
        """As ``ControlPlane.adopt_running``."""

    def told_all(self) -> None:
        """Every relay that is expected has told."""

    @property
    def settling(self) -> bool:
        """It waits for that."""


@dataclass(kw_only=True)
class LinkContext:
    """What the connections to all relays work with, and whom they tell."""

    clock: LiveClock
    desk: Desk
    models: Models
    keys: KeyRing
    engines: Mapping[int, InstanceEngine]
    """Of instances that are ready."""
    adoption: Adoption | None
    """What becomes of what relays know from another brain; None: it is not counted."""
    term: int
    """This brain's, at most ``m.TERM_MAX``."""
    protocol: int
    """The newest version that is spoken."""
    gateway: str
    """The name of this one, of several."""
    seldom: Seldom
    superseded: Callable[[int], None]
    """Hears of a higher term, which means that another brain leads."""
    responded: Callable[[int, int], None]
    """Hears (status, count) of answers."""
    joined: Callable[[RelayLink], None]
    """It has said hello."""
    listening: Callable[[RelayLink], None]
    """It takes connections."""
    returned: Callable[[RelayLink], None]
    """It knows nothing that this brain does not know."""
    left: Callable[[RelayLink, str], None]
    """Its connection has ended, and why."""
    away: Callable[[RelayLink, str], None]
    """It may come back."""
    own_placements: int = 0
    """That relays chose while they had no brain."""
    expired: int = 0
    """Requests that relays gave up because they had none."""


class RelayLink:
    """The brain's end of the connection to one relay."""

    def __init__(self, context: LinkContext, name: str, *, ride_s: float) -> None:
        self.name = name
        self.gone = False
        self.buried = False
        self.calls: dict[int, FarCall] = {}
        """Requests that have not ended, by the relay's numbers."""
        self.items: dict[int, BatchCall] = {}
        """Items of batches whose bodies are there, by numbers of ours."""
        self.item_bytes = 0
        """Of their bodies."""
        self.runs: dict[int, FarRun] = {}
        """Placements that have not ended, by number."""
        self.late = 0
        """Messages about placements that had ended already."""
        self.quiet = 0
        """Looks since it last said something."""
        self.health = m.Health(0, 0, 0.0)
        self.pid = 0
        self.listens = False
        """It takes clients' connections."""
        self.wire = Wire(
            name=name,
            kind=m.Up,
            opened=self._opened,
            received=self._received,
            closed=self._closed,
            ride_s=ride_s,
            hello=m.Hello(
                version=context.protocol, version_min=m.VERSION_MIN, term=context.term, gateway=context.gateway
            ),
            greeted=self._greeted,
            seldom=context.seldom,
        )
        self.gateway = ""
        """Of several, as it says."""
        self.nonce = ""
        """Of a relay that stays when this brain is gone."""
        self.returns = False
        """It comes from another brain."""
        self.told = False
        """All that it knew is known here."""
        self.own_placements = 0
        """That it chose itself while it had no brain."""
        self.process: PeerProcess | None = None
        """None: it may be on another machine."""
        self.before: RelayLink | None = None
        """The connection that this relay has lost, with what it carried, until all has been told."""
        self.ends: dict[int, m.End] = {}
        """The last ones, for a relay that may not have heard them."""
        self.hears: Callable[[Any], None] = lambda message: None
        """Takes in each message (``Hearing``)."""
        self._context = context
        self._shapes: dict[str, m.Shape] = {}

    # -- what the rest of the brain asks -----------------------------------------------------------------------

    def carry(self, engine: InstanceEngine, placed: Placed) -> FarRun:
        call: FarCall | BatchCall = placed.request.payload
        run = self.runs[placed.number] = FarRun(self, engine, placed)
        call.run = run
        if not self.gone:
            self.wire.send(m.Place(call.here, placed.number, engine.instance.id, placed.request.tokens_done))
        return run

    def has_room(self, call: BatchCall) -> bool:
        """For the body of one more item."""
        added = len(call.body.raw)
        return added <= ITEM_MAX_BYTES and self.item_bytes + added <= ITEMS_MAX_BYTES

    def take_item(self, call: BatchCall, placed: Placed) -> None:
        """Its body goes there, and what has come of it elsewhere is lost."""
        restart(placed)
        request = placed.request
        call.link, call.here = self, m.ITEMS_FROM + request.id
        self.items[call.here] = call
        self.item_bytes += len(call.body.raw)
        message = m.Item(
            number=call.here,
            request_id=call.request_id,
            model=request.model,
            path=call.path.decode(),
            body=call.body.raw,
            input_tokens=request.input_tokens,
            answer_max_bytes=call.answer_max_bytes,
        )
        self.wire.send(message)

    def item_ended(self, call: BatchCall, request: Request) -> None:
        if self.items.pop(call.here, None) is not None:
            self.item_bytes -= len(call.body.raw)
        if not self.gone:
            self.wire.post(m.End(call.here, str(request.outcome)))

    def ended(self, call: FarCall, request: Request) -> None:
        """The control plane is done with a request."""
        self.calls.pop(call.here, None)
        if self.gone and not self.nonce:
            return
        message = m.End(
            call.here,
            str(request.outcome),
            dispatched=request.dispatch_s >= 0.0,
            retries=request.retries,
            retry_after_s=request.retry_after_s,
            refusal=refusal_of(call.refusal) if call.refusal is not None else None,
        )
        if self.nonce:
            self.ends[call.here] = message
            if len(self.ends) > ENDS_KEPT:
                del self.ends[next(iter(self.ends))]
        if request.outcome == "finished" and call.streams:
            self.wire.post(message)  # Its client has it all.
        else:
            self.wire.send(message)

    def forget(self, run: FarRun) -> None:
        """Its placement has ended."""
        self.runs.pop(run.placed.number, None)
        call: FarCall | BatchCall = run.placed.request.payload
        if call.run is run:
            call.run = None

    def tell_shapes(self) -> None:
        """What has changed of the models since the last time."""
        for name, served in self._context.models.by_name.items():
            shape = m.Shape(name, served.kv_capacity_tokens, served.context_tokens, served.bytes_per_token)
            if shape != self._shapes.get(name):
                self._shapes[name] = shape
                self.wire.post(shape)

    def place_again(self, run: FarRun) -> None:
        """The relay has nothing of it."""
        restart(run.placed)
        call: FarCall = run.placed.request.payload
        if run.asked:  # To be answered at once.
            self.forget(run)
            run.engine.evicted(run.placed, 0)
        else:
            self.wire.send(m.Place(call.here, run.placed.number, run.engine.instance.id, 0))

    def resume(self, call: FarCall) -> None:
        """It goes on over this connection."""
        before = call.link
        del before.calls[call.here]
        self.calls[call.here], call.link = call, self
        if (run := call.run) is not None:
            before.runs.pop(run.placed.number, None)
            self.runs[run.placed.number], run.link = run, self

    def run_ended(self, number: int, seen: int) -> FarRun | None:
        """The placement, which ends now; None: it has ended already."""
        run = self.runs.get(number)
        if run is None:
            self.late += 1
            return None
        self.forget(run)
        run.placed.tokens = max(run.placed.tokens, seen)
        return run

    # -- the wire ----------------------------------------------------------------------------------------------

    def _greeted(self, hello: m.Hello) -> None:
        context = self._context
        if hello.term > context.term:
            context.superseded(hello.term)
            raise ProtocolError(f"it says that it has seen a brain of term {hello.term}; this one's is {context.term}")
        self.nonce, self.returns = hello.nonce, hello.returns
        self.gateway = hello.gateway if PEER_NAME.fullmatch(hello.gateway) else ""

    def _opened(self) -> None:
        self.process = PeerProcess.of(self.wire.transport)
        self._context.joined(self)

    def _received(self, messages: Sequence[Any]) -> None:
        """One post for all of a read: timers that are due count first, once."""
        self.quiet = 0

        def take() -> None:
            for message in messages:
                try:
                    self.hears(message)
                except ProtocolError:
                    raise
                except Exception:
                    log.exception("%s: %s could not be taken in", self.name, type(message).__name__)

        self._context.clock.post(take)

    def _closed(self, why: str) -> None:
        self.gone = True
        self._context.clock.post(lambda: self._lost_connection(why))

    def _lost_connection(self, why: str) -> None:
        """First of all nothing more is sent there: what ends makes room for what waits."""
        context = self._context
        context.left(self, why)
        if self.before is not None:
            self.before.bury(why)
        if self.nonce and self.told:
            context.away(self, why)
        else:
            self.bury(why)

    def bury(self, why: str) -> None:
        """It does not come back: nothing is left of what it carried. Harmless twice."""
        if self.buried:
            return
        self.buried = True
        if self.process is not None:
            self.process.close()
        context = self._context
        for item in self.items.values():
            item.link = None
        self.items.clear()
        for call in list(self.calls.values()):
            context.desk.left(call)
        for run in list(self.runs.values()):
            if isinstance(run.placed.request.payload, BatchCall):
                self.forget(run)
                run.engine.abandoned(run.placed)
            else:
                run.evict()  # Of a request that had ended before, and was being stopped.


def refusal_of(error: ApiError) -> m.Refusal:
    message = error.message[: m.TEXT_MAX]
    return m.Refusal(error.status, message, error.type, error.code, error.param, error.headers)
