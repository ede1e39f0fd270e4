"""How live fleets watch, start and keep instances: the tables ``[fleet]`` and ``[sleepers]`` of the serve config."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from chiron.fleet.health import HealthSettings, RecoverySettings
from chiron.fleet.starts import BackoffSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SleeperSettings:
    """Engine processes that sleep in host memory instead of being stopped: the table ``[sleepers]``."""

    host_memory_gb: float = 0.0
    """Host memory for all sleepers of this machine together, in GB (1e9 bytes). 0: none sleeps."""
    fall_asleep_timeout_s: float = 60.0
    """For an engine to copy its weights to host memory and to say that it sleeps; it is stopped after that."""
    wake_timeout_s: float = 30.0
    """For a sleeper to be ready again; it is stopped after that, and another engine is started."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.host_memory_gb < inf:
            raise ValueError(f"host_memory_gb is {self.host_memory_gb}; it must be 0 or more, and finite")
        for key in ("fall_asleep_timeout", "wake_timeout"):
            value = getattr(self, f"{key}_s")
            if not 0.0 < value < inf:
                raise ValueError(f"{key} is {value}; it must be above 0, and finite")


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
