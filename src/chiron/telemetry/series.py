"""Series for charts: thinned so that nothing seen is invented and no peak is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

import numpy as np
import numpy.typing as npt

from chiron.telemetry.run_data import FleetPoint, RunData

Floats = npt.NDArray[np.float64]

POINTS_MAX = 2000
CDF_POINTS = 125
SHORTEST_S = 1e-4
"""A log axis has no zero: what is shorter is drawn here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cdf:
    """A cumulative distribution: ``share`` of all requests have at most ``value``."""

    value: Floats
    share: Floats


def thin(values: Floats, limit: int = POINTS_MAX) -> npt.NDArray[np.int64]:
    """Indices of at most ``limit`` points: of each stretch the lowest, the highest and the last one (nan: the last)."""
    n = len(values)
    if n <= limit:
        return np.arange(n)
    kept: list[int] = []
    for stretch in np.array_split(np.arange(n), max(1, limit // 3)):
        seen = stretch[~np.isnan(values[stretch])]
        if len(seen):
            kept += [int(seen[values[seen].argmin()]), int(seen[values[seen].argmax()])]
        kept.append(int(stretch[-1]))
    return np.unique(kept)


def thin_fleet(points: Sequence[FleetPoint], key: Callable[[FleetPoint], float], limit: int) -> list[FleetPoint]:
    """Points of one model, thinned by ``key``, the figure whose peaks must stay."""
    return [points[i] for i in thin(np.array([float(key(p)) for p in points]), limit)]


def gpus_over_time(result: RunData, limit: int = POINTS_MAX) -> tuple[Floats, Floats]:
    """GPUs billed over all models: times in seconds, GPUs from then on."""
    now: dict[str, int] = {}
    totals: dict[float, float] = {}
    for point in result.fleet:
        now[point.model] = point.gpus
        totals[point.t_s] = float(sum(now.values()))
    times, gpus = np.array(list(totals)), np.array(list(totals.values()))
    kept = thin(gpus, limit)
    return times[kept], gpus[kept]


def cdf(values: Floats) -> Cdf:
    """Distribution over all ``values``; a nan (it never happened) counts among all, so the curve ends below 1."""
    seen = np.sort(values[~np.isnan(values)])
    if not len(seen):
        return Cdf(value=np.empty(0), share=np.empty(0))
    ranks = cdf_ranks(len(seen), len(values))
    return Cdf(value=seen[ranks], share=(ranks + 1) / len(values))


def cdf_ranks(seen: int, total: int) -> npt.NDArray[np.int64]:
    """Ranks to draw: half of them evenly, half of them by the logarithm of the share that is slower, so that the few
    slowest of many are drawn, too."""
    evenly = np.linspace(0, seen - 1, min(seen, CDF_POINTS))
    slower = np.geomspace(max(1, total - seen), max(2, total), min(seen, CDF_POINTS))
    ranks = np.concatenate([evenly, total - slower, [0, seen - 1]]).round().astype(np.int64)
    return np.unique(ranks[(ranks >= 0) & (ranks < seen)])


def latency_cdf(result: RunData, cls: int, measure: str) -> Cdf:
    """``measure`` of the requests of class number ``cls``: ``ttft``, ``itl`` (seconds) or ``deadline`` (share of the
    time to the deadline that was used). Requests without a second token have no ITL and are not counted in it."""
    table = result.requests
    mine = table.cls == cls
    if measure == "ttft":
        return cdf(table.ttft_s()[mine])
    if measure == "itl":
        # A finished request of one token has no gap to measure; every other one without an ITL is a miss.
        return cdf(table.itl_s()[mine & ~((table.outcome == 0) & (table.output_tokens <= 1))])
    used = (table.finish_s - table.arrival_s) / (table.deadline_s - table.arrival_s)
    return cdf(np.where(table.outcome == 0, used, np.nan)[mine])


def measures(result: RunData, cls: int) -> list[tuple[str, str, float]]:
    """What class number ``cls`` is judged by: measure, axis title, limit. TTFT without a limit if by nothing."""
    slo = result.classes[cls]
    due = np.isfinite(result.requests.deadline_s[result.requests.cls == cls]).any()
    asked = [
        ("ttft", "time to first token, s", slo.ttft_s),
        ("itl", "mean inter-token latency, s", slo.itl_s),
        ("deadline", "share of the time to the deadline used", 1.0 if due else np.inf),
    ]
    return [one for one in asked if np.isfinite(one[2])] or asked[:1]


def log_axis(curves: Sequence[Cdf], limit: float) -> tuple[float, float, list[float]]:
    """Ends and ticks, in seconds, of a logarithmic axis that shows all curves and the limit, if that is finite."""
    seen = [float(v) for c in curves if len(c.value) for v in (c.value[0], c.value[-1])]
    seen = [max(v, SHORTEST_S) for v in (*seen, limit) if isfinite(v)] or [1.0]
    low, high = min(seen) / 1.25, max(seen) * 1.25
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    # Numbers that touch are worse than few: 2 and 5 only on a short axis.
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return low, high, [tick for tick in ticks if low <= tick <= high]
