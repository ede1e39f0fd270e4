"""A result as pandas tables, for notebooks. Needs the extra ``report``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from chiron.core.types import ROLES
from chiron.telemetry.errors import need
from chiron.telemetry.run_data import OUTCOMES, BatchSizePoint, DecisionPoint, FleetPoint, RunData


def requests_frame(result: RunData) -> Any:
    """One row per request, in order of arrival; seconds and tokens. Names are categories, what never was is nan."""
    pandas = need("pandas")
    table = result.requests
    columns = {
        "model": pandas.Categorical.from_codes(table.model, categories=list(result.models)),
        "cls": pandas.Categorical.from_codes(table.cls, categories=[c.name for c in result.classes]),
        "arrival_s": table.arrival_s,
        "dispatch_s": np.where(table.dispatch_s >= 0, table.dispatch_s, np.nan),
        "first_token_s": np.where(table.first_token_s >= 0, table.first_token_s, np.nan),
        "finish_s": np.where(table.finish_s >= 0, table.finish_s, np.nan),
        "deadline_s": table.deadline_s,
        "input_tokens": table.input_tokens,
        "output_tokens": table.output_tokens,
        "outcome": pandas.Categorical.from_codes(table.outcome, categories=list(OUTCOMES)),
        "evictions": table.evictions,
        "ttft_s": table.ttft_s(),
        "itl_s": table.itl_s(),
        "attained": table.attained(result.classes),
    }
    return pandas.DataFrame(columns)


def fleet_frame(result: RunData) -> Any:
    """One row per model and fleet tick."""
    columns = rows_as_columns(FleetPoint, result.fleet)
    ready = columns.pop("ready")
    columns |= {f"ready_{role}": [counts.get(role, 0) for counts in ready] for role in ROLES}
    return need("pandas").DataFrame(columns)


def decisions_frame(result: RunData) -> Any:
    """One row per decision."""
    return need("pandas").DataFrame(rows_as_columns(DecisionPoint, result.decisions))


def batch_sizes_frame(result: RunData) -> Any:
    """One row per start of an instance, change of its max batch size, and end."""
    return need("pandas").DataFrame(rows_as_columns(BatchSizePoint, result.batch_sizes))


def rows_as_columns(row_type: Any, rows: tuple[Any, ...]) -> dict[str, list[Any]]:
    """Column name to values; every column is there even without a row."""
    return {field.name: [getattr(row, field.name) for row in rows] for field in fields(row_type)}
