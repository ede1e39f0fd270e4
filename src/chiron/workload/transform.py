"""Traces from traces: a slice, another rate, one after the other.

**Scaling the rate.** "Ten times this trace" has to say what happens to burstiness. Thinning or jittered copies make
any trace more like Poisson; copies without jitter make it clump; compressing time keeps every gap's shape but ends
the day early. We keep two things at two time scales, separated by a window (by default the time in which a typical
request sees 100 more, so that the count of a window is rate rather than chance):

- above the window, the *rate profile*: every window holds ``factor`` times its arrivals, so day shapes and spikes
  stay as tall in proportion as they were;
- inside it, the *process*: the window's own arrivals run past ``factor`` times as fast, as on a wheel that turns
  ``factor`` times a window from a random angle. Gaps keep their distribution up to the scale, hence their CV, and so
  does the variance-to-mean ratio of short counts. Poisson stays Poisson, Gamma stays Gamma.

So silences longer than a window stay as long as they were while gaps inside windows shrink, and a burst shorter than
a window becomes several shorter ones. With a factor that is not whole, the total is ``factor`` times the arrivals
only on average: a part turn catches more or fewer of a window's bursts.

The first turn of the wheel keeps each arrival's own lengths; further turns borrow lengths from arrivals nearby, so
that one rare huge prompt does not come ``factor`` times within seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np

from chiron.workload.errors import WorkloadSettingError, require
from chiron.workload.seeds import generator
from chiron.workload.types import Trace

_WINDOW_ARRIVALS = 100
_WINDOW_MIN_S, _WINDOW_MAX_S = 10.0, 600.0
_LENGTH_NEIGHBOURS = 500
"""Borrowed lengths come from at most this many arrivals before or after."""


def slice_trace(trace: Trace, *, start_s: float = 0.0, duration_s: float = inf) -> Trace:
    """Arrivals in ``[start_s, start_s + duration_s)``, re-based so that ``start_s`` becomes 0."""
    require(0 <= start_s < inf, "start", start_s, "at least 0 s and finite")
    require(duration_s > 0, "duration", duration_s, "above 0 s")
    first, last = np.searchsorted(trace.arrival_s, [start_s, start_s + duration_s])
    if first == last:
        span = f"{trace.arrival_s[0]:g} s to {trace.arrival_s[-1]:g} s" if len(trace) else "nothing"
        kept = f"start {start_s:g} s" + ("" if duration_s == inf else f", duration {duration_s:g} s")
        raise WorkloadSettingError(f"{kept}: no request there; the trace covers {span}")
    return Trace(
        arrival_s=trace.arrival_s[first:last] - start_s,
        input_tokens=trace.input_tokens[first:last],
        output_tokens=trace.output_tokens[first:last],
        source=f"{trace.source}; from {start_s:g} s {'on' if duration_s == inf else f'for {duration_s:g} s'}",
        bad_rows=trace.bad_rows,
    )


def scale_rate(trace: Trace, factor: float, *, window_s: float | None = None, seed: int = 0) -> Trace:
    """The trace at ``factor`` times its rate, over the same time, as bursty as before (see the module's text).

    ``window_s`` separates the two time scales; None derives it from the arrivals.
    """
    require(0 < factor < inf, "rate scale", factor, "above 0 and finite")
    require(window_s is None or 0 < window_s < inf, "window_s", window_s, "above 0 and finite")
    count = len(trace)
    if count == 0:
        return trace
    span_s = float(trace.arrival_s[-1]) * (1 + 1 / count) or 1.0
    if window_s is None:
        window_s = _default_window_s(trace, span_s)
    windows = max(1, round(span_s / window_s))
    width_s = span_s / windows
    rng = generator(seed, "scale rate")
    window = np.minimum((trace.arrival_s / width_s).astype(np.int64), windows - 1)
    start_angle = rng.random(windows)[window]
    # The arrival's angle as seen from where its window's wheel starts: it passes at angle, angle + 1, ... < factor.
    angle = (trace.arrival_s / width_s - window - start_angle) % 1.0
    passes = np.maximum(np.ceil(factor - angle), 0).astype(np.int64)
    origin = np.repeat(np.arange(count), passes)
    turn = np.arange(len(origin)) - np.repeat(np.cumsum(passes) - passes, passes)
    arrival_s = (window[origin] + (angle[origin] + turn) / factor) * width_s
    near = np.clip(origin + rng.integers(-_LENGTH_NEIGHBOURS, _LENGTH_NEIGHBOURS + 1, len(origin)), 0, count - 1)
    lengths_from = np.where(turn == 0, origin, near)
    order = np.argsort(arrival_s, kind="stable")
    return Trace(
        arrival_s=arrival_s[order],
        input_tokens=trace.input_tokens[lengths_from[order]],
        output_tokens=trace.output_tokens[lengths_from[order]],
        source=f"{trace.source}; rate x {factor:g} (windows of {width_s:.3g} s, seed {seed})",
        bad_rows=trace.bad_rows,
    )


def _default_window_s(trace: Trace, span_s: float) -> float:
    ahead_s = trace.arrival_s[_WINDOW_ARRIVALS:] - trace.arrival_s[:-_WINDOW_ARRIVALS]
    typical_s = float(np.median(ahead_s)) if len(ahead_s) else span_s
    return min(max(typical_s, _WINDOW_MIN_S), _WINDOW_MAX_S)


def concat(traces: Sequence[Trace], *, gap_s: float = 0.0) -> Trace:
    """One after the other: each begins ``gap_s`` after the last arrival of the one before."""
    require(len(traces) > 0, "traces", len(traces), "at least one")
    require(0 <= gap_s < inf, "gap_s", gap_s, "at least 0 and finite")
    arrivals, offset_s = [], 0.0
    for trace in traces:
        arrivals.append(trace.arrival_s + offset_s)
        offset_s = (float(arrivals[-1][-1]) if len(trace) else offset_s) + gap_s
    return Trace(
        arrival_s=np.concatenate(arrivals),
        input_tokens=np.concatenate([trace.input_tokens for trace in traces]),
        output_tokens=np.concatenate([trace.output_tokens for trace in traces]),
        source=" then ".join(trace.source for trace in traces),
        bad_rows=tuple(row for trace in traces for row in trace.bad_rows),
    )
