"""How live fleets watch, start and keep instances: the table ``[fleet]`` of the serve config."""

from __future__ import annotations

from dataclasses import dataclass, field

from chiron.fleet.health import HealthSettings, RecoverySettings
from chiron.fleet.starts import BackoffSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    health: HealthSettings = field(default_factory=HealthSettings)
    """Health checks, of all engines."""
    backoff: BackoffSettings = field(default_factory=BackoffSettings)
    """Starts of an engine that keeps failing."""
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    """How an endpoint that failed comes back."""
    usage_period_s: float = 2.0
    """Between two looks at the CPU and memory of engine processes."""
    logs_kept: int = 200
    """Log files of engines; the oldest go first, those of running ones never."""
    reason_lines: int = 8
    """Last lines of an engine's log that a failure's reason quotes."""

    def __post_init__(self) -> None:
        for key in ("logs_kept", "reason_lines"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be 0 or more")
        if not self.usage_period_s > 0:
            raise ValueError(f"usage_period is {self.usage_period_s}; it must be above 0")
