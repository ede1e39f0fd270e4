"""One instance's engine as the control plane sees it: the ``Engine`` port, and the account of what runs there.

A relay speaks with the engine (``relay.upstream``); this is told of what matters: a first token, an answer, a loss.
Each placement of a request is a ``Placed``, and has exactly one end: answered, lost, evicted, or gone with the
instance. What is told of a placement that has ended already counts for nothing: timers that were due before what is
told count first, and may have taken the request away, or even have brought it back as another placement.

What follows for the engine from a loss is in ``engines.losses``; where that suspects it, the fleet looks at it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

from chiron.core.ports import RemoteEngineEvents
from chiron.core.types import Instance, Request
from chiron.engines.losses import Losses
from chiron.engines.unseen import presumed_first_token_s, presumed_prefill_s
from chiron.gateway.instances.engine_limit import OwnLimit
from chiron.gateway.instances.observer import Begun, EngineObserver
from chiron.gateway.instances.setting import EngineSetting
from chiron.gateway.relay.upstream import EngineAddress, Placement, UpstreamFailure, blames_client
from chiron.net.client import Call, Header, NetError, Origin
from chiron.net.clock import LiveClock
from chiron.net.memory import MemoryNetwork


class Carrier(Protocol):
    """Carries one placement: the relay's side of it."""

    def evict(self) -> None:
        """Stop it. Answered by ``InstanceEngine.evicted``, or by whatever end of it is under way."""

    def drop(self) -> int:
        """The instance is gone. Returns the output tokens that are kept (0: start again)."""


Carry = Callable[["Placed"], Carrier]
"""Sends a placed request to its engine."""


class Placed(Placement):
    """One placement of a request: from its start on an instance to its one end there."""

    __slots__ = ("adopted", "began_with", "begun", "carrier", "decoding_s", "entered_s")

    def __init__(self, number: int, request: Request, now_s: float) -> None:
        super().__init__(number, request)
        self.carrier: Carrier | None = None
        """Who has it; None: it has ended."""
        self.entered_s = now_s
        self.began_with = request.tokens_done
        self.decoding_s = -1.0
        """When it began to decode, as far as can be seen."""
        self.begun: Begun | None = None
        """What its beginning was counted as, once it decodes."""
        self.adopted = False
        """It began under another brain: when, this one has not seen."""


def restart(placed: Placed) -> None:
    """Who carries it has nothing of what came of the request elsewhere."""
    placed.request.tokens_done = placed.tokens = placed.began_with = 0


