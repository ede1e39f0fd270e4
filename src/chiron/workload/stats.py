"""What a trace looks like: rates and burstiness at several time scales, lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chiron.workload.types import Floats, Ints, Trace

WINDOWS_S = (1.0, 10.0, 60.0, 600.0)
_WINDOW_COUNT_MIN = 5
_WINDOW_COUNT_MAX = 20_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStats:
    """Request counts in windows of one width, as rates in requests per second."""

    window_s: float
    windows: int
    rate_p50: float
    rate_p99: float
    rate_max: float
    dispersion: float
    """Variance / mean of the counts: 1 for Poisson, above it when bursty or when the rate drifts."""
    spike: float
    """Largest rise between adjacent windows: the later count / the earlier (at least 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStats:
    requests: int
    span_s: float
    """From 0 to the last arrival."""
    rate: float
    """Mean requests per second over that span."""
    gap_cv: float
    """Standard deviation / mean of the gaps between arrivals; 1 for Poisson."""
    windows: tuple[WindowStats, ...]
    input_tokens: Quantiles
    output_tokens: Quantiles
    input_tokens_per_s: float
    output_tokens_per_s: float


def trace_stats(trace: Trace, windows_s: tuple[float, ...] = WINDOWS_S) -> TraceStats:
    """Widths of which the trace holds fewer than five windows are left out. The trace must not be empty."""
    span_s = float(trace.arrival_s[-1])
    per_s = 1 / span_s if span_s > 0 else float("nan")
    return TraceStats(
        requests=len(trace),
        span_s=span_s,
        rate=len(trace) * per_s,
        gap_cv=gap_cv(trace.arrival_s),
        windows=tuple(
            window_stats(trace.arrival_s, width_s)
            for width_s in windows_s
            if _WINDOW_COUNT_MIN <= span_s / width_s <= _WINDOW_COUNT_MAX
        ),
        input_tokens=quantiles(trace.input_tokens),
        output_tokens=quantiles(trace.output_tokens),
        input_tokens_per_s=float(trace.input_tokens.sum()) * per_s,
        output_tokens_per_s=float(trace.output_tokens.sum()) * per_s,
    )


def gap_cv(arrival_s: Floats) -> float:
    gaps = np.diff(arrival_s)
    return float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() > 0 else float("nan")


def counts(arrival_s: Floats, window_s: float) -> Ints:
    """Arrivals in each whole window from 0 on; the last, partial one is left out."""
    windows = int(arrival_s[-1] // window_s)
    index = (arrival_s // window_s).astype(np.int64)
    return np.bincount(index, minlength=windows)[:windows]


def window_stats(arrival_s: Floats, window_s: float) -> WindowStats:
    counted = counts(arrival_s, window_s)
    p50, p99 = np.quantile(counted, [0.5, 0.99])
    return WindowStats(
        window_s=window_s,
        windows=len(counted),
        rate_p50=float(p50) / window_s,
        rate_p99=float(p99) / window_s,
        rate_max=float(counted.max()) / window_s,
        dispersion=float(counted.var() / counted.mean()) if counted.any() else float("nan"),
        spike=float((counted[1:] / np.maximum(counted[:-1], 1)).max(initial=0.0)),
    )


def quantiles(tokens: Ints) -> Quantiles:
    p50, p90, p99 = np.quantile(tokens, [0.5, 0.9, 0.99])
    return Quantiles(mean=float(tokens.mean()), p50=float(p50), p90=float(p90), p99=float(p99), max=float(tokens.max()))
