"""The requests of a run over time: arrivals, completions, tokens, latencies.

From the request table alone, so that a client's run, which sees no fleet, has a time axis, too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from math import inf, isfinite, nan

import numpy as np
import numpy.typing as npt

from chiron.telemetry import axes
from chiron.telemetry.marks import INK, Chart, Panel, Rule, Series, peak, steps
from chiron.telemetry.palette import COLOURS, LIMIT_COLOUR, ROLE_COLOURS
from chiron.telemetry.run_data import OUTCOMES, RequestTable, RunData

Floats = npt.NDArray[np.float64]
BINS_MAX = 120
BIN_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 43_200, 86_400)
ROOM = 1.06
LOST_COLOURS = (COLOURS[3], COLOURS[4], LIMIT_COLOUR, COLOURS[7], COLOURS[5])
QUANTILE_REQUESTS_MIN = 5
"""A quantile of fewer says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bins:
    """Equal stretches of time from 0 on; the last one may be shorter."""

    edges_s: Floats

    @property
    def widths_s(self) -> Floats:
        return np.diff(self.edges_s)

    def of(self, times_s: Floats) -> npt.NDArray[np.int64]:
        """The bin of each time; times beyond the ends are in the first and the last one."""
        return np.clip(np.searchsorted(self.edges_s, times_s, side="right") - 1, 0, len(self.edges_s) - 2)

    def rate(self, times_s: Floats) -> Floats:
        """Events per second in each bin."""
        return np.bincount(self.of(times_s), minlength=len(self.edges_s) - 1) / self.widths_s


def bins_of(end_s: float, most: int = BINS_MAX) -> Bins:
    """Round stretches, at most ``most`` of them."""
    end_s = end_s if end_s > 0 else 1.0
    width_s = next((step for step in BIN_STEPS_S if end_s / step <= most), end_s / most)
    edges = np.arange(0.0, end_s, width_s)
    # A sliver at the end would show a rate of nothing.
    edges = edges[:-1] if len(edges) > 1 and end_s - edges[-1] < width_s / 4 else edges
    return Bins(edges_s=np.append(edges, end_s))


def charts(result: RunData, model: str, end_s: float, limit: int = BINS_MAX) -> list[Chart | None]:
    """Requests, tokens and latencies of one model over time, in the order of the page."""
    table = of_model(result, result.models.index(model))
    if not len(table.arrival_s):
        return []
    bins = bins_of(end_s, min(BINS_MAX, limit))
    return [requests(table, bins, end_s), tokens(table, bins, end_s), latency(result, table, bins, end_s)]


def of_model(result: RunData, model: int) -> RequestTable:
    """The rows of one model."""
    table = result.requests
    rows = table.model == model
    return RequestTable(**{field.name: getattr(table, field.name)[rows] for field in fields(table)})


def ended_s(table: RequestTable) -> Floats:
    """When each request was over; for those that never began, when they came."""
    return np.where(table.finish_s >= 0, table.finish_s, table.arrival_s)


def requests(table: RequestTable, bins: Bins, end_s: float) -> Chart:
    """Requests per second: that came and that finished, and beneath it those that were not served, by how they
    ended."""
    per, x_axis = axes.time(end_s)
    at = [*(bins.edges_s / per)]
    over = ended_s(table)
    flow = (
        held("came", INK, at, bins.rate(table.arrival_s), dash="2 2.5"),
        held("finished", ROLE_COLOURS["mixed"], at, bins.rate(over[table.outcome == 0])),
    )
    lost = [(index, name) for index, name in enumerate(OUTCOMES) if index and (table.outcome == index).any()]
    shown = tuple(
        held(name, LOST_COLOURS[index % len(LOST_COLOURS)], at, bins.rate(over[table.outcome == index]))
        for index, name in lost
    )
    panels = [Panel(y=axes.linear("requests/s", 0.0, ROOM * peak(flow)), series=flow, height=220)]
    if shown:
        panels.append(Panel(y=axes.linear("not served, requests/s", 0.0, ROOM * peak(shown)), series=shown, height=120))
    return Chart(title="Requests", x=x_axis, panels=tuple(panels))


