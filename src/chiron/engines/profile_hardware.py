"""What a profile needs to know of a GPU and a model besides step times: memory, KV size, a price.

KV capacity of an instance follows vLLM's rule: 0.9 of the memory, less weights, less what activations, CUDA graphs and
communication buffers take, over the KV bytes of a token. It is an estimate; an engine prints its own at start.
"""

from __future__ import annotations

from dataclasses import dataclass

from chiron.engines.profile import ProfileError

GIB = 1 << 30

GPU_MEMORY_BYTES = {"a100": 80 * GIB, "h100": 80 * GIB, "h200": 141 * GIB}
"""SXM boards, as the driver reports them to within half a percent."""

DEFAULT_PRICE_PER_GPU_HOUR = {"a100": 2.0, "h100": 3.0, "h200": 3.8}
"""US dollars, round figures of ours so that costs can be compared at all. Prices differ by a factor of two between
sellers and contracts: put your own in the profile or the scenario."""

MEMORY_FRACTION = 0.9
"""vLLM's default ``gpu_memory_utilization``."""
RUNTIME_BYTES_PER_GPU = 2_850_000_000
"""Activations of a step of 2,048 tokens, CUDA graphs, NCCL buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The part of a decoder's architecture that sets its memory."""

    parameters: int
    layers: int
    kv_heads: int
    head_dim: int
    weight_bytes_per_parameter: int = 2
    """2 for bfloat16."""
    kv_bytes_per_value: int = 2

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token, over all layers and all GPUs of the instance."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes_per_value

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.weight_bytes_per_parameter


MODEL_SHAPES = {
    "llama-3.1-8b": ModelShape(parameters=8_030_261_248, layers=32, kv_heads=8, head_dim=128),
    "llama-3.1-70b": ModelShape(parameters=70_553_706_496, layers=80, kv_heads=8, head_dim=128),
}


def kv_capacity_tokens(shape: ModelShape, gpu: str, tp: int) -> int:
    """KV tokens that fit on an instance of ``tp`` such GPUs. Raises ProfileError for an unknown GPU or no room."""
    if gpu not in GPU_MEMORY_BYTES:
        raise ProfileError(f"gpu {gpu!r} is unknown; known: {', '.join(GPU_MEMORY_BYTES)}")
    room = tp * (MEMORY_FRACTION * GPU_MEMORY_BYTES[gpu] - RUNTIME_BYTES_PER_GPU) - shape.weight_bytes
    tokens = int(room / shape.kv_bytes_per_token)
    if tokens < 1:
        raise ProfileError(f"the weights leave no room for KV on {tp} x {gpu} ({room / GIB:.1f} GiB)")
    return tokens
