"""The result of one run, as users have it: what was recorded, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chiron.telemetry import frames
from chiron.telemetry.run_data import RunData, headline


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Result(RunData):
    """One policy, one seed."""

    def __repr__(self) -> str:
        """In a line: the run, and what a reader asks first. Everything else is in the attributes."""
        return f"Result({headline(self)})"

    def _repr_html_(self) -> str:
        """For notebooks: the figures of each class."""
        from chiron.telemetry.notebook import fragment

        return fragment(self)

    def requests_frame(self) -> Any:
        """One row per request (pandas DataFrame, extra ``report``); nan instead of -1 for what never happened."""
        return frames.requests_frame(self)

    def fleet_frame(self) -> Any:
        """One row per model and fleet tick; roles and groups as columns ``ready_<role>``, ``groups``."""
        return frames.fleet_frame(self)

    def decisions_frame(self) -> Any:
        """One row per decision; ``numbers`` stays a dict."""
        return frames.decisions_frame(self)

    def batch_sizes_frame(self) -> Any:
        """One row per start of an instance, change of its max batch size, and end, where that is 0."""
        return frames.batch_sizes_frame(self)
