"""Splits of a model's layers into stages, checked and balanced. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from chiron.engines.staged.errors import StagedModelError

STAGES_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class StageRange:
    """Layers ``begin`` to ``end - 1``. The first stage of a model has the embedding as well, the last one the head."""

    begin: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise StagedModelError(f"layers {self.begin}-{self.end - 1}: a stage needs at least one layer")

    def __str__(self) -> str:
        return f"{self.begin}-{self.end - 1}"

    def __len__(self) -> int:
        return self.end - self.begin


def read_range(text: str) -> StageRange:
    """``0-9``, both included, or one layer's number. Raises StagedModelError."""
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text.strip())
    if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
        raise StagedModelError(f"layers {text!r}: must be FIRST-LAST, both included, such as 0-9")
    first = int(found[1])
    return StageRange(begin=first, end=int(found[2] if found[2] is not None else first) + 1)


def check_split(stages: Sequence[StageRange], layers: int) -> None:
    """Every layer is in one stage, in order. Raises StagedModelError that names the hole or the overlap."""
    if not 1 <= len(stages) <= STAGES_MAX:
        raise StagedModelError(f"{len(stages)} stages: there must be 1 to {STAGES_MAX}")
    at = 0
    for stage in stages:
        if stage.begin > at:
            raise StagedModelError(f"layers {StageRange(begin=at, end=stage.begin)} are in no stage")
        if stage.begin < at:
            raise StagedModelError(f"layers {stage.begin}-{min(at, stage.end) - 1} are in two stages")
        at = stage.end
    if at < layers:
        raise StagedModelError(f"layers {StageRange(begin=at, end=layers)} are in no stage")
    if at > layers:
        raise StagedModelError(f"layers {stages[-1]}: this model has layers 0 to {layers - 1}")


def balanced(costs: Sequence[float], count: int, *, first: float = 0.0, last: float = 0.0) -> tuple[StageRange, ...]:
    """The split of layers with these costs into ``count`` stages whose dearest one is the cheapest.

    ``first`` and ``last`` are what the embedding and the head cost besides. By dynamic programming over the places
    where stages end; of splits whose dearest stages are equal the most even one, with larger stages first.
    """
    layers = len(costs)
    if not 1 <= count <= min(layers, STAGES_MAX):
        raise StagedModelError(f"{count} stages: a model of {layers} layers has 1 to {min(layers, STAGES_MAX)}")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def cost_of(begin: int, end: int) -> float:
        return sums[end] - sums[begin] + (first if begin == 0 else 0.0) + (last if end == layers else 0.0)

    best = [[(inf, inf)] * (layers + 1) for _ in range(count + 1)]  # The dearest stage, and the sum of squares.
    came = [[0] * (layers + 1) for _ in range(count + 1)]
    best[0][0] = (0.0, 0.0)
    for stages in range(1, count + 1):
        for end in range(stages, layers + 1):
            for begin in range(stages - 1, end):
                (worst, squares), own = best[stages - 1][begin], cost_of(begin, end)
                found = max(worst, own), squares + own * own
                if found <= best[stages][end]:
                    best[stages][end], came[stages][end] = found, begin
    ends = [layers]
    for stages in range(count, 0, -1):
        ends.append(came[stages][ends[-1]])
    ends.reverse()
    return tuple(StageRange(begin=a, end=b) for a, b in pairwise(ends))


def by_memory(
    layer_bytes: Sequence[int], room_bytes: Sequence[int], *, first: int = 0, last: int = 0
) -> tuple[StageRange, ...]:
    """As many layers in each stage as its device has room for, in the devices' order; the last ones may be left out.
    Raises StagedModelError if they do not hold the model."""
    layers, at, stages = len(layer_bytes), 0, []
    for room in room_bytes:
        used, begin = first if at == 0 else 0, at
        while at < layers and used + layer_bytes[at] + (last if at == layers - 1 else 0) <= room:
            used += layer_bytes[at]
            at += 1
        if at == begin:
            raise StagedModelError(f"memory: {room} bytes hold not even layer {at} ({used + layer_bytes[at]} bytes)")
        stages.append(StageRange(begin=begin, end=at))
        if at == layers:
            return tuple(stages)
    whole = first + last + sum(layer_bytes)
    raise StagedModelError(
        f"memory: the devices hold layers 0-{at - 1} of {layers}; the model's weights are {whole} bytes, "
        f"theirs together {sum(room_bytes)}"
    )
