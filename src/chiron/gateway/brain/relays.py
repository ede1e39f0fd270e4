"""Relays in processes of their own, as the brain knows them.

Each has a ``RelayLink``. A client's request is a ``FarCall`` here: its bytes and its client are at the relay. What is
placed for it is a ``FarRun``, known by the placement's number from ``Place`` to its one end; what a relay says of any
other number is late or doubled, and is dropped and counted (``RelayLink.late``). Nothing above knows how many relays
there are: to the desk, the control plane and the instances' engines a ``FarCall`` is a call like any other.

A relay that dies takes its clients with it: their requests are cancelled, and what ran for them has ended.

A relay may come from another brain, and tell what it knows of there (``m.Known`` up to ``m.Told``). What it runs on an
instance that this brain knows, or takes over (``Adoption``), under the same number and address, is counted from then on
like any other placement; the rest runs to its end uncounted. One that comes back to the brain that it has just lost
goes on where it was (``RelayLink.before``): what runs is the same placement, and what has ended is told again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, Protocol

from chiron.core.types import Instance, Request, RequestClass
from chiron.gateway.batch.call import BatchCall, FarAnswer
from chiron.gateway.brain.desk import Desk
from chiron.gateway.instances.engine import InstanceEngine, Placed, restart
from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import FRAME_MAX_BYTES, RIDE_S, UNREAD_MAX_BYTES, ProtocolError, Seldom, Wire
from chiron.gateway.relay.admission import Models, with_slos
from chiron.gateway.relay.calls import REMIND_S
from chiron.gateway.relay.errors import ApiError, internal, model_not_found
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key
from chiron.gateway.relay.turns import REASONS, Turn
from chiron.gateway.relay.upstream import UpstreamFailure
from chiron.gateway.settings import PEER_NAME
from chiron.net.clock import LiveClock
from chiron.net.peer_process import PeerProcess

log = logging.getLogger("chiron.relays")

REJOIN_S = 1.0
"""For so long what a relay that stays carries is kept when its connection is lost: it may be alive, and come back. Not
that of a relay whose process has ended, as far as that can be seen from here."""
ENDS_KEPT = 4096
"""Of requests of one relay, the last: whether it has heard of them is not known until it says something."""
ADOPTED_MAX = 4
"""Times what an instance takes at most: so much may run there when it is taken over."""
PULSE_S = 0.25
"""Between two signs of life to relays that stay without their brain."""
TICK_S = 1.0
"""Between two looks at relays, and at what they should know of models."""
TURNS_MAX = 1000
"""Cascades' turns that are told before their requests, each of which follows at once."""
QUIET_MAX = 30
"""Looks at a relay that says nothing, though it should once a second, until it is taken to be dead."""
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
        self.link.wire.send(m.End(self.here, "failed", refusal=_refusal(internal(self.request_id))))

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


