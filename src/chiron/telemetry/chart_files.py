"""Charts of a study as PNG and SVG, the same that its page shows. Needs the extra ``report``; no display.

Points are placed by the chart's own axes, so a picture and the page agree; equal charts give equal files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chiron.telemetry.axes import Axis
from chiron.telemetry.errors import need
from chiron.telemetry.figures import INK, STYLE, legend, safe, save
from chiron.telemetry.marks import INK as PAGE_INK
from chiron.telemetry.marks import Chart, Panel
from chiron.telemetry.palette import MARKERS

MARKS = dict(MARKERS)
WIDTH_IN, PANEL_IN, MARGIN_IN = 7.6, 2.6, 1.4


def write_charts(charts: Mapping[str, Chart], directory: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """A file per chart, by name, and format; returns the paths."""
    agg, figure = need("matplotlib.backends.backend_agg"), need("matplotlib.figure")
    written = []
    with need("matplotlib").rc_context(STYLE):
        for name, chart in charts.items():
            height = MARGIN_IN + PANEL_IN * len(chart.panels)
            canvas = figure.Figure(figsize=(WIDTH_IN, height), layout="constrained")
            agg.FigureCanvasAgg(canvas)
            rows = canvas.subplots(len(chart.panels), 1, squeeze=False)[:, 0]
            for axes, panel in zip(rows, chart.panels, strict=True):
                _panel(axes, chart.x, panel)
            rows[0].set_title(chart.title)
            rows[-1].set_xlabel(chart.x.title)
            legend(rows[-1])
            written += [save(canvas, directory / f"{safe(name)}.{ending}") for ending in formats]
    return written


def _panel(axes: Any, x: Axis, panel: Panel) -> None:
    """Dots and rules: what charts of studies are made of."""
    for series in panel.series:
        axes.scatter(
            [x.place(value) for value in series.x],
            [panel.y.place(value) for value in series.y],
            color=series.colour,
            marker=MARKS[series.shape],
            s=40,
            label=series.name,
            zorder=3,
            clip_on=False,
        )
    for rule in panel.rules:
        colour = INK if rule.colour == PAGE_INK else rule.colour
        style = "--" if rule.dash else "-"
        if rule.x is not None:
            axes.axvline(x.place(rule.x), color=colour, linestyle=style, linewidth=1, label=rule.name)
        else:
            axes.axhline(panel.y.place(rule.y or 0.0), color=colour, linestyle=style, linewidth=1, label=rule.name)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel=panel.y.title)
    axes.set_xticks([x.place(value) for value, _ in x.ticks], [text for _, text in x.ticks])
    axes.set_yticks([panel.y.place(value) for value, _ in panel.y.ticks], [text for _, text in panel.y.ticks])
