"""Settings of the overload order. Not compiled: configuration is read by a class's annotations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OverloadSettings:
    """What is done when the fleet cannot serve everybody in time. All our choices."""

    relegate: bool = True
    """Off: earliest deadline first, whatever can still be reached (as the paper's queue)."""
    late_turn: int = 40
    """Every so many turns one is for a lost request, while others wait: 1/40 of the fleet's goodput."""
    fair: bool = True
    """Share an overload out over classes and API keys; off: the earliest deadline goes first in an overload too."""
    hold_s: float = 30.0
    """An overload is over when no request was lost for this long."""
    refuse: bool = False
    """Refuse requests that would be lost before their turn comes (429 with Retry-After), instead of serving them
    late."""

    def __post_init__(self) -> None:
        if self.late_turn < 2:
            raise ValueError(f"late_turn is {self.late_turn}; it must be 2 or more")
        if not self.hold_s > 0:
            raise ValueError(f"hold is {self.hold_s}; it must be above 0")
