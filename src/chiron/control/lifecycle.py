"""Instances from start to end: created, drained, taken back, re-labelled, within bounds and GPU limits.

States: ``starting`` -> ``ready`` -> ``draining`` -> ``gone``; a start that is no longer wanted, and a failure, go
straight to ``gone``; a draining instance may be taken back. What becomes of one that has drained is the fleet's affair:
it is stopped, or it sleeps, and some later start is its waking. One that falls asleep holds its GPUs until it does. A
start that is waking a sleeper and is no longer wanted may go back to sleep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf

from chiron.control.actuators import Actuators
from chiron.control.batch_size import BatchSizes
from chiron.control.booking import leave
from chiron.control.eviction import Evictor
from chiron.control.gpus import Gpus
from chiron.control.model import ModelState, first_budget, instance_view, over_budget, takes_budget
from chiron.core.clock import VirtualClock
from chiron.core.ports import Engine, Fleet, Journal, Sleepers
from chiron.core.types import ROLES, Decision, Instance, InstanceKind, Request, Role
from chiron.policies.policy import Policy
from chiron.policies.views import ModelPlan, TokenBudget


class Lifecycle:
    """Makes every model's fleet its plan."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        fleet: Fleet,
        journal: Journal,
        policy: Policy,
        gpus: Gpus,
        actuators: Actuators,
        evictor: Evictor,
        sizes: BatchSizes,
        sleepers: Sleepers | None,
    ) -> None:
        """``sleepers``: the fleet, if its instances can sleep."""
        self.instances: dict[int, Instance] = {}
        """Every instance that is not gone."""
        self._clock = clock
        self._fleet = fleet
        self._journal = journal
        self._policy = policy
        self._gpus = gpus
        self._actuators = actuators
        self._evictor = evictor
        self._sizes = sizes
        self._sleepers = sleepers
        self.unsettled = False
        """Not all that runs is known: nothing is created or drained, and no plan is adopted."""
        self._next_instance = 1
        self._numbers: set[int] = set()
        """Given while not all is known, also to instances that are gone: a second one of a number is another one."""
        self._falling_asleep: set[int] = set()
        """Told to sleep; the fleet has not said yet that they do."""
        self._most: dict[str, int] = {}
        """How many instances of a kind there can be now, by name, where it is less than usual."""

    # -- the first instances -----------------------------------------------------------------------------------

    def adopt(self, state: ModelState, count: int, attach: Callable[[Instance], Engine]) -> None:
        """Take over ``count`` running instances at the start; ``attach`` gives each its engine."""
        self._plan_initial(state, count)
        self._adopt_planned(state, count, attach)
        if len(state.instances) < min(count, sum(state.planned.values())):
            raise ValueError(f"model {state.spec.name!r}: the GPU limits do not allow {count} initial instances")

    def adopt_rest(self, state: ModelState, attach: Callable[[Instance], Engine]) -> None:
        """Of a policy that starts with more than was asked for: what there is room for once every model has its own."""
        self._adopt_planned(state, state.spec.max_instances, attach)
        up = Counter(instance.role for instance in state.instances.values())
        state.planned = {role: up[role] for role in ROLES}

    def _adopt_planned(self, state: ModelState, most: int, attach: Callable[[Instance], Engine]) -> None:
        """As far as there is room, and no more than ``most`` in all."""
        for role, number in state.planned.items():
            up = sum(instance.role == role for instance in state.instances.values())
            while up < number and len(state.instances) < most and (kind := self._free_kind(state)) is not None:
                instance = self._new_instance(state, kind, role, up=True)
                self.ready(state, instance, attach(instance))
                up += 1

    def adopt_one(
        self,
        state: ModelState,
        kind: str,
        role: Role,
        *,
        number: int,
        max_batch_size: int,
        attach: Callable[[Instance], Engine],
    ) -> Instance | None:
        """Take over one that is up under its number. None: there has been one of this number, or no such kind."""
        found = next((each for each in state.spec.kinds if each.name == kind), None)
        if found is None or number in self._numbers or number in self.instances or number < 1:
            return None
        state.planned = {**state.planned, role: state.planned.get(role, 0) + 1}
        self._next_instance, following = number, self._next_instance
        instance = self._new_instance(state, found, role)
        self._next_instance = max(following, number + 1)
        instance.max_batch_size = min(max(1, max_batch_size), found.max_num_seqs)
        self.ready(state, instance, attach(instance))
        return instance

    def request_initial(self, state: ModelState, count: int) -> None:
        """Ask the fleet for the first ``count`` instances; they become ready when they do."""
        self._plan_initial(state, count)
        self.reconcile(state)

    def request_missing(self, state: ModelState, count: int) -> None:
        """The same, where some have been taken over."""
        policy = self._policy
        # Of the whole start: the policy may start with more or fewer than ``count``.
        split = policy.initial_roles(policy.settings, count) if policy.initial_roles else {"mixed": count}
        missing = max(0, sum(split.values()) - sum(state.planned.values()))
        planned = {role: state.planned.get(role, 0) for role in ROLES}
        for role in ROLES:
            more = min(missing, max(0, split.get(role, 0) - planned[role]))
            planned[role] += more
            missing -= more
        state.planned = planned
        self.reconcile(state)

    def _plan_initial(self, state: ModelState, count: int) -> None:
        policy = self._policy
        split = policy.initial_roles(policy.settings, count) if policy.initial_roles else {"mixed": count}
        state.planned = {role: split.get(role, 0) for role in ROLES}

    # -- plans -------------------------------------------------------------------------------------------------

    def adopt_plan(self, state: ModelState, plan: ModelPlan) -> None:
        """Clamp to the model's bounds, remember, and log if anything changed."""
        if self.unsettled:
            return
        state.batch_at_risk = plan.batch_at_risk
        state.renews = plan.renews
        state.learner.spread_over = plan.spread_over
        self._allow_asleep(state, plan.asleep)
        self._set_token_budget(state, plan)
        spec = state.spec
        counts: dict[Role, int] = {role: max(0, plan.counts.get(role, 0)) for role in ROLES}
        excess = sum(counts.values()) - spec.max_instances
        for role in ("batch", "mixed", "interactive"):
            cut = min(max(excess, 0), counts[role])
            counts[role] -= cut
            excess -= cut
        missing = spec.min_instances - sum(counts.values())
        if missing > 0:
            counts["mixed"] += missing
        previous = self._actuators.plan(state, counts)
        before = sum((previous if previous is not None else state.planned).values())
        after = sum(counts.values())
        if counts != previous:
            self._journal.decided(
                self._clock.now_s,
                Decision(
                    kind="fleet" if before != after or previous is None else "role",
                    subject=spec.name,
                    before=before,
                    after=after,
                    reason=plan.reason,
                    numbers={**plan.numbers, **{role: float(n) for role, n in counts.items()}},
                ),
            )

    def _set_token_budget(self, state: ModelState, plan: ModelPlan) -> None:
        """That of instances to come."""
        if not any(map(takes_budget, state.spec.kinds)):
            return
        whole = state.spec.kinds[0].max_num_batched_tokens
        wanted = plan.token_budget or TokenBudget(max_num_batched_tokens=whole, reason="step_within_itl_slo")
        before = whole if state.token_budget is None else state.token_budget.max_num_batched_tokens
        state.token_budget = plan.token_budget
        if wanted.max_num_batched_tokens != before:
            decision = Decision(
                kind="token_budget",
                subject=state.spec.name,
                before=before,
                after=wanted.max_num_batched_tokens,
                reason=wanted.reason,
                numbers=wanted.numbers,
            )
            self._journal.decided(self._clock.now_s, decision)

    def reconcile(self, state: ModelState) -> None:
        """Start and drain instances until the fleet is the plan."""
        if self.unsettled:
            return
        if self._policy.label is not None:
            total = sum(state.planned.values())
            self._resize(
                state, [i for i in state.instances.values() if i.state in ("starting", "ready")], total, "mixed"
            )
            self._relabel(state, self._policy.label(self._policy.settings, state.planned))
            return
        for role, count in state.planned.items():
            live = [i for i in state.instances.values() if i.role == role and i.state in ("starting", "ready")]
            self._resize(state, live, count, role)

    def _resize(self, state: ModelState, live: list[Instance], count: int, role: Role) -> None:
        for _ in range(count - len(live)):
            if not self._take_back(state, role) and not self._create(state, role):
                break
        if len(live) > count:
            # First those that still start, then those with another token budget than new ones have, then the emptiest;
            # the newest of equals.
            live.sort(
                key=lambda i: (
                    i.state != "starting",
                    i.kind.live_token_budget or i.max_num_batched_tokens == first_budget(state, i.kind),
                    i.running_interactive,
                    len(i.requests),
                    -i.rank,
                )
            )
            for instance in live[: len(live) - count]:
                # While successors still start, the model keeps the instances that its bounds require.
                ready = sum(1 for i in state.instances.values() if i.state == "ready")
                if instance.state == "ready" and ready <= state.spec.min_instances:
                    break
                self._drain(state, instance)

    def _relabel(self, state: ModelState, labels: Sequence[Role]) -> None:
        live = sorted((i for i in state.instances.values() if i.state in ("starting", "ready")), key=lambda i: i.rank)
        for instance, role in zip(live, labels, strict=False):
            if instance.role != role:
                instance.role = role
                if instance.state == "ready":
                    state.router.changed(instance)
                    self._sizes.retune(state, instance)

    def _take_back(self, state: ModelState, role: Role) -> bool:
        policy, now_s = self._policy, self._clock.now_s
        able = [i for i in state.instances.values() if not i.leaving and i.avoided_until_s < inf]
        draining = [i for i in able if i.state == "draining" and not (state.renews and over_budget(state, i))]
        if policy.take_back is None or not draining:
            return False
        instance = self.instances[policy.take_back(policy.settings, [instance_view(i, now_s) for i in draining])]
        instance.state = "ready"
        instance.role = role
        state.router.add(instance)
        self._announce("ready", instance)
        return True

    def _free_kind(self, state: ModelState, without: Instance | None = None) -> InstanceKind | None:
        """The first with room of which an instance can come now; if there is none, the first with room is tried.
        ``without`` makes room."""
        free = [kind for kind in state.spec.kinds if self._has_room(state, kind, without)]
        return next((kind for kind in free if self._can_come(state, kind)), free[0] if free else None)

    def limit(self, states: Iterable[ModelState], most: Mapping[str, int]) -> None:
        """No more instances than ``most`` can be of these kinds now. Starts beyond it give way to another kind."""
        self._most = dict(most)
        for state in states:
            for kind in state.spec.kinds:
                surplus = _count(state, kind) - self._most.get(kind.name, kind.max_instances)
                starting = [i for i in state.instances.values() if i.kind is kind and i.state == "starting"]
                for instance in starting[-surplus:] if surplus > 0 else ():
                    other = self._free_kind(state, without=instance)
                    if other is not None and other is not kind and self._can_come(state, other):
                        self._remove(state, instance)
                        self._fleet.create(self._new_instance(state, other, instance.role))

    def take_over(self, states: Iterable[ModelState], found: Mapping[str, int]) -> None:
        """So many instances of these kinds run already: as many of them as the bounds allow join the fleet. Not while
        others may still be told of under numbers that these would take."""
        if self.unsettled:
            return
        split = self._policy.initial_roles(self._policy.settings, 1) if self._policy.initial_roles else {}
        role: Role = next((role for role in ROLES if split.get(role)), "mixed")
        for state in states:
            for kind in state.spec.kinds:
                room = state.spec.max_instances - sum(state.planned.values())
                for _ in range(min(found.get(kind.name, 0), room)):
                    if self._has_room(state, kind, None):
                        state.planned = {**state.planned, role: state.planned.get(role, 0) + 1}
                        self._fleet.create(self._new_instance(state, kind, role))

    def _can_come(self, state: ModelState, kind: InstanceKind) -> bool:
        return _count(state, kind) < self._most.get(kind.name, kind.max_instances)

    def _has_room(self, state: ModelState, kind: InstanceKind, without: Instance | None) -> bool:
        used = _count(state, kind) - (without is not None and without.kind is kind)
        return used < kind.max_instances and self._gpus.room(kind, without)

    def _new_instance(self, state: ModelState, kind: InstanceKind, role: Role, *, up: bool = False) -> Instance:
        instance = Instance(self._next_instance, state.spec.name, kind, role, self._clock.now_s)
        self._next_instance += 1
        limit = state.batch_size_hint or self._policy.initial_max_batch_size or kind.max_num_seqs
        instance.max_batch_size = min(limit, kind.max_num_seqs)
        instance.max_num_batched_tokens = first_budget(state, kind)
        self.instances[instance.id] = instance
        if self.unsettled:
            self._numbers.add(instance.id)
        state.instances[instance.id] = instance
        self._gpus.take(instance, up=up)
        self._announce("created", instance)
        return instance

    def _create(self, state: ModelState, role: Role) -> bool:
        kind = self._free_kind(state)
        if kind is None:
            return False
        self._fleet.create(self._new_instance(state, kind, role))
        return True

    def _drain(self, state: ModelState, instance: Instance) -> None:
        if instance.state == "starting":
            if self._sleeps_again(state, instance):
                self._fall_asleep(instance)
            else:
                self._remove(state, instance)
            return
        state.router.remove(instance)
        instance.state = "draining"
        instance.drain_started_s = started_s = self._clock.now_s
        self._announce("draining", instance)
        if not instance.requests and not instance.evicting:
            self._drained(state, instance)
            return

        def hurry() -> None:
            if instance.state == "draining" and instance.drain_started_s == started_s:
                for request in list(instance.batch.values()):
                    self._evictor.evict(state, request)

        self._clock.call_later(self._policy.drain_timeout_s, hurry)

    # -- what the fleet reports --------------------------------------------------------------------------------

    def ready(self, state: ModelState, instance: Instance, engine: Engine) -> None:
        instance.engine = engine
        instance.state = "ready"
        instance.ready_s = self._clock.now_s
        state.started(instance)
        self._actuators.begin(instance)
        self._announce("ready", instance)
        state.router.add(instance)
        self._sizes.retune(state, instance)

    def failed(self, state: ModelState, instance: Instance) -> list[Request]:
        """It is gone with all it held: returns that."""
        if instance.state == "ready":
            state.router.remove(instance)
        instance.state = "draining"
        lost = list(instance.requests.values()) + list(instance.evicting.values())
        for request in lost:
            leave(state, request)
        instance.evicting.clear()
        self._forget(state, instance)
        self._announce("failed", instance)
        return lost

    def leaving(self, state: ModelState, instance: Instance) -> None:
        """It will be taken away soon. Harmless twice, and for one that drains already. What may run there and is not
        told yet would be cut off: until then it is not drained."""
        instance.leaving = True
        if instance.state == "ready" and not self.unsettled:
            self._drain(state, instance)
            self.reconcile(state)

    def remove_if_empty(self, state: ModelState, instance: Instance) -> None:
        """Something has left an instance that drains."""
        if not instance.requests and not instance.evicting and instance.id not in self._falling_asleep:
            self._drained(state, instance)

    def _drained(self, state: ModelState, instance: Instance) -> None:
        if self._sleepers is None or instance.leaving or not self._may_sleep(state):
            self._remove(state, instance)
            return
        self._fall_asleep(instance)

    def _fall_asleep(self, instance: Instance) -> None:
        assert self._sleepers is not None
        self._falling_asleep.add(instance.id)
        instance.state = "draining"
        instance.leaving = True
        self._sleepers.sleep(instance)

    # -- sleepers ----------------------------------------------------------------------------------------------

    def _may_sleep(self, state: ModelState) -> bool:
        falling = sum(1 for number in state.instances if number in self._falling_asleep)
        return sum(state.asleep.values()) + falling < state.asleep_most

    def _sleeps_again(self, state: ModelState, instance: Instance) -> bool:
        """Whether one that is waking, and not wanted any more, sleeps again. A wake is not stopped half-way: its GPUs
        are billed for the rest of it, for falling asleep (taken to be as long as a wake), and for the next wake. Those
        of one that is stopped are billed for the next load instead. The less is chosen. To keep it up until it may be
        wanted would be billed for all of that time."""
        if self._sleepers is None or instance.source != "memory" or not self._may_sleep(state):
            return False
        wake_s = state.start_s.get("memory", 0.0)
        load_s = min((s for source, s in state.start_s.items() if source != "memory"), default=state.cold_start_s)
        rest_s = max(0.0, wake_s - (self._clock.now_s - instance.began_s))
        return rest_s + 2.0 * wake_s <= load_s

    def _allow_asleep(self, state: ModelState, most: int) -> None:
        state.asleep_most = left = max(0, most)
        if self._sleepers is not None and sum(state.asleep.values()) > most:
            for kind, count in list(state.asleep.items()):
                if count > left:
                    self._sleepers.keep_asleep(kind, left)
                left -= min(left, count)

    def asleep(self, states: Iterable[ModelState], state: ModelState, instance: Instance) -> None:
        """It has left its GPUs, to sleep or because it was stopped: for whoever of ``states``, which is all of them,
        has waited for GPUs since the last tick."""
        self._forget(state, instance)
        self._announce("gone", instance)
        for each in states:
            self.reconcile(each)

    def kinds_asleep(self, states: Iterable[ModelState], asleep: Mapping[str, int]) -> None:
        for state in states:
            state.asleep = {kind.name: asleep[kind.name] for kind in state.spec.kinds if asleep.get(kind.name)}

    def _remove(self, state: ModelState, instance: Instance) -> None:
        self._forget(state, instance)
        self._fleet.remove(instance)
        self._announce("gone", instance)

    def _forget(self, state: ModelState, instance: Instance) -> None:
        assert not instance.requests, "an instance is drained before it is removed"
        instance.state = "gone"
        self._falling_asleep.discard(instance.id)
        del self.instances[instance.id]
        del state.instances[instance.id]
        if len(state.spec.kinds) > 1:
            state.measure_kinds()
        self._gpus.give_back(instance)

    def _announce(self, name: str, instance: Instance) -> None:
        self._journal.event(self._clock.now_s, name, None, instance)


def _count(state: ModelState, kind: InstanceKind) -> int:
    return sum(1 for i in state.instances.values() if i.kind is kind)
