"""What can be wrong with a workload.

WorkloadError
├── TraceFormatError    the file is not a trace that we read
├── BadRowsError        too many of its rows are unusable
├── UnknownTraceError   no packaged trace or file has this name
└── WorkloadSettingError   a parameter of a generator, transform or stream is out of range
"""

from __future__ import annotations

from chiron.core.errors import InputError


class WorkloadError(InputError):
    """The message names the file, line or field, the value, and what is allowed."""


class TraceFormatError(WorkloadError):
    pass


class BadRowsError(WorkloadError):
    pass


class UnknownTraceError(WorkloadError):
    pass


class WorkloadSettingError(WorkloadError):
    pass


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise WorkloadSettingError unless ``ok``; for the ``__post_init__`` of settings."""
    if not ok:
        raise WorkloadSettingError(f"{name} is {value!r}; it must be {allowed}")
