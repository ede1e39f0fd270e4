"""A relay in a process of its own: its end of the connection to the brain, and what it knows of its requests.

Towards the clients' side (``front``) it is the desk, towards the engines' side (``upstream``) it is who hears of runs;
both are the very same as in one process. It decides nothing: what has come it tells, what it is told it does. Each
``Place`` has one end from here, whatever crosses it on the way: where the client has left meanwhile that is
``Evicted``, and an answer that was complete already is told again.

A relay may outlive its brain (``StaySettings``). While it has none (``alone``) running streams go on to their ends, and
their clients notice nothing; requests that come, wait. Items of batches are dropped: the store has them. The next brain
is told what the last one knew, and what it did not. What it does not count runs to its end by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import inf
from secrets import token_hex
from typing import Any, cast

import orjson
from msgspec.structs import replace

from chiron.core.types import Outcome, Request, RequestClass
from chiron.engines.claims import usage_details
from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import RIDE_S, ProtocolError, Seldom, Wire
from chiron.gateway.relay.admission import Models, is_chat
from chiron.gateway.relay.body import read_body
from chiron.gateway.relay.calls import CollectedCall, FlexCall, ItemCall, RelayCall
from chiron.gateway.relay.cascade import FirstCall
from chiron.gateway.relay.errors import ApiError, timed_out, unavailable
from chiron.gateway.relay.keys import Key
from chiron.gateway.relay.uplink.alone import Alone
from chiron.gateway.relay.uplink.held import Held
from chiron.gateway.relay.uplink.joining import Connect, Joining, StaySettings
from chiron.gateway.relay.upstream import EngineAddress, Placement, Run, Upstream, UpstreamFailure
from chiron.net.client import Origin
from chiron.net.clock import LiveClock
from chiron.net.memory import MemoryNetwork

log = logging.getLogger("chiron.relay")

WATCH_S = 1.0
"""Between two looks at engines."""
COUNTS_S = 0.1
"""Between two reports of what streams have made: engines are sampled once a second, or a little more often."""
LOOK_S = 0.25
"""Between two looks at whether the brain says anything, and at what waits without one."""
HANGS = 5.0
"""Times ``fall_back_s``: a brain that has said nothing for so long is given up although nothing waits for it."""
_OUTCOMES = frozenset({"finished", "rejected", "failed", "cancelled", "shed", "refused"})


class RelayedItem(ItemCall):
    """An item of a batch; its answer goes to the brain as bytes."""

    def __init__(self, said: m.Item) -> None:
        path = said.path
        super().__init__(
            path=path.encode(),
            body=read_body(said.body, is_chat(path)),
            request_id=said.request_id,
            key_name="",
            answer_max_bytes=said.answer_max_bytes,
        )
        self._answer = b""
        self._answer_max_bytes = said.answer_max_bytes

    def end(self) -> str:
        problem = super().end()
        if problem or not (self.status < 300 or self.refused):
            return problem
        try:
            self._answer = orjson.dumps(self.outcome()[1])
        except orjson.JSONEncodeError as error:
            return f"the engine's answer cannot be kept: {error}"
        if len(self._answer) > self._answer_max_bytes:  # Numbers can be longer than the engine wrote them.
            self._answer = b""
            return f"the answer is larger than {self._answer_max_bytes} bytes"
        return ""

    def result(self, number: int) -> m.Result:
        cached, reasoning = usage_details(self.collector.usage)
        return m.Result(number, self.status if self.refused else 200, self._answer, cached, reasoning)


class RunTeller:
    """What happens at one instance, told to the brain. Implements ``RunReports`` and ``Counts``."""

    def __init__(self, uplink: Uplink, instance: int) -> None:
        self.tokens = 0
        self.held_tokens = 0
        self._uplink = uplink
        self._instance = instance
        self._told = 0
        self.counted = True
        """The brain knows the instance."""

    def first_token(self, placed: Placement) -> None:
        placed.told = True
        self._uplink.began(placed)
        self._uplink.post(m.FirstToken(placed.number, placed.tokens))

    def answered(self, placed: Placement, status: int, tokens: int, prompt_tokens: int) -> None:
        self.tell_counts()
        message = m.Answered(placed.number, status, tokens, prompt_tokens, placed.tokens)
        call = placed.request.payload
        if isinstance(call, RelayedItem) and (status < 300 or call.refused):
            self._uplink.post(call.result(placed.request.id))
        self._uplink.post(message)
        self._uplink.ended(placed, message)

    def lost(self, placed: Placement, failure: UpstreamFailure, *, connect: bool, visible: bool, kept: int) -> None:
        self.tell_counts()
        placed.request.payload.error = failure
        words = failure.message[: m.TEXT_MAX]
        message = m.Lost(placed.number, failure.status, words, connect, visible, kept, placed.tokens)
        self._uplink.send(message)
        self._uplink.ended(placed, message)

    def evicted(self, placed: Placement, kept: int) -> None:
        self.tell_counts()
        message = m.Evicted(placed.number, kept, placed.tokens)
        self._uplink.send(message)
        self._uplink.ended(placed, message)

    def fell_silent(self, placed: Placement, since_s: float) -> None:
        self.tell_counts()
        self._uplink.post(m.Silent(placed.number, max(0.0, self._uplink.clock.now_s - since_s), placed.tokens))

    def spoke_again(self, placed: Placement) -> None:
        placed.silent = False
        self._uplink.post(m.Spoke(placed.number, placed.tokens))

    def tell_counts(self) -> None:
        """Before anything that says how many tokens a run has made, so that sums agree."""
        if self.tokens != self._told:
            if self.counted:
                self._uplink.post(m.Counted(self._instance, self.tokens - self._told))
            self._told = self.tokens

    def forget_counts(self) -> None:
        """The brain is told how far each run has come."""
        self._told = self.tokens


class PromptTeller(RunTeller):
    """Tells of each block of tokens at once, in the order in which all happens."""

    @property
    def held_tokens(self) -> int:
        return 0

    @held_tokens.setter
    def held_tokens(self, value: int) -> None:
        if value:
            self.tell_counts()
            self._uplink.tell_made()


class Uplink:
    """The relay's end. Implements the ``Desk`` of its front."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        models: Models,
        address_of: Callable[[str, str, str], EngineAddress],
        engine_stall_s: float,
        request_timeout_s: float = inf,
        retry_after_s: float,
        closed: Callable[[str], None],
        drain: Callable[[bool], None] = lambda on: None,
        ready: Callable[[], None] = lambda: None,
        joined: Callable[[], None] = lambda: None,
        stop: Callable[[float], None] = lambda grace_s: None,
        health: Callable[[], m.Health] = lambda: m.Health(0, 0, 0.0),
        network: MemoryNetwork | None = None,
        ride_s: float = RIDE_S,
        connect: Connect | None = None,
        stay: StaySettings | None = None,
        gateway: str = "",
    ) -> None:
        """``address_of`` (model, kind, url) raises KeyError for what the config does not have; ``closed`` hears why the
        brain is gone, ``drain``, ``ready`` and ``stop`` what it says; ``health`` is asked once a second. With
        ``connect`` the relay stays when its brain is gone: ``begin`` has it find one, again and again, ``ready`` is
        called for the first only, ``joined`` for each, and ``closed`` never."""
        self.clock = clock
        self.held: dict[int, Held] = {}
        """By our number."""
        self.upstreams: dict[int, Upstream] = {}
        """By id of instance."""
        self.runs: dict[int, Run] = {}
        """By number of placement."""
        self.known: dict[int, m.Known] = {}
        """Instances, as the brain last told of them."""
        self.listening: m.Listening | None = None
        """What each brain is told once clients can connect."""
        self.term = 0
        """The highest that a brain has had."""
        self._ride_s = ride_s
        self._ready_once = ready
        self._each_ready = joined
        self._closed_for_good = closed
        self._nonce = token_hex(8) if connect is not None else ""
        self._joined = False
        """A brain has said hello before."""
        self._begun = False
        self._heard_s = 0.0
        self._looked_s = 0.0
        self._silent_looks = 0
        self._silent_s = (stay or StaySettings()).fall_back_s
        self._telling = 0
        """Ends that the present brain has been told, and has not said that it heard."""
        self._confirmed: set[int] = set()
        """Instances that the present brain has told of."""
        self._uncounted: list[Upstream] = []
        """Of instances that it does not know, while something runs there."""
        self._alone_since_s: float | None = None
        self._own_numbers = itertools.count(m.OWN_FROM)
        self.alone = Alone(
            settings=stay or StaySettings(),
            retry_after_s=retry_after_s,
            upstreams=self.upstreams,
            known=self.known,
            carry=self._carry_alone,
            end=self._end_here,
        )
        self._protocol, self._gateway, self._seldom = (stay or StaySettings()).protocol, gateway, Seldom()
        self.wire = self._make_wire()
        self._joining = Joining(connect, self._renew_wire) if connect is not None else None
        self._joins: asyncio.Task[None] | None = None
        self._stopped = False
        self._models = models
        self._address_of = address_of
        self._stall_s = engine_stall_s
        self._timeout_s = request_timeout_s
        self._retry_after_s = retry_after_s
        self._drain = drain
        self._stop = stop
        self._health = health
        self._network = network
        self._numbers = itertools.count(1)
        self._make_teller = RunTeller if ride_s else PromptTeller
        self._tellers: dict[int, RunTeller] = {}
        self._made: dict[int, int] = {}
        """What was told of runs whose answers are collected."""
        self._answers: Counter[int] = Counter()
        self._closing: set[asyncio.Task[None]] = set()
        self._hear: Mapping[type, Callable[[Any], None]] = {
            m.InstanceUp: self._instance_up,
            m.InstanceGone: self._instance_gone,
            m.Shape: self._shape,
            m.Item: self._item,
            m.Place: self._place,
            m.Evict: self._evict,
            m.End: self._end,
            m.Remind: self._remind,
            m.Drain: lambda said: self._drain(said.on),
            m.Ready: lambda said: self._ready(),
            m.Limit: self._limit,
            m.Unknown: self._unknown,
            m.Pulse: self._pulse,
            m.Stop: lambda said: self._stop(said.grace_s),
        }

    # -- the front's desk --------------------------------------------------------------------------------------

    def arrive(
        self, call: RelayCall | FlexCall | FirstCall, model: str, cls: RequestClass, key: Key, input_tokens: int
    ) -> None:
        if not self.wire.up and self._alone_since_s is None:
            raise unavailable("The gateway is starting.", self._retry_after_s)
        number = call.number = next(self._numbers)
        message = m.Arrive(
            number=number,
            request_id=call.request_id,
            model=model,
            cls=cls.name,
            ttft_s=cls.ttft_s,
            itl_s=cls.itl_s,
            key=key.name,
            input_tokens=input_tokens,
            peers=tuple(call.peers),
            sequences=call.sequences,
            streams=call.streams,
            prompt_bytes=call.prompt_bytes,
            collected=isinstance(call, FlexCall),
            wait_max_s=call.wait_max_s,
            program=call.program,
        )
        held = Held(Request(number, model, cls, self.clock.elapsed_s(), input_tokens, call), message)
        if self.wire.up:
            self.held[number] = held
            if call.turn is not None:
                self._tell_turn(held)
            self.wire.send(message)
        else:
            self.alone.check_room(held)
            self.clock.post(lambda: self._hold(held))

    def shown(self, call: FirstCall) -> None:
        held = self.held.get(call.number)
        if held is None:
            return
        held.shown_s = self.clock.elapsed_s()
        if self.wire.up and self.wire.version >= m.TURNS_FROM:
            self.wire.post(m.Shown(call.number))

    def _tell_turn(self, held: Held) -> None:
        """What a request is to a cascade, before the brain is told of it."""
        if (turn := held.turn()) is not None and self.wire.version >= m.TURNS_FROM:
            self.wire.send(turn)

    def left(self, call: RelayCall | FlexCall | FirstCall) -> None:
        held = self.held.get(call.number)
        if held is None:
            return
        held.left = True
        tokens = held.run.placed.tokens if held.run is not None else held.request.tokens_done
        self.send(m.Left(call.number, tokens))
        if held.run is not None:
            held.run.evict()  # As the brain will say.
        elif self._alone_since_s is not None:
            self._settle(held)

    # -- what engines' side and clients' side tell ----------------------------------------------------------------

    def began(self, placed: Placement) -> None:
        """Its first token is here."""
        placed.request.first_token_s = now_s = self.clock.elapsed_s()
        if self._alone_since_s is not None:
            self.alone.answered(now_s)

    def ended(self, placed: Placement, message: m.Answered | m.Lost | m.Evicted) -> None:
        """A placement has ended, and the brain was told, if there is one."""
        self.runs.pop(placed.number, None)
        self._made.pop(placed.number, None)
        held = self.held.get(placed.request.id)
        if held is None or held.placed is not placed:
            return  # The brain has ended it.
        held.run, held.last = None, message
        if isinstance(message, m.Lost):
            held.losses += 1
            self.alone.lost(held.instance, self.clock.elapsed_s())
        elif isinstance(message, m.Answered) and self._alone_since_s is not None:
            self.alone.answered(self.clock.elapsed_s())
        if self._alone_since_s is not None or held.uncounted:
            self._settle(held)

    def tell_made(self) -> None:
        """How far answers have come that are collected."""
        for number, run in self.runs.items():
            placed = run.placed
            if placed.told and placed.tokens != self._made.get(number) and isinstance(run.sent, CollectedCall):
                self._made[number] = placed.tokens
                self.post(m.Made(number, placed.tokens))

    def responded(self, status: int) -> None:
        self._answers[status] += 1

    @property
    def has_brain(self) -> bool:
        """As far as that has been noticed."""
        return self._alone_since_s is None

    @property
    def serves(self) -> bool:
        """Requests, with a brain or without."""
        return self._alone_since_s is None or self.alone.serves(self.clock.elapsed_s())

    def how_it_stands(self) -> str:
        """For who asks what only a brain could answer, after other words; empty while there is one."""
        if self._alone_since_s is None:
            return ""
        for_s = self.clock.elapsed_s() - self._alone_since_s
        placed = f", has placed {self.alone.placements} itself" if self.alone.placements else ""
        return (
            f" This relay has had no control plane for {for_s:.0f} s: {len(self.alone.waiting)} of its requests wait,"
            f" it carries {len(self.runs)}{placed}."
        )

    # -- the wire ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Find a brain, and another one whenever it is gone; for a relay that stays."""
        assert self._joining is not None
        self._joins = asyncio.get_running_loop().create_task(self._joining.run())

    def close(self) -> None:
        """Look for no brain any more."""
        self._stopped = True
        if self._joins is not None:
            self._joins.cancel()
            self._joins = None

    def send(self, message: m.Message) -> None:
        """Soon; to nobody, if there is no brain."""
        if self.wire.up:
            self.wire.send(message)

    def post(self, message: m.Message) -> None:
        """With the next, or a little later."""
        if self.wire.up:
            self.wire.post(message)

    def tell_listening(self, port: int, pid: int) -> None:
        """It takes clients' connections from now on."""
        self.listening = m.Listening(port, pid)
        self.send(self.listening)

    def _make_wire(self) -> Wire:
        wire = Wire(
            name="the brain",
            kind=m.Down,
            opened=self._opened,
            received=self._received,
            closed=lambda why: self._closed(wire, why),
            ride_s=self._ride_s,
            hello=m.Hello(
                version=self._protocol,
                version_min=m.VERSION_MIN,
                term=self.term,
                nonce=self._nonce,
                returns=self._joined,
                gateway=self._gateway,
            ),
            greeted=self._greeted,
            seldom=self._seldom,
        )
        return wire

    def _renew_wire(self) -> Wire:
        self.wire = self._make_wire()
        return self.wire

    def _greeted(self, hello: m.Hello) -> None:
        if hello.term < self.term:
            raise ProtocolError(f"its term is {hello.term}, and there has been one of term {self.term}: it is over")
        self.term = hello.term

    def _opened(self) -> None:
        self.clock.post(self._begin)
        if self._joining is not None:
            self._joining.changed()

    def _begin(self) -> None:
        self._heard_s, self._silent_looks = self.clock.now_s, 0
        if not self._begun:
            self._begun = True
            self.clock.call_later(WATCH_S, self._watch)
            self.clock.call_later(COUNTS_S, self._tell_counts)
            if self._joining is not None:
                self.clock.call_later(LOOK_S, self._look)
        if self._joined:
            self._tell_all()
        self._joined = True

    def _closed(self, wire: Wire, why: str) -> None:
        if self._joining is None:
            self._closed_for_good(why)
            return
        self._joining.changed()
        if wire is self.wire and self._joined and self._alone_since_s is None and not self._stopped:
            log.error("there is no brain: %s; running requests go on, new ones wait", why)
            self.clock.post(self._go_on_alone)

    def _watch(self) -> None:
        self.clock.call_later(WATCH_S, self._watch)
        for upstream in (*self.upstreams.values(), *self._uncounted):
            upstream.watch(self._stall_s)
        for upstream in [each for each in self._uncounted if not each.runs]:
            self._uncounted.remove(upstream)
            self._retire(upstream)
        self._cut_off_late()
        self.tell_made()
        self.post(self._health())

    def _tell_counts(self) -> None:
        self.clock.call_later(COUNTS_S, self._tell_counts)
        for teller in self._tellers.values():
            teller.tell_counts()
        if self.wire.up:
            for status, count in self._answers.items():
                self.wire.post(m.Responded(status, count))
            self._answers.clear()

    def _received(self, messages: Sequence[Any]) -> None:
        self._silent_looks = 0
        self._heard_s = self.clock.elapsed_s()

        def take() -> None:
            for message in messages:
                try:
                    self._hear[type(message)](message)
                except ProtocolError:
                    raise
                except Exception:
                    log.exception("%s of the brain could not be taken in", type(message).__name__)

        self.clock.post(take)

    # -- without a brain ---------------------------------------------------------------------------------------

    def _look(self) -> None:
        """A few times a second: whether the brain says anything, and what becomes of what waits without it."""
        self.clock.call_later(LOOK_S, self._look)
        now_s, before_s = self.clock.elapsed_s(), self._looked_s
        self._looked_s = now_s
        if self._alone_since_s is not None:
            self.alone.look(now_s)
            return
        # Looks that this process makes up for after a stall say nothing: what the brain sent is still to be read.
        if now_s - before_s >= LOOK_S / 2:
            self._silent_looks += 1
        silent_s = self._silent_looks * LOOK_S
        if silent_s > self._silent_s and (silent_s > HANGS * self._silent_s or self._interactive_waits()):
            self.wire.give_up(f"it has said nothing for {silent_s:g} s")

    def _interactive_waits(self) -> bool:
        return any(
            held.run is None and held.outcome is None and held.request.interactive for held in self.held.values()
        )

    def _go_on_alone(self) -> None:
        self._alone_since_s = now_s = self.clock.now_s
        self._telling = 0  # Nobody has said that they were heard.
        self.alone.begin(now_s, self._heard_s)
        for held in list(self.held.values()):
            if held.arrive is None:
                self._drop_item(held)
            elif held.run is None:
                self._settle(held)

    def _cut_off_late(self) -> None:
        """What no brain counts has nobody else who would end it. What waits is given up by ``alone``."""
        now_s, alone = self.clock.now_s, self._alone_since_s is not None
        for held in [each for each in self.held.values() if (alone or each.uncounted) and each.run is not None]:
            request = held.request
            if request.interactive and now_s - request.arrival_s > self._timeout_s:
                request.payload.refusal = timed_out(f"The answer took longer than {self._timeout_s:g} s.")
            elif not request.interactive and now_s > request.deadline_s:
                request.payload.refusal = timed_out("The deadline of the request's class has passed.")
            else:
                continue
            held.left = True  # As if its client had.
            assert held.run is not None
            held.run.evict()

    def _drop_item(self, held: Held) -> None:
        """Its brain has it in the store, and runs it again."""
        self.held.pop(held.request.id, None)
        if (run := held.run) is not None:
            self.runs.pop(run.placed.number, None)
            self._made.pop(run.placed.number, None)
            run.drop()

    def _hold(self, held: Held) -> None:
        self.held[held.request.id] = held
        if self.wire.up:
            assert held.arrive is not None
            self._tell_turn(held)
            self.wire.send(held.arrive)
            return
        self.alone.wait(held)
        self.alone.place(self.clock.now_s)

    def _settle(self, held: Held) -> None:
        """It has no placement, and no brain counted its last one: it ends here, or waits for another one."""
        outcome, now_s = held.outcome, self.clock.elapsed_s()
        alone, counted = self._alone_since_s is not None, not held.uncounted
        if outcome is None:
            held.uncounted = False
            if alone:
                self.alone.wait(held)
                self.alone.place(now_s)
            elif self.wire.up:
                self._tell_turn(held)
                self.wire.send(held.waits(now_s))
            return
        if alone and counted and held.last is not None:
            left = (m.Left(held.request.id, held.last.seen),) if held.left else ()
            told = (held.turn(), held.running(now_s), held.shown(now_s), *left, held.last)
            self.alone.keep(tuple(message for message in told if message is not None))
        self.alone.no_longer_waits(held)
        self._end_here(held, outcome, None)
        if alone:
            self.alone.place(now_s)

    def _end_here(self, held: Held, outcome: Outcome, refusal: ApiError | None) -> None:
        """A request is over without a word of the brain."""
        request = held.request
        self.held.pop(request.id, None)
        request.outcome, request.retries = outcome, held.losses
        if refusal is not None:
            request.payload.refusal = refusal
        self._tell_client(request)

    def _tell_client(self, request: Request) -> None:
        try:
            request.payload.ended(request)
        except Exception:
            log.exception("the end of request %s could not be told", request.payload.request_id)
            request.payload.abandon()

    def _carry_alone(self, held: Held, instance: int) -> None:
        held.request.tokens_done = 0
        number = next(self._own_numbers)
        try:
            self._carry(held, number, instance)
        except Exception:
            log.exception("request %s could not be sent", held.request.payload.request_id)
            self._end_here(held, "failed", None)

    def _carry(self, held: Held, number: int, instance: int) -> None:
        upstream, placed = self.upstreams[instance], Placement(number, held.request)
        run = self.runs[number] = upstream.carry(placed)
        held.began(run, placed, instance, self.clock.elapsed_s())

    def _tell_all(self) -> None:
        """To a brain that does not know what the last one knew."""
        now_s, alone, wire = self.clock.now_s, self.alone, self.wire
        self._alone_since_s = None
        self._confirmed.clear()
        for teller in self._tellers.values():
            teller.forget_counts()
        if self.listening is not None:
            wire.send(self.listening)
        for known in self.known.values():
            wire.send(known)
        for messages in alone.untold:
            for message in messages:
                if wire.version >= m.TURNS_FROM or not isinstance(message, m.Turn | m.Shown):
                    wire.send(message)
        self._telling = len(alone.untold)
        for held in self.held.values():
            if held.uncounted:
                continue
            self._tell_turn(held)
            wire.send(held.running(now_s) if held.run is not None else held.waits(now_s))
            if (shown := held.shown(now_s)) is not None and wire.version >= m.TURNS_FROM:
                wire.send(shown)
        wire.send(m.Told(alone.placements, alone.expired, alone.forgotten))
        alone.placements = alone.expired = alone.forgotten = 0
        alone.over()

    def _ready(self) -> None:
        """All that the brain knows is known here, and the other way round."""
        for _ in range(self._telling):
            self.alone.untold.popleft()
        self._telling = 0
        for instance in [each for each in self.upstreams if each not in self._confirmed]:
            self._leave_uncounted(instance)
        ready, self._ready_once = self._ready_once, lambda: None
        ready()
        self._each_ready()

    def _leave_uncounted(self, instance: int) -> None:
        """The brain does not know it: what runs there goes on, and nothing more is sent there."""
        upstream, teller = self.upstreams.pop(instance), self._tellers.pop(instance)
        self.known.pop(instance, None)
        teller.counted = False
        self._uncounted.append(upstream)
        for run in upstream.runs.values():
            held = self.held.get(run.placed.request.id)
            if held is not None and held.arrive is not None:
                held.uncounted = True

    # -- what the brain says -----------------------------------------------------------------------------------

    def _instance_up(self, said: m.InstanceUp) -> None:
        self._confirmed.add(said.instance)
        known = self.known.get(said.instance)
        if known is not None and (known.model, known.kind, known.url) == (said.model, said.kind, said.url):
            return
        if known is not None:
            self._leave_uncounted(said.instance)
        try:
            address = self._address_of(said.model, said.kind, said.url)
        except KeyError:
            raise ProtocolError(f"instance {said.instance} is of model {said.model!r}, kind {said.kind!r}") from None
        self.known[said.instance] = m.Known(said.instance, said.model, said.kind, said.url, 0, "mixed")
        teller = self._tellers[said.instance] = self._make_teller(self, said.instance)
        origin = Origin(said.url, keepalive=address.row.keepalive, idle_max=1024, network=self._network)
        self.upstreams[said.instance] = Upstream(
            clock=self.clock, address=address, origin=origin, reports=teller, counts=teller
        )

    def readdress(self, changed: Callable[[str, str], bool]) -> None:
        """Instances of kinds and models that have ``changed`` are spoken to in another way from now on, or are no more:
        they are others once a brain tells of them."""
        for number, known in self.known.items():
            if known.url and changed(known.kind, known.model):
                self.known[number] = m.Known(number, known.model, known.kind, "", 0, known.role)

    def _instance_gone(self, said: m.InstanceGone) -> None:
        upstream = self.upstreams.pop(said.instance, None)
        self._tellers.pop(said.instance, None)
        self.known.pop(said.instance, None)
        if upstream is None:
            return
        for run in list(upstream.runs.values()):
            placed = run.placed
            placed.request.tokens_done = run.drop()
            self.runs.pop(placed.number, None)
            self._made.pop(placed.number, None)
            held = self.held.get(placed.request.id)
            if held is not None and held.placed is placed:
                held.run = None
            placed.request.payload.error = UpstreamFailure("its engine was lost")
        self._retire(upstream)

    def _retire(self, upstream: Upstream) -> None:
        task = asyncio.get_running_loop().create_task(upstream.origin.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _limit(self, said: m.Limit) -> None:
        known = self.known.get(said.instance)
        if known is not None:
            self.known[said.instance] = replace(known, max_batch_size=said.max_batch_size, role=said.role)

    def _unknown(self, said: m.Unknown) -> None:
        run = self.runs.get(said.run)
        held = self.held.get(run.placed.request.id) if run is not None else None
        if held is not None and held.arrive is not None:
            held.uncounted = True

    def _pulse(self, said: m.Pulse) -> None:
        self.alone.relays = said.relays

    def _shape(self, said: m.Shape) -> None:
        served = self._models.by_name.get(said.model)
        if served is None:
            raise ProtocolError(f"model {said.model!r} is not in the config")
        served.kv_capacity_tokens = said.kv_capacity_tokens
        served.context_tokens = said.context_tokens
        served.bytes_per_token = said.bytes_per_token

    def _item(self, said: m.Item) -> None:
        served = self._models.by_name.get(said.model)
        if served is None or not served.settings.batch_class:
            raise ProtocolError(f"an item is of model {said.model!r}, which takes no batch work")
        try:
            call = RelayedItem(said)
        except ApiError as error:
            raise ProtocolError(f"item {said.request_id} cannot be read: {error.message}") from None
        cls = served.classes[served.settings.batch_class]
        request = Request(said.number, said.model, cls, self.clock.now_s, said.input_tokens, call)
        self.held[said.number] = Held(request)

    def _place(self, said: m.Place) -> None:
        held = self.held.get(said.number)
        upstream = self.upstreams.get(said.instance)
        if held is None and self._joining is not None and said.number < m.ITEMS_FROM:
            # It ended here while its brain, which had stopped it, could not be told.
            self.wire.send(m.Left(said.number, 0))
            self.wire.send(m.Evicted(said.run, 0, 0))
            return
        if held is None or upstream is None:
            raise ProtocolError(f"placement {said.run}: request {said.number} or instance {said.instance} is not here")
        if held.left:
            self.wire.send(m.Evicted(said.run, 0, 0))
            return
        if held.request.payload.closed:  # It has had its whole answer before the brain knew of it.
            before = held.last
            if not isinstance(before, m.Answered):
                before = m.Answered(said.run, 200, held.request.tokens_done, 0, 0)
            self.wire.post(m.Answered(said.run, before.status, before.tokens, before.prompt_tokens, 0))
            return
        if held.request.payload.visible:  # It began as its instance failed: nobody is to get two beginnings.
            self.wire.send(m.Lost(said.run, 0, "its engine was lost", False, True, 0, 0))
            return
        request = held.request
        # After its instance failed we know better how far it came.
        request.tokens_done = max(said.tokens_done, request.tokens_done) if said.tokens_done else 0
        try:
            self._carry(held, said.run, said.instance)
        except Exception:
            log.exception("request %s could not be sent", held.request.payload.request_id)
            self.wire.send(m.Lost(said.run, 0, "the request could not be sent", False, False, 0, 0))

    def _evict(self, said: m.Evict) -> None:
        run = self.runs.get(said.run)
        if run is not None:  # Else its end is under way.
            run.evict()

    def _end(self, said: m.End) -> None:
        held = self.held.pop(said.number, None)
        if held is None:
            return
        if said.outcome not in _OUTCOMES:
            raise ProtocolError(f"request {said.number} ends as {said.outcome!r}")
        request, call = held.request, held.request.payload
        request.outcome = cast(Outcome, said.outcome)
        if not said.dispatched:
            request.dispatch_s = -1.0
        elif request.dispatch_s < 0.0:
            request.dispatch_s = 0.0
        request.retries = said.retries
        request.retry_after_s = said.retry_after_s
        if (told := said.refusal) is not None:
            call.refusal = ApiError(
                told.status, told.message, type=told.type, code=told.code, param=told.param, headers=told.headers
            )
        elif said.outcome == "failed" and call.error is None:
            call.error = UpstreamFailure("its engine was lost")  # As the brain knew first.
        call.ended(request)

    def _remind(self, said: m.Remind) -> None:
        held = self.held.get(said.number)
        if held is not None:
            held.request.payload.remind(self.clock.now_s, said.words)
