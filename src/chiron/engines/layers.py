"""Profiles by layer: what a range of a model's layers takes, as a profile of its own.

A whole step is that of all layers and of the head (``engines.profile`` has its form); a stage of n layers takes n
shares of it, and the last one the head. So the stages of a model add up to the model (within a percent, as the head is
charged by its weights only), and what splitting costs is in what they do besides: hops, an engine's overhead for each,
and weights that are read again for each micro-batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_hardware import (
    GIB,
    GPU_MEMORY_BYTES,
    MEMORY_FRACTION,
    MODEL_SHAPES,
    RUNTIME_BYTES_PER_GPU,
)

LAYERS = Path(str(files("chiron"))) / "data" / "layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """Step times and sizes of one model on one GPU, by layer."""

    name: str
    """For example ``llama-2-13b/a100``."""
    model: str
    gpu: str
    engine: str
    layers: int
    hidden: int
    """Width of an activation."""
    layer_bytes: int
    embedding_bytes: int
    head_bytes: int
    kv_bytes_per_token: int
    """Of one layer."""
    layer_h_ms: float
    layer_w0_ms: float
    layer_f_ms_per_token: float
    layer_c_ms_per_context_token: float
    layer_q_ms_per_token_squared: float
    head_w0_ms: float
    """Reading the head's weights, once a pass."""
    price_per_gpu_hour: float = 0.0
    mape: float = 0.0
    """Of the fit against the sums of kernel times, as fractions."""
    max_error: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.type == "int" else 0
            if field.type != "str" and not (isfinite(value) and value >= least):
                raise ProfileError(
                    f"profile by layer {self.name!r}: {field.name} is {value!r}; it must be {least} or more"
                )

    def weight_bytes(self, first: int, last: int) -> int:
        """Of layers ``first`` to ``last``, with the embedding and the head where they belong."""
        ends = self.embedding_bytes * (first == 0) + self.head_bytes * (last == self.layers - 1)
        return (last - first + 1) * self.layer_bytes + ends

    def stage(
        self,
        first: int,
        last: int,
        *,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        step_overhead_ms: float = 0.0,
        request_overhead_ms: float = 0.0,
        price_per_gpu_hour: float | None = None,
    ) -> Profile:
        """The profile of these layers on one GPU. Raises ProfileError: out of range, or too large for it."""
        if not 0 <= first <= last < self.layers:
            raise ProfileError(f"layers {first}-{last} of {self.name!r}; it has 0-{self.layers - 1}")
        count, ends = last - first + 1, last == self.layers - 1
        return Profile(
            name=f"{self.name}/{first}-{last}",
            model=self.model,
            gpu=self.gpu,
            tp=1,
            engine=self.engine,
            h_ms=count * self.layer_h_ms,
            w0_ms=count * self.layer_w0_ms + ends * self.head_w0_ms,
            f_ms_per_token=count * self.layer_f_ms_per_token,
            c_ms_per_context_token=count * self.layer_c_ms_per_context_token,
            q_ms_per_token_squared=count * self.layer_q_ms_per_token_squared,
            kv_capacity_tokens=self._kv_capacity(first, last),
            kv_bytes_per_token=count * self.kv_bytes_per_token,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            step_overhead_ms=step_overhead_ms,
            request_overhead_ms=request_overhead_ms,
            price_per_gpu_hour=self.price_per_gpu_hour if price_per_gpu_hour is None else price_per_gpu_hour,
            source=self.source,
        )

    def _kv_capacity(self, first: int, last: int) -> int:
        weights = self.weight_bytes(first, last)
        room = MEMORY_FRACTION * GPU_MEMORY_BYTES[self.gpu] - RUNTIME_BYTES_PER_GPU - weights
        tokens = int(room / ((last - first + 1) * self.kv_bytes_per_token))
        if tokens < 1:
            raise ProfileError(
                f"layers {first}-{last} of {self.name!r} ({weights / GIB:.1f} GiB) leave no room for KV on one "
                f"{self.gpu}; use more stages"
            )
        return tokens


def even_split(layers: int, stages: int) -> list[tuple[int, int]]:
    """Ranges of layers that differ by one at most, the shorter ones last, where the head is."""
    if not 1 <= stages <= layers:
        raise ProfileError(f"{stages} stages of {layers} layers; allowed: 1 to {layers}")
    ranges, first = [], 0
    for number in range(stages):
        count = layers // stages + (number < layers % stages)
        ranges.append((first, first + count - 1))
        first += count
    return ranges


def check_ranges(ranges: Sequence[tuple[int, int]], layers: int) -> None:
    """Raises ProfileError for a hole, an overlap, or an end that is missing."""
    following = 0
    for first, last in ranges:
        if first > last:
            raise ProfileError(f"layers {first}-{last} descend")
        if first > following:
            raise ProfileError(f"a hole: layers {following}-{first - 1} belong to no stage")
        if first < following:
            raise ProfileError(f"an overlap: layer {first} belongs to two stages")
        following = last + 1
    if following < layers:
        raise ProfileError(f"a hole: layers {following}-{layers - 1} belong to no stage")
    if following > layers:
        raise ProfileError(f"layer {following - 1} does not exist; the model has 0-{layers - 1}")


@cache
def layer_profile_names() -> tuple[str, ...]:
    """Names of the packaged profiles by layer, sorted."""
    return tuple(sorted(path.relative_to(LAYERS).with_suffix("").as_posix() for path in LAYERS.rglob("*.json")))


def load_layer_profile(name_or_path: str | Path) -> LayerProfile:
    """The packaged one of that name, else the one in that JSON file. Raises ProfileError."""
    text = str(name_or_path)
    path = LAYERS / f"{text}.json" if text in layer_profile_names() else Path(name_or_path)
    if not path.is_file():
        close = get_close_matches(text, layer_profile_names(), n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ProfileError(
            f"profile by layer {text!r} is neither packaged nor a file; {hint}"
            f"packaged: {', '.join(layer_profile_names())}"
        )
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProfileError(f"profile by layer {path}: cannot be read: {error}") from None
    return _checked(data, str(path))


def weight_bytes(profile: Profile) -> int:
    """Of a whole model whose size is known; 0 else."""
    if profile.name in layer_profile_names():
        layered = load_layer_profile(profile.name)
        return layered.weight_bytes(0, layered.layers - 1)
    return MODEL_SHAPES[profile.model].weight_bytes if profile.model in MODEL_SHAPES else 0


def _checked(data: Any, where: str) -> LayerProfile:
    types = {"str": str, "int": int, "float": (int, float)}
    known = {field.name: types[str(field.type)] for field in fields(LayerProfile)}
    if not isinstance(data, dict):
        raise ProfileError(f"profile by layer {where}: expected one JSON object, found {type(data).__name__}")
    for key, value in data.items():
        if key not in known:
            raise ProfileError(f"profile by layer {where}: unknown key {key!r}; allowed: {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, known[key]):  # type: ignore[arg-type]
            raise ProfileError(f"profile by layer {where}: {key} is {value!r}, of the wrong type")
    try:
        return LayerProfile(**data)
    except TypeError as error:
        raise ProfileError(f"profile by layer {where}: {error}") from None
