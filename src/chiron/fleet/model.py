"""A fleet under virtual time: node start, model load (cold, warm), failures, and the bill.

A start on a node that lately served the same kind is warm: no node start, a shorter load. If a sleeper of the kind is
there, it wakes instead; if an instance of the kind is ready, it may hand over its weights. Billing runs from the start
of the model load until the instance is removed, or asleep. Every random draw comes from a generator named by seed and
instance, so one policy's extra start does not shift another's luck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from random import Random
from typing import Protocol, cast

from chiron.core.clock import VirtualClock
from chiron.core.ports import Engine, FleetEvents, SleeperEvents
from chiron.core.types import Instance, StartSource
from chiron.fleet.bill import Bill as Bill
from chiron.fleet.places_model import Places
from chiron.fleet.replicas import ReplicaFleet
from chiron.fleet.sleepers_model import Sleep as Sleep
from chiron.fleet.sleepers_model import SleepersModel
from chiron.fleet.starts_model import ColdStart as ColdStart
from chiron.fleet.starts_model import Nodes


class ModelledEngine(Engine, Protocol):
    """An engine that can be killed."""

    instance: Instance

    def fail(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Engine failures: at random, or at given times."""

    mtbf_s: float = inf
    """Mean time between failures of one instance, exponential; inf: never."""
    at: tuple[float, ...] = ()
    """Seconds at which one ready instance, drawn by seed, fails."""
    start_failure: float = 0.0
    """Probability that a start fails when its time is over."""
    replica_mtbf_s: float = inf
    """Likewise of one replica of a stage, in pipelines."""
    replicas_at: tuple[float, ...] = ()
    """Seconds at which one replica of a stage, drawn by seed, fails."""


class StagedEngine(ModelledEngine, Protocol):
    """One whose stages have replicas that can be killed."""

    def replica_failed(self, number: int) -> None: ...


