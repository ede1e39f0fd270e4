"""The page of a study: a heading, an answer, tables and charts; one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from chiron.telemetry.drawing import draw
from chiron.telemetry.html import asset
from chiron.telemetry.marks import Chart

Cells = Sequence[str]


def study_page(
    title: str, subtitle: str, answer: str, notes: Sequence[str], sections: Sequence[str], command: str
) -> str:
    """``sections`` are HTML; all else is text."""
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(f'Chiron: {title}')}</title>\n<style>\n{asset('report.css')}\n</style>\n</head>\n"
        f'<body>\n<main>\n<header><p class="brand">Chiron</p><h1>{escape(title)}</h1>'
        f'<p class="subtitle">{escape(subtitle)}</p></header>\n'
        f'<section class="verdict" aria-label="Verdict"><p>{escape(answer)}</p><ul>{listed}</ul></section>\n'
        f"{''.join(sections)}\n"
        f'<section><h2>Run it again</h2><pre class="command">{escape(command)}</pre></section>\n'
        "</main>\n</body>\n</html>\n"
    )


def table_section(title: str, headings: Cells, rows: Sequence[Cells], caption: str = "") -> str:
    """A table of text under a heading; the first cell of a row is its name."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    about = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return (
        f'<section><h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{about}</section>"
    )


def chart_section(title: str, charts: Sequence[Chart]) -> str:
    figures = "".join(draw(chart) for chart in charts)
    return f'<section><h2>{escape(title)}</h2><div class="stack">{figures}</div></section>' if figures else ""
