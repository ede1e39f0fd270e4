"""What one relay says, taken in.

A relay may come from another brain, and tell what it knows of there (``m.Known`` up to ``m.Told``). What it runs on an
instance that this brain knows, or takes over (``Adoption``), under the same number and address, is counted from then on
like any other placement; the rest runs to its end uncounted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from chiron.core.types import RequestClass
from chiron.gateway.batch.call import FarAnswer
from chiron.gateway.brain.relay_link import FarCall, FarRun, LinkContext, RelayLink, refusal_of
from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import ProtocolError
from chiron.gateway.relay.admission import with_slos
from chiron.gateway.relay.errors import ApiError, internal, model_not_found
from chiron.gateway.relay.keys import Key
from chiron.gateway.relay.turns import REASONS, Turn
from chiron.gateway.relay.upstream import UpstreamFailure

log = logging.getLogger("chiron.relays")

ADOPTED_MAX = 4
"""Times what an instance takes at most: so much may run there when it is taken over."""
TURNS_MAX = 1000
"""Cascades' turns that are told before their requests, each of which follows at once."""


class Hearing:
    """Takes in what one relay says, message by message. A ``ProtocolError`` ends the connection."""

    def __init__(self, link: RelayLink, context: LinkContext) -> None:
        self._link = link
        self._context = context
        self._turns: dict[int, Turn] = {}
        """Of requests that will be told of next, by their numbers."""
        self._shared: set[int] = set()
        """Instances that both know under the same number and address."""
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

    def hear(self, message: Any) -> None:
        self._hear[type(message)](message)

    def _arrive(self, said: m.Arrive) -> None:
        if said.number in self._link.calls:
            raise ProtocolError(f"request {said.number} arrives twice")
        context, found, turn = self._context, self._admitted(said), self._turns.pop(said.number, None)
        if said.model not in context.models.by_name:  # It may be served no more, which the relay has yet to read.
            self._link.wire.send(m.End(said.number, "refused", refusal=refusal_of(model_not_found(said.model))))
            return
        if found is None:
            raise ProtocolError(
                f"request {said.number} names model {said.model!r}, class {said.cls!r}, key {said.key!r}"
            )
        cls, key = found
        call = self._link.calls[said.number] = FarCall(self._link, said, turn)
        try:
            context.models.permit(key, said.model, cls.name, turn.cascade if turn is not None else "")
            context.desk.arrive(call, said.model, cls, key, said.input_tokens)
        except ApiError as error:
            self._link.calls.pop(said.number, None)
            self._link.wire.send(m.End(said.number, "refused", refusal=refusal_of(error.with_traceback(None))))

    def _admitted(self, said: m.Arrive) -> tuple[RequestClass, Key] | None:
        """Its class and its key. None: there is no such model, class or key."""
        context = self._context
        served, key = context.models.by_name.get(said.model), context.keys.named(said.key)
        cls = served.classes.get(said.cls) if served is not None else None
        if cls is None or key is None:
            return None
        if (said.ttft_s, said.itl_s) != (cls.ttft_s, cls.itl_s):
            cls = with_slos(cls, said.ttft_s, said.itl_s)
        return cls, key

    def _left(self, said: m.Left) -> None:
        call = self._link.calls.get(said.number)
        if call is None:
            return  # Its end is under way to the relay.
        if call.run is not None:
            call.run.placed.tokens = max(call.run.placed.tokens, said.tokens)
        self._context.desk.left(call)

    def _turn(self, said: m.Turn) -> None:
        if said.reason and said.reason not in REASONS:
            raise ProtocolError(f"request {said.number} is asked for a cascade with reason {said.reason!r}")
        if said.cascade not in self._context.models.cascades:
            return  # Another gateway's config may have it: a request like any other.
        if len(self._turns) >= TURNS_MAX:
            raise ProtocolError(f"{TURNS_MAX} cascade turns are told, and none of their requests")
        self._turns[said.number] = Turn(said.cascade, said.reason, said.before, said.counted, said.ttft_s, said.streams)

    def _shown(self, said: m.Shown) -> None:
        call = self._link.calls.get(said.number)
        if call is not None:
            self._context.desk.shown(call, said.ago)

    def _first_token(self, said: m.FirstToken) -> None:
        run = self._link.runs.get(said.run)
        if run is None or run.placed.told:
            self._link.late += 1
            return
        run.placed.tokens = max(run.placed.tokens, said.tokens)
        run.engine.first_token(run.placed)

    def _answered(self, said: m.Answered) -> None:
        run = self._link.run_ended(said.run, said.seen)
        if run is not None:
            run.engine.answered(run.placed, said.status, said.tokens, said.prompt_tokens)

    def _lost(self, said: m.Lost) -> None:
        run = self._link.run_ended(said.run, said.seen)
        if run is not None:
            failure = UpstreamFailure(said.message, said.status)
            run.engine.lost(run.placed, failure, connect=said.connect, visible=said.visible, kept=said.kept)

    def _evicted(self, said: m.Evicted) -> None:
        run = self._link.runs.get(said.run)
        if run is not None and not run.asked:
            raise ProtocolError(f"placement {said.run} is evicted, which nobody asked for")
        run = self._link.run_ended(said.run, said.seen)
        if run is None:
            return
        request = run.placed.request
        call = request.payload
        if isinstance(call, FarCall) and request.outcome is not None and said.seen > call.paid_tokens:
            self._context.desk.charge(call, said.seen - call.paid_tokens)
        run.engine.evicted(run.placed, said.kept)

    def _silent(self, said: m.Silent) -> None:
        run = self._link.runs.get(said.run)
        if run is None or run.placed.silent or not run.placed.told:
            self._link.late += 1
            return
        run.placed.silent = True
        run.placed.tokens = said.tokens
        run.engine.fell_silent(run.placed, self._context.clock.now_s - said.for_s)

    def _spoke(self, said: m.Spoke) -> None:
        run = self._link.runs.get(said.run)
        if run is None or not run.placed.silent:
            self._link.late += 1
            return
        run.placed.tokens = said.tokens
        run.engine.spoke_again(run.placed)

    def _counted(self, said: m.Counted) -> None:
        engine = self._context.engines.get(said.instance)
        if engine is not None:
            engine.observer.tokens += said.tokens
            engine.observer.held_tokens += said.tokens

    def _made(self, said: m.Made) -> None:
        run = self._link.runs.get(said.run)
        if run is None or not run.placed.told:
            self._link.late += 1
            return
        run.placed.tokens = said.tokens

    def _responded(self, said: m.Responded) -> None:
        self._context.responded(said.status, said.count)

    def _result(self, said: m.Result) -> None:
        call = self._link.items.get(said.number)
        if call is None:
            self._link.late += 1
        elif b"\n" in said.body:
            raise ProtocolError(f"the answer to item {call.request_id} has more than one line")
        else:
            call.status = said.status
            call.far = FarAnswer(said.body, said.cached_tokens, said.reasoning_tokens)

    def _health(self, said: m.Health) -> None:
        self._link.health = said

    def _listening(self, said: m.Listening) -> None:
        self._link.listens = True
        self._link.pid = said.pid
        self._context.listening(self._link)

    # -- what it says of another brain ---------------------------------------------------------------------------

    def _known(self, said: m.Known) -> None:
        context = self._context
        engine = context.engines.get(said.instance)
        if engine is None and context.adoption is not None:
            engine = context.adoption.adopt_instance(said)
        if engine is not None and (engine.instance.model, engine.url) == (said.model, said.url):
            self._shared.add(said.instance)

    def _running(self, said: m.Running) -> None:
        if said.request.number in self._link.calls or said.run in self._link.runs:
            raise ProtocolError(f"request {said.request.number} or placement {said.run} is told twice")
        turn = self._turns.pop(said.request.number, None)
        if not (self._resumes(said) or self._adopt(said, turn)):
            self._link.wire.post(m.Unknown(said.run))

    def _resumes(self, said: m.Running) -> bool:
        """Whether this brain has placed it, or ended it, over the connection that was lost."""
        before, number = self._link.before, said.request.number
        if before is None:
            return False
        if (end := before.ends.get(number)) is not None:
            self._link.wire.send(m.Evict(said.run))
            self._link.wire.send(end)
            return True
        call = before.calls.get(number)
        if call is not None and call.run is not None and call.run.placed.number == said.run:
            self._link.resume(call)
            run = call.run
            run.placed.tokens = max(run.placed.tokens, said.tokens)
            run.engine.observer.inexact = True  # Nobody told of what it has made meanwhile.
            if said.began >= 0.0 and not run.placed.told:
                run.engine.first_token(run.placed)
            if run.asked:
                self._link.wire.send(m.Evict(said.run))
            return True
        if call is not None and said.run < m.OWN_FROM:  # It was stopped meanwhile, and may have been placed again.
            self._link.wire.send(m.Evict(said.run))
            self._link.resume(call)
            if (again := call.run) is not None:
                self._link.place_again(again)
            return True
        if call is not None:  # The relay has placed it itself.
            self._context.desk.left(call)
        return False

    def _adopt(self, said: m.Running, turn: Turn | None) -> bool:
        """Count it from now on. False: that cannot be."""
        context, asked = self._context, said.request
        engine = context.engines.get(said.instance) if said.instance in self._shared else None
        found = self._admitted(asked)
        if context.adoption is None or engine is None or found is None or engine.instance.model != asked.model:
            return False
        if engine.instance.sequences >= ADOPTED_MAX * engine.instance.kind.max_num_seqs:
            return False
        call, now_s = FarCall(self._link, asked, turn), context.clock.now_s
        request = context.desk.adopt(
            call, asked.model, *found, asked.input_tokens, ago_s=said.arrived, losses=said.losses
        )
        taken = context.adoption.adopt_running(
            engine.instance,
            request,
            epoch=1,
            tokens_done=said.tokens_before,
            dispatch_s=max(0.0, now_s - said.placed),
            first_token_s=max(0.0, now_s - said.began) if said.began >= 0.0 else -1.0,
        )
        if not taken:
            context.desk.forget(request)
            return False
        self._link.calls[asked.number] = call
        placed = engine.adopt(request, said.run, tokens=said.tokens, began=said.began >= 0.0)
        run = placed.carrier = call.run = self._link.runs[said.run] = FarRun(self._link, engine, placed)
        if said.silent and placed.told:
            run.placed.silent = True
            engine.fell_silent(placed, now_s)
        return True

    def _waits(self, said: m.Waits) -> None:
        asked, before = said.request, self._link.before
        turn = self._turns.pop(asked.number, None)
        if asked.number in self._link.calls:
            raise ProtocolError(f"request {asked.number} is told twice")
        if before is not None and (end := before.ends.get(asked.number)) is not None:
            self._link.wire.send(end)
            return
        if before is not None and (known := before.calls.get(asked.number)) is not None:
            self._link.resume(known)
            if known.run is not None:  # It never heard of this placement, or has lost it.
                self._link.place_again(known.run)
            return
        found = self._admitted(asked)
        call = FarCall(self._link, asked, turn)
        try:
            if found is None:
                served = asked.model in self._context.models.by_name
                raise internal(asked.request_id) if served else model_not_found(asked.model)
            cascade = turn.cascade if turn is not None else ""
            self._context.models.permit(found[1], asked.model, found[0].name, cascade)
            self._link.calls[asked.number] = call
            self._context.desk.arrive_again(
                call, asked.model, *found, asked.input_tokens, ago_s=said.arrived, losses=said.losses
            )
        except ApiError as error:
            self._link.calls.pop(asked.number, None)
            self._link.wire.send(m.End(asked.number, "refused", refusal=refusal_of(error.with_traceback(None))))

    def _told(self, said: m.Told) -> None:
        context = self._context
        self._link.own_placements += said.own_placements
        context.own_placements += said.own_placements
        context.expired += said.expired
        if self._link.before is None:
            context.keys.bound_debts()
        if said.forgotten:
            log.warning(
                "%s could not keep %d ends of requests while there was no brain", self._link.name, said.forgotten
            )
        context.returned(self._link)
