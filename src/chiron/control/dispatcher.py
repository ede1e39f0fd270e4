"""Requests from arrival to end: queued, placed, dispatched, tried again, ended exactly once.

Every placement ends exactly once, whatever is told of it. What is told of a request that no engine has (any more), of
one that has not been submitted, and of one twice, changes nothing and is counted in ``refused_events``. An eviction
that was not asked for is a loss. An answer without a first token had it when it ended. An eviction that is never
answered is over after ``ANSWER_MAX_S``. Events of an earlier placement of a request that runs again look like those of
the present one: whoever tells of placements over a network compares ``Request.epoch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

from chiron.control.batch_size import BatchSizes
from chiron.control.booking import book, held_by, leave, prefill_over
from chiron.control.eviction import Evictor
from chiron.control.lifecycle import Lifecycle
from chiron.control.model import ModelState
from chiron.core.clock import VirtualClock
from chiron.core.ports import Ends, Journal
from chiron.core.types import KV_ANY, Decision, Instance, Outcome, Placement, Request
from chiron.policies.policy import Policy
from chiron.policies.size import placed, prompt_tokens

RETRIES_MAX = 3
"""Engine failures that a request survives before it fails itself."""
LOST_TURN = 40
"""Batch requests at risk that may pass those that are lost, before one of these has its turn."""
AVOID_ALONE_S = 0.5
"""Longest that the only instance of a model gets no requests after it lost some."""


class Dispatcher:
    """Every call is about one request of the model whose state it gets; ``pump`` is about all that wait there."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        policy: Policy,
        journal: Journal,
        ends: Ends | None,
        evictor: Evictor,
        sizes: BatchSizes,
        lifecycle: Lifecycle,
    ) -> None:
        self.open_requests = 0
        """Arrived and not ended."""
        self.refused_events = 0
        """What was told and could not be."""
        self._clock = clock
        self._admit = policy.admit
        self._told = policy.ended
        self._settings = policy.settings
        self._journal = journal
        self._event: Callable[[float, str, Request | None, Instance | None], None] | None = (
            journal.event if journal.wants_events else None
        )
        self._ends = ends
        self._evictor = evictor
        self._sizes = sizes
        self._lifecycle = lifecycle

    # -- requests come and go ----------------------------------------------------------------------------------

    def arrived(self, state: ModelState, request: Request) -> None:
        if request.submitted:
            self.refused_events += 1
            return
        request.submitted = True
        self.open_requests += 1
        if self._event is not None:
            self._event(self._clock.now_s, "arrival", request, None)
        state.arrived(request)
        if request.input_tokens >= state.kv_capacity_tokens:
            self._end(state, request, "rejected")
        elif not self._refuses(state, request):
            self._enter(state, request)

    def called_off(self, state: ModelState, request: Request, outcome: Outcome) -> None:
        """End a request early: its client cancelled it, or it was cut off."""
        if request.outcome is not None or not request.submitted:
            return
        instance = request.instance
        self._end(state, request, outcome)
        if instance is None:
            (state.batch if not request.interactive and state.holds_batch else state.waiting).forget(request)
            self.pump(state)  # It may have been in the way of the next one.
        elif request.booked:
            self._evictor.stop(state, request)

    def shed_lost(self, state: ModelState) -> bool:
        """End a waiting request that is late already, by its policy, to make room for one that can still be served in
        time. False: there is none."""
        request = state.waiting.lost()
        if request is None:
            return False
        self._end(state, request, "shed")
        state.waiting.forget(request)
        return True

    def capacity_known(self, state: ModelState) -> None:
        """What waits and fits none of the model's instances would wait for ever."""
        state.measure_kinds()
        for request in [*state.waiting, *state.batch]:
            if request.outcome is None and request.input_tokens + request.tokens_done >= state.kv_capacity_tokens:
                self.called_off(state, request, "rejected")

    def _refuses(self, state: ModelState, request: Request) -> bool:
        """Whether the policy does not take it; then it has ended."""
        if self._admit is None:
            return False
        refusal = self._admit(self._settings, state.waiting.order_of(request), request, self._clock.now_s)
        if refusal is None:
            return False
        request.refused_because = refusal.reason
        request.retry_after_s = refusal.retry_after_s
        self._end(state, request, "shed")
        return True

    def _enter(self, state: ModelState, request: Request) -> None:
        """Dispatch or queue; who came earlier and waits goes first."""
        if not request.interactive and state.holds_batch:
            state.batch.add(request, self._clock.now_s)
            if not state.waiting.count:
                self._release_batch(state, state.sizes.count)
            elif state.batch_at_risk or state.sizes.count > 1:
                self.pump(state)
        elif state.waiting.count:
            state.waiting.add(request, self._clock.now_s)
            self.pump(state)
        elif (placement := state.router.place(request, 0.0)) is not None:
            self._dispatch(state, request, placement)
        else:
            state.waiting.add(request, self._clock.now_s)

    def _end(self, state: ModelState, request: Request, outcome: Outcome) -> None:
        assert request.outcome is None, "a request ends once"
        now_s = self._clock.now_s
        request.outcome = outcome
        request.finish_s = now_s
        self.open_requests -= 1
        state.ended(request)
        if self._told is not None:
            self._told(self._settings, request, now_s)
        if self._event is not None:
            self._event(now_s, "ended", request, request.instance)
        self._journal.ended(request)
        if self._ends is not None:
            self._ends.ended(request)

    # -- dispatch ----------------------------------------------------------------------------------------------

    def pump(self, state: ModelState) -> None:
        """Dispatch what waits, while there is room. Behind a prompt that only larger instances have room for, smaller
        instances take those that fit there."""
        waiting = state.waiting
        below = state.sizes.count
        if waiting.count:
            now_s = self._clock.now_s
            while (request := waiting.head(now_s, below)) is not None:
                waited_s = now_s - request.arrival_s
                if state.batch_at_risk and waiting.only_lost(below):
                    if not self._dispatch_lost(state, request, waited_s, below):
                        below = request.tier
                    continue
                placement = self._place(state, request, waited_s, below)
                if placement is None:
                    if _fits_nowhere(state, request):
                        waiting.remove_head(request, now_s)
                        waiting.never_ran(request)
                        self._end(state, request, "rejected")
                        continue
                    self._relieve(state, request, waited_s, below)
                    below = request.tier
                    continue
                waiting.remove_head(request, now_s)
                self._dispatch(state, request, placement)
        if state.batch.count and below:
            self._release_batch(state, below)

    def _place(self, state: ModelState, request: Request, waited_s: float, below: int) -> Placement | None:
        """Where it runs now. Instances that have room for a request of tier ``below`` are kept for one."""
        router = state.router
        if below == state.sizes.count:
            return router.place(request, waited_s)
        request.kv_most_tokens = most = state.sizes.most(below)
        placement = router.place(request, waited_s)
        request.kv_most_tokens = KV_ANY
        if placement is not None and placement.instance.kv_capacity_tokens > most:
            return None  # A router that does not ask what ``fits``.
        return placement

    def _relieve(self, state: ModelState, request: Request, waited_s: float, below: int) -> None:
        if below < state.sizes.count:
            request.kv_most_tokens = state.sizes.most(below)
        victims = state.router.relieve(request, waited_s)
        request.kv_most_tokens = KV_ANY
        self._evictor.relieve(state, victims)

    def _dispatch_lost(self, state: ModelState, request: Request, waited_s: float, below: int) -> bool:
        """The turn of a request that is lost, while batch work is at risk: that goes first, and is not evicted. What
        waits for room then gets it, but for an empty instance and a turn in ``LOST_TURN``. False: it goes on waiting.
        """
        batch = state.batch
        if batch.count:
            before = batch.count
            self._release_batch(state, below)
            state.passed_lost += before - batch.count
        placement = self._place(state, request, waited_s, below)
        if placement is None or placement.evict:
            return False
        if batch.count and placement.instance.requests and state.passed_lost < LOST_TURN:
            return False
        state.passed_lost = 0
        state.waiting.remove_head(request, self._clock.now_s)
        self._dispatch(state, request, placement)
        return True

    def _release_batch(self, state: ModelState, below: int) -> None:
        """While there is room on instances too small for a request of tier ``below``. A prompt that is too long is
        passed by shorter ones, each time by half as long ones; on instances that it can never fit, by all that do."""
        batch, router, now_s = state.batch, state.router, self._clock.now_s
        room_tokens = refused = 0
        request = batch.head(now_s, below)
        while request is not None:
            placement = self._place(state, request, 0.0, below)
            if placement is not None:
                batch.remove_head(request, now_s)
                self._dispatch(state, request, placement)
            elif _fits_nowhere(state, request):
                batch.remove_head(request, now_s)
                self._end(state, request, "rejected")
            else:
                refused = request.tier
                bits = router.room_tokens.bit_length()
                if not bits or (room_tokens and bits >= room_tokens.bit_length()):
                    below, room_tokens = refused, 0
                else:
                    room_tokens = router.room_tokens
            request = batch.shorter(now_s, room_tokens, below) if room_tokens else batch.head(now_s, below)
            if request is None and room_tokens:
                below, room_tokens = refused, 0
                request = batch.head(now_s, below)

    def resumed(self, state: ModelState, request: Request, instance: Instance) -> None:
        """It runs there already: booked, and not started. It is no arrival of this control plane, and no load."""
        request.submitted = True
        self.open_requests += 1
        placement = placed(state.learner, request, instance)
        if request.ran:
            placement.prefill_s = 0.0
        book(request, placement)
        if self._event is not None:
            self._event(self._clock.now_s, "arrival", request, None)
            self._event(self._clock.now_s, "dispatch", request, instance)
        if instance.state == "ready":
            state.router.changed(instance)

    def _dispatch(self, state: ModelState, request: Request, placement: Placement) -> None:
        now_s = self._clock.now_s
        if placement.evict:
            self._evictor.make_room(state, request, placement)
        instance = placement.instance
        if request.dispatch_s < 0.0:
            request.dispatch_s = now_s
        book(request, placement)
        if not request.interactive and instance.running_interactive and placement.prefill_s > instance.prefill_step_s:
            self._pace_batch(state, instance, placement.prefill_s)
        if self._event is not None:
            self._event(now_s, "dispatch", request, instance)
        state.router.changed(instance)
        engine = instance.engine
        assert engine is not None
        engine.start(request)
        if request.interactive and instance.running_interactive == 1 and instance.batch:
            self._sizes.retune(state, instance)

    def _pace_batch(self, state: ModelState, instance: Instance, cost_s: float) -> None:
        """A batch prompt longer than a step has room for: no other until the requests beside it have made up for it."""
        instance.batch_paced = True

        def over() -> None:
            instance.batch_paced = False
            if instance.state == "ready":
                state.router.changed(instance)
                if state.batch.count:
                    self.pump(state)

        self._clock.call_later(cost_s / instance.prefill_share, over)

    def avoid(self, state: ModelState, instance: Instance, for_s: float) -> None:
        """While no other instance can take its requests it is only a short while: the fault may be in a request, and
        the others wait."""
        if instance.state != "ready" or instance.avoided_until_s == inf:
            return
        if not any(
            i.state == "ready" and i.avoided_until_s < 0.0 for i in state.instances.values() if i is not instance
        ):
            for_s = min(for_s, AVOID_ALONE_S)
        state.router.remove(instance)
        instance.avoided_until_s = until_s = self._clock.now_s + for_s

        def back() -> None:
            if instance.state == "ready" and instance.avoided_until_s == until_s:
                instance.avoided_until_s = -1.0
                state.router.add(instance)
                self.pump(state)

        self._clock.call_later(for_s, back)

    # -- what engines report -----------------------------------------------------------------------------------

    def first_token(self, state: ModelState, request: Request) -> None:
        """Only the first time counts."""
        instance = held_by(request)
        if instance is None:
            self.refused_events += 1
            return
        self._began(state, request, instance)
        self.prefilled(state, request)

    def _began(self, state: ModelState, request: Request, instance: Instance) -> None:
        if request.first_token_s < 0.0 and request.outcome is None:
            request.first_token_s = self._clock.now_s
            if request.dispatch_s > request.arrival_s and not (request.retries or request.evictions):
                state.learner.first_token(request)
            if self._event is not None:
                self._event(self._clock.now_s, "first_token", request, instance)
        if not request.kv_saved_tokens:  # Else nothing was prefilled.
            tokens = request.input_tokens
            instance.prefill_square_total += tokens * tokens
        if not request.ran and request.outcome is None:
            request.ran = True
            state.learner.ran(request)

    def prefilled(self, state: ModelState, request: Request) -> None:
        instance = request.instance
        if instance is not None and request.prefill_cost_s and request.booked:
            prefill_over(instance, request)
            state.router.changed(instance)
            if state.waiting.count or state.batch.count:
                self.pump(state)

    def finished(self, state: ModelState, request: Request) -> None:
        instance = self._left(state, request)
        if instance is None:
            return
        if request.outcome is None:
            if not request.ran:
                self._began(state, request, instance)
            state.learner.made(request)
            self._end(state, request, "finished")
        self._after_leaving(state, instance)

    def evicted(self, state: ModelState, request: Request) -> None:
        instance = request.instance
        if instance is None or instance.evicting.pop(request.id, None) is None:
            self.lost(state, request)
            return
        if not request.ran:
            state.waiting.never_ran(request)
        request.instance = None
        request.instance_saved = instance if request.kv_saved_tokens else None
        destination, request.migrating_to = request.migrating_to, None
        if request.outcome is not None:
            if request.ran and request.tokens_done and (request.interactive or request.flex):
                # Called off half-way, it was as long as that. An item of a job is taken back to run later.
                state.learner.made(request)
        else:
            if self._event is not None:
                self._event(self._clock.now_s, "evicted", request, instance)
            if destination is not None and destination.state == "ready":
                if request.kv_saved_tokens:
                    request.kv_saved_on = destination.id
                self._dispatch(state, request, placed(state.learner, request, destination))
            else:
                self._enter(state, request)
        self._after_leaving(state, instance)

    def lost(self, state: ModelState, request: Request) -> None:
        instance = self._left(state, request)
        if instance is None:
            return
        self.try_again(state, (request,))
        self._after_leaving(state, instance)

    def gave_up(self, state: ModelState, request: Request, reason: str, outcome: Outcome) -> None:
        """The engine will not or cannot run it."""
        instance = self._left(state, request)
        if instance is None:
            return
        if not request.ran:
            state.waiting.never_ran(request)
        if request.outcome is None:
            self._journal.decided(
                self._clock.now_s,
                Decision(kind="reject", subject=str(request.id), before=1, after=0, reason=reason.replace(" ", "_")),
            )
            self._end(state, request, outcome)
        self._after_leaving(state, instance)

    def try_again(self, state: ModelState, requests: Iterable[Request]) -> None:
        """Requests whose engine lost them: once more each, unless that has been tried enough or a client has seen a
        part of the answer."""
        for request in requests:
            request.instance = None
            request.migrating_to = None
            request.kv_saved_tokens = 0
            if not request.ran:
                state.waiting.never_ran(request)
            if request.outcome is not None:
                continue
            request.retries += 1
            if request.retries > RETRIES_MAX or (request.interactive and request.first_token_s >= 0.0):
                self._end(state, request, "failed")
            else:
                self._enter(state, request)

    def end_unanswered(self, state: ModelState) -> None:
        """Evictions that no engine has answered are over."""
        for instance in list(state.instances.values()):
            for request in self._evictor.unanswered(instance):
                self.lost(state, request)

    def _left(self, state: ModelState, request: Request) -> Instance | None:
        """An engine has released it. Returns where it ran; None: no engine had it."""
        instance = held_by(request)
        if instance is None:
            self.refused_events += 1
            return None
        leave(state, request)
        instance.evicting.pop(request.id, None)
        return instance

    def _after_leaving(self, state: ModelState, instance: Instance) -> None:
        if instance.state == "draining":
            self._lifecycle.remove_if_empty(state, instance)
        if state.waiting.count or state.batch.count:
            self.pump(state)


def _fits_nowhere(state: ModelState, request: Request) -> bool:
    """All instances that had room for its prompt are gone: it would keep the largest that are left for ever."""
    if state.sizes.count == 1 or request.kv_saved_tokens:
        return False
    return prompt_tokens(request) >= state.kv_capacity_tokens
