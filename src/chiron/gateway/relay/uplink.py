"""A relay in a process of its own: its end of the connection to the brain, and what it knows of its requests.

Towards the clients' side (``front``) it is the desk, towards the engines' side (``upstream``) it is who hears of runs;
both are the very same as in one process. It decides nothing: what has come it tells, what it is told it does. Each
``Place`` has one end from here, whatever crosses it on the way: where the client has left meanwhile that is
``Evicted``, and an answer that was complete already is told again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import orjson

from chiron.core.types import Outcome, Request, RequestClass
from chiron.engines.claims import usage_details
from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import RIDE_S, ProtocolError, Wire
from chiron.gateway.relay.admission import Models, is_chat
from chiron.gateway.relay.body import read_body
from chiron.gateway.relay.calls import CollectedCall, FlexCall, ItemCall, RelayCall
from chiron.gateway.relay.errors import ApiError, unavailable
from chiron.gateway.relay.keys import Key
from chiron.gateway.relay.upstream import EngineAddress, Placement, Run, Upstream, UpstreamFailure
from chiron.net.client import Origin
from chiron.net.clock import LiveClock
from chiron.net.memory import MemoryNetwork

log = logging.getLogger("chiron.relay")

WATCH_S = 1.0
"""Between two looks at engines."""
COUNTS_S = 0.1
"""Between two reports of what streams have made: engines are sampled once a second, or a little more often."""
_OUTCOMES = frozenset({"finished", "rejected", "failed", "cancelled", "shed", "refused"})


class Held:
    """A request that the brain has not ended yet."""

    __slots__ = ("answer", "left", "request", "run")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.run: Run | None = None
        """Its placement, while it has one."""
        self.left = False
        """Its client has left, and the brain was told."""
        self.answer: m.Answered | None = None
        """What its last placement ended with, if that was a complete answer."""


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
        self._wire = uplink.wire
        self._instance = instance
        self._told = 0

    def first_token(self, placed: Placement) -> None:
        placed.told = True
        self._wire.post(m.FirstToken(placed.number, placed.tokens))

    def answered(self, placed: Placement, status: int, tokens: int, prompt_tokens: int) -> None:
        self.tell_counts()
        message = m.Answered(placed.number, status, tokens, prompt_tokens, placed.tokens)
        held = self._uplink.left_engine(placed)
        if held is not None:
            held.answer = message
        call = placed.request.payload
        if isinstance(call, RelayedItem) and (status < 300 or call.refused):
            self._wire.post(call.result(placed.request.id))
        self._wire.post(message)

    def lost(self, placed: Placement, failure: UpstreamFailure, *, connect: bool, visible: bool, kept: int) -> None:
        self.tell_counts()
        self._uplink.left_engine(placed)
        placed.request.payload.error = failure
        words = failure.message[: m.TEXT_MAX]
        self._wire.send(m.Lost(placed.number, failure.status, words, connect, visible, kept, placed.tokens))

    def evicted(self, placed: Placement, kept: int) -> None:
        self.tell_counts()
        self._uplink.left_engine(placed)
        self._wire.send(m.Evicted(placed.number, kept, placed.tokens))

    def fell_silent(self, placed: Placement, since_s: float) -> None:
        self.tell_counts()
        self._wire.post(m.Silent(placed.number, max(0.0, self._uplink.clock.now_s - since_s), placed.tokens))

    def spoke_again(self, placed: Placement) -> None:
        placed.silent = False
        self._wire.post(m.Spoke(placed.number, placed.tokens))

    def tell_counts(self) -> None:
        """Before anything that says how many tokens a run has made, so that sums agree."""
        if self.tokens != self._told:
            self._wire.post(m.Counted(self._instance, self.tokens - self._told))
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
        retry_after_s: float,
        closed: Callable[[str], None],
        drain: Callable[[bool], None] = lambda on: None,
        ready: Callable[[], None] = lambda: None,
        stop: Callable[[float], None] = lambda grace_s: None,
        health: Callable[[], m.Health] = lambda: m.Health(0, 0, 0.0),
        network: MemoryNetwork | None = None,
        ride_s: float = RIDE_S,
    ) -> None:
        """``address_of`` (model, kind, url) raises KeyError for what the config does not have; ``closed`` hears why the
        brain is gone, ``drain``, ``ready`` and ``stop`` what it says; ``health`` is asked once a second."""
        self.clock = clock
        self.wire = Wire(
            name="the brain", kind=m.Down, opened=self._opened, received=self._received, closed=closed, ride_s=ride_s
        )
        self.held: dict[int, Held] = {}
        """By our number."""
        self.upstreams: dict[int, Upstream] = {}
        """By id of instance."""
        self.runs: dict[int, Run] = {}
        """By number of placement."""
        self._models = models
        self._address_of = address_of
        self._stall_s = engine_stall_s
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
            m.Ready: lambda said: ready(),
            m.Stop: lambda said: self._stop(said.grace_s),
        }

    # -- the front's desk --------------------------------------------------------------------------------------

    def arrive(self, call: RelayCall | FlexCall, model: str, cls: RequestClass, key: Key, input_tokens: int) -> None:
        if not self.wire.up:
            raise unavailable("The gateway is starting.", self._retry_after_s)
        number = call.number = next(self._numbers)
        self.held[number] = Held(Request(number, model, cls, self.clock.elapsed_s(), input_tokens, call))
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
        )
        self.wire.send(message)

    def left(self, call: RelayCall | FlexCall) -> None:
        held = self.held.get(call.number)
        if held is None:
            return
        held.left = True
        tokens = held.run.placed.tokens if held.run is not None else held.request.tokens_done
        self.wire.send(m.Left(call.number, tokens))
        if held.run is not None:
            held.run.evict()  # As the brain will say.

    # -- what engines' side and clients' side tell ----------------------------------------------------------------

    def left_engine(self, placed: Placement) -> Held | None:
        """A placement has ended. Returns its request, unless the brain has ended that."""
        self.runs.pop(placed.number, None)
        self._made.pop(placed.number, None)
        held = self.held.get(placed.request.id)
        if held is not None:
            held.run = None
        return held

    def tell_made(self) -> None:
        """How far answers have come that are collected."""
        for number, run in self.runs.items():
            placed = run.placed
            if placed.told and placed.tokens != self._made.get(number) and isinstance(run.sent, CollectedCall):
                self._made[number] = placed.tokens
                self.wire.post(m.Made(number, placed.tokens))

    def responded(self, status: int) -> None:
        self._answers[status] += 1

    # -- the wire ----------------------------------------------------------------------------------------------

    def _opened(self) -> None:
        self.clock.post(self._begin)

    def _begin(self) -> None:
        self.clock.call_later(WATCH_S, self._watch)
        self.clock.call_later(COUNTS_S, self._tell_counts)

    def _watch(self) -> None:
        self.clock.call_later(WATCH_S, self._watch)
        for upstream in list(self.upstreams.values()):
            upstream.watch(self._stall_s)
        self.tell_made()
        self.wire.post(self._health())

    def _tell_counts(self) -> None:
        self.clock.call_later(COUNTS_S, self._tell_counts)
        for teller in self._tellers.values():
            teller.tell_counts()
        for status, count in self._answers.items():
            self.wire.post(m.Responded(status, count))
        self._answers.clear()

    def _received(self, messages: Sequence[Any]) -> None:
        def take() -> None:
            for message in messages:
                try:
                    self._hear[type(message)](message)
                except ProtocolError:
                    raise
                except Exception:
                    log.exception("%s of the brain could not be taken in", type(message).__name__)

        self.clock.post(take)

    # -- what the brain says -----------------------------------------------------------------------------------

    def _instance_up(self, said: m.InstanceUp) -> None:
        try:
            address = self._address_of(said.model, said.kind, said.url)
        except KeyError:
            raise ProtocolError(f"instance {said.instance} is of model {said.model!r}, kind {said.kind!r}") from None
        teller = self._tellers[said.instance] = self._make_teller(self, said.instance)
        origin = Origin(said.url, keepalive=address.row.keepalive, idle_max=1024, network=self._network)
        self.upstreams[said.instance] = Upstream(
            clock=self.clock, address=address, origin=origin, reports=teller, counts=teller
        )

    def _instance_gone(self, said: m.InstanceGone) -> None:
        upstream = self.upstreams.pop(said.instance, None)
        self._tellers.pop(said.instance, None)
        if upstream is None:
            return
        for run in list(upstream.runs.values()):
            run.placed.request.tokens_done = run.drop()
            self.left_engine(run.placed)
            run.placed.request.payload.error = UpstreamFailure("its engine was lost")
        task = asyncio.get_running_loop().create_task(upstream.origin.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

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
        if held is None or upstream is None:
            raise ProtocolError(f"placement {said.run}: request {said.number} or instance {said.instance} is not here")
        if held.left:
            self.wire.send(m.Evicted(said.run, 0, 0))
            return
        if held.request.payload.closed:  # It has had its whole answer before the brain knew of it.
            before = held.answer or m.Answered(said.run, 200, held.request.tokens_done, 0, 0)
            self.wire.post(m.Answered(said.run, before.status, before.tokens, before.prompt_tokens, 0))
            return
        request = held.request
        # After its instance failed we know better how far it came.
        request.tokens_done = max(said.tokens_done, request.tokens_done) if said.tokens_done else 0
        try:
            held.run = self.runs[said.run] = upstream.carry(Placement(said.run, request))
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
        request.dispatch_s = 0.0 if said.dispatched else -1.0
        request.retries = said.retries
        request.retry_after_s = said.retry_after_s
        if (told := said.refusal) is not None:
            call.refusal = ApiError(
                told.status, told.message, type=told.type, code=told.code, param=told.param, headers=told.headers
            )
        call.ended(request)

    def _remind(self, said: m.Remind) -> None:
        held = self.held.get(said.number)
        if held is not None:
            held.request.payload.remind(self.clock.now_s, said.words)
