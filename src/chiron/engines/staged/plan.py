"""Where to split a model: what each stage weighs, takes, and sends on.

Layers of one shape take the same time, so one of each shape is measured, here and now, on random activations: a step of
so many sequences, each with one token after a context of ``CONTEXT_TOKENS``. What the embedding and the head add is the
first and last stage's time beyond their layers'.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from chiron.engines.staged.errors import StagedModelError
from chiron.engines.staged.split import StageRange, balanced, by_memory
from chiron.engines.staged.weights import ModelFiles

CONTEXT_TOKENS = 256
BATCHES = (1, 8, 32)
_REPEATS = 7
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds by batch size."""

    layers: Mapping[int, tuple[float, ...]]
    """Of each layer, at each batch size."""
    embedding: Mapping[int, float]
    head: Mapping[int, float]

    def stage_s(self, stage: StageRange, batch: int) -> float:
        layers = self.layers[batch]
        first = self.embedding[batch] if stage.begin == 0 else 0.0
        last = self.head[batch] if stage.end == len(layers) else 0.0
        return first + sum(layers[stage.begin : stage.end]) + last


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    stage: StageRange
    weights_bytes: int
    kv_bytes_per_token: int
    sent_bytes_per_token: int
    """To the next stage; of the last one none."""
    step_s: Mapping[int, float]
    """By batch size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    model: str
    dtype: str
    stages: tuple[PlannedStage, ...]

    def fields(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "dtype": self.dtype,
            "stages": [
                {
                    "layers": str(each.stage),
                    "weights_bytes": each.weights_bytes,
                    "kv_bytes_per_token": each.kv_bytes_per_token,
                    "sent_bytes_per_token": each.sent_bytes_per_token,
                    "step_s": {str(batch): seconds for batch, seconds in each.step_s.items()},
                }
                for each in self.stages
            ],
        }


def split(
    files: ModelFiles, times: LayerTimes, stages: str, room_bytes: Sequence[int] = (), *, batch: int, dtype: str
) -> tuple[StageRange, ...]:
    """``stages``: a number, or ``auto``: the fewest whose dearest one has no layer more than the others need. With
    ``room_bytes`` by memory. Raises StagedModelError."""
    if room_bytes:
        layer_bytes, first, last = _bytes(files, dtype)
        return by_memory(layer_bytes, room_bytes, first=first, last=last)
    costs, first_s, last_s = times.layers[batch], times.embedding[batch], times.head[batch]
    if stages == "auto":
        return _automatic(costs, first_s, last_s)
    if not stages.isdigit():
        raise StagedModelError(f"--stages {stages!r}: must be a number or auto")
    return balanced(costs, int(stages), first=first_s, last=last_s)


def _automatic(costs: Sequence[float], first: float, last: float) -> tuple[StageRange, ...]:
    """As many stages, up to eight, as are busy for nine tenths of the time when the dearest one always is."""
    found = balanced(costs, 1)
    for count in range(2, min(len(costs), 8) + 1):
        stages = balanced(costs, count, first=first, last=last)
        each = [
            sum(costs[s.begin : s.end]) + (first if s.begin == 0 else 0) + (last if s.end == len(costs) else 0)
            for s in stages
        ]
        if sum(each) / (count * max(each)) >= 0.9:
            found = stages
    return found


def make_plan(files: ModelFiles, ranges: Sequence[StageRange], times: LayerTimes, dtype: str) -> Plan:
    item = _ITEM_BYTES[dtype]
    scale = item / _ITEM_BYTES[files.architecture.dtype]
    last = files.architecture.layers
    return Plan(
        model=str(files.directory),
        dtype=dtype,
        stages=tuple(
            PlannedStage(
                stage=stage,
                weights_bytes=round(files.stage_bytes(stage) * scale),
                kv_bytes_per_token=files.architecture.kv_bytes(len(stage), item),
                sent_bytes_per_token=files.architecture.hidden * item if stage.end < last else 0,
                step_s={batch: times.stage_s(stage, batch) for batch in times.layers},
            )
            for stage in ranges
        ),
    )


def _bytes(files: ModelFiles, dtype: str) -> tuple[list[int], int, int]:
    """Of each layer, of the embedding and of the head."""
    layers = files.architecture.layers
    scale = _ITEM_BYTES[dtype] / _ITEM_BYTES[files.architecture.dtype]
    whole = [files.stage_bytes(StageRange(begin=i, end=i + 1)) for i in range(layers)]
    if layers == 1:
        return [round(whole[0] * scale)], 0, 0
    middle = whole[1] if layers > 2 else min(whole)
    first, last = whole[0] - middle, whole[-1] - middle
    return [round(middle * scale)] * layers, round(first * scale), round(last * scale)


def measure(
    files: ModelFiles, *, dtype: str, device: str, threads: int, batches: Sequence[int] = BATCHES
) -> LayerTimes:
    """Seconds here. Raises ImportError without torch, StagedModelError for a model that cannot be served."""
    from chiron.engines.staged.torch_parts import torch

    torch.set_num_threads(threads)
    count = files.architecture.layers
    windows = files.architecture.windows
    shapes: dict[int, Mapping[int, float]] = {}
    for window in dict.fromkeys(windows):
        inner = [i for i, each in enumerate(windows) if each == window and 0 < i < count - 1]
        at = inner[0] if inner else windows.index(window)
        shapes[window] = _times(files, StageRange(begin=at, end=at + 1), dtype, device, batches)
    first = _times(files, StageRange(begin=0, end=1), dtype, device, batches)
    last = _times(files, StageRange(begin=count - 1, end=count), dtype, device, batches)
    return LayerTimes(
        layers={batch: tuple(shapes[window][batch] for window in windows) for batch in batches},
        embedding={batch: max(0.0, first[batch] - shapes[windows[0]][batch]) for batch in batches},
        head={batch: max(0.0, last[batch] - shapes[windows[-1]][batch]) for batch in batches},
    )


def _times(
    files: ModelFiles, stage: StageRange, dtype: str, device: str, batches: Sequence[int]
) -> Mapping[int, float]:
    from chiron.engines.staged.kv import Entry, KvStore
    from chiron.engines.staged.layers import StageLayers
    from chiron.engines.staged.torch_parts import torch

    layers = StageLayers(files, stage, dtype=dtype, device=device)
    context = min(CONTEXT_TOKENS, files.architecture.context_tokens - _REPEATS - 2)
    found = {}
    for batch in batches:
        kv = KvStore(
            files.architecture,
            len(stage),
            capacity_tokens=batch * (context + 256),
            dtype=layers.dtype,
            device=layers.device,
        )
        seconds = []
        for position in range(context, context + _REPEATS + 1):
            entries = [Entry(key=i, position=position, count=1, want=1) for i in range(batch)]
            if position == context:
                for i in range(batch):
                    kv.reserve(Entry(key=i, position=0, count=context))
            for entry in entries:
                kv.reserve(entry)
            given = torch.zeros(batch, dtype=torch.int64)
            if not layers.first:
                given = torch.randn(batch, files.architecture.hidden).to(layers.dtype)
            began_s = time.perf_counter()
            layers.run(given, entries, kv)
            if layers.device.type != "cpu":
                torch.cuda.synchronize(layers.device)
            seconds.append(time.perf_counter() - began_s)
        found[batch] = median(seconds[1:])
    return found
