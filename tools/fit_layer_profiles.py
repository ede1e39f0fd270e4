#!/usr/bin/env python3
"""Fit profiles by layer (``chiron/data/layers``) to NVIDIA's tables of measured kernel times.

    tools/fit_layer_profiles.py FOLDER

FOLDER holds aiconfigurator-core's Parquet tables (gemm, context and generation attention, all-reduce). A step of
a layer is the sum of its kernels: four matrix products, attention of prompts and of running sequences, and what moves
activations (norms, rotation, activation function), which no table has and is counted by its bytes. A step is that of
all layers and of the head. Steps on the grid of the packaged profiles are fitted as those are; the same sum for models
whose whole steps are packaged says how far it is off.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from chiron.engines.layers import LAYERS, LayerProfile
from chiron.engines.profile_aic import (
    DECODE_BATCHES,
    DECODE_CONTEXTS,
    MIXED_BATCHES,
    MIXED_CONTEXTS,
    MIXED_PREFILL_TOKENS,
    PREFILL_TOKENS,
)
from chiron.engines.profile_fit import fit_profile
from chiron.engines.profile_hardware import DEFAULT_PRICE_PER_GPU_HOUR
from chiron.engines.profile_points import GRID, StepPoint

BYTES_PER_S = {"a100": 2.039e12, "h100": 3.35e12, "h200": 4.8e12}
MOVED = 0.8
"""Share of the memory's bandwidth that kernels reach which only move data."""
VERSION = {"a100": "0.14.0", "h100": "0.24.0", "h200": "0.24.0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder of the Llama family."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int


SHAPES = (
    Shape(name="llama-2-13b", layers=40, hidden=5120, heads=40, kv_heads=40, feed_forward=13824, vocabulary=32000),
    Shape(name="llama-3.1-70b", layers=80, hidden=8192, heads=64, kv_heads=8, feed_forward=28672, vocabulary=128256),
)
SMALL = Shape(name="llama-3.1-8b", layers=32, hidden=4096, heads=32, kv_heads=8, feed_forward=14336, vocabulary=128256)
HEAD_DIM = 128


class Kernels:
    """One GPU's tables."""

    def __init__(self, folder: Path, gpu: str) -> None:
        self.gpu = gpu
        prefix = f"{gpu}_sxm_vllm{VERSION[gpu]}"
        gemm = _rows(folder / f"{prefix}_gemm_perf.parquet", gemm_dtype="bfloat16")
        self._gemm = _grouped(gemm, ("n", "k"), "m")
        self._gemm_n = sorted({n for n, _ in self._gemm})
        self._gemm_k = sorted({k for _, k in self._gemm})
        wanted = {"head_dim": HEAD_DIM, "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "window_size": 0}
        prompts = _rows(folder / f"{prefix}_context_attention_perf.parquet", **wanted)
        self._prompt = _grouped(prompts, ("num_heads", "num_key_value_heads", "batch_size"), "isl")
        running = _rows(folder / f"{prefix}_generation_attention_perf.parquet", **wanted)
        self._running = _grouped(running, ("num_heads", "num_key_value_heads", "batch_size"), "step")
        reduce = _rows(folder / f"{prefix}_custom_allreduce_perf.parquet", backend="vllm_graph")
        self._reduce = _grouped(reduce, ("num_gpus",), "message_size")

    def gemm_ms(self, m: float, n: float, k: float) -> float:
        if n > self._gemm_n[-1]:
            return self.gemm_ms(m, self._gemm_n[-1], k) * n / self._gemm_n[-1]
        total = 0.0
        for one_n, share_n in _between(self._gemm_n, n):
            for one_k, share_k in _between(self._gemm_k, k):
                total += share_n * share_k * _at(self._gemm[one_n, one_k], m)
        return total

    def running_ms(self, heads: int, kv_heads: int, batch: float, context: float) -> float:
        if kv_heads > 8:
            # No table goes that far: what reads KV grows with it, the launch does not.
            launch = self.running_ms(heads, 8, 1, 1)
            return launch + (self.running_ms(heads, 8, batch, context) - launch) * kv_heads / 8
        batches = sorted(b for h, kv, b in self._running if (h, kv) == (heads, kv_heads))
        found = _between(batches, batch) if batch <= batches[-1] else [(batches[-1], batch / batches[-1])]
        return sum(share * _at(self._running[heads, kv_heads, b], context) for b, share in found)

    def prompt_ms(self, heads: int, kv_heads: int, tokens: float) -> float:
        return _at(self._prompt[heads, kv_heads, 1], tokens)

    def reduce_ms(self, gpus: int, size: float) -> float:
        return 0.0 if gpus == 1 else _at(self._reduce[(gpus,)], size)


def layer_ms(kernels: Kernels, shape: Shape, tp: int, tokens: float) -> float:
    """One layer without attention to contexts."""
    hidden, ff = shape.hidden, shape.feed_forward / tp
    q, kv = shape.heads * HEAD_DIM / tp, shape.kv_heads * HEAD_DIM / tp
    products = (
        kernels.gemm_ms(tokens, q + 2 * kv, hidden)
        + kernels.gemm_ms(tokens, hidden, q)
        + kernels.gemm_ms(tokens, 2 * ff, hidden)
        + kernels.gemm_ms(tokens, hidden, ff)
    )
    moved_bytes = 2 * tokens * (2 * 4 * hidden + 2 * (q + kv) + 3 * ff)
    moves = 1000.0 * moved_bytes / (MOVED * BYTES_PER_S[kernels.gpu])
    return products + moves + 2 * kernels.reduce_ms(tp, 2 * tokens * hidden)


def head_ms(kernels: Kernels, shape: Shape, tp: int, sampled: float) -> float:
    return kernels.gemm_ms(max(1.0, sampled), shape.vocabulary / tp, shape.hidden)


def step_ms(kernels: Kernels, shape: Shape, tp: int, phase: str, batch: float, context: float, prompt: float) -> float:
    """One step of the whole model, as the packaged grid means its rows."""
    heads, kv_heads = shape.heads // tp, max(1, shape.kv_heads // tp)
    attention = 0.0
    if phase == "prefill":
        attention = batch * kernels.prompt_ms(heads, kv_heads, prompt / batch)
        sampled, tokens = batch, prompt
    else:
        tokens = batch + prompt
        sampled = batch
        if batch:
            attention += kernels.running_ms(heads, kv_heads, batch, context)
        if prompt:
            attention += kernels.prompt_ms(heads, kv_heads, context) * prompt / context
    return shape.layers * (layer_ms(kernels, shape, tp, tokens) + attention) + head_ms(kernels, shape, tp, sampled)


def points_of(kernels: Kernels, shape: Shape) -> Iterator[StepPoint]:
    """One GPU, on the grid of the packaged profiles."""
    rows = [("decode", b, c, 0) for b in DECODE_BATCHES for c in DECODE_CONTEXTS]
    rows += [("prefill", 1, n, n) for n in PREFILL_TOKENS]
    rows += [("mixed", b, c, n) for b in MIXED_BATCHES for c in MIXED_CONTEXTS for n in MIXED_PREFILL_TOKENS]
    for phase, batch, context, prompt in rows:
        square = prompt * prompt if phase == "prefill" else prompt * context
        yield StepPoint(
            phase=phase,
            decoding=0 if phase == "prefill" else batch,
            context_len=context,
            prefill_tokens=prompt,
            attention=square,
            latency_ms=step_ms(kernels, shape, 1, phase, batch, context, prompt),
        )


def errors_of(kernels: Kernels, shape: Shape, tp: int) -> tuple[float, float]:
    """Of the sum of kernels against the packaged steps of the whole model: mean and worst, as fractions."""
    errors = []
    with gzip.open(GRID, "rt") as text:
        for row in csv.DictReader(text):
            if (row["model"], row["tp"], row["system"]) == (shape.name, str(tp), kernels.gpu):
                batch, context, prompt = (float(row[c]) for c in ("decode_batch", "context_len", "prefill_tokens"))
                summed = step_ms(kernels, shape, tp, row["phase"], batch, context, prompt)
                errors.append(abs(summed / float(row["latency_ms"]) - 1.0))
    return float(np.mean(errors)), float(np.max(errors))


def fitted(kernels: Kernels, shape: Shape) -> LayerProfile:
    gpu = kernels.gpu
    report = fit_profile(list(points_of(kernels, shape)))
    whole = {"h_ms": report.h_ms, "w0_ms": report.w0_ms}
    # The head is read once a step, whatever is sampled; what the rest takes is spread over the layers evenly.
    head = min(head_ms(kernels, shape, 1, 16), 0.9 * whole["w0_ms"])
    compared = [(SMALL, 1)] + [(s, tp) for s, tp in ((SHAPES[1], 4), (SHAPES[1], 8)) if shape.name == s.name]
    off = {f"{s.name}/tp{tp}": errors_of(kernels, s, tp) for s, tp in compared}
    width = shape.heads * HEAD_DIM + 2 * shape.kv_heads * HEAD_DIM
    parameters = shape.hidden * (width + shape.heads * HEAD_DIM + 3 * shape.feed_forward + 2)
    return LayerProfile(
        name=f"{shape.name}/{gpu}",
        model=shape.name,
        gpu=gpu,
        engine="vllm",
        layers=shape.layers,
        hidden=shape.hidden,
        layer_bytes=2 * parameters,
        embedding_bytes=2 * shape.vocabulary * shape.hidden,
        head_bytes=2 * (shape.vocabulary + 1) * shape.hidden,
        kv_bytes_per_token=4 * shape.kv_heads * HEAD_DIM,
        layer_h_ms=_short(whole["h_ms"] / shape.layers),
        layer_w0_ms=_short((whole["w0_ms"] - head) / shape.layers),
        layer_f_ms_per_token=_short(report.f_ms_per_token / shape.layers),
        layer_c_ms_per_context_token=_short(report.c_ms_per_context_token / shape.layers),
        layer_q_ms_per_token_squared=_short(report.q_ms_per_token_squared / shape.layers),
        head_w0_ms=_short(head),
        price_per_gpu_hour=DEFAULT_PRICE_PER_GPU_HOUR[gpu],
        mape=round(report.error.mape, 4),
        max_error=round(report.error.max_error, 4),
        source=(
            f"sums of kernel times of vllm {VERSION[gpu]} on {gpu.upper()} SXM, bfloat16 (aiconfigurator-core 0.12.0, "
            "NVIDIA, Apache-2.0), fitted; GPU time only. Error of such sums against whole steps (mean, worst): "
            + "; ".join(f"{name} {mean:.1%}, {worst:.1%}" for name, (mean, worst) in off.items())
        ),
    )


def _short(value: float) -> float:
    return float(f"{value:.7g}")


def _rows(path: Path, **wanted: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return [row for row in rows if all(row.get(key, value) == value for key, value in wanted.items())]


def _grouped(rows: Sequence[dict[str, Any]], by: Sequence[str], x: str) -> dict[Any, list[tuple[float, float]]]:
    """Latencies over ``x``, ascending; where kernels compete, the quickest."""
    best: dict[Any, dict[float, float]] = {}
    for row in rows:
        curve = best.setdefault(tuple(row[key] for key in by), {})
        curve[row[x]] = min(row["latency"], curve.get(row[x], float("inf")))
    return {key: sorted(curve.items()) for key, curve in best.items()}


def _at(curve: Sequence[tuple[float, float]], x: float) -> float:
    """On a line between neighbours; beyond the last in proportion."""
    if x > curve[-1][0]:
        return curve[-1][1] * x / curve[-1][0]
    return float(np.interp(x, [p[0] for p in curve], [p[1] for p in curve]))


def _between(values: Sequence[float], x: float) -> list[tuple[float, float]]:
    at = bisect_right(values, x)
    if at == 0 or values[at - 1] == x or at == len(values):
        return [(values[max(at - 1, 0)], 1.0)]
    low, high = values[at - 1], values[at]
    share = (x - low) / (high - low)
    return [(low, 1.0 - share), (high, share)]


def main(folder: str) -> None:
    for gpu in ("a100", "h100"):
        kernels = Kernels(Path(folder), gpu)
        for shape in SHAPES:
            profile = fitted(kernels, shape)
            target = LAYERS / f"{profile.name}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(asdict(profile), indent=2) + "\n", encoding="utf-8")
            print(profile.name, f"fit {profile.mape:.1%} {profile.max_error:.1%};", profile.source.split("Error")[1])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
