"""GPUs of each type that are free, where there is a limit.

An instance holds its kind's from its creation until it is gone. A pipeline holds those of its replicas: of each stage
as many as are planned and, besides, those that drain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from chiron.core.types import Instance, InstanceKind


class Gpus:
    """What is held, by instance and stage."""

    def __init__(self, limits: Mapping[str, float]) -> None:
        self._free = dict(limits)
        self._held: dict[int, list[int]] = {}
        """Replicas of each stage, of pipelines."""

    def room(self, kind: InstanceKind, without: Instance | None = None) -> bool:
        """Whether another instance of this kind fits, its stages at their least. ``without`` makes room."""
        freed = self._of(without) if without is not None else {}
        return all(self._free.get(gpu, inf) + freed.get(gpu, 0) >= count for gpu, count in _least(kind).items())

    def take(self, instance: Instance, *, up: bool) -> None:
        """``up``: it has been running before, with the replicas that stages have then."""
        pipeline = instance.kind.pipeline
        if pipeline is not None:
            self._held[instance.id] = [s.initial_replicas if up else s.min_replicas for s in pipeline.stages]
        self._add(self._of(instance), -1)

    def give_back(self, instance: Instance) -> None:
        self._add(self._of(instance), 1)
        self._held.pop(instance.id, None)

    def hold(self, instance: Instance, replicas: Sequence[int]) -> None:
        """A pipeline has, or will have, these replicas of each stage."""
        self._add(self._of(instance), 1)
        self._held[instance.id] = list(replicas)
        self._add(self._of(instance), -1)

    def afforded(self, instance: Instance, before: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
        """``wanted`` as far as there are GPUs for what is more than ``before``. First comes the stage that is furthest
        from what it wants: a pipeline is as fast as its slowest stage. What it holds beyond ``before`` is on its way
        out, and serves no replica that is new."""
        assert instance.kind.pipeline is not None
        stages = instance.kind.pipeline.stages
        granted = [min(pair) for pair in zip(before, wanted, strict=True)]
        free = dict(self._free)
        while True:
            short = [
                number
                for number, stage in enumerate(stages)
                if granted[number] < wanted[number] and free.get(stage.gpu, inf) >= stage.gpus
            ]
            if not short:
                return tuple(granted)
            first = min(short, key=lambda number: granted[number] / wanted[number])
            if stages[first].gpu in free:
                free[stages[first].gpu] -= stages[first].gpus
            granted[first] += 1

    def _of(self, instance: Instance) -> dict[str, int]:
        held, pipeline = self._held.get(instance.id), instance.kind.pipeline
        if held is None or pipeline is None:
            return {instance.kind.gpu: instance.kind.gpus}
        return _sums([(stage.gpu, count * stage.gpus) for stage, count in zip(pipeline.stages, held, strict=True)])

    def _add(self, counts: Mapping[str, int], sign: int) -> None:
        for gpu, count in counts.items():
            if gpu in self._free:
                self._free[gpu] += sign * count


def _least(kind: InstanceKind) -> dict[str, int]:
    if kind.pipeline is None:
        return {kind.gpu: kind.gpus}
    return _sums([(stage.gpu, stage.min_replicas * stage.gpus) for stage in kind.pipeline.stages])


def _sums(counts: Sequence[tuple[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for gpu, count in counts:
        total[gpu] = total.get(gpu, 0) + count
    return total
