"""The global loop: carry out the policy's plan for the fleet, and migrate running requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from chiron.control.dispatcher import Dispatcher
from chiron.control.eviction import Evictor
from chiron.control.lifecycle import Lifecycle
from chiron.control.model import ModelState, fleet_view
from chiron.core.clock import VirtualClock
from chiron.core.kept import Kept
from chiron.policies.defaults import keep_fleet
from chiron.policies.policy import ClassesOf, Policy
from chiron.policies.views import FleetPlan, FleetView, Migration, PolicyState

PREPARE_GAP_S: Final = 0.005
"""Between two calls of a policy's ``prepare``: the requests that arrive meanwhile are placed."""

Observer = Callable[[FleetView, FleetPlan], None]


class Autoscaler:
    """Ticks of the fleet hook and of the migration hook."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        policy: Policy,
        models: Mapping[str, ModelState],
        lifecycle: Lifecycle,
        dispatcher: Dispatcher,
        evictor: Evictor,
        gpus_max: Mapping[str, float],
        observer: Observer | None,
    ) -> None:
        self.migrations = 0
        self._clock = clock
        self._policy = policy
        self._models = models
        self._lifecycle = lifecycle
        self._dispatcher = dispatcher
        self._evictor = evictor
        self._gpus_max = gpus_max
        self._observer = observer
        self.fleet_state: PolicyState = None
        self._migration_state: PolicyState = None
        self._last_tick_s = 0.0
        self._waking = False
        self._preparing = False

    def begin(self) -> None:
        """Start the periodic loops."""
        policy = self._policy
        self._last_tick_s = self._clock.now_s
        self._clock.call_later(max(policy.fleet_first_s, policy.fleet_period_s), self._fleet_tick)
        if policy.migrate is not None:
            self._clock.call_later(policy.migrate_period_s, self._migration_tick)

    def learned(self) -> Mapping[str, Any]:
        """What the fleet hook knows of each model, as plain data."""
        learned = self._policy.learned
        if learned is None:
            return {}
        return learned(self._policy.settings, self.fleet_state, self._classes(), self._clock.now_s)

    def restore(self, kept: Mapping[str, Kept], age_s: float) -> None:
        """The same of an earlier run, ``age_s`` ago."""
        policy = self._policy
        if policy.restore is not None:
            self.fleet_state = policy.restore(policy.settings, kept, self._classes(), self._clock.now_s, age_s)

    def _classes(self) -> ClassesOf:
        return {name: tuple(state.classes.values()) for name, state in self._models.items()}

    def wake(self) -> None:
        """Something waits and there is no instance at all: do not wait for the next tick to start one."""
        if not self._waking:
            self._waking = True
            self._clock.call_at(self._clock.now_s, self._woken)

    def _woken(self) -> None:
        self._waking = False
        states = self._models.values()
        if any(not s.instances and (s.waiting.count or s.batch.count or s.batch.announced) for s in states):
            self._tick()

    def _fleet_tick(self) -> None:
        try:
            self._tick()
        finally:  # Live, a faulty tick must not be the last one.
            self._clock.call_later(self._policy.fleet_period_s, self._fleet_tick)

    def _prepare_soon(self) -> None:
        if self._policy.prepare is not None and not self._preparing:
            self._preparing = True
            self._clock.call_later(PREPARE_GAP_S, self._prepare)

    def _prepare(self) -> None:
        self._preparing = False
        prepare = self._policy.prepare
        assert prepare is not None
        state = prepare(self._policy.settings, self.fleet_state)
        if state is not None:
            self.fleet_state = state
            self._prepare_soon()

    def _tick(self) -> None:
        now_s = self._clock.now_s
        policy = self._policy
        view = fleet_view(now_s, now_s - self._last_tick_s, self._models.values(), self._gpus_max)
        self._last_tick_s = now_s
        plan, self.fleet_state = (policy.fleet or keep_fleet)(policy.settings, self.fleet_state, view)
        self._prepare_soon()
        for name, model_plan in plan.items():
            self._lifecycle.adopt_plan(self._models[name], model_plan)
        for instance in self._lifecycle.instances.values():
            # Scrapes do it sooner, but they may be missing.
            self._evictor.end_pause(self._models[instance.model], instance)
        for state in self._models.values():
            self._dispatcher.end_unanswered(state)
            self._lifecycle.reconcile(state)
            self._dispatcher.pump(state)
        if self._observer is not None:
            self._observer(view, plan)

    # -- migration ---------------------------------------------------------------------------------------------

    def _migration_tick(self) -> None:
        policy = self._policy
        assert policy.migrate is not None
        view = fleet_view(self._clock.now_s, 0.0, self._models.values(), self._gpus_max, peek=True)
        moves, self._migration_state = policy.migrate(policy.settings, self._migration_state, view)
        for move in moves:
            self._migrate(move)
        self._clock.call_later(policy.migrate_period_s, self._migration_tick)

    def _migrate(self, move: Migration) -> None:
        """Move the request dispatched last among those that decode (last come, first served)."""
        source = self._lifecycle.instances.get(move.source)
        destination = self._lifecycle.instances.get(move.destination)
        if source is None or destination is None or destination.state != "ready":
            return
        for request in reversed(list(source.requests.values())):
            if request.first_token_s >= 0.0 and request.prefill_cost_s == 0.0 and not request.pinned:
                request.migrating_to = destination
                self.migrations += 1
                self._evictor.stop(self._models[source.model], request)
                return