class RelayLink:
    """The brain's end of the connection to one relay."""

    def __init__(self, relays: Relays, name: str, *, ride_s: float) -> None:
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
            hello=m.Hello(version=relays.protocol, version_min=m.VERSION_MIN, term=relays.term, gateway=relays.gateway),
            greeted=self._greeted,
            seldom=relays.seldom,
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
        self._turns: dict[int, Turn] = {}
        """Of requests that will be told of next, by their numbers."""
        self._shared: set[int] = set()
        """Instances that both know under the same number and address."""
        self._relays = relays
        self._shapes: dict[str, m.Shape] = {}
        self._hear: Mapping[type, Callable[[Any], None]] = {
            m.Arrive: self._arrive,
            m.Left: self._left,
            m.FirstToken: self._first_token,
            m.Answered: self._answered,
            m.Lost: self._lost,
            m.Evicted: self._evicted,
            m.Silent: self._silent,
            m.Spoke: self._spoke,
            m.Counted: self._counted,
            m.Made: self._made,
            m.Responded: self._responded,
            m.Result: self._result,
            m.Health: self._health,
            m.Listening: self._listening,
            m.Known: self._known,
            m.Running: self._running,
            m.Waits: self._waits,
            m.Told: self._told,
            m.Turn: self._turn,
            m.Shown: self._shown,
        }

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
            refusal=_refusal(call.refusal) if call.refusal is not None else None,
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
        for name, served in self._relays.models.by_name.items():
            shape = m.Shape(name, served.kv_capacity_tokens, served.context_tokens, served.bytes_per_token)
            if shape != self._shapes.get(name):
                self._shapes[name] = shape
                self.wire.post(shape)

    # -- the wire ----------------------------------------------------------------------------------------------

    def _greeted(self, hello: m.Hello) -> None:
        relays = self._relays
        if hello.term > relays.term:
            relays.superseded(hello.term)
            raise ProtocolError(f"it says that it has seen a brain of term {hello.term}; this one's is {relays.term}")
        self.nonce, self.returns = hello.nonce, hello.returns
        self.gateway = hello.gateway if PEER_NAME.fullmatch(hello.gateway) else ""

    def _opened(self) -> None:
        self.process = PeerProcess.of(self.wire.transport)
        self._relays.joined(self)

    def _received(self, messages: Sequence[Any]) -> None:
        """One post for all of a read: timers that are due count first, once."""
        self.quiet = 0

        def take() -> None:
            for message in messages:
                try:
                    self._hear[type(message)](message)
                except ProtocolError:
                    raise
                except Exception:
                    log.exception("%s: %s could not be taken in", self.name, type(message).__name__)

        self._relays.clock.post(take)

    def _closed(self, why: str) -> None:
        self.gone = True
        self._relays.clock.post(lambda: self._lost_connection(why))

    def _lost_connection(self, why: str) -> None:
        """First of all nothing more is sent there: what ends makes room for what waits."""
        relays = self._relays
        relays.left(self, why)
        if self.before is not None:
            self.before.bury(why)
        if self.nonce and self.told:
            relays.away(self, why)
        else:
            self.bury(why)

    def bury(self, why: str) -> None:
        """It does not come back: nothing is left of what it carried. Harmless twice."""
        if self.buried:
            return
        self.buried = True
        if self.process is not None:
            self.process.close()
        relays = self._relays
        for item in self.items.values():
            item.link = None
        self.items.clear()
        for call in list(self.calls.values()):
            relays.desk.left(call)
        for run in list(self.runs.values()):
            if isinstance(run.placed.request.payload, BatchCall):
                self.forget(run)
                run.engine.abandoned(run.placed)
            else:
                run.evict()  # Of a request that had ended before, and was being stopped.

    # -- what the relay says -----------------------------------------------------------------------------------

    def _arrive(self, said: m.Arrive) -> None:
        if said.number in self.calls:
            raise ProtocolError(f"request {said.number} arrives twice")
        relays, found, turn = self._relays, self._admitted(said), self._turns.pop(said.number, None)
        if said.model not in relays.models.by_name:  # It may be served no more, which the relay has yet to read.
            self.wire.send(m.End(said.number, "refused", refusal=_refusal(model_not_found(said.model))))
            return
        if found is None:
            raise ProtocolError(
                f"request {said.number} names model {said.model!r}, class {said.cls!r}, key {said.key!r}"
            )
        cls, key = found
        call = self.calls[said.number] = FarCall(self, said, turn)
        try:
            relays.models.permit(key, said.model, cls.name, turn.cascade if turn is not None else "")
            relays.desk.arrive(call, said.model, cls, key, said.input_tokens)
        except ApiError as error:
            self.calls.pop(said.number, None)
            self.wire.send(m.End(said.number, "refused", refusal=_refusal(error.with_traceback(None))))

    def _admitted(self, said: m.Arrive) -> tuple[RequestClass, Key] | None:
        """Its class and its key. None: there is no such model, class or key."""
        relays = self._relays
        served, key = relays.models.by_name.get(said.model), relays.keys.named(said.key)
        cls = served.classes.get(said.cls) if served is not None else None
        if cls is None or key is None:
            return None
        if (said.ttft_s, said.itl_s) != (cls.ttft_s, cls.itl_s):
            cls = with_slos(cls, said.ttft_s, said.itl_s)
        return cls, key

    def _left(self, said: m.Left) -> None:
        call = self.calls.get(said.number)
        if call is None:
            return  # Its end is under way to the relay.
        if call.run is not None:
            call.run.placed.tokens = max(call.run.placed.tokens, said.tokens)
        self._relays.desk.left(call)

    def _turn(self, said: m.Turn) -> None:
        if said.reason and said.reason not in REASONS:
            raise ProtocolError(f"request {said.number} is asked for a cascade with reason {said.reason!r}")
        if said.cascade not in self._relays.models.cascades:
            return  # Another gateway's config may have it: a request like any other.
        if len(self._turns) >= TURNS_MAX:
            raise ProtocolError(f"{TURNS_MAX} cascade turns are told, and none of their requests")
        self._turns[said.number] = Turn(said.cascade, said.reason, said.before, said.counted, said.ttft_s, said.streams)

    def _shown(self, said: m.Shown) -> None:
        call = self.calls.get(said.number)
        if call is not None:
            self._relays.desk.shown(call, said.ago)

    def _first_token(self, said: m.FirstToken) -> None:
        run = self._run(said.run)
        if run is None or run.placed.told:
            self.late += 1
            return
        run.placed.tokens = max(run.placed.tokens, said.tokens)
        run.engine.first_token(run.placed)

    def _answered(self, said: m.Answered) -> None:
        run = self._ends(said.run, said.seen)
        if run is not None:
            run.engine.answered(run.placed, said.status, said.tokens, said.prompt_tokens)

    def _lost(self, said: m.Lost) -> None:
        run = self._ends(said.run, said.seen)
        if run is not None:
            failure = UpstreamFailure(said.message, said.status)
            run.engine.lost(run.placed, failure, connect=said.connect, visible=said.visible, kept=said.kept)

    def _evicted(self, said: m.Evicted) -> None:
        run = self._run(said.run)
        if run is not None and not run.asked:
            raise ProtocolError(f"placement {said.run} is evicted, which nobody asked for")
        run = self._ends(said.run, said.seen)
        if run is None:
            return
        request = run.placed.request
        call = request.payload
        if isinstance(call, FarCall) and request.outcome is not None and said.seen > call.paid_tokens:
            self._relays.desk.charge(call, said.seen - call.paid_tokens)
        run.engine.evicted(run.placed, said.kept)

    def _silent(self, said: m.Silent) -> None:
        run = self._run(said.run)
        if run is None or run.placed.silent or not run.placed.told:
            self.late += 1
            return
        run.placed.silent = True
        run.placed.tokens = said.tokens
        run.engine.fell_silent(run.placed, self._relays.clock.now_s - said.for_s)

    def _spoke(self, said: m.Spoke) -> None:
        run = self._run(said.run)
        if run is None or not run.placed.silent:
            self.late += 1
            return
        run.placed.tokens = said.tokens
        run.engine.spoke_again(run.placed)

    def _counted(self, said: m.Counted) -> None:
        engine = self._relays.engines.get(said.instance)
        if engine is not None:
            engine.observer.tokens += said.tokens
            engine.observer.held_tokens += said.tokens

    def _made(self, said: m.Made) -> None:
        run = self._run(said.run)
        if run is None or not run.placed.told:
            self.late += 1
            return
        run.placed.tokens = said.tokens

    def _responded(self, said: m.Responded) -> None:
        self._relays.responded(said.status, said.count)

    def _result(self, said: m.Result) -> None:
        call = self.items.get(said.number)
        if call is None:
            self.late += 1
        elif b"\n" in said.body:
            raise ProtocolError(f"the answer to item {call.request_id} has more than one line")
        else:
            call.status = said.status
            call.far = FarAnswer(said.body, said.cached_tokens, said.reasoning_tokens)

    def _health(self, said: m.Health) -> None:
        self.health = said

    def _listening(self, said: m.Listening) -> None:
        self.listens = True
        self.pid = said.pid
        self._relays.listening(self)

    # -- what it says of another brain ---------------------------------------------------------------------------

    def _known(self, said: m.Known) -> None:
        relays = self._relays
        engine = relays.engines.get(said.instance)
        if engine is None and relays.adoption is not None:
            engine = relays.adoption.adopt_instance(said)
        if engine is not None and (engine.instance.model, engine.url) == (said.model, said.url):
            self._shared.add(said.instance)

    def _running(self, said: m.Running) -> None:
        if said.request.number in self.calls or said.run in self.runs:
            raise ProtocolError(f"request {said.request.number} or placement {said.run} is told twice")
        turn = self._turns.pop(said.request.number, None)
        if not (self._resumes(said) or self._adopt(said, turn)):
            self.wire.post(m.Unknown(said.run))

    def _resumes(self, said: m.Running) -> bool:
        """Whether this brain has placed it, or ended it, over the connection that was lost."""
        before, number = self.before, said.request.number
        if before is None:
            return False
        if (end := before.ends.get(number)) is not None:
            self.wire.send(m.Evict(said.run))
            self.wire.send(end)
            return True
        call = before.calls.get(number)
        if call is not None and call.run is not None and call.run.placed.number == said.run:
            self._resume(call)
            run = call.run
            run.placed.tokens = max(run.placed.tokens, said.tokens)
            run.engine.observer.inexact = True  # Nobody told of what it has made meanwhile.
            if said.began >= 0.0 and not run.placed.told:
                run.engine.first_token(run.placed)
            if run.asked:
                self.wire.send(m.Evict(said.run))
            return True
        if call is not None and said.run < m.OWN_FROM:  # It was stopped meanwhile, and may have been placed again.
            self.wire.send(m.Evict(said.run))
            self._resume(call)
            if (again := call.run) is not None:
                self._place_again(again)
            return True
        if call is not None:  # The relay has placed it itself.
            self._relays.desk.left(call)
        return False

    def _place_again(self, run: FarRun) -> None:
        """The relay has nothing of it."""
        restart(run.placed)
        call: FarCall = run.placed.request.payload
        if run.asked:  # To be answered at once.
            self.forget(run)
            run.engine.evicted(run.placed, 0)
        else:
            self.wire.send(m.Place(call.here, run.placed.number, run.engine.instance.id, 0))

    def _resume(self, call: FarCall) -> None:
        """It goes on over this connection."""
        before = call.link
        del before.calls[call.here]
        self.calls[call.here], call.link = call, self
        if (run := call.run) is not None:
            before.runs.pop(run.placed.number, None)
            self.runs[run.placed.number], run.link = run, self

    def _adopt(self, said: m.Running, turn: Turn | None) -> bool:
        """Count it from now on. False: that cannot be."""
        relays, asked = self._relays, said.request
        engine = relays.engines.get(said.instance) if said.instance in self._shared else None
        found = self._admitted(asked)
        if relays.adoption is None or engine is None or found is None or engine.instance.model != asked.model:
            return False
        if engine.instance.sequences >= ADOPTED_MAX * engine.instance.kind.max_num_seqs:
            return False
        call, now_s = FarCall(self, asked, turn), relays.clock.now_s
        request = relays.desk.adopt(
            call, asked.model, *found, asked.input_tokens, ago_s=said.arrived, losses=said.losses
        )
        taken = relays.adoption.adopt_running(
            engine.instance,
            request,
            epoch=1,
            tokens_done=said.tokens_before,
            dispatch_s=max(0.0, now_s - said.placed),
            first_token_s=max(0.0, now_s - said.began) if said.began >= 0.0 else -1.0,
        )
        if not taken:
            relays.desk.forget(request)
            return False
        self.calls[asked.number] = call
        placed = engine.adopt(request, said.run, tokens=said.tokens, began=said.began >= 0.0)
        run = placed.carrier = call.run = self.runs[said.run] = FarRun(self, engine, placed)
        if said.silent and placed.told:
            run.placed.silent = True
            engine.fell_silent(placed, now_s)
        return True

    def _waits(self, said: m.Waits) -> None:
        asked, before = said.request, self.before
        turn = self._turns.pop(asked.number, None)
        if asked.number in self.calls:
            raise ProtocolError(f"request {asked.number} is told twice")
        if before is not None and (end := before.ends.get(asked.number)) is not None:
            self.wire.send(end)
            return
        if before is not None and (known := before.calls.get(asked.number)) is not None:
            self._resume(known)
            if known.run is not None:  # It never heard of this placement, or has lost it.
                self._place_again(known.run)
            return
        found = self._admitted(asked)
        call = FarCall(self, asked, turn)
        try:
            if found is None:
                served = asked.model in self._relays.models.by_name
                raise internal(asked.request_id) if served else model_not_found(asked.model)
            cascade = turn.cascade if turn is not None else ""
            self._relays.models.permit(found[1], asked.model, found[0].name, cascade)
            self.calls[asked.number] = call
            self._relays.desk.arrive_again(
                call, asked.model, *found, asked.input_tokens, ago_s=said.arrived, losses=said.losses
            )
        except ApiError as error:
            self.calls.pop(asked.number, None)
            self.wire.send(m.End(asked.number, "refused", refusal=_refusal(error.with_traceback(None))))

    def _told(self, said: m.Told) -> None:
        relays = self._relays
        self.own_placements += said.own_placements
        relays.own_placements += said.own_placements
        relays.expired += said.expired
        if self.before is None:
            relays.keys.bound_debts()
        if said.forgotten:
            log.warning("%s could not keep %d ends of requests while there was no brain", self.name, said.forgotten)
        relays.returned(self)

    def _run(self, number: int) -> FarRun | None:
        """The placement, unless it has ended."""
        return self.runs.get(number)

    def _ends(self, number: int, seen: int) -> FarRun | None:
        """The placement, which ends now; None: it has ended already."""
        run = self.runs.get(number)
        if run is None:
            self.late += 1
            return None
        self.forget(run)
        run.placed.tokens = max(run.placed.tokens, seen)
        return run


