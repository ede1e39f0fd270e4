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

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from math import inf
from typing import Any, cast

from chiron.core.types import Outcome, Request, RequestClass
from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import RIDE_S, ProtocolError, Wire
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.calls import CollectedCall, FlexCall, RelayCall
from chiron.gateway.relay.cascade import FirstCall
from chiron.gateway.relay.errors import ApiError, timed_out, unavailable
from chiron.gateway.relay.keys import Key
from chiron.gateway.relay.uplink.alone import Alone
from chiron.gateway.relay.uplink.brain_link import LOOK_S, BrainLink
from chiron.gateway.relay.uplink.held import Held
from chiron.gateway.relay.uplink.instances import RelayInstances
from chiron.gateway.relay.uplink.item import RelayedItem
from chiron.gateway.relay.uplink.joining import Connect, StaySettings
from chiron.gateway.relay.uplink.tellers import PromptTeller, RunTeller
from chiron.gateway.relay.upstream import EngineAddress, Placement, Run, Upstream, UpstreamFailure
from chiron.net.clock import LiveClock
from chiron.net.memory import MemoryNetwork

log = logging.getLogger("chiron.relay")

WATCH_S = 1.0
"""Between two looks at engines."""
COUNTS_S = 0.1
"""Between two reports of what streams have made: engines are sampled once a second, or a little more often."""
HANGS = 5.0
"""Times ``fall_back_s``: a brain that has said nothing for so long is given up although nothing waits for it."""
_OUTCOMES = frozenset({"finished", "rejected", "failed", "cancelled", "shed", "refused"})


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
        self.runs: dict[int, Run] = {}
        """By number of placement."""
        self.listening: m.Listening | None = None
        """What each brain is told once clients can connect."""
        settings = stay or StaySettings()
        self.link = BrainLink(
            clock=clock,
            take=self._take,
            opened=self._opened,
            gone=self._gone,
            ride_s=ride_s,
            connect=connect,
            protocol=settings.protocol,
            gateway=gateway,
        )
        make_teller = RunTeller if ride_s else PromptTeller
        self.instances = RelayInstances(
            clock=clock,
            address_of=address_of,
            teller=lambda instance: make_teller(self.link, self, instance),
            uncounted=self._leave_uncounted,
            stall_s=engine_stall_s,
            network=network,
        )
        self.alone = Alone(
            settings=settings,
            retry_after_s=retry_after_s,
            upstreams=self.instances.upstreams,
            known=self.instances.known,
            carry=self._carry_alone,
            end=self._end_here,
        )
        self._alone_since_s: float | None = None
        self._silent_s = settings.fall_back_s
        self._telling = 0
        """Ends that the present brain has been told, and has not said that it heard."""
        self._ready_once = ready
        self._each_ready = joined
        self._closed_for_good = closed
        self._models = models
        self._timeout_s = request_timeout_s
        self._retry_after_s = retry_after_s
        self._drain = drain
        self._stop = stop
        self._health = health
        self._numbers = itertools.count(1)
        self._own_numbers = itertools.count(m.OWN_FROM)
        self._made: dict[int, int] = {}
        """What was told of runs whose answers are collected."""
        self._answers: Counter[int] = Counter()
        self._hear: Mapping[type, Callable[[Any], None]] = {
            m.InstanceUp: self.instances.up,
            m.InstanceGone: self._instance_gone,
            m.Shape: self._shape,
            m.Item: self._item,
            m.Place: self._place,
            m.Evict: self._evict,
            m.End: self._end,
            m.Remind: self._remind,
            m.Drain: lambda said: self._drain(said.on),
            m.Ready: lambda said: self._ready(),
            m.Limit: self.instances.limit,
            m.Unknown: self._unknown,
            m.Pulse: self._pulse,
            m.Stop: lambda said: self._stop(said.grace_s),
        }

    # -- the front's desk --------------------------------------------------------------------------------------

    def arrive(
        self, call: RelayCall | FlexCall | FirstCall, model: str, cls: RequestClass, key: Key, input_tokens: int
    ) -> None:
        if not self.link.wire.up and self._alone_since_s is None:
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
        if self.link.wire.up:
            self.held[number] = held
            if call.turn is not None:
                self._tell_turn(held)
            self.link.wire.send(message)
        else:
            self.alone.check_room(held)
            self.clock.post(lambda: self._hold(held))

    def shown(self, call: FirstCall) -> None:
        held = self.held.get(call.number)
        if held is None:
            return
        held.shown_s = self.clock.elapsed_s()
        if self.link.wire.up and self.link.wire.version >= m.TURNS_FROM:
            self.link.wire.post(m.Shown(call.number))

    def _tell_turn(self, held: Held) -> None:
        """What a request is to a cascade, before the brain is told of it."""
        if (turn := held.turn()) is not None and self.link.wire.version >= m.TURNS_FROM:
            self.link.wire.send(turn)

    def left(self, call: RelayCall | FlexCall | FirstCall) -> None:
        held = self.held.get(call.number)
        if held is None:
            return
        held.left = True
        tokens = held.run.placed.tokens if held.run is not None else held.request.tokens_done
        self.link.send(m.Left(call.number, tokens))
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
                self.link.post(m.Made(number, placed.tokens))

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

    # -- the brain ---------------------------------------------------------------------------------------------

    @property
    def wire(self) -> Wire:
        """The protocol of the connection to the present brain, or to the next."""
        return self.link.wire

    def _take(self, message: Any) -> None:
        self._hear[type(message)](message)

    def tell_listening(self, port: int, pid: int) -> None:
        """It takes clients' connections from now on."""
        self.listening = m.Listening(port, pid)
        self.link.send(self.listening)

    def _opened(self, again: bool) -> None:
        if not again:
            self.clock.call_later(WATCH_S, self._watch)
            self.clock.call_later(COUNTS_S, self._tell_counts)
            if self.link.stays:
                self.clock.call_later(LOOK_S, self._look)
        else:
            self._tell_all()

    def _gone(self, why: str) -> None:
        if not self.link.stays:
            self._closed_for_good(why)
        elif self.link.joined and self._alone_since_s is None and not self.link.stopped:
            log.error("there is no brain: %s; running requests go on, new ones wait", why)
            self.clock.post(self._go_on_alone)

    def _watch(self) -> None:
        self.clock.call_later(WATCH_S, self._watch)
        self.instances.watch()
        self._cut_off_late()
        self.tell_made()
        self.link.post(self._health())

    def _tell_counts(self) -> None:
        self.clock.call_later(COUNTS_S, self._tell_counts)
        self.instances.tell_counts()
        if self.link.wire.up:
            for status, count in self._answers.items():
                self.link.wire.post(m.Responded(status, count))
            self._answers.clear()

    # -- without a brain ---------------------------------------------------------------------------------------

    def _look(self) -> None:
        """A few times a second: whether the brain says anything, and what becomes of what waits without it."""
        self.clock.call_later(LOOK_S, self._look)
        silent_s = self.link.silent_s()
        if self._alone_since_s is not None:
            self.alone.look(self.clock.elapsed_s())
            return
        if silent_s > self._silent_s and (silent_s > HANGS * self._silent_s or self._interactive_waits()):
            self.link.wire.give_up(f"it has said nothing for {silent_s:g} s")

    def _interactive_waits(self) -> bool:
        return any(
            held.run is None and held.outcome is None and held.request.interactive for held in self.held.values()
        )

    def _go_on_alone(self) -> None:
        self._alone_since_s = now_s = self.clock.now_s
        self._telling = 0  # Nobody has said that they were heard.
        self.alone.begin(now_s, self.link.heard_s)
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
        if self.link.wire.up:
            assert held.arrive is not None
            self._tell_turn(held)
            self.link.wire.send(held.arrive)
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
            elif self.link.wire.up:
                self._tell_turn(held)
                self.link.wire.send(held.waits(now_s))
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
        upstream, placed = self.instances.upstreams[instance], Placement(number, held.request)
        run = self.runs[number] = upstream.carry(placed)
        held.began(run, placed, instance, self.clock.elapsed_s())

    def _tell_all(self) -> None:
        """To a brain that does not know what the last one knew."""
        now_s, alone, wire = self.clock.now_s, self.alone, self.link.wire
        self._alone_since_s = None
        self.instances.begin_anew()
        if self.listening is not None:
            wire.send(self.listening)
        for known in self.instances.known.values():
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
        self.instances.leave_unknown()
        ready, self._ready_once = self._ready_once, lambda: None
        ready()
        self._each_ready()

    def _leave_uncounted(self, upstream: Upstream) -> None:
        """The brain does not know its instance: what runs there goes on."""
        for run in upstream.runs.values():
            held = self.held.get(run.placed.request.id)
            if held is not None and held.arrive is not None:
                held.uncounted = True

    # -- what the brain says -----------------------------------------------------------------------------------

    def _instance_gone(self, said: m.InstanceGone) -> None:
        upstream = self.instances.gone(said.instance)
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
        self.instances.retire(upstream)

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
        upstream = self.instances.upstreams.get(said.instance)
        if held is None and self.link.stays and said.number < m.ITEMS_FROM:
            # It ended here while its brain, which had stopped it, could not be told.
            self.link.wire.send(m.Left(said.number, 0))
            self.link.wire.send(m.Evicted(said.run, 0, 0))
            return
        if held is None or upstream is None:
            raise ProtocolError(f"placement {said.run}: request {said.number} or instance {said.instance} is not here")
        if held.left:
            self.link.wire.send(m.Evicted(said.run, 0, 0))
            return
        if held.request.payload.closed:  # It has had its whole answer before the brain knew of it.
            before = held.last
            if not isinstance(before, m.Answered):
                before = m.Answered(said.run, 200, held.request.tokens_done, 0, 0)
            self.link.wire.post(m.Answered(said.run, before.status, before.tokens, before.prompt_tokens, 0))
            return
        if held.request.payload.visible:  # It began as its instance failed: nobody is to get two beginnings.
            self.link.wire.send(m.Lost(said.run, 0, "its engine was lost", False, True, 0, 0))
            return
        request = held.request
        # After its instance failed we know better how far it came.
        request.tokens_done = max(said.tokens_done, request.tokens_done) if said.tokens_done else 0
        try:
            self._carry(held, said.run, said.instance)
        except Exception:
            log.exception("request %s could not be sent", held.request.payload.request_id)
            self.link.wire.send(m.Lost(said.run, 0, "the request could not be sent", False, False, 0, 0))

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
