"""Check the A100 profiles against an independent measurement: ``python tools/check_profiles.py DIRECTORY``.

DIRECTORY holds Vidur's A100 profiling data (MIT): ``a100_Meta-Llama-3-{8B,70B}_mlp.csv``, the time of every operator of
a layer but attention and the output projection over the number of tokens, and ``a100_dgx_all_reduce.csv``. Summed over
the layers (and with two all-reduces a layer when TP > 1) they are compared with our step without its context and
attention terms, ``base_s(tokens)``. Ours also holds the attention kernels' fixed cost and the output projection, which
shows at few tokens on one GPU; theirs used older kernels, which shows at many tokens, and NCCL's all-reduce where vLLM
has its own, which shows at few tokens with TP. Nothing of that data is packaged.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from chiron.engines.profile_hardware import MODEL_SHAPES
from chiron.engines.profile_store import load_profile

TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
PER_LAYER = (
    "input_layernorm",
    "attn_pre_proj",
    "attn_rope",
    "attn_post_proj",
    "post_attention_layernorm",
    "mlp_up_proj",
    "mlp_act",
    "mlp_down_proj",
    "add",
    "add",  # A layer adds its residual twice; the data time one.
)
CASES = (
    ("8B", "llama-3.1-8b", 1, 4096),
    ("8B", "llama-3.1-8b", 2, 4096),
    ("70B", "llama-3.1-70b", 4, 8192),
    ("70B", "llama-3.1-70b", 8, 8192),
)
"""Vidur's name, ours, TP, hidden size."""


def main(directory: Path) -> None:
    print(f"{'profile':24}{'tokens':>8}{'operators ms':>14}{'profile ms':>12}{'ratio':>8}")
    for vidur_name, model, tp, hidden in CASES:
        profile = load_profile(f"{model}/a100/tp{tp}")
        operators = _operators_ms(directory / f"a100_Meta-Llama-3-{vidur_name}_mlp.csv", tp)
        for tokens in TOKENS:
            total = MODEL_SHAPES[model].layers * operators[tokens]
            if tp > 1:
                total += 2 * MODEL_SHAPES[model].layers * _all_reduce_ms(directory, tp, 2 * hidden * tokens)
            ours = 1000 * profile.base_s(tokens)
            print(f"{profile.name:24}{tokens:>8,}{total:>14.1f}{ours:>12.1f}{ours / total:>8.2f}")


def _operators_ms(path: Path, tp: int) -> dict[int, float]:
    """Milliseconds of one layer, by tokens."""
    with path.open(encoding="utf-8", newline="") as file:
        return {
            int(row["num_tokens"]): sum(float(row[f"time_stats.{name}.median"] or 0) for name in PER_LAYER)
            for row in csv.DictReader(file)
            if int(row["num_tensor_parallel_workers"]) == tp
        }


def _all_reduce_ms(directory: Path, tp: int, size_bytes: int) -> float:
    """The all-reduce nearest in size, among GPUs of one host."""
    with (directory / "a100_dgx_all_reduce.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["num_workers"]) == tp == int(row["devices_per_node"])]
    nearest = min(rows, key=lambda row: abs(int(row["size"]) - size_bytes))
    return float(nearest["time_stats.all_reduce.median"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/check_profiles.py DIRECTORY (the one with a100_Meta-Llama-3-8B_mlp.csv)")
    main(Path(sys.argv[1]))
