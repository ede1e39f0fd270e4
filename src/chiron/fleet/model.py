"""A fleet under virtual time: node start, model load (cold, warm), failures, and the bill.

A start on a node that lately served the same kind is warm: no node start, a shorter load. Billing runs from the
start of the model load until the instance is removed. Every random draw comes from a generator named by seed and
instance, so one policy's extra start does not shift another's luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from random import Random
from typing import Protocol

from chiron.core.clock import VirtualClock
from chiron.core.ports import Engine, FleetEvents
from chiron.core.types import Instance


class ModelledEngine(Engine, Protocol):
    """An engine that can be killed."""

    instance: Instance

    def fail(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """How long an instance takes to come up. Billing starts with the model load."""

    node_start_s: float = 30.0
    """Until a node with free GPUs exists (0 on a fixed cluster). Not billed."""
    model_load_s: float = 30.0
    """Weights into the GPU and engine start, on a cold node. Billed. The paper's range is 15 s to 1 minute."""
    warm_load_s: float = 15.0
    """The same on a node that ran this model lately (weights still in its memory); no node start either. Billed."""
    warm_for_s: float = 600.0
    """How long a released node stays warm."""
    jitter: float = 0.1
    """Each start takes uniformly +- this fraction of its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Engine failures: at random, or at given times."""

    mtbf_s: float = inf
    """Mean time between failures of one instance, exponential; inf: never."""
    at: tuple[float, ...] = ()
    """Seconds at which one ready instance, drawn by seed, fails."""
    start_failure: float = 0.0
    """Probability that a start fails when its time is over."""


class Bill:
    """GPU-seconds and cost by model, and peaks."""

    def __init__(self) -> None:
        self.gpu_seconds: dict[str, float] = {}
        self.loading_gpu_seconds = 0.0
        """The part of them before an instance was ready."""
        self.cost: dict[str, float] = {}
        self.gpus = 0
        self.gpus_peak = 0
        self.instances = 0
        self.instances_peak = 0

    def open(self, instance: Instance) -> None:
        self.gpus += instance.kind.gpus
        self.instances += 1
        self.gpus_peak = max(self.gpus_peak, self.gpus)
        self.instances_peak = max(self.instances_peak, self.instances)

    def close(self, instance: Instance, seconds: float) -> None:
        self.gpus -= instance.kind.gpus
        self.instances -= 1
        gpu_seconds = seconds * instance.kind.gpus
        model = instance.model
        self.gpu_seconds[model] = self.gpu_seconds.get(model, 0.0) + gpu_seconds
        self.cost[model] = self.cost.get(model, 0.0) + gpu_seconds / 3600.0 * instance.kind.price_per_gpu_hour


class FleetModel:
    """Implements the ``Fleet`` port."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        cold_start: ColdStart,
        failures: Failures | None = None,
        seed: int,
        make_engine: Callable[[Instance], ModelledEngine],
        notice_s: float = 0.0,
    ) -> None:
        """``notice_s``: how long it takes to notice that an instance has died, unless somebody suspects it."""
        self.bill = Bill()
        self.listener: FleetEvents | None = None
        """Set once the control plane exists; it needs a fleet to be made."""
        self.engines: dict[int, ModelledEngine] = {}
        """Engines of ready and draining instances, by instance id."""
        self._clock = clock
        self._cold_start = cold_start
        self._failures = failures or Failures()
        self._seed = seed
        self._make_engine = make_engine
        self._billed_from: dict[int, float] = {}
        self._billed: dict[int, Instance] = {}
        self._warm_until: dict[str, list[float]] = {}
        self._notice_s = notice_s
        self._unnoticed: dict[int, Instance] = {}
        """Dead instances."""
        self._failure_draws = Random(f"{seed}:failures")

    def begin(self) -> None:
        """Instances fail at their times from now on."""
        for when_s in self._failures.at:
            self._clock.call_at(when_s, self.fail_one)

    def create(self, instance: Instance) -> None:
        cold, draw = self._cold_start, self._random(instance)
        warm = self._take_warm(instance.kind.name)
        wait_s = 0.0 if warm else cold.node_start_s
        load_s = cold.warm_load_s if warm else cold.model_load_s
        spread = 1.0 + cold.jitter * (2.0 * draw.random() - 1.0)
        fails = draw.random() < self._failures.start_failure

        def loading() -> None:
            if instance.state == "starting":
                self._bill_from_now(instance)
                self._clock.call_later(load_s * spread, loaded)

        def loaded() -> None:
            if instance.state != "starting":
                return
            self.bill.loading_gpu_seconds += load_s * spread * instance.kind.gpus
            if fails:
                self._stop_billing(instance)
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
        return self._attach(instance)

    def remove(self, instance: Instance) -> None:
        self._unnoticed.pop(instance.id, None)
        self.engines.pop(instance.id, None)
        if self._stop_billing(instance):
            self._warm_until.setdefault(instance.kind.name, []).append(self._clock.now_s + self._cold_start.warm_for_s)

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
            self._heard_by().instance_failed(instance)

    def _take_warm(self, kind: str) -> bool:
        now_s = self._clock.now_s
        nodes = [until for until in self._warm_until.get(kind, []) if until > now_s]
        warm = bool(nodes)
        if warm:
            nodes.remove(max(nodes))
        self._warm_until[kind] = nodes
        return warm

    def _bill_from_now(self, instance: Instance) -> None:
        self._billed_from[instance.id] = self._clock.now_s
        self._billed[instance.id] = instance
        self.bill.open(instance)

    def _stop_billing(self, instance: Instance) -> bool:
        since = self._billed_from.pop(instance.id, inf)
        if since == inf:
            return False
        del self._billed[instance.id]
        self.bill.close(instance, self._clock.now_s - since)
        return True
