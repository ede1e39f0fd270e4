"""What can be wrong with results, as one tree::

TelemetryError(InputError)
├── ExtraError      an optional package is not installed
├── LogError        a file that is no event log
├── ReportError     results that cannot be reported together
├── StoreError      a saved result that cannot be read or written
└── SummaryError    figures that contradict each other
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from chiron.core.errors import InputError


class TelemetryError(InputError):
    """Bad input to a function of this package."""


class ExtraError(TelemetryError):
    """An optional package is missing; the message says how to get it."""


class LogError(TelemetryError):
    """A file is no event log. The message names the line."""


class ReportError(TelemetryError):
    """The results given cannot be reported together."""


class StoreError(TelemetryError):
    """A file is not a saved result, or a result cannot be saved."""


class SummaryError(TelemetryError):
    """The figures of a run contradict each other."""


def need(module: str) -> Any:
    """Import ``module`` of the extra ``report``, or say how to install it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ExtraError(
            f"{module.split('.')[0]} is not installed; install it with: pip install 'chiron-serving[report]'"
        ) from error
