"""Plots of profiles: fitted curves over the points they were fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_points import StepPoint
from chiron.telemetry.palette import COLOURS

FORMATS = (".png", ".svg", ".pdf")
CONTEXTS = (256, 1024, 4096, 16384)
PREFILL_MAX_TOKENS = 16384


def plot_profiles(profiles: Sequence[tuple[Profile, Sequence[StepPoint]]], out: Path) -> None:
    """One row a profile: ITL over batch size at several contexts, and prefill over prompt length.

    Curves end where the contexts exceed the KV capacity or the batch the engine's limit. Raises ProfileError.
    """
    if out.suffix.lower() not in FORMATS:
        raise ProfileError(f"--out is {str(out)!r}; its ending must be one of {', '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ProfileError("plots need matplotlib; install it with: pip install 'chiron-serving[report]'") from None
    # A figure of its own, not pyplot's: no display, no global state.
    figure = Figure(figsize=(11, 4.2 * len(profiles)), layout="constrained")
    axes = figure.subplots(len(profiles), 2, squeeze=False)
    for (decode, prefill), (profile, points) in zip(axes, profiles, strict=True):
        _draw_decode(decode, profile, points)
        _draw_prefill(prefill, profile, points)
    try:
        figure.savefig(out, dpi=140)
    except OSError as error:
        raise ProfileError(f"--out {out} cannot be written: {error.strerror}") from None


def _draw_decode(axes: Any, profile: Profile, points: Sequence[StepPoint]) -> None:
    for context, colour in zip(CONTEXTS, COLOURS, strict=False):
        most = min(profile.max_num_seqs, profile.kv_capacity_tokens // context)
        if most < 1:
            continue
        batches = np.unique(np.geomspace(1, most, 100).round().astype(int)).tolist()
        fitted = [1000 * profile.step_s(decoding=batch, context_tokens=batch * context) for batch in batches]
        axes.plot(batches, fitted, color=colour, label=f"{context:,}")
        measured = [p for p in points if p.phase == "decode" and p.context_len == context and p.decoding <= most]
        axes.plot([p.decoding for p in measured], [p.latency_ms for p in measured], "o", color=colour, markersize=4)
    title = f"{profile.name}: ITL"
    if profile.mape > 0:
        title += f" (all steps: {100 * profile.mape:.1f} % off on average, {100 * profile.max_error:.0f} % at worst)"
    _finish(axes, title, "decoding sequences", 1024)
    axes.legend(title="context, tokens", loc="upper left", frameon=False, fontsize=8, title_fontsize=8)


def _draw_prefill(axes: Any, profile: Profile, points: Sequence[StepPoint]) -> None:
    tokens = np.unique(np.geomspace(1, PREFILL_MAX_TOKENS, 200).round().astype(int)).tolist()
    fitted = [1000 * profile.step_s(decoding=0, context_tokens=0, prefill_tokens=n) for n in tokens]
    axes.plot(tokens, fitted, color=COLOURS[0], label="fitted")
    measured = [p for p in points if p.phase == "prefill"]
    if measured:
        n, ms = [p.prefill_tokens for p in measured], [p.latency_ms for p in measured]
        axes.plot(n, ms, "o", color=COLOURS[1], markersize=4, label="grid it was fitted to")
    axes.axvline(profile.max_num_batched_tokens, color="0.6", linestyle=":", label="token budget of a step")
    _finish(axes, f"{profile.name}: prefill in one step", "prompt tokens", PREFILL_MAX_TOKENS)
    axes.legend(loc="upper left", frameon=False, fontsize=8)


def _finish(axes: Any, title: str, xlabel: str, most: int) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(0.9, most * 1.15)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel("ms")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color="0.92", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
