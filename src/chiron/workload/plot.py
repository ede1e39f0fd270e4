"""One picture of a trace: rate over time, lengths, gaps between arrivals. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chiron.workload.errors import WorkloadError
from chiron.workload.types import Floats, Ints, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROMPT, OUTPUT = "#2f6db3", "#d9792b"
_GREY = "#8a8a8a"
_NICE_WINDOWS_S = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 21_600, 86_400)
_POINTS = 400
_CURVE_POINTS = 2000


def plot_trace(trace: Trace, path: str | Path, *, title: str) -> None:
    """Write a PNG, SVG or PDF, by the name's ending. Raises WorkloadError without matplotlib or for another ending."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise WorkloadError(f"{path}: the name must end in .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise WorkloadError("plots need matplotlib: pip install 'chiron-serving[report]'") from error
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    axes: Any = figure.subplot_mosaic([["rate", "rate", "rate"], ["histogram", "cdf", "gaps"]])
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    _rate(axes["rate"], trace.arrival_s)
    _histogram(axes["histogram"], trace)
    _cdf(axes["cdf"], trace)
    _gaps(axes["gaps"], trace.arrival_s)
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def _rate(panel: Axes, arrival_s: Floats) -> None:
    span_s = max(float(arrival_s[-1]), 1e-9)
    width_s = next((width for width in _NICE_WINDOWS_S if span_s / width <= _POINTS), _NICE_WINDOWS_S[-1])
    windows = int(span_s // width_s) + 1
    counted = np.bincount((arrival_s // width_s).astype(np.int64), minlength=windows)
    unit, per = ("s", 1.0) if span_s < 600 else ("minutes", 60.0) if span_s < 4 * 3600 else ("hours", 3600.0)
    # The last window is cut by the end of the trace: its rate counts over what there is of it.
    widths_s = np.full(windows, float(width_s))
    widths_s[-1] = max(span_s - (windows - 1) * width_s, width_s / 10)
    edges = np.append(np.arange(windows) * width_s, span_s) / per
    panel.stairs(counted / widths_s, edges, color=PROMPT, fill=True, alpha=0.75)
    panel.axhline(len(arrival_s) / span_s, color=_GREY, linestyle="--", linewidth=1, label="mean")
    panel.set(title=f"requests per second (windows of {width_s:g} s)", xlabel=unit, ylabel="1/s")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, loc="upper right")


def _histogram(panel: Axes, trace: Trace) -> None:
    longest = _longest(trace)
    bins = np.geomspace(1, longest + 1, 40)
    for tokens, colour, label in _fields(trace):
        panel.hist(tokens, bins=bins.tolist(), color=colour, alpha=0.6, label=label)
    panel.set(title="lengths", ylabel="requests")
    panel.set_ylim(top=1.3 * panel.get_ylim()[1])  # Room for the legend.
    _token_axis(panel, longest)
    panel.legend(frameon=False, loc="upper left")


def _cdf(panel: Axes, trace: Trace) -> None:
    share = np.linspace(0, 1, _CURVE_POINTS)
    for tokens, colour, label in _fields(trace):
        panel.plot(np.quantile(tokens, share), share, color=colour, label=label)
    panel.set(title="lengths, cumulative", ylabel="share of requests", ylim=(0, 1.02))
    _token_axis(panel, _longest(trace))
    panel.legend(frameon=False, loc="upper left")


def _gaps(panel: Axes, arrival_s: Floats) -> None:
    gaps = np.diff(arrival_s)
    panel.set(title="gaps between arrivals", xlabel="longer than (s)", ylabel="share of gaps")
    if not len(gaps) or gaps.max() <= 0:
        panel.text(0.5, 0.5, "no gap above 0", transform=panel.transAxes, ha="center")
        return
    mean_s = float(gaps.mean())
    # Evenly spaced in rank, and for the tail in the logarithm of it.
    share = np.unique(np.concatenate([np.linspace(0, 1, 500), 1 - np.geomspace(1 / len(gaps), 1, 500)]))[:-1]
    panel.plot(np.quantile(gaps, share), 1 - share, color=PROMPT, label="trace")
    poisson_s = np.geomspace(mean_s / 1000, mean_s * np.log(len(gaps) + 1), 200)
    panel.plot(poisson_s, np.exp(-poisson_s / mean_s), color=_GREY, linestyle="--", label="Poisson, same rate")
    panel.set(xscale="log", yscale="log", xlim=(mean_s / 1000, max(float(gaps.max()), poisson_s[-1]) * 1.3))
    panel.legend(frameon=False, loc="lower left")


def _longest(trace: Trace) -> int:
    return max(int(trace.input_tokens.max()), int(trace.output_tokens.max()), 10)


def _token_axis(panel: Axes, longest: int) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panel.set(xscale="log", xlabel="tokens", xlim=(1, longest * 1.2))
    # Round powers of ten only: minor labels of a narrow range would overlap.
    panel.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _fields(trace: Trace) -> tuple[tuple[Ints, str, str], ...]:
    return (trace.input_tokens, PROMPT, "prompt"), (trace.output_tokens, OUTPUT, "output")
