"""What the fair tuning found (``make tune``, data/tuned.toml); made by tools/write_tuned.py."""

TUNED: dict[str, dict[str, float | int | bool]] = {
    "hpa-queue": {
        "stabilise_down_s": 786.9,
        "target": 0.09254,
        "max_num_seqs": 211,
    },
    "llumnix": {
        "scale_up_blocks": 2500.0,
        "scale_down_blocks": 2550.0,
        "max_num_seqs": 256,
    },
    "hpa-kv": {
        "stabilise_down_s": 60.0,
        "target": 0.01696,
        "max_num_seqs": 137,
    },
    "chiron-paper": {
        "alpha": 0.1,
        "theta": 0.1912,
        "interactive_share": 0.5253,
        "shrink_after_s": 32.19,
    },
    "knative-kpa": {
        "target": 3.602,
        "stable_window_s": 35.22,
        "scale_down_delay_s": 295.8,
        "max_num_seqs": 63,
    },
    "keda-hpa": {
        "waiting_target": 0.2992,
        "running_target": 2.093,
        "stabilise_down_s": 157.6,
        "max_num_seqs": 71,
    },
    "llm-d-slo": {
        "up_at": 0.06751,
        "down_at": 0.05048,
        "stabilise_down_s": 129.2,
        "max_num_seqs": 376,
    },
    "ray-serve": {
        "target_ongoing": 12.33,
        "max_ongoing": 50,
        "upscale_delay_s": 19.48,
        "downscale_delay_s": 172.0,
    },
    "aibrix-apa": {
        "kv_target": 0.01696,
        "waiting_target": 0.2004,
        "window_s": 45.64,
        "max_num_seqs": 63,
    },
    "skyserve": {
        "target_qps": 1.108,
        "upscale_delay_s": 82.64,
        "downscale_delay_s": 526.9,
        "max_num_seqs": 109,
    },
}
