"""Charts as HTML: geometry is SVG that stretches with the page, text and markers are HTML beside it.

So a chart fits any width, keeps its type size on a phone, follows the page's colours, prints, and needs no script:
``report.js`` only reads values back from the geometry where a pointer is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from chiron.telemetry.axes import Axis
from chiron.telemetry.marks import Chart, Panel, Rule, Series

GRID = 10_000
"""Units of a plot each way: a tenth of a pixel on a large screen."""
SHAPES = {
    "circle": "M8 2.5A5.5 5.5 0 1 1 8 13.5A5.5 5.5 0 1 1 8 2.5Z",
    "square": "M3 3H13V13H3Z",
    "diamond": "M8 1.5L14.5 8L8 14.5L1.5 8Z",
    "triangle": "M8 2L14.5 13.5H1.5Z",
    "cross": "M6 2H10V6H14V10H10V14H6V10H2V6H6Z",
    "x": "M2 4.5L4.5 2L8 5.5L11.5 2L14 4.5L10.5 8L14 11.5L11.5 14L8 10.5L4.5 14L2 11.5L5.5 8Z",
    "star": "M8 1L10 6H15L11 9.3L12.5 14.5L8 11.4L3.5 14.5L5 9.3L1 6H6Z",
    "triangle-down": "M8 14L1.5 2.5H14.5Z",
}
"""In a box of 16 by 16."""


def draw(chart: Chart) -> str:
    """The chart with its legend."""
    title, caption = escape(chart.title), f'<p class="caption">{escape(chart.caption)}</p>' if chart.caption else ""
    panels = "".join(
        panel(chart, part, last=part is chart.panels[-1], number=number) for number, part in enumerate(chart.panels)
    )
    return f'<figure class="chart"><figcaption><h3>{title}</h3>{caption}</figcaption>{legend(chart)}{panels}</figure>'


def legend(chart: Chart) -> str:
    """What each mark stands for, once; nothing is written into a plot, where words would lie on one another."""
    entries: dict[str, str] = {}
    for part in chart.panels:
        for series in part.series:
            if series.listed and series.name not in entries:
                entries[series.name] = key(series)
        for line in part.rules:
            if line.name and line.name not in entries:
                entries[line.name] = rule_key(line)
    items = "".join(f'<li data-name="{escape(name)}">{mark}{escape(name)}</li>' for name, mark in entries.items())
    return f'<ul class="legend">{items}</ul>' if items else ""


def key(series: Series) -> str:
    """The small picture before a name."""
    if series.mark == "layer":
        return f'<span class="swatch" style="background:{series.colour}"></span>'
    if series.mark == "dots":
        return marker(series.shape, series.colour)
    return line_key(series.colour, series.dash, 2.4)


def rule_key(line: Rule) -> str:
    return line_key(line.colour, line.dash, 1.6)


def line_key(colour: str, dash: str, width: float) -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<svg class="key" viewBox="0 0 22 8" aria-hidden="true"><path d="M0 4H22" fill="none" stroke="{colour}" '
        f'stroke-width="{width}"{dashes}/></svg>'
    )


def marker(shape: str, colour: str) -> str:
    return f'<svg class="mark" viewBox="0 0 16 16" aria-hidden="true"><path d="{SHAPES[shape]}" fill="{colour}"/></svg>'


def panel(chart: Chart, part: Panel, *, last: bool, number: int) -> str:
    """One plot with its axes."""
    x, y = chart.x, part.y
    names = ", ".join(s.name for s in part.series if s.listed)
    about = f"{chart.title}: {y.title} over {x.title}" + (f", of {names}" if names else "")
    lines = "".join(rule(line, x, y) for line in part.rules)
    dots = "".join(markers(s, x, y) for s in part.series if s.mark == "dots" and s.texts)
    xs = (
        "".join(f'<span class="xt" style="left:{100 * x.place(v):.4g}%">{t}</span>' for v, t in x.ticks) if last else ""
    )
    ys = "".join(f'<span class="yt" style="bottom:{100 * y.place(v):.4g}%">{t}</span>' for v, t in y.ticks)
    foot = f'<p class="xtitle">{escape(x.title)}</p>' if last else ""
    return (
        f'<div class="panel"><p class="ytitle">{escape(y.title)}</p>'
        f'<div class="plot" style="height:{part.height}px" data-x="{axis(x)}" data-y="{axis(y)}">'
        f'<svg viewBox="0 0 {GRID} {GRID}" preserveAspectRatio="none" role="img" aria-label="{escape(about)}">'
        f'<path class="grid" d="{grid(x, y)}"/>{"".join(layers(part.series, x, y))}{lines}'
        f"{''.join(lines_of(part.series, x, y))}</svg>{dots}{xs}{ys}</div>{foot}</div>"
    )


def axis(axis: Axis) -> str:
    """What the script needs to read a value back."""
    return escape(f"{axis.scale} {axis.low:.6g} {axis.high:.6g} {axis.top:.6g} {axis.title}")


def grid(x: Axis, y: Axis) -> str:
    """Lines at the ticks."""
    across = "".join(f"M0 {down(y, value)}H{GRID}" for value, _ in y.ticks)
    return across + "".join(f"M{right(x, value)} 0V{GRID}" for value, _ in x.ticks)


def rule(line: Rule, x: Axis, y: Axis) -> str:
    path = f"M{right(x, line.x)} 0V{GRID}" if line.x is not None else f"M0 {down(y, line.y or 0.0)}H{GRID}"
    dashes = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    return f'<path class="rule" d="{path}" stroke="{line.colour}"{dashes}/>'


def layers(series: Sequence[Series], x: Axis, y: Axis) -> Iterator[str]:
    """Stacked layers, the highest first: each is drawn down to the ground, and those beneath cover it."""
    stacked = [s for s in series if s.mark == "layer"]
    drawn = []
    totals = [0.0] * (len(stacked[0].x) if stacked else 0)
    for one in stacked:
        totals = [total + (value if value == value else 0.0) for total, value in zip(totals, one.y, strict=True)]
        if path := step_path(one.x, totals, x, y):
            area = f"{path}V{GRID}H{right(x, one.x[0])}Z"
            drawn.append(f'<path class="layer" data-name="{escape(one.name)}" fill="{one.colour}" d="{area}"/>')
    yield from reversed(drawn)


def lines_of(series: Sequence[Series], x: Axis, y: Axis) -> Iterator[str]:
    """Lines, and dots without words, which are lines of no length with round ends. The first lies on top."""
    for one in reversed(series):
        name = escape(one.name)
        if one.mark == "step" and (path := step_path(one.x, one.y, x, y)):
            dashes = f' stroke-dasharray="{one.dash}"' if one.dash else ""
            yield f'<path class="line" data-name="{name}" stroke="{one.colour}"{dashes} d="{path}"/>'
        elif one.mark == "dots" and not one.texts:
            path = "".join(f"M{right(x, u)} {down(y, v)}h0" for u, v in zip(one.x, one.y, strict=True) if v == v)
            yield f'<path class="dots" data-name="{name}" stroke="{one.colour}" d="{path}"/>' if path else ""


def step_path(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis) -> str:
    """``M`` to the first point, ``H`` and ``V`` from step to step; nothing is written for what does not move."""
    parts: list[str] = []
    height: int | None = None
    across = 0
    for value_x, value_y in zip(xs, ys, strict=True):
        place = right(x, value_x)
        if value_y != value_y:
            if height is not None and place != across:
                parts.append(f"H{place}")
            height, across = None, place
            continue
        level = down(y, value_y)
        if height is None:
            parts.append(f"M{place} {level}")
        elif level != height:
            parts.append(f"H{place}V{level}" if place != across else f"V{level}")
        else:
            continue  # The line goes on; where it ends is written below.
        height, across = level, place
    if height is not None and xs and right(x, xs[-1]) != across:
        parts.append(f"H{right(x, xs[-1])}")
    return "".join(parts)


def markers(series: Series, x: Axis, y: Axis) -> str:
    """Dots that say something, where a pointer or the keyboard comes to them."""
    made = []
    for u, v, text in zip(series.x, series.y, series.texts, strict=True):
        if u == u and v == v:
            place = f"left:{100 * x.place(u):.4g}%;bottom:{100 * y.place(v):.4g}%"
            said = escape(text)
            made.append(
                f'<span class="dot-mark" tabindex="0" role="img" aria-label="{said}" data-name="{escape(series.name)}" '
                f'data-text="{said}" style="{place}">{marker(series.shape, series.colour)}</span>'
            )
    return "".join(made)


def right(x: Axis, value: float) -> int:
    return round(GRID * x.place(value))


def down(y: Axis, value: float) -> int:
    """SVG counts from the top."""
    return GRID - round(GRID * y.place(value))