class FleetModel:
    """Implements the ports ``Fleet`` and ``Sleepers``."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        cold_start: ColdStart,
        failures: Failures | None = None,
        seed: int,
        make_engine: Callable[[Instance], ModelledEngine],
        notice_s: float = 0.0,
        sleep: Sleep | None = None,
        gpus_max: Mapping[str, int] | None = None,
    ) -> None:
        """``notice_s``: how long it takes to notice that an instance has died, unless somebody suspects it.
        ``gpus_max``: how many GPUs of each type there are; of a type not named, as many as wanted."""
        self.bill = Bill()
        self.listener: FleetEvents | None = None
        """Set once the control plane exists; it needs a fleet to be made."""
        self.sleep_listener: SleeperEvents | None = None
        """Likewise, where instances can sleep."""
        self.engines: dict[int, ModelledEngine] = {}
        """Engines of ready and draining instances, by instance id."""
        self._clock = clock
        self._cold_start = cold_start
        self._failures = failures or Failures()
        self._seed = seed
        self._make_engine = make_engine
        self._billed_from: dict[int, float] = {}
        self._billed: dict[int, Instance] = {}
        self._nodes = Nodes(clock, cold_start.warm_for_s)
        self.replicas = ReplicaFleet(
            clock=clock,
            cold_start=cold_start,
            seed=seed,
            bill=self.bill,
            mtbf_s=self._failures.replica_mtbf_s,
            failed=self._replica_failed,
        )
        """Of the stages of instances that are pipelines."""
        self._sleep = sleep or Sleep()
        self.sleepers = SleepersModel(clock, self._sleep, self.bill)
        self.places: Places | None = None
        """Where nodes have a size."""
        if self._sleep.gpus_per_node:
            self.places = Places(self._sleep.gpus_per_node, gpus_max or {})
        self._waking: dict[int, tuple[float, bool]] = {}
        """Starts that wake a sleeper, by instance id: until when, and whether they fail then."""
        self._up: dict[int, list[list[int]]] = {}
        """Replicas of each stage of a pipeline that has no engine yet."""
        self._notice_s = notice_s
        self._unnoticed: dict[int, Instance] = {}
        """Dead instances."""
        self._failure_draws = Random(f"{seed}:failures")

    def begin(self) -> None:
        """Instances fail at their times from now on."""
        for when_s in self._failures.at:
            self._clock.call_at(when_s, self.fail_one)
        for when_s in self._failures.replicas_at:
            self._clock.call_at(when_s, self.replicas.fail_one)

    def create(self, instance: Instance) -> None:
        if instance.kind.pipeline is not None:
            self._create_pipeline(instance)
            return
        cold, draw = self._cold_start, self._random(instance)
        sleeper = self.sleepers.wake(instance.kind, self.places)
        wakes = sleeper is not None
        if self.places is not None:
            self.places.take(instance, None if sleeper is None else sleeper.node)
        if wakes:
            self._tell_asleep()
        warm = wakes or self._nodes.take(instance.kind.name)
        wait_s = 0.0 if warm else cold.node_start_s
        spread = 1.0 + cold.jitter * (2.0 * draw.random() - 1.0)
        fails = draw.random() < self._failures.start_failure

        load_s = 0.0

        def loading() -> None:
            nonlocal load_s
            if instance.state == "starting":
                instance.source, load_s = self._source(instance, warm=warm, wakes=wakes)
                self._bill_from_now(instance)
                self.bill.count_start(warm=warm, wakes=wakes)
                if wakes:
                    self._waking[instance.id] = self._clock.now_s + load_s * spread, fails
                self._clock.call_later(load_s * spread, loaded)

        def loaded() -> None:
            self._waking.pop(instance.id, None)
            if instance.state != "starting":
                return
            self.bill.loading_gpu_seconds += load_s * spread * instance.kind.gpus
            if fails:
                self._stop_billing(instance)
                self._leave(instance)
                self._heard_by().instance_failed(instance)
            else:
                self._heard_by().instance_ready(instance, self._attach(instance))

        if wait_s > 0.0:
            self._clock.call_later(wait_s * spread, loading)
        else:
            loading()

    def attach_running(self, instance: Instance) -> ModelledEngine:
        """The engine of an instance that has been up since before the start; billed from now."""
        self._bill_from_now(instance)
        if instance.kind.pipeline is not None:
            self._up[instance.id] = [
                [self.replicas.attach_running(instance, number) for _ in range(stage.initial_replicas)]
                for number, stage in enumerate(instance.kind.pipeline.stages)
            ]
        elif self.places is not None:
            self.places.take(instance)
        return self._attach(instance)

    def remove(self, instance: Instance) -> None:
        self._waking.pop(instance.id, None)
        self._unnoticed.pop(instance.id, None)
        self.engines.pop(instance.id, None)
        self._leave(instance)
        if self._stop_billing(instance):
            self._nodes.release(instance.kind.name)

    def sleep(self, instance: Instance) -> None:
        """What is dead, noticed or not, does not sleep, nor what is too large: it is gone at once. One that is waking
        sleeps again once it is awake, unless that fails."""
        awake_s, fails = self._waking.pop(instance.id, (self._clock.now_s, False))
        self._unnoticed.pop(instance.id, None)
        self.engines.pop(instance.id, None)
        node = None if self.places is None else self.places.node(instance)
        spread = self.places is not None and node is None

        def asleep() -> None:
            if self._stop_billing(instance) and (fails or spread or not self.sleepers.add(instance, node)):
                self._nodes.release(instance.kind.name)
            self._leave(instance)
            self._tell_asleep()
            assert self.sleep_listener is not None
            self.sleep_listener.instance_asleep(instance)

        falls = instance.id in self._billed_from and self._sleep.holds(instance.kind) and not (spread or fails)
        fall_s = self._sleep.fall_asleep_s if falls else 0.0
        self._clock.call_later(awake_s - self._clock.now_s + fall_s, asleep)

    def keep_asleep(self, kind: str, most: int) -> None:
        self.sleepers.keep(kind, most)
        self._tell_asleep()

    def suspect(self, instance: Instance) -> None:
        """Somebody could not reach it."""
        if instance.id in self._unnoticed:
            self._clock.call_at(self._clock.now_s, lambda: self._notice(instance))

    def fail_one(self) -> None:
        """One ready instance, drawn by seed, dies."""
        alive = sorted(i for i, engine in self.engines.items() if engine.instance.state == "ready")
        if alive:
            self._fail(self.engines[alive[self._failure_draws.randrange(len(alive))]])

    def close(self) -> None:
        """End every bill that is still open, at now."""
        for instance_id in list(self._billed_from):
            self._stop_billing(self._billed[instance_id])
        self.replicas.close()
        self.sleepers.close()

    def take_replicas(self, instance: Instance) -> list[list[int]]:
        """Numbers of a pipeline's replicas, stage by stage, for its engine: from then on it starts and stops them."""
        return self._up.pop(instance.id)

    def _create_pipeline(self, instance: Instance) -> None:
        """As few replicas of each stage as there may be, loaded side by side; ready with the last one."""
        assert instance.kind.pipeline is not None
        stages = instance.kind.pipeline.stages
        numbers = self._up[instance.id] = [[] for _ in stages]
        missing = sum(stage.min_replicas for stage in stages)
        fails = self._random(instance).random() < self._failures.start_failure
        self._bill_from_now(instance)

        def up(stage: int, replica: int) -> None:
            nonlocal missing
            numbers[stage].append(replica)
            missing -= 1
            if missing or instance.state != "starting":
                return
            if fails:
                self._stop_billing(instance)
                self._heard_by().instance_failed(instance)
            else:
                self._heard_by().instance_ready(instance, self._attach(instance))

        for number, stage in enumerate(stages):
            for _ in range(stage.min_replicas):
                self.replicas.start(instance, number, lambda replica, _, at=number: up(at, replica))  # type: ignore[misc]

    def _replica_failed(self, instance: Instance, number: int) -> None:
        engine = self.engines.get(instance.id)
        if engine is not None:  # Else the pipeline is still starting: it has lost nothing yet.
            cast(StagedEngine, engine).replica_failed(number)

    def _source(self, instance: Instance, *, warm: bool, wakes: bool) -> tuple[StartSource, float]:
        """Where its weights come from now, and what loading them takes."""
        if wakes:
            return "memory", self._sleep.waking_s(instance.kind)
        others = (engine.instance for engine in self.engines.values())
        peer = isfinite(self._cold_start.peer_load_s) and any(
            other.kind.name == instance.kind.name and other.model == instance.model and other.state == "ready"
            for other in others
        )
        return self._cold_start.fastest(warm=warm, peer=peer, weight_bytes=instance.kind.weight_bytes)

    def _leave(self, instance: Instance) -> None:
        if self.places is not None:
            self.places.leave(instance)

    def _tell_asleep(self) -> None:
        assert self.sleep_listener is not None
        self.sleep_listener.kinds_asleep(self.sleepers.counts())

    def _heard_by(self) -> FleetEvents:
        assert self.listener is not None
        return self.listener

    def _random(self, instance: Instance) -> Random:
        return Random(f"{self._seed}:instance:{instance.id}")

    def _attach(self, instance: Instance) -> ModelledEngine:
        engine = self._make_engine(instance)
        self.engines[instance.id] = engine
        if isfinite(self._failures.mtbf_s):
            lifetime_s = Random(f"{self._seed}:life:{instance.id}").expovariate(1.0 / self._failures.mtbf_s)
            self._clock.call_later(lifetime_s, lambda: self._fail(engine))
        return engine

    def _fail(self, engine: ModelledEngine) -> None:
        instance = engine.instance
        if self.engines.pop(instance.id, None) is None:
            return
        engine.fail()
        self._stop_billing(instance)
        self._unnoticed[instance.id] = instance
        if self._notice_s > 0.0:
            self._clock.call_later(self._notice_s, lambda: self._notice(instance))
        else:
            self._notice(instance)

    def _notice(self, instance: Instance) -> None:
        if self._unnoticed.pop(instance.id, None) is not None:
            self._leave(instance)
            self._heard_by().instance_failed(instance)

    def _bill_from_now(self, instance: Instance) -> None:
        self._billed_from[instance.id] = self._clock.now_s
        self._billed[instance.id] = instance
        self.bill.open(instance)

    def _stop_billing(self, instance: Instance) -> bool:
        since = self._billed_from.pop(instance.id, inf)
        if since == inf:
            return False
        del self._billed[instance.id]
        if instance.kind.pipeline is not None:
            self._up.pop(instance.id, None)
            self.replicas.stop_all(instance)
        self.bill.close(instance, self._clock.now_s - since)
        return True
