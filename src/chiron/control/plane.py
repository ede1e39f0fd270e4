"""The control plane of a fleet of engines, whatever drives it.

``core.ports`` has both directions: what it is told, by clients, batch jobs, engines, scrapes and fleets, and what it
asks. Synchronous and single-threaded: every call runs to its end, and engines answer later.

A request holds its place on an instance from dispatch until the engine lets go of it. An evicted one gives its place
up at once: the engine takes it out at the same step boundary at which it lets the next one in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from chiron.control.lifecycle import Lifecycle
from chiron.control.model import ModelState, fleet_view, local_view
from chiron.control.snapshot import ModelSnapshot, PlaneSnapshot, model_snapshot
from chiron.core.clock import VirtualClock
from chiron.core.ports import Ends, Engine, Fleet, Journal
from chiron.core.types import Decision, Instance, ModelSpec, Outcome, Placement, Request, RequestClass, Sample
from chiron.policies.advise import advising
from chiron.policies.policy import Policy
from chiron.policies.size import placed, prefill_left_s
from chiron.policies.views import FleetPlan, FleetView, LocalDecision, Migration, PolicyState

RETRIES_MAX = 3
"""Engine failures that a request survives before it fails itself."""
AVOID_ALONE_S = 0.5
"""Longest that the only instance of a model gets no requests after it lost some."""
LEARN_PER_SCRAPE = 8
"""Instances whose scrape is learned from, per model and round: more say little new and cost time."""

Observer = Callable[[FleetView, FleetPlan], None]


class ControlPlane:
    """Queues, dispatch, both loops and instance lifecycle of every model. ``core.ports`` names what it needs."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        fleet: Fleet,
        journal: Journal,
        ends: Ends | None = None,
        models: Sequence[ModelSpec],
        classes: Sequence[RequestClass],
        policy: Policy,
        gpus_max: Mapping[str, int] | None = None,
        observer: Observer | None = None,
        actuates: bool = True,
    ) -> None:
        """``ends``: who waits for requests; in a simulation nobody. ``actuates=False``: decisions are journalled
        and nothing else; the fleet stays as it was started, batch sizes stay at what the engines allow, and nothing is
        evicted or moved."""
        if not actuates:
            policy = advising(policy)
        self.clock = clock
        self.policy = policy
        self.actuates = actuates
        self.models = {m.name: ModelState(m, tuple(classes), policy) for m in models}
        self.open_requests = 0
        """Arrived and not ended."""
        self.evictions = 0
        self.migrations = 0
        self._journal = journal
        self._ends = ends
        self._event = journal.event if journal.wants_events else None
        self._observer = observer
        self._gpus_max = {gpu: float(count) for gpu, count in (gpus_max or {}).items()}
        self._lifecycle = Lifecycle(
            clock=clock,
            fleet=fleet,
            journal=journal,
            policy=policy,
            gpus_max=self._gpus_max,
            evict=self._evict,
            retune=self._retune,
            actuates=actuates,
        )
        self.instances = self._lifecycle.instances
        """Every instance that is not gone, by id."""
        self._fleet_state: PolicyState = None
        self._migration_state: PolicyState = None
        self._last_tick_s = 0.0
        self._advised: dict[int, int] = {}
        """Max batch size last journalled of an instance, while nothing is actuated."""
        self._waking = False

    # -- lifecycle of the plane itself --------------------------------------------------------------------------

    def adopt(self, model: str, count: int, attach: Callable[[Instance], Engine]) -> None:
        """Take over ``count`` running instances of ``model`` at the start; ``attach`` gives each its engine."""
        state = self.models[model]
        split = (
            self.policy.initial_roles(self.policy.settings, count) if self.policy.initial_roles else {"mixed": count}
        )
        for role, number in split.items():
            for _ in range(number):
                kind = self._lifecycle.free_kind(state)
                if kind is None:
                    raise ValueError(f"model {model!r}: the GPU limits do not allow {count} initial instances")
                instance = self._lifecycle.new_instance(state, kind, role)  # type: ignore[arg-type]
                self.instance_ready(instance, attach(instance))
        state.planned = {role: split.get(role, 0) for role in ("interactive", "mixed", "batch")}

    def request_initial(self, model: str, count: int) -> None:
        """Ask the fleet for the first ``count`` instances of ``model``; they become ready when they do."""
        state = self.models[model]
        split = (
            self.policy.initial_roles(self.policy.settings, count) if self.policy.initial_roles else {"mixed": count}
        )
        state.planned = {role: split.get(role, 0) for role in ("interactive", "mixed", "batch")}
        self._lifecycle.reconcile(state)

    def begin(self) -> None:
        """Start the periodic loops."""
        policy = self.policy
        self._last_tick_s = self.clock.now_s
        self.clock.call_later(max(policy.fleet_first_s, policy.fleet_period_s), self._fleet_tick)
        if policy.migrate is not None:
            self.clock.call_later(policy.migrate_period_s, self._migration_tick)

    # -- what is read ------------------------------------------------------------------------------------------

    def snapshot(self) -> PlaneSnapshot:
        now_s = self.clock.now_s
        return PlaneSnapshot(
            now_s=now_s,
            policy=self.policy.name,
            open_requests=self.open_requests,
            evictions=self.evictions,
            migrations=self.migrations,
            models=tuple(model_snapshot(state, now_s) for state in self.models.values()),
        )

    def model_snapshot(self, model: str) -> ModelSnapshot:
        return model_snapshot(self.models[model], self.clock.now_s)

    def is_served(self, model: str) -> bool:
        return any(instance.state == "ready" for instance in self.models[model].instances.values())

    # -- requests ----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        state = self.models[request.model]
        self.open_requests += 1
        if self._event is not None:
            self._event(self.clock.now_s, "arrival", request, None)
        state.arrived(request)
        if request.input_tokens >= state.kv_capacity_tokens:
            self._end(state, request, "rejected")
        elif not self._refuses(state, request):
            self._enter(state, request)
            if not state.instances and not self._waking:
                # Nobody is there to serve it: do not wait for the next tick to start somebody.
                self._waking = True
                self.clock.call_at(self.clock.now_s, self._wake)

    def announce_batch(
        self, model: str, deadline_s: float, cls: str, requests: int, input_tokens: int, input_square: float
    ) -> None:
        state = self.models[model]
        state.batch.announce(deadline_s, cls, requests, input_tokens, input_square)
        if requests > 0 and not state.instances and not self._waking:
            self._waking = True
            self.clock.call_at(self.clock.now_s, self._wake)

    hold_batch = announce_batch

    def _refuses(self, state: ModelState, request: Request) -> bool:
        """Whether the policy does not take it; then it has ended."""
        hook = self.policy.admit
        if hook is None:
            return False
        refusal = hook(self.policy.settings, state.waiting.order, request, self.clock.now_s)
        if refusal is None:
            return False
        request.retry_after_s = refusal.retry_after_s
        self._end(state, request, "shed")
        return True

    def clients_waiting(self, model: str, *, interactive: bool) -> int:
        return self.models[model].clients_waiting(interactive=interactive)

    def shed_lost(self, model: str) -> bool:
        state = self.models[model]
        request = state.waiting.order.lost() if state.waiting.count else None
        if request is None:
            return False
        self._end(state, request, "shed")
        state.waiting.forget(request)
        return True

    def _enter(self, state: ModelState, request: Request) -> None:
        """Dispatch or queue; who came earlier and waits goes first."""
        if not request.interactive and self.policy.holds_batch:
            state.batch.add(request)
            if not state.waiting.count:
                self._release_batch(state)
        elif state.waiting.count:
            state.waiting.add(request, self.clock.now_s)
            self._pump(state)
        elif not self._place(state, request):
            state.waiting.add(request, self.clock.now_s)

    def cancel(self, request: Request) -> None:
        self._call_off(request, "cancelled")

    def capacity_told(self, instance: Instance, kv_capacity_tokens: int) -> None:
        state = self.models[instance.model]
        instance.kv_capacity_tokens = kv_capacity_tokens
        state.kv_capacity_tokens = max(i.kv_capacity_tokens for i in state.instances.values())
        if instance.state == "ready":
            state.router.changed(instance)
        self.capacity_known(instance.model)

    def capacity_known(self, model: str) -> None:
        """What waits and fits none of the model's instances would wait for ever."""
        state = self.models[model]
        for request in [*state.waiting, *state.batch]:
            if request.outcome is None and request.input_tokens + request.tokens_done >= state.kv_capacity_tokens:
                self._call_off(request, "rejected")

    def cut_off(self, request: Request) -> None:
        self._call_off(request, "shed")

    def _call_off(self, request: Request, outcome: Outcome) -> None:
        if request.outcome is not None:
            return
        state = self.models[request.model]
        instance = request.instance
        self._end(state, request, outcome)
        if instance is None:
            (state.batch if not request.interactive and self.policy.holds_batch else state.waiting).forget(request)
            self._pump(state)  # It may have been in the way of the next one.
        elif request.id in instance.requests:
            self._stop(state, instance, request)

    def _place(self, state: ModelState, request: Request) -> bool:
        """Dispatch if an instance has room, or can be given room by evicting batch work."""
        placement = state.router.place(request, 0.0)
        if placement is None:
            return False
        self._dispatch(state, request, placement)
        return True

    def _dispatch(self, state: ModelState, request: Request, placement: Placement) -> None:
        now_s = self.clock.now_s
        instance, cost, reserved, evict = placement
        if evict:
            self._make_room(state, placement)
        request.instance = instance
        if request.dispatch_s < 0.0:
            request.dispatch_s = now_s
        if request.kv_saved_tokens and request.kv_saved_on != instance.id:
            request.kv_saved_tokens = 0
        instance.requests[request.id] = request
        name = request.cls.name
        counts = instance.class_counts
        counts[name] = counts.get(name, 0) + 1
        request.reserved_tokens = reserved
        instance.kv_reserved_tokens += reserved
        request.prefill_cost_s = cost
        instance.prefill_backlog_s += cost
        if request.interactive:
            instance.running_interactive += 1
        else:
            instance.batch[request.id] = request
            instance.prefill_batch_s += cost
            if cost > instance.prefill_step_s and instance.running_interactive:
                self._pace_batch(state, instance, cost)
        if self._event is not None:
            self._event(now_s, "dispatch", request, instance)
        state.router.changed(instance)
        engine = instance.engine
        assert engine is not None
        engine.start(request)
        if request.interactive and instance.running_interactive == 1 and instance.batch:
            self._retune(state, instance)

    def _leave(self, state: ModelState, request: Request) -> Instance | None:
        """Give up the request's place, if it still has one. Returns where it ran."""
        instance = request.instance
        if instance is None or instance.requests.pop(request.id, None) is None:
            return instance
        instance.class_counts[request.cls.name] -= 1
        instance.kv_reserved_tokens -= request.reserved_tokens
        if request.prefill_cost_s:
            self._prefill_over(instance, request)
        if request.interactive:
            instance.running_interactive -= 1
        else:
            del instance.batch[request.id]
        state.router.changed(instance)
        return instance

    def _prefill_over(self, instance: Instance, request: Request) -> None:
        instance.prefill_backlog_s = prefill_left_s(instance.prefill_backlog_s, request.prefill_cost_s)
        if not request.interactive:
            instance.prefill_batch_s = prefill_left_s(instance.prefill_batch_s, request.prefill_cost_s)
        request.prefill_cost_s = 0.0

    def _end(self, state: ModelState, request: Request, outcome: Outcome) -> None:
        assert request.outcome is None, "a request ends once"
        request.outcome = outcome
        request.finish_s = self.clock.now_s
        self.open_requests -= 1
        state.ended(request)
        if self._event is not None:
            self._event(self.clock.now_s, "ended", request, request.instance)
        self._journal.ended(request)
        if self._ends is not None:
            self._ends.ended(request)

    # -- what engines report -----------------------------------------------------------------------------------

    def first_token(self, request: Request) -> None:
        """Prefill is over. After an eviction without KV this comes again; only the first time counts."""
        instance = request.instance
        assert instance is not None
        if request.first_token_s < 0.0 and request.outcome is None:
            request.first_token_s = self.clock.now_s
            if request.dispatch_s > request.arrival_s and not (request.retries or request.evictions):
                self.models[request.model].learner.first_token(request)
            if self._event is not None:
                self._event(self.clock.now_s, "first_token", request, instance)
        if not request.kv_saved_tokens:  # Else nothing was prefilled.
            tokens = request.input_tokens
            instance.prefill_square_total += tokens * tokens
        state = self.models[request.model]
        if not request.ran and request.outcome is None:
            request.ran = True
            state.learner.ran(request)
        if request.prefill_cost_s and request.id in instance.requests:
            self._prefill_over(instance, request)
            state.router.changed(instance)
            if state.waiting.count or state.batch.count:
                self._pump(state)

    def prefilled(self, request: Request) -> None:
        """Its prefill is presumably over: for drivers that cannot see the first token of an answer in one piece."""
        instance = request.instance
        if instance is not None and request.prefill_cost_s and request.id in instance.requests:
            state = self.models[request.model]
            self._prefill_over(instance, request)
            state.router.changed(instance)
            if state.waiting.count or state.batch.count:
                self._pump(state)

    def finished(self, request: Request) -> None:
        state = self.models[request.model]
        instance = self._leave(state, request)
        assert instance is not None
        instance.evicting.pop(request.id, None)
        if request.outcome is None:
            state.learner.made(request)
            self._end(state, request, "finished")
        self._after_leaving(state, instance)

    def evicted(self, request: Request) -> None:
        """The engine let go of it; ``tokens_done`` and saved KV are up to date."""
        state = self.models[request.model]
        instance = request.instance
        assert instance is not None
        instance.evicting.pop(request.id, None)
        request.instance = None
        request.instance_saved = instance if request.kv_saved_tokens else None
        if request.outcome is None:
            if self._event is not None:
                self._event(self.clock.now_s, "evicted", request, instance)
        elif request.ran and request.tokens_done and (request.interactive or request.flex):
            # Called off half-way, it was as long as that. An item of a job is taken back to run later.
            state.learner.made(request)
        destination, request.migrating_to = request.migrating_to, None
        if request.outcome is None:
            if destination is not None and destination.state == "ready":
                if request.kv_saved_tokens:
                    request.kv_saved_on = destination.id
                self._dispatch(state, request, placed(state.learner, request, destination))
            else:
                self._enter(state, request)
        self._after_leaving(state, instance)

    def lost(self, request: Request) -> None:
        """The engine gave it up without an answer, and lives on. It runs again, here or elsewhere, a few times."""
        state = self.models[request.model]
        instance = self._leave(state, request)
        assert instance is not None
        instance.evicting.pop(request.id, None)
        request.instance = None
        request.migrating_to = None
        request.kv_saved_tokens = 0
        if request.outcome is None:
            self._retry(state, request)
        self._after_leaving(state, instance)

    def avoid(self, instance: Instance, for_s: float) -> None:
        """Dispatch nothing to an instance for a while: it loses requests, though it may be alive. While no other one
        can take them it is only a short while: the fault may be in a request, and the others wait."""
        if instance.state != "ready":
            return
        state = self.models[instance.model]
        if not any(
            i.state == "ready" and i.avoided_until_s < 0.0 for i in state.instances.values() if i is not instance
        ):
            for_s = min(for_s, AVOID_ALONE_S)
        state.router.remove(instance)
        instance.avoided_until_s = until_s = self.clock.now_s + for_s

        def back() -> None:
            if instance.state == "ready" and instance.avoided_until_s == until_s:
                instance.avoided_until_s = -1.0
                state.router.add(instance)
                self._pump(state)

        self.clock.call_later(for_s, back)

    def _retry(self, state: ModelState, request: Request) -> None:
        """Once more, unless that has been tried enough or a client has seen a part of the answer."""
        request.retries += 1
        if request.retries > RETRIES_MAX or (request.interactive and request.first_token_s >= 0.0):
            self._end(state, request, "failed")
        else:
            self._enter(state, request)

    def refused(self, request: Request, reason: str) -> None:
        """The engine will not run this request, for what is wrong with it."""
        self._give_up(request, reason, "rejected")

    def failed(self, request: Request, reason: str) -> None:
        """The engine cannot run this request at all."""
        self._give_up(request, reason, "failed")

    def _give_up(self, request: Request, reason: str, outcome: Outcome) -> None:
        state = self.models[request.model]
        instance = self._leave(state, request)
        assert instance is not None
        instance.evicting.pop(request.id, None)
        if request.outcome is None:
            self._journal.decided(
                self.clock.now_s,
                Decision(kind="reject", subject=str(request.id), before=1, after=0, reason=reason.replace(" ", "_")),
            )
            self._end(state, request, outcome)
        self._after_leaving(state, instance)

    def _after_leaving(self, state: ModelState, instance: Instance) -> None:
        if instance.state == "draining" and not instance.requests and not instance.evicting:
            self._lifecycle.remove(state, instance)
        if state.waiting.count or state.batch.count:
            self._pump(state)

    def _pump(self, state: ModelState) -> None:
        """Dispatch what waits, while there is room."""
        if state.waiting.count:
            now_s = self.clock.now_s
            while (request := state.waiting.head(now_s)) is not None:
                waited_s = now_s - request.arrival_s
                placement = state.router.place(request, waited_s)
                if placement is None:
                    for victim in state.router.relieve(request, waited_s):
                        self._evict(state, victim)
                    break
                state.waiting.remove_head(request, now_s)
                self._dispatch(state, request, placement)
        if state.batch.count and not state.waiting.count:
            self._release_batch(state)

    def _release_batch(self, state: ModelState) -> None:
        batch, router = state.batch, state.router
        below = batch.BITS_MAX
        while (request := batch.head(self.clock.now_s, below)) is not None:
            placement = router.place(request, 0.0)
            if placement is None:
                bits = router.room_tokens.bit_length()
                if not 0 < bits < below:
                    return
                below = bits
                continue
            batch.remove_head(request)
            self._dispatch(state, request, placement)

    # -- eviction ----------------------------------------------------------------------------------------------

    def _make_room(self, state: ModelState, placement: Placement) -> None:
        instance = placement.instance
        for victim in placement.evict:
            full = (
                len(instance.requests) >= instance.max_batch_size
                or instance.kv_reserved_tokens + placement.kv_tokens > instance.kv_capacity_tokens
            )
            self._evict(state, victim)
            if full:
                self._hold_batch(instance)

    def _hold_batch(self, instance: Instance) -> None:
        """The place that batch work has just left stays free for a while: the next of a burst may want it."""
        instance.batch_held_until_s = self.clock.now_s + self.policy.eviction_pause_s
        instance.batch_held_to = len(instance.batch)

    def _pace_batch(self, state: ModelState, instance: Instance, cost_s: float) -> None:
        """A batch prompt longer than a step has room for: no other until the requests beside it have made up for it."""
        instance.batch_paced = True

        def over() -> None:
            instance.batch_paced = False
            if instance.state == "ready":
                state.router.changed(instance)
                if state.batch.count:
                    self._pump(state)

        self.clock.call_later(cost_s / instance.prefill_share, over)

    def _evict(self, state: ModelState, request: Request) -> None:
        request.evictions += 1
        self.evictions += 1
        assert request.instance is not None
        self._stop(state, request.instance, request)

    def _stop(self, state: ModelState, instance: Instance, request: Request) -> None:
        """Take its place away; the engine lets go of it at the next step."""
        self._leave(state, request)
        instance.evicting[request.id] = request
        assert instance.engine is not None
        instance.engine.evict(request)

    # -- the local loop ----------------------------------------------------------------------------------------

    def sampled(self, samples: Iterable[Sample]) -> None:
        """A round of scrapes arrives."""
        learned: dict[str, int] = {}
        fresh: list[Instance] = []
        for sample in samples:
            instance = self.instances.get(sample.instance_id)
            if instance is None or instance.state == "starting":
                continue
            before, instance.previous_sample, instance.sample = instance.sample, instance.sample, sample
            square = instance.prefill_square_total - instance.prefill_square_sampled
            instance.prefill_square_sampled = instance.prefill_square_total
            self._end_hold(instance)
            if before is None:
                continue
            fresh.append(instance)
            count = learned.get(instance.model, 0)
            if count < LEARN_PER_SCRAPE and sample.steps - before.steps >= 4:
                learned[instance.model] = count + 1
                self.models[instance.model].learner.observe(before, sample, square)
        for name in learned:
            self.models[name].learner.publish()
        if self.policy.local is not None:
            for instance in fresh:
                if instance.state == "ready":
                    self._retune(self.models[instance.model], instance)
        for state in self.models.values():
            self._pump(state)

    def _end_hold(self, instance: Instance) -> None:
        """Let batch work back in once the pause after an eviction is over."""
        if 0.0 <= instance.batch_held_until_s <= self.clock.now_s:
            instance.batch_held_until_s = -1.0
            if instance.state == "ready":
                self.models[instance.model].router.changed(instance)

    def _retune(self, state: ModelState, instance: Instance) -> None:
        """Ask the local autoscaler for this instance's max batch size."""
        hook = self.policy.local
        if hook is None:
            return
        view = local_view(state, instance, self.clock.now_s)
        decision, instance.local = hook(self.policy.settings, instance.local, view)
        if decision is None:
            return
        if not self.actuates:
            self._advise_batch_size(instance, decision)
            return
        if decision.prefill_limit_s != instance.prefill_limit_s:
            instance.prefill_limit_s = decision.prefill_limit_s
            instance.prefill_step_s = decision.prefill_step_s
            instance.prefill_share = decision.prefill_share
            state.router.changed(instance)
        if decision.batch_limit != instance.batch_limit:
            instance.batch_limit = decision.batch_limit
            state.router.changed(instance)
        size = max(1, min(decision.max_batch_size, instance.kind.max_num_seqs))
        before = instance.max_batch_size
        if size != before:
            self._set_batch_size(state, instance, size)
            self._journal_batch_size(instance, before, size, decision)
        if self.policy.evicts and len(instance.requests) > size and instance.running_interactive:
            while instance.batch and len(instance.requests) > size:
                self._evict(state, next(reversed(instance.batch.values())))
                self._hold_batch(instance)

    def _advise_batch_size(self, instance: Instance, decision: LocalDecision) -> None:
        size = max(1, min(decision.max_batch_size, instance.kind.max_num_seqs))
        before = self._advised.get(instance.id, instance.max_batch_size)
        if size != before:
            self._advised[instance.id] = size
            self._journal_batch_size(instance, before, size, decision)

    def _journal_batch_size(self, instance: Instance, before: int, size: int, decision: LocalDecision) -> None:
        self._journal.decided(
            self.clock.now_s,
            Decision(
                kind="batch_size",
                subject=f"{instance.model}#{instance.id}",
                before=before,
                after=size,
                reason=decision.reason,
                numbers={"running": len(instance.requests), **decision.numbers},
            ),
        )

    def _set_batch_size(self, state: ModelState, instance: Instance, size: int) -> None:
        instance.max_batch_size = size
        state.batch_size_hint = size
        assert instance.engine is not None
        instance.engine.set_max_batch_size(size)
        state.router.changed(instance)

    # -- the global loop ---------------------------------------------------------------------------------------

    def _fleet_tick(self) -> None:
        try:
            self._tick()
        finally:  # Live, a faulty tick must not be the last one.
            self.clock.call_later(self.policy.fleet_period_s, self._fleet_tick)

    def _wake(self) -> None:
        """A tick out of turn: something waits and there is no instance at all."""
        self._waking = False
        if any(
            not s.instances and (s.waiting.count or s.batch.count or s.batch.announced) for s in self.models.values()
        ):
            self._tick()

    def _tick(self) -> None:
        now_s = self.clock.now_s
        policy = self.policy
        view = fleet_view(now_s, now_s - self._last_tick_s, self.models.values(), self._gpus_max)
        self._last_tick_s = now_s
        plan, self._fleet_state = policy.fleet(policy.settings, self._fleet_state, view)
        for name, model_plan in plan.items():
            self._lifecycle.adopt_plan(self.models[name], model_plan)
        for instance in self.instances.values():
            self._end_hold(instance)  # Scrapes do it sooner, but they may be missing.
        for state in self.models.values():
            self._lifecycle.reconcile(state)
            self._pump(state)
        if self._observer is not None:
            self._observer(view, plan)

    # -- what the fleet reports --------------------------------------------------------------------------------

    def instance_ready(self, instance: Instance, engine: Engine) -> None:
        state = self.models[instance.model]
        instance.engine = engine
        instance.state = "ready"
        instance.ready_s = self.clock.now_s
        state.started(instance)
        engine.set_max_batch_size(instance.max_batch_size)
        self._lifecycle.announce("ready", instance)
        state.router.add(instance)
        self._retune(state, instance)
        self._pump(state)

    def kinds_limited(self, most: Mapping[str, int]) -> None:
        """How many instances there can be now, of all kinds of which there cannot be as many as usual, by name."""
        self._lifecycle.limit(self.models.values(), most)

    def instance_failed(self, instance: Instance) -> None:
        """It is gone with all it held. Work that no client has seen a token of starts again elsewhere."""
        if instance.state == "gone":
            return
        state = self.models[instance.model]
        started = instance.state != "starting"
        if instance.state == "ready":
            state.router.remove(instance)
        instance.state = "draining"
        lost = list(instance.requests.values()) + list(instance.evicting.values())
        for request in lost:
            self._leave(state, request)
        instance.evicting.clear()
        self._lifecycle.forget(state, instance)
        self._lifecycle.announce("failed", instance)
        for request in lost:
            request.instance = None
            request.migrating_to = None
            request.kv_saved_tokens = 0
            if request.outcome is not None:
                continue
            self._retry(state, request)
        if started:  # A start that failed is tried again at the next tick: failing at once must not be a loop.
            self._lifecycle.reconcile(state)
        self._pump(state)

    # -- migration ---------------------------------------------------------------------------------------------

    def _migration_tick(self) -> None:
        now_s = self.clock.now_s
        policy = self.policy
        assert policy.migrate is not None
        view = fleet_view(now_s, 0.0, self.models.values(), self._gpus_max, peek=True)
        moves, self._migration_state = policy.migrate(policy.settings, self._migration_state, view)
        for move in moves:
            self._migrate(move)
        self.clock.call_later(policy.migrate_period_s, self._migration_tick)

    def _migrate(self, move: Migration) -> None:
        """Move the request dispatched last among those that decode (last come, first served)."""
        source = self.instances.get(move.source)
        destination = self.instances.get(move.destination)
        if source is None or destination is None or destination.state != "ready":
            return
        state = self.models[source.model]
        for request in reversed(list(source.requests.values())):
            if request.first_token_s >= 0.0 and request.prefill_cost_s == 0.0 and not request.pinned:
                request.migrating_to = destination
                self.migrations += 1
                self._stop(state, source, request)
                return
