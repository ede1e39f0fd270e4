"""Settings from which ``chiron tune`` starts, besides those that a policy has and those that were published.

A budget of a few dozen trials can miss what an earlier search, or another kind of search, has found. Nothing that was
found once is to be lost, whoever's policy it is, so what a tuning chose is added here when the next one replaces it.
The list is declared, not read from the settings in use: a search repeated finds the same.
"""

from __future__ import annotations

from collections.abc import Mapping

STARTS: Mapping[str, tuple[Mapping[str, float | int | bool], ...]] = {
    "chiron": ({"itl_margin": 0.7559, "utilisation": 0.8274, "miss_max": 0.005706, "slack_share": 0.4165},),
    "chiron-paper": (
        {"theta": 0.6},
        {"alpha": 0.1, "theta": 0.1912, "interactive_share": 0.5253, "shrink_after_s": 32.19},
    ),
    "llumnix": (
        {"scale_up_blocks": 1000.0, "scale_down_blocks": 2000.0, "max_num_seqs": 512},
        {"scale_up_blocks": 1000.0, "scale_down_blocks": 4000.0, "max_num_seqs": 256},
        {"scale_up_blocks": 2500.0, "scale_down_blocks": 2550.0, "max_num_seqs": 256},
        {"scale_up_blocks": 714.9, "scale_down_blocks": 6097.0, "max_num_seqs": 71},
    ),
    "hpa-queue": (
        {"target": 0.1},
        {"target": 0.1, "max_num_seqs": 512},
        {"target": 0.2278, "stabilise_down_s": 786.9, "max_num_seqs": 211},
        {"target": 0.09254, "stabilise_down_s": 786.9, "max_num_seqs": 211},
    ),
    "hpa-kv": (
        {"target": 0.02},
        {"target": 0.01696, "stabilise_down_s": 60.0, "max_num_seqs": 137},
    ),
    "knative-kpa": ({"target": 3.602, "stable_window_s": 35.22, "scale_down_delay_s": 295.8, "max_num_seqs": 63},),
    "keda-hpa": ({"waiting_target": 0.2992, "running_target": 2.093, "stabilise_down_s": 157.6, "max_num_seqs": 71},),
    "llm-d-slo": ({"up_at": 0.06751, "down_at": 0.05048, "stabilise_down_s": 129.2, "max_num_seqs": 376},),
    "ray-serve": ({"target_ongoing": 12.33, "max_ongoing": 50, "upscale_delay_s": 19.48, "downscale_delay_s": 172.0},),
    "aibrix-apa": ({"kv_target": 0.01696, "waiting_target": 0.2004, "window_s": 45.64, "max_num_seqs": 63},),
    "skyserve": ({"target_qps": 1.108, "upscale_delay_s": 82.64, "downscale_delay_s": 526.9, "max_num_seqs": 109},),
}
"""By policy, in the order in which they were found; what one does not name is as published."""
