"""What can be wrong with a load run, as one tree::

LoadError(InputError)
├── PlanError      a setting or a request stream that cannot be sent
├── TargetError    the server is not there, or does not answer as an OpenAI endpoint does
└── StoppedError   asked to stop before the first request was sent
"""

from __future__ import annotations

from chiron.core.errors import InputError


class LoadError(InputError):
    """The message names the setting or the server, the value, and what is allowed."""


class PlanError(LoadError):
    pass


class TargetError(LoadError):
    pass


class StoppedError(LoadError):
    pass


def require(fine: bool, name: str, value: object, allowed: str) -> None:
    """Raise PlanError unless ``fine``; for the ``__post_init__`` of settings."""
    if not fine:
        raise PlanError(f"{name} is {value!r}; it must be {allowed}")
