"""Replicas of stages under virtual time: node start, loading of the stage's own weights (cold, warm), and the bill.

A replica starts as an instance does (``fleet.model``): on a cold node after the node's start, on one that lately served
the same stage sooner. It loads no more than its stage's weights, which is what a pipeline gains over a whole model.
Billing runs from the start of the load until it is given back. Draws are named by seed, instance, stage and the
number of the start.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite
from random import Random

from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, StageKind
from chiron.fleet.bill import Bill
from chiron.fleet.starts_model import ColdStart, Nodes


class _Start:
    """A replica that is up or on its way."""

    __slots__ = ("asked_s", "billed_s", "instance", "stage", "up")

    def __init__(self, instance: Instance, stage: StageKind, asked_s: float) -> None:
        self.instance = instance
        self.stage = stage
        self.asked_s = asked_s
        self.billed_s = -1.0
        """Since when it is billed; below 0: not yet."""
        self.up = False


class ReplicaFleet:
    """Implements ``ReplicaSource``."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        cold_start: ColdStart,
        seed: int,
        bill: Bill,
        mtbf_s: float = inf,
        failed: Callable[[Instance, int], None] = lambda instance, number: None,
    ) -> None:
        """``failed`` hears of replicas that die: at random with a mean of ``mtbf_s`` between two failures of one, and
        by ``fail_one``. Whoever has it then stops it."""
        self._clock = clock
        self._cold_start = cold_start
        self._seed = seed
        self._bill = bill
        self._nodes = Nodes(clock, cold_start.warm_for_s)
        self._held: dict[int, _Start] = {}
        self._starts: dict[tuple[int, int], int] = {}
        """Starts so far, by instance and stage."""
        self._lives: dict[tuple[int, int], int] = {}
        """Likewise of those that came up."""
        self._mtbf_s = mtbf_s
        self._failed = failed
        self._failure_draws = Random(f"{seed}:replica-failures")
        self._next = 1

    def start(self, instance: Instance, stage: int, up: Callable[[int, float], None]) -> int:
        cold, number = self._cold_start, self._next
        self._next += 1
        kind = _stages(instance)[stage]
        held = self._held[number] = _Start(instance, kind, self._clock.now_s)
        warm = self._nodes.take(_node(instance, kind))
        spread = self._spread(instance, stage)
        wait_s = 0.0 if warm else cold.node_start_s * spread
        load_s = cold.load_s(warm=warm, weight_bytes=kind.weight_bytes) * spread

        def loading() -> None:
            if number in self._held:
                self._bill_from_now(held, warm=warm)
                self._clock.call_later(load_s, loaded)

        def loaded() -> None:
            if number in self._held:
                self._bill.loading_gpu_seconds += load_s * kind.gpus
                self._live(number, stage)
                up(number, self._clock.now_s - held.asked_s)

        if wait_s > 0.0:
            self._clock.call_later(wait_s, loading)
        else:
            loading()
        return number

    def attach_running(self, instance: Instance, stage: int) -> int:
        """One that has been up since before the start; billed from now."""
        number = self._next
        self._next += 1
        held = self._held[number] = _Start(instance, _stages(instance)[stage], self._clock.now_s)
        self._bill_from_now(held, warm=None)
        self._live(number, stage)
        return number

    def fail_one(self) -> None:
        """One that is up, drawn by seed, dies."""
        up = sorted(number for number, held in self._held.items() if held.up)
        if up:
            self._fail(up[self._failure_draws.randrange(len(up))])

    def _live(self, number: int, stage: int) -> None:
        held = self._held[number]
        held.up = True
        if isfinite(self._mtbf_s):
            key = (held.instance.id, stage)
            count = self._lives[key] = self._lives.get(key, 0) + 1
            draw = Random(f"{self._seed}:replica-life:{held.instance.id}:{stage}:{count}")
            self._clock.call_later(draw.expovariate(1.0 / self._mtbf_s), lambda: self._fail(number))

    def _fail(self, number: int) -> None:
        held = self._held.get(number)
        if held is not None and held.up:
            held.up = False
            self._failed(held.instance, number)

    def stop(self, replica: int) -> None:
        held = self._held.pop(replica, None)
        if held is not None and held.billed_s >= 0.0:
            self._bill.close_gpus(
                held.instance.model,
                held.stage.gpus,
                held.stage.price_per_gpu_hour,
                self._clock.now_s - held.billed_s,
            )
            self._nodes.release(_node(held.instance, held.stage))

    def stop_all(self, instance: Instance) -> None:
        """Everything that this pipeline has."""
        for number in [n for n, held in self._held.items() if held.instance is instance]:
            self.stop(number)

    def close(self) -> None:
        """End every bill that is still open, at now."""
        for number in list(self._held):
            self.stop(number)

    def _bill_from_now(self, held: _Start, *, warm: bool | None) -> None:
        held.billed_s = self._clock.now_s
        self._bill.open_gpus(held.stage.gpus)
        if warm is not None:
            self._bill.count_start(warm=warm)

    def _spread(self, instance: Instance, stage: int) -> float:
        key = (instance.id, stage)
        count = self._starts[key] = self._starts.get(key, 0) + 1
        draw = Random(f"{self._seed}:replica:{instance.id}:{stage}:{count}")
        return 1.0 + self._cold_start.jitter * (2.0 * draw.random() - 1.0)


def _stages(instance: Instance) -> tuple[StageKind, ...]:
    assert instance.kind.pipeline is not None
    return instance.kind.pipeline.stages


def _node(instance: Instance, stage: StageKind) -> str:
    return f"{instance.kind.name}/{stage.name}"
