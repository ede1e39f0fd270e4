"""Durations given as options."""

from __future__ import annotations

from chiron.config.read import ConfigError
from chiron.core.units import DurationError, parse_duration


def seconds_of(option: str, text: str) -> float:
    """Raises ConfigError, which names the option: a command line may hold several durations."""
    try:
        return parse_duration(text)
    except DurationError as error:
        raise ConfigError(f"{option}: {error}") from None