class Relays:
    """All relays of this brain."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        desk: Desk,
        models: Models,
        keys: KeyRing,
        engines: Mapping[int, InstanceEngine],
        responded: Callable[[int, int], None],
        listening: Callable[[RelayLink], None] = lambda link: None,
        left: Callable[[RelayLink, str], None] = lambda link, why: None,
        ride_s: float = RIDE_S,
        term: int = 0,
        superseded: Callable[[int], None] = lambda term: None,
        adoption: Adoption | None = None,
        protocol: int = m.VERSION,
        gateway: str = "",
    ) -> None:
        """``engines`` are those of instances that are ready; ``responded`` hears (status, count) of answers;
        ``listening`` hears of each relay that takes connections, ``left`` of each whose connection here has ended, and
        why. ``term``: this brain's, at most ``m.TERM_MAX``; ``superseded`` hears of a higher one, which means that
        another brain leads. ``adoption``: what becomes of what relays know from another brain; None: it is not
        counted. ``protocol``: the newest version that is spoken; ``gateway``: the name of this one, of several."""
        self.clock = clock
        self.desk = desk
        self.models = models
        self.keys = keys
        self.engines = engines
        self.responded = responded
        self.links: list[RelayLink] = []
        """Those that have said hello and are there."""
        self.draining = False
        self.late = 0
        """``RelayLink.late`` of those that are gone."""
        self.listening = listening
        self.term = term
        self.superseded = superseded
        self.adoption = adoption
        self.protocol = protocol
        self.gateway = gateway
        self.seldom = Seldom()
        self.expects = 0
        """How many there are, whether they are here or not; 0: that is not known."""
        self.awaited: frozenset[str] = frozenset()
        """Nonces of those that the brain before this one spoke with."""
        self._away: dict[str, RelayLink] = {}
        """Connections that were lost a moment ago, by their relays' nonces."""
        self.own_placements = 0
        """Placements that relays chose while they had no brain."""
        self.expired = 0
        """Requests that relays gave up because they had none."""
        self._limits: dict[int, m.Limit] = {}
        """As last told to relays that stay."""
        self._looked_s = 0.0
        self._left = left
        self._ride_s = ride_s

    def link(self, name: str) -> RelayLink:
        """The end of a connection to one more relay; its ``wire`` is the protocol."""
        return RelayLink(self, name, ride_s=self._ride_s)

    def begin(self) -> None:
        """Posted."""
        self.clock.call_later(TICK_S, self._tick)
        self.clock.call_later(PULSE_S, self._pulse)

    def carry(self, engine: InstanceEngine, placed: Placed) -> FarRun | None:
        call = placed.request.payload
        if isinstance(call, FarCall):
            return call.link.carry(engine, placed)
        if not isinstance(call, BatchCall):
            return None
        link = call.link if isinstance(call.link, RelayLink) else None
        # What no relay has room for is sent to its engine from here.
        if link is None and (able := [each for each in self.links if each.has_room(call)]):
            link = min(able, key=lambda each: len(each.items))
            link.take_item(call, placed)
        if link is None and call.here:
            call.here = 0
            restart(placed)  # What came of it was at a relay that is gone.
        return link.carry(engine, placed) if link is not None else None

    def instance_up(self, engine: InstanceEngine) -> None:
        for link in self.links:
            link.wire.send(_up(engine))

    def instance_gone(self, instance: Instance) -> None:
        for link in self.links:
            link.wire.send(m.InstanceGone(instance.id))

    def drain(self, on: bool) -> None:
        """Requests that come are refused from now on (or taken again)."""
        self.draining = on
        for link in self.links:
            link.wire.send(m.Drain(on))

    @property
    def connections(self) -> int:
        return sum(link.health.connections for link in self.links)

    def joined(self, link: RelayLink) -> None:
        """It has said hello."""
        for other in [each for each in self.links if link.nonce and each.nonce == link.nonce]:
            other.wire.give_up("it has come back by another connection")
        link.before = self._away.pop(link.nonce, None)
        self.links.append(link)
        link.tell_shapes()
        for engine in self.engines.values():
            link.wire.post(_up(engine))
        if link.nonce:
            self._note_limits()
            for limit in self._limits.values():
                link.wire.post(limit)
            link.wire.post(m.Pulse(self.sharing))
        link.wire.post(m.Drain(self.draining))
        if not link.returns:
            self.returned(link)

    def returned(self, link: RelayLink) -> None:
        """It knows nothing that this brain does not know."""
        link.told = True
        if (before := link.before) is not None:
            link.before = None
            before.bury("the relay came back without it")
        link.wire.send(m.Ready())
        if self.adoption is not None and self.adoption.settling and self._all_have_told():
            self.adoption.told_all()

    def _all_have_told(self) -> bool:
        """False also where it is not known who is to tell: then the settling time is waited for."""
        told = [each.nonce for each in self.links if each.told]
        return 0 < self.expects <= len(told) or (bool(self.awaited) and self.awaited <= set(told))

    @property
    def known(self) -> frozenset[str]:
        """Nonces of relays that may run something: whoever follows this brain waits for them. While this one waits
        itself, those that it has not heard of yet are among them."""
        here = {each.nonce for each in self.links} | set(self._away)
        settling = self.adoption is not None and self.adoption.settling
        return frozenset(here | self.awaited if settling else here) - {""}

    @property
    def missing(self) -> int:
        """Relays that are known, and have not told."""
        told = {each.nonce for each in self.links if each.told}
        return max(len(self.known - told), self.expects - len(told))

    @property
    def sharing(self) -> int:
        """How many relays share the instances, as far as is known: one that is told too few takes more than its share
        if this brain dies."""
        return max(1, len(self.links), self.expects, len(self.known))

    def left(self, link: RelayLink, why: str) -> None:
        """Its connection has ended."""
        if link in self.links:
            self.links.remove(link)
            self.late += link.late
        self._left(link, why)

    def close(self) -> None:
        """Nobody wants to hear any more how processes end."""
        for link in (*self.links, *self._away.values()):
            if link.process is not None:
                link.process.close()

    def away(self, link: RelayLink, why: str) -> None:
        """It may come back, unless its process has ended."""
        self._away[link.nonce] = link

        def over() -> None:
            if self._away.get(link.nonce) is link:
                del self._away[link.nonce]
                link.bury(why)

        self.clock.call_later(REJOIN_S, over)
        if link.process is not None:
            link.process.when_ended(lambda: self.clock.post(over))

    def _pulse(self) -> None:
        self.clock.call_later(PULSE_S, self._pulse)
        pulse = m.Pulse(self.sharing)
        for link in self.links:
            if link.nonce:
                link.wire.send(pulse)

    def _note_limits(self) -> list[m.Limit]:
        """What has changed since the last look, which is told from now on."""
        changed = []
        for number, engine in self.engines.items():
            limit = m.Limit(number, engine.instance.max_batch_size, engine.instance.role)
            if limit != self._limits.get(number):
                self._limits[number] = limit
                changed.append(limit)
        for number in [each for each in self._limits if each not in self.engines]:
            del self._limits[number]
        return changed

    def _tell_limits(self) -> None:
        staying = [link for link in self.links if link.nonce]
        for limit in self._note_limits() if staying else ():
            for link in staying:
                link.wire.post(limit)

    def _tick(self) -> None:
        self.clock.call_later(TICK_S, self._tick)
        self._tell_limits()
        now_s, before_s = self.clock.elapsed_s(), self._looked_s
        self._looked_s = now_s
        for link in list(self.links):
            link.tell_shapes()
            # Looks that this process makes up for after a stall say nothing: what relays sent is still to be read.
            if now_s - before_s >= TICK_S / 2:
                link.quiet += 1
            if link.quiet > QUIET_MAX:
                link.wire.give_up(f"it (process {link.pid}) has said nothing for {QUIET_MAX} s")


def _up(engine: InstanceEngine) -> m.InstanceUp:
    instance = engine.instance
    return m.InstanceUp(instance.id, instance.model, instance.kind.name, engine.url)


def _refusal(error: ApiError) -> m.Refusal:
    message = error.message[: m.TEXT_MAX]
    return m.Refusal(error.status, message, error.type, error.code, error.param, error.headers)
