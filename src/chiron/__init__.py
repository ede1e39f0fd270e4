"""Chiron: SLO-aware, hierarchical autoscaling for LLM serving.

The Python API is ``chiron.api``; its names are here too, loaded on first use so that ``import chiron`` is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chiron.api import (
        Bound,
        Result,
        RunFailedError,
        Scenario,
        bound,
        compare,
        load_result,
        load_scenario,
        report,
        save_result,
        scenarios,
        simulate,
    )

__all__ = [
    "Bound",
    "Result",
    "RunFailedError",
    "Scenario",
    "bound",
    "compare",
    "load_result",
    "load_scenario",
    "report",
    "save_result",
    "scenarios",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'chiron' has no attribute {name!r}")
    from chiron import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
