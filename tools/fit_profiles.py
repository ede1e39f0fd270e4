"""Regenerate the packaged profiles and their grid: ``python tools/fit_profiles.py DIRECTORY``.

DIRECTORY holds ``aic_vllm_step_latency_grid.csv``: GPU times of one vLLM step, computed with aiconfigurator-core 0.12.0
(Apache-2.0) from kernel times that NVIDIA measured. Columns: see ``chiron.engines.profile_points``.
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from chiron.engines.profile_fit import fit_profile
from chiron.engines.profile_hardware import DEFAULT_PRICE_PER_GPU_HOUR, MODEL_SHAPES, kv_capacity_tokens
from chiron.engines.profile_points import GRID, read_points
from chiron.engines.profile_store import PACKAGED, save_profile

GRID_CSV = "aic_vllm_step_latency_grid.csv"
MODELS = {
    "meta-llama/Meta-Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Meta-Llama-3.1-70B": "llama-3.1-70b",
}
ENGINES = {"a100": "vllm 0.14.0", "h100": "vllm 0.24.0", "h200": "vllm 0.24.0"}
COLUMNS = ("model", "tp", "system", "phase", "decode_batch", "context_len", "prefill_tokens", "latency_ms")


def main(directory: str) -> None:
    with (Path(directory) / GRID_CSV).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["model"] = MODELS[row["model"]]
        row["system"] = row["system"].removesuffix("_sxm")
    _write_grid(rows)
    for model, gpu, tp in sorted({(row["model"], row["system"], int(row["tp"])) for row in rows}):
        _write_profile(model, gpu, tp)


def _write_grid(rows: Sequence[Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    # No time stamp in the header: the same grid gives the same file.
    GRID.parent.mkdir(parents=True, exist_ok=True)
    GRID.write_bytes(gzip.compress(text.getvalue().encode(), 9, mtime=0))


def _write_profile(model: str, gpu: str, tp: int) -> None:
    report = fit_profile(read_points(GRID, model=model, system=gpu, tp=tp).points)
    shape = MODEL_SHAPES[model]
    profile = report.profile(
        name=f"{model}/{gpu}/tp{tp}",
        model=model,
        gpu=gpu,
        tp=tp,
        engine="vllm",
        kv_capacity_tokens=kv_capacity_tokens(shape, gpu, tp),
        kv_bytes_per_token=shape.kv_bytes_per_token,
        price_per_gpu_hour=DEFAULT_PRICE_PER_GPU_HOUR[gpu],
        source=f"fit to {report.error.points} step times of {ENGINES[gpu]} on {gpu.upper()} SXM, bfloat16, from"
        " NVIDIA's measured kernel times (aiconfigurator-core 0.12.0, Apache-2.0). GPU time only: no CPU, tokenizer or"
        " HTTP. KV capacity estimated.",
    )
    path = PACKAGED / f"{profile.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_profile(profile, path)
    phases = "  ".join(f"{phase} {100 * e.mape:.1f}/{100 * e.max_error:.1f}" for phase, e in report.by_phase.items())
    print(
        f"{profile.name:26} mean/max error %: knee {100 * profile.mape:.1f}/{100 * profile.max_error:.1f}  "
        f"linear {100 * profile.linear_mape:.1f}/{100 * profile.linear_max_error:.1f}  {phases}"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/fit_profiles.py DIRECTORY (the one with " + GRID_CSV + ")")
    main(sys.argv[1])