def tokens(table: RequestTable, bins: Bins, end_s: float) -> Chart | None:
    """Output tokens per second: of each request evenly between its first token and its end."""
    done = (table.finish_s >= 0) & (table.output_tokens > 0)
    if not done.any():
        return None
    per, x_axis = axes.time(end_s)
    finish = table.finish_s[done]
    first = np.where(table.first_token_s[done] >= 0, table.first_token_s[done], finish)
    made = tokens_until(bins.edges_s, first, finish, table.output_tokens[done].astype(np.float64))
    line = held("output tokens", ROLE_COLOURS["mixed"], [*(bins.edges_s / per)], np.diff(made) / bins.widths_s)
    return Chart(
        title="Output tokens",
        x=x_axis,
        panels=(Panel(y=axes.linear("tokens/s", 0.0, ROOM * peak([line])), series=(line,), height=180),),
    )


def tokens_until(edges_s: Floats, first_s: Floats, finish_s: Floats, tokens: Floats) -> Floats:
    """Tokens made until each edge."""
    # The sum over requests of a ramp from first to finish is a sum of hinges, each a sum over those that began before.
    slope = tokens / np.maximum(finish_s - first_s, 1e-3)
    last_s = first_s + np.maximum(finish_s - first_s, 1e-3)
    return hinges(edges_s, first_s, slope) - hinges(edges_s, last_s, slope)


def hinges(edges_s: Floats, start_s: Floats, slope: Floats) -> Floats:
    """Sum of ``slope * max(0, edge - start)`` at each edge."""
    order = np.argsort(start_s, kind="stable")
    starts, slopes = start_s[order], slope[order]
    count = np.searchsorted(starts, edges_s, side="right")
    total = np.concatenate([[0.0], np.cumsum(slopes)])
    moment = np.concatenate([[0.0], np.cumsum(slopes * starts)])
    summed: Floats = edges_s * total[count] - moment[count]
    return summed


def latency(result: RunData, table: RequestTable, bins: Bins, end_s: float) -> Chart | None:
    """Median and p99 of the TTFT by time of arrival, of each class that has an SLO for it."""
    per, x_axis = axes.time(end_s)
    at = [*(bins.edges_s / per)]
    series: list[Series] = []
    limits: dict[float, list[tuple[str, str]]] = {}
    shown = [(i, c) for i, c in enumerate(result.classes) if c.interactive and (table.cls == i).any()]
    for number, (index, cls) in enumerate(shown):
        mine = (table.cls == index) & (table.first_token_s >= 0)
        for share, name, dash in ((0.99, "p99", ""), (0.5, "p50", "2 2.5")):
            values = quantiles(table.ttft_s()[mine], bins.of(table.arrival_s[mine]), len(bins.widths_s), share)
            if np.isfinite(values).any():
                series.append(held(f"{cls.name} {name}", COLOURS[number % len(COLOURS)], at, values, dash=dash))
        limits.setdefault(cls.ttft_s, []).append((cls.name, COLOURS[number % len(COLOURS)]))
    seen = [value for one in series for value in one.y if isfinite(value)]
    if not seen:
        return None
    rules = [
        Rule(name=f"SLO {limit:g} s", y=limit)
        if len(limits) == 1
        else Rule(name=f"SLO {limit:g} s ({', '.join(name for name, _ in of)})", y=limit, colour=of[0][1])
        for limit, of in limits.items()
        if limit < inf
    ]
    ends = [max(value, 1e-4) for value in (*seen, *(rule.y for rule in rules if rule.y))]
    low, high = min(ends) / 1.3, max(ends) * 1.3
    ticks = [float(f"1e{n}") for n in range(-4, 6) if low <= float(f"1e{n}") <= high]
    ticks = ticks if len(ticks) > 1 else [
        t for n in range(-4, 6) for t in (float(f"1e{n}"), float(f"2e{n}"), float(f"5e{n}")) if low <= t <= high
    ]  # fmt: skip
    return Chart(
        title="Time to first token",
        caption="By time of arrival.",
        x=x_axis,
        panels=(Panel(y=axes.log("seconds", low, high, ticks), series=tuple(series), rules=tuple(rules), height=220),),
    )


def quantiles(values: Floats, bin_of: npt.NDArray[np.int64], count: int, share: float) -> Floats:
    """Of each bin; nan where there are too few."""
    order = np.argsort(bin_of, kind="stable")
    ends = np.searchsorted(bin_of[order], np.arange(count + 1))
    parts = [values[order[a:b]] for a, b in pairwise(ends)]
    return np.array([np.quantile(part, share) if len(part) >= QUANTILE_REQUESTS_MIN else nan for part in parts])


def held(name: str, colour: str, edges: list[float], values: Floats, dash: str = "") -> Series:
    """A value per bin, held from edge to edge."""
    return steps(name, colour, edges, [*values.tolist(), float(values[-1])], dash=dash)
