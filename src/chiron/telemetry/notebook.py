"""A result in a notebook: what it is, in a line, and the figures of each class. Names are escaped."""

from __future__ import annotations

from html import escape

from chiron.telemetry.palette import looks
from chiron.telemetry.run_data import RunData, headline
from chiron.telemetry.table import class_table
from chiron.telemetry.verdict import TARGET, PolicyRuns


def fragment(result: RunData) -> str:
    """HTML that stands in a page of somebody else's, so without styles or scripts."""
    runs = PolicyRuns(policy=result.policy, results=(result,))
    figures = class_table([runs], looks([result.policy]), target=TARGET)
    return f"<div><p><b>RunData</b> {escape(headline(result))}</p>{figures}</div>"
