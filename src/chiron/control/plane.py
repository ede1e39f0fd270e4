"""The control plane of a fleet of engines, whatever drives it: a front that knows which part does what.

``core.ports`` has both directions: what it is told, by clients, batch jobs, engines, scrapes and fleets, and what it
asks. Synchronous and single-threaded: every call runs to its end, and engines answer later. Each part knows only those
above it::

    booking, eviction     slots on instances: booked, freed, taken away
    batch_size            the local loop
    lifecycle             instances, from plan to gone
    dispatcher            requests, from arrival to end
    autoscaler            the global loop
    stages                the stage loop, where instances are pipelines
    scrapes               rounds of samples, a few instances at a time
    takeover              what runs when this one begins, told by others
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from chiron.control.actuators import Actuators, DirectActuators
from chiron.control.autoscaler import Autoscaler, Observer
from chiron.control.batch_size import BatchSizes
from chiron.control.dispatcher import Dispatcher
from chiron.control.eviction import Evictor
from chiron.control.gpus import Gpus
from chiron.control.learned import AGE_MAX_S, CLOCK_SKEW_MAX_S, Learned
from chiron.control.lifecycle import Lifecycle
from chiron.control.model import ModelState
from chiron.control.scrapes import Scrapes
from chiron.control.snapshot import ModelSnapshot, PlaneSnapshot, model_snapshot
from chiron.control.stages import StageLoop
from chiron.control.takeover import SETTLE_S, Takeover
from chiron.core.clock import VirtualClock
from chiron.core.kept import Kept
from chiron.core.ports import Ends, Engine, Fleet, Journal, Sleepers
from chiron.core.stages import PipelineSample
from chiron.core.types import Instance, ModelSpec, Request, RequestClass, Role, Sample
from chiron.policies.policy import LOAD_AGE_MAX_S, Policy
from chiron.policies.views import PolicyState


class ControlPlane:
    """Implements the ports that the world speaks to: ``Completions``, ``BatchAnnouncements``, ``Queues``,
    ``RemoteEngineEvents``, ``Samples``, ``StageSamples``, ``FleetEvents``, ``SleeperEvents``, and
    ``snapshot.Readers``."""

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
        actuators: Actuators | None = None,
        sleepers: Sleepers | None = None,
    ) -> None:
        """``ends``: who waits for requests; in a simulation nobody. ``actuators``: what becomes of decisions; by
        default they are carried out. ``sleepers``: the fleet, if its instances can sleep."""
        limits = {gpu: float(count) for gpu, count in (gpus_max or {}).items()}
        gpus = Gpus(limits)
        actuators = actuators or DirectActuators()
        self.clock = clock
        self.policy = policy
        self.models = {m.name: ModelState(m, tuple(classes), policy) for m in models}
        self._evictor = Evictor(clock, policy.eviction_pause_s)
        self._sizes = BatchSizes(
            clock=clock, journal=journal, policy=policy, actuators=actuators, evictor=self._evictor
        )
        self._lifecycle = Lifecycle(
            clock=clock,
            fleet=fleet,
            journal=journal,
            policy=policy,
            gpus=gpus,
            actuators=actuators,
            evictor=self._evictor,
            sizes=self._sizes,
            sleepers=sleepers,
        )
        self._dispatcher = Dispatcher(
            clock=clock,
            policy=policy,
            journal=journal,
            ends=ends,
            evictor=self._evictor,
            sizes=self._sizes,
            lifecycle=self._lifecycle,
        )
        self._autoscaler = Autoscaler(
            clock=clock,
            policy=policy,
            models=self.models,
            lifecycle=self._lifecycle,
            dispatcher=self._dispatcher,
            evictor=self._evictor,
            gpus_max=limits,
            observer=observer,
        )
        self.instances = self._lifecycle.instances
        """Every instance that is not gone, by id."""
        self._stages = StageLoop(
            clock=clock,
            policy=policy,
            models=self.models,
            instances=self.instances,
            gpus=gpus,
            journal=journal,
            actuators=actuators,
        )
        self._takeover = Takeover(
            clock=clock,
            models=self.models,
            lifecycle=self._lifecycle,
            dispatcher=self._dispatcher,
            wake=self._autoscaler.wake,
        )
        self._scrapes = Scrapes(
            clock=clock,
            models=self.models,
            instances=self.instances,
            sizes=self._sizes,
            dispatcher=self._dispatcher,
        )

    # -- the start ---------------------------------------------------------------------------------------------

    def adopt(self, model: str, count: int, attach: Callable[[Instance], Engine]) -> None:
        """Take over ``count`` running instances of ``model``; ``attach`` gives each its engine."""
        self._lifecycle.adopt(self.models[model], count, attach)

    def adopt_rest(self, model: str, attach: Callable[[Instance], Engine]) -> None:
        """Once every model has its own: what the policy starts with beyond it, as far as there is room."""
        self._lifecycle.adopt_rest(self.models[model], attach)

    def request_initial(self, model: str, count: int) -> None:
        """Ask the fleet for the first ``count`` instances of ``model``; they become ready when they do. While this one
        takes over, those that are missing in the end."""
        if self.settling:
            self._takeover.initial(model, count)
        else:
            self._lifecycle.request_initial(self.models[model], count)

    def restore(self, learned: Learned, age_s: float) -> list[str]:
        """Take over what an earlier run has learned, before ``begin``; ``age_s``: how long ago that was. Returns what
        was left out, and why."""
        notes: list[str] = []
        if age_s < -CLOCK_SKEW_MAX_S:
            return [f"it is of {-age_s:.0f} s from now; at most {CLOCK_SKEW_MAX_S:.0f} s are allowed"]
        if not age_s <= AGE_MAX_S:
            return [f"it is {age_s:.0f} s old; at most {AGE_MAX_S:.0f} s are allowed"]
        models = Kept(learned.models, "models", notes)
        fleet: dict[str, Kept] = {}
        sizes: dict[str, Kept] = {}
        for name, state in self.models.items():
            if name in models:
                kept = models.part(name)
                state.restore(kept, self.clock.now_s)
                fleet[name] = kept.part("fleet")
                sizes[name] = kept.part("sizes")
        if learned.policy != self.policy.name:
            notes.append(f"the load as policy {learned.policy!r} saw it is of no use to {self.policy.name!r}")
        else:
            self._autoscaler.restore(fleet, max(0.0, age_s))
            for name, kept in sizes.items():
                self._sizes.restore(name, kept)
            if age_s > LOAD_AGE_MAX_S:
                notes.append(
                    f"the last hour's load is {age_s:.0f} s old and is not planned with (at most "
                    f"{LOAD_AGE_MAX_S:.0f} s are allowed); load that is kept for longer is"
                )
        return notes

    def take_over(self, settle_s: float = SETTLE_S) -> None:
        """Follow another control plane, whose instances and requests still run: before ``begin``. Told by
        ``adopt_instance`` and ``adopt_running`` what runs, until ``told_all`` or for ``settle_s``; until then nothing
        is dispatched to what was taken over, and no fleet grows or shrinks."""
        self._takeover.begin(settle_s)

    def adopt_instance(
        self,
        model: str,
        kind: str,
        role: Role,
        *,
        number: int,
        max_batch_size: int,
        attach: Callable[[Instance], Engine],
        found: bool = True,
    ) -> Instance | None:
        """An instance that is up, under its number; ``attach`` gives it its engine. Not ``found``: nothing new begins
        there before ``instance_ready``. None: it cannot be taken in."""
        return self._takeover.instance(
            self.models[model], kind, role, number=number, max_batch_size=max_batch_size, attach=attach, found=found
        )

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
        """A request that runs on an instance, in the placement of this number; ``tokens_done`` as when it was started,
        ``first_token_s`` below 0 before its first token. False: it cannot be taken in, and must be stopped."""
        if not self._knows(instance):
            return False
        return self._takeover.running(
            self.models[instance.model],
            instance,
            request,
            epoch=epoch,
            tokens_done=tokens_done,
            dispatch_s=dispatch_s,
            first_token_s=first_token_s,
        )

    def told_all(self) -> None:
        """All that runs has been told."""
        self._takeover.settled()

    @property
    def settling(self) -> bool:
        return self._takeover.settling

    def begin(self) -> None:
        """Start the periodic loops."""
        self._autoscaler.begin()
        self._stages.begin()

    def learned(self, wall_s: float) -> Learned:
        """What the next run should know; ``wall_s`` is the Unix time now."""
        fleet = self._autoscaler.learned()
        now_s = self.clock.now_s
        models = {name: {**state.learned(now_s), "fleet": fleet.get(name, {})} for name, state in self.models.items()}
        for name, state in self.models.items():
            sizes = self._sizes.learned(state)
            if sizes:
                models[name]["sizes"] = sizes
        return Learned(policy=self.policy.name, wall_s=wall_s, models=models)

    # -- what is read ------------------------------------------------------------------------------------------

    @property
    def open_requests(self) -> int:
        """Arrived and not ended."""
        return self._dispatcher.open_requests

    def unfinished(self) -> Iterator[Request]:
        """Those, one by one: O(all of them)."""
        for state in self.models.values():
            yield from state.waiting
            yield from state.batch
            for instance in state.instances.values():
                for request in (*instance.requests.values(), *instance.evicting.values()):
                    if request.outcome is None:
                        yield request

    @property
    def refused_events(self) -> int:
        """What was told and could not be: of a request that no engine has, of an instance that is gone, twice."""
        return self._dispatcher.refused_events

    @property
    def evictions(self) -> int:
        return self._evictor.evictions

    @property
    def migrations(self) -> int:
        return self._autoscaler.migrations

    @property
    def fleet_state(self) -> PolicyState:
        """What the fleet hook remembers."""
        return self._autoscaler.fleet_state

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

    def kv_capacity_tokens(self, model: str) -> int:
        return self.models[model].kv_capacity_tokens

    # -- clients and batch jobs --------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        state = self.models[request.model]
        self._dispatcher.arrived(state, request)
        if not state.instances and request.outcome is None and not self.settling:
            self._autoscaler.wake()

    def cancel(self, request: Request) -> None:
        self._dispatcher.called_off(self.models[request.model], request, "cancelled")

    def cut_off(self, request: Request) -> None:
        self._dispatcher.called_off(self.models[request.model], request, "shed")

    def announce_batch(
        self, model: str, deadline_s: float, cls: str, requests: int, input_tokens: int, input_square: float
    ) -> None:
        state = self.models[model]
        state.batch.announce(deadline_s, cls, requests, input_tokens, input_square)
        if requests > 0 and not state.instances and not self.settling:
            self._autoscaler.wake()

    def clients_waiting(self, model: str, *, interactive: bool) -> int:
        return self.models[model].clients_waiting(interactive=interactive)

    def shed_lost(self, model: str) -> bool:
        return self._dispatcher.shed_lost(self.models[model])

    # -- engines and scrapes -----------------------------------------------------------------------------------

    def first_token(self, request: Request) -> None:
        self._dispatcher.first_token(self.models[request.model], request)

    def prefilled(self, request: Request) -> None:
        self._dispatcher.prefilled(self.models[request.model], request)

    def finished(self, request: Request) -> None:
        self._dispatcher.finished(self.models[request.model], request)

    def evicted(self, request: Request) -> None:
        self._dispatcher.evicted(self.models[request.model], request)

    def lost(self, request: Request) -> None:
        self._dispatcher.lost(self.models[request.model], request)

    def refused(self, request: Request, reason: str) -> None:
        self._dispatcher.gave_up(self.models[request.model], request, reason, "rejected")

    def failed(self, request: Request, reason: str) -> None:
        self._dispatcher.gave_up(self.models[request.model], request, reason, "failed")

    def avoid(self, instance: Instance, for_s: float) -> None:
        self._dispatcher.avoid(self.models[instance.model], instance, for_s)

    def sampled(self, samples: Iterable[Sample]) -> None:
        self._scrapes.sampled(samples)

    def stages_sampled(self, instance: Instance, sample: PipelineSample) -> None:
        if self._knows(instance):
            self._stages.sampled(instance, sample)

    def stage_plan(self, instance: Instance) -> tuple[int, ...]:
        """Replicas of each stage by the plan in force; empty where the instance is no pipeline, or not yet known."""
        return self._stages.plan_of(instance)

    def capacity_told(self, instance: Instance, kv_capacity_tokens: int) -> None:
        if not self._knows(instance) or kv_capacity_tokens <= 0:
            return
        state = self.models[instance.model]
        instance.kv_capacity_tokens = kv_capacity_tokens
        if instance.state == "ready":
            state.router.changed(instance)
        self._dispatcher.capacity_known(state)

    # -- fleets ------------------------------------------------------------------------------------------------

    def instance_ready(self, instance: Instance, engine: Engine) -> None:
        if not self._knows(instance):
            return
        state = self.models[instance.model]
        if instance.state == "starting":
            self._lifecycle.ready(state, instance, engine)
        else:
            self._takeover.found(state, instance)
        if len(state.spec.kinds) > 1:
            state.measure_kinds()
        self._dispatcher.pump(state)

    def kinds_limited(self, most: Mapping[str, int]) -> None:
        """How many instances there can be now, of all kinds of which there cannot be as many as usual, by name."""
        self._lifecycle.limit(self.models.values(), most)

    def kinds_found(self, found: Mapping[str, int]) -> None:
        """How many instances run that nobody has asked for, by name of their kind."""
        self._lifecycle.take_over(self.models.values(), found)

    def instance_asleep(self, instance: Instance) -> None:
        """Its GPUs are free."""
        if self._knows(instance):
            self._lifecycle.asleep(self.models.values(), self.models[instance.model], instance)

    def kinds_asleep(self, asleep: Mapping[str, int]) -> None:
        """How many sleepers of each kind there are now, by name."""
        self._lifecycle.kinds_asleep(self.models.values(), asleep)

    def instance_leaving(self, instance: Instance) -> None:
        """It is drained, and another one takes its place."""
        if self._knows(instance):
            self._lifecycle.leaving(self.models[instance.model], instance)

    def instance_failed(self, instance: Instance) -> None:
        """Work that no client has seen a token of starts again elsewhere."""
        if not self._knows(instance):
            return
        state = self.models[instance.model]
        started = instance.state != "starting"
        self._dispatcher.try_again(state, self._lifecycle.failed(state, instance))
        if started:  # A start that failed is tried again at the next tick: failing at once must not be a loop.
            self._lifecycle.reconcile(state)
        self._dispatcher.pump(state)

    def _knows(self, instance: Instance) -> bool:
        """Whether it is not gone; what is told of it then comes too late."""
        known = self.instances.get(instance.id) is instance
        self._dispatcher.refused_events += not known
        return known