class InstanceEngine:
    """Implements the ``Engine`` port, and what relays tell (``RunReports``). Made when the instance is ready."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        instance: Instance,
        address: EngineAddress,
        carry: Carry,
        listener: RemoteEngineEvents,
        suspect: Callable[[Instance], None],
        learn_usage: Callable[[Request, int], None] | None = None,
        network: MemoryNetwork | None = None,
        numbers: Callable[[], int] | None = None,
    ) -> None:
        """``learn_usage`` hears true prompt lengths. ``network`` has the engines of this process (``memory:NAME``).
        ``numbers`` tells placements apart, over all instances."""
        self.instance = instance
        instance.heard_late = True
        self.address = address
        self.row = address.row
        self.url = address.url
        self.model = address.model
        self.authorization = address.authorization
        self.origin = Origin(address.url, keepalive=address.row.keepalive, idle_max=1024, network=network)
        self.observer = EngineObserver(instance, clock.now_s)
        self.metrics: dict[str, float] = {}
        """The engine's figures at the last scrape, by our names."""
        self.context_tokens: int | None = None
        """Prompt and answer of one request together, as it told; 0: it does not tell, None: not asked yet."""
        self.own_limit = OwnLimit()
        self.runs: dict[int, Placed] = {}
        """What runs here, by request id."""
        self.clock = clock
        self.listener = listener
        self.learn_usage = learn_usage
        self.carry = carry
        self.closed = False
        self._numbers = numbers or itertools.count(1).__next__
        self._suspect = suspect
        self._losses = Losses()
        self.limit = EngineSetting(self.origin, address.lines, address.row.limit)
        self.token_budget = EngineSetting(self.origin, address.lines, address.row.token_budget)
        self._replicas: tuple[int, ...] = ()
        self._replicas_heard = True
        self._replicas_call: Call | None = None
        self._retiring: asyncio.Task[None] | None = None

    # -- the Engine port ---------------------------------------------------------------------------------------

    def start(self, request: Request) -> None:
        if request.tokens_done and not self.row.resumes:
            request.tokens_done = 0
        placed = Placed(self._numbers(), request, self.clock.now_s)
        self.runs[request.id] = placed
        self.observer.entered(self.clock.now_s)
        placed.carrier = self.carry(placed)
        self._presume_soon(placed)

    def adopt(self, request: Request, number: int, *, tokens: int, began: bool) -> Placed:
        """It runs here already, in the placement of this number; ``began``: it has had its first token. The caller sets
        who carries it (posted)."""
        placed = Placed(number, request, self.clock.now_s)
        placed.adopted = True
        placed.tokens = max(tokens, placed.tokens)
        self.runs[request.id] = placed
        self.observer.entered(self.clock.now_s)
        if began:
            placed.told = True
            self._begin_decoding(placed)
        else:
            self._presume_soon(placed)
        return placed

    def evict(self, request: Request) -> None:
        placed = self.runs.get(request.id)
        if placed is not None and placed.carrier is not None:  # Else its end is under way to the control plane.
            placed.carrier.evict()

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """The gate in front of the engine holds in any case; engines that can are told, one message at a time."""
        self.limit.set(max_batch_size)

    def set_max_num_batched_tokens(self, max_num_batched_tokens: int) -> None:
        """Of an engine that takes it while it runs (``TokenBudgetEngine``)."""
        self.token_budget.set(max_num_batched_tokens)

    def scale(self, replicas: Sequence[int]) -> None:
        """Of an engine that is a pipeline (``StagedEngine``): told now, and again by ``watch`` until it has heard."""
        self._replicas, self._replicas_heard = tuple(replicas), False
        if self._replicas_call is None and not self.closed:
            self._send_replicas()

    # -- what relays tell (RunReports) -------------------------------------------------------------------------

    def first_token(self, placed: Placed) -> None:
        self.clock.post(lambda: self._first(placed))

    def answered(self, placed: Placed, status: int, tokens: int, prompt_tokens: int) -> None:
        self._losses.answered()

        def report() -> None:
            if not self.holds(placed):
                return
            request, sent = placed.request, placed.request.payload
            fine = status < 400
            made = max(1, tokens) if fine else 0
            if request.outcome is None:
                request.tokens_done = made
                if not sent.streams and fine:
                    request.first_token_s = presumed_first_token_s(request, self.clock.now_s)
            if fine:
                self._first(placed)
                if not self.holds(placed):  # Its prefill is over, and somebody more urgent took the room.
                    return
                self._count(placed, made)
            self._leave(placed, ran=fine)
            if blames_client(status):
                self.listener.refused(request, f"engine answered {status}")
            elif not fine:
                self.listener.failed(request, f"engine answered {status}")
            else:
                sent.prompt_tokens = prompt_tokens
                if prompt_tokens and self.learn_usage is not None:
                    self.learn_usage(request, prompt_tokens)
                self.listener.finished(request)

        self.clock.post(report)

    def lost(self, placed: Placed, failure: UpstreamFailure, *, connect: bool, visible: bool, kept: int) -> None:
        self._note(placed, failure)
        suspected, avoid_s = self._losses.lost(status=failure.status, connect=connect)

        def report() -> None:
            if not self.holds(placed):
                return
            self._leave(placed, ran=False)
            request = placed.request
            if request.first_token_s < 0.0 and visible:
                self.listener.first_token(request)
            if request.outcome is None:
                request.tokens_done = kept
            if suspected:
                self._suspect(self.instance)
            if avoid_s and not self.closed:
                self.listener.avoid(self.instance, avoid_s)
            if not self.closed:
                self.listener.lost(request)

        self.clock.post(report)

    def abandoned(self, placed: Placed) -> None:
        """Who carried it is gone, with all that came of it, which says nothing of the engine (posted)."""
        if self.holds(placed):
            self._leave(placed, ran=False)
            self._note(placed, UpstreamFailure("its relay was lost"))
            if placed.request.outcome is None:
                placed.request.tokens_done = 0
            self.listener.lost(placed.request)

    def evicted(self, placed: Placed, kept: int) -> None:
        if not self.holds(placed):
            return
        self._leave(placed)
        request = placed.request
        request.tokens_done = kept
        request.kv_saved_tokens = request.input_tokens + kept if kept else 0
        request.kv_saved_on = self.instance.id
        self.clock.call_at(self.clock.now_s, lambda: self.listener.evicted(request))

    def fell_silent(self, placed: Placed, since_s: float) -> None:
        if self.holds(placed):
            request, now_s = placed.request, self.clock.now_s
            self.observer.fell_silent(now_s, since_s, request.input_tokens, placed.tokens, request.payload.sequences)

    def spoke_again(self, placed: Placed) -> None:
        """Over how long it made these tokens is not known."""
        if self.holds(placed):
            placed.silent = False
            request, now_s = placed.request, self.clock.elapsed_s()
            self.observer.spoke_again(now_s, request.input_tokens, placed.tokens, request.payload.sequences)

    # -- the rest ----------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Now and then, posted: a limit that did not get through is sent again."""
        self.limit.again()
        self.token_budget.again()
        if not self._replicas_heard and self._replicas_call is None and not self.closed:
            self._send_replicas()

    def close(self) -> None:
        """The instance is gone. What runs is cut; call this before the control plane is told."""
        self.closed = True
        for placed in list(self.runs.values()):
            carrier, placed.carrier = placed.carrier, None
            kept = carrier.drop() if carrier is not None else 0
            self._note(placed, UpstreamFailure("its engine was lost"))
            if placed.request.outcome is None:
                placed.request.tokens_done = kept
        self.runs.clear()
        self.limit.close()
        self.token_budget.close()
        if self._replicas_call is not None:
            self._replicas_call.cancel()

    def retire(self) -> None:
        """Close its connections too."""
        self._retiring = asyncio.get_running_loop().create_task(self.origin.close())

    def holds(self, placed: Placed) -> bool:
        """Whether this placement has not ended yet."""
        return self.runs.get(placed.request.id) is placed

    def _first(self, placed: Placed) -> None:
        """The first token is here (posted)."""
        if placed.told or not self.holds(placed):
            return
        placed.told = True
        if placed.decoding_s < 0.0:
            self._begin_decoding(placed)
        self.listener.first_token(placed.request)

    def _presume_soon(self, placed: Placed) -> None:
        """The first token of an answer in one piece cannot be seen. What waits for prefill to end must not wait for the
        whole answer."""
        if not placed.request.payload.streams and placed.request.prefill_cost_s:
            self.clock.call_later(presumed_prefill_s(self.instance), lambda: self._presume_prefilled(placed))

    def _presume_prefilled(self, placed: Placed) -> None:
        if self.holds(placed) and placed.decoding_s < 0.0:
            self._begin_decoding(placed)
            self.listener.prefilled(placed.request)

    def _begin_decoding(self, placed: Placed) -> None:
        request, sent = placed.request, placed.request.payload
        tokens = request.input_tokens
        placed.decoding_s = self.clock.now_s
        placed.begun = self.observer.first_token(
            placed.decoding_s,
            tokens,
            entered_s=placed.entered_s,
            prefilled=0 if request.kv_saved_tokens or placed.adopted else tokens + placed.began_with,
            streams=sent.streams,
            sequences=sent.sequences,
        )
        self.observer.held_tokens += placed.tokens

    def _count(self, placed: Placed, tokens: int) -> None:
        """It ended with this many output tokens: put right what was counted in passing."""
        sent = placed.request.payload
        if sent.streams:
            self.observer.tokens += tokens - placed.tokens
        elif not placed.adopted:
            decoding_s = self.clock.now_s - placed.decoding_s
            self.observer.answered(tokens - sent.sequences, decoding_s * sent.sequences)

    def _leave(self, placed: Placed, *, ran: bool = True) -> None:
        """``ran=False``: what it was presumed to do was nothing."""
        placed.carrier = None  # It refers to this placement: no cycle is left behind.
        request, now_s = placed.request, self.clock.now_s
        del self.runs[request.id]
        if placed.begun is not None and not (ran or placed.told):
            self.observer.undo(now_s, placed.begun)
        self.observer.left(
            now_s,
            request.input_tokens,
            placed.tokens,
            decoded=placed.begun is not None and not placed.silent,
            streams=request.payload.streams,
            sequences=request.payload.sequences,
        )

    def _note(self, placed: Placed, failure: UpstreamFailure) -> None:
        failure.at_s = self.clock.elapsed_s()
        placed.request.payload.error = failure

    def _send_replicas(self) -> None:
        body = b'{"counts": [%b]}' % b", ".join(b"%d" % count for count in self._replicas)
        answer, path = _StagesAnswer(self, self._replicas), self.row.stages_path.encode()
        self._replicas_call = self.origin.send(b"PUT", path, (), body, answer, lines=self.address.lines)

    def replicas_answered(self, status: int, replicas: tuple[int, ...]) -> None:
        self._replicas_call = None
        self._replicas_heard = status == 200 and replicas == self._replicas


class _StagesAnswer:
    """Receiver of the answer to new numbers of replicas."""

    def __init__(self, engine: InstanceEngine, replicas: tuple[int, ...]) -> None:
        self._engine = engine
        self._replicas = replicas
        self._status = 0

    def on_head(self, status: int, headers: list[Header]) -> None:
        self._status = status

    def on_data(self, data: bytes) -> None:
        pass

    def on_end(self) -> None:
        self._engine.replicas_answered(self._status, self._replicas)

    def on_error(self, error: NetError) -> None:
        self._engine.replicas_answered(0, self._replicas)
