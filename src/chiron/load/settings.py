"""How a plan is sent: limits, waits, and what to expect of the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from chiron.load.body import BodySettings
from chiron.load.errors import require


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How jobs are submitted and watched."""

    poll_s: float = 1.0
    """Between two looks at a job."""
    poll_failures_max: int = 30
    """Failed checks in a row before a job counts as failed."""
    wait_s: float = 60.0
    """How long after its deadline a job may still end."""
    input_max_bytes: int = 1 << 30
    """Largest input file; it is made before the run starts and held in memory."""
    upload_timeout_s: float = 300.0
    line_max_bytes: int = 8 << 20
    """Longest line of a result file."""

    def __post_init__(self) -> None:
        for name in ("poll_s", "wait_s", "upload_timeout_s"):
            require(0 < getattr(self, name) < inf, name, getattr(self, name), "above 0 and finite")
        for name in ("poll_failures_max", "input_max_bytes", "line_max_bytes"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How a plan is sent."""

    url: str
    """Such as ``http://127.0.0.1:8000``, with or without ``/v1``."""
    body: BodySettings = field(default_factory=BodySettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    ignore_eos: bool | None = None
    """Ask for outputs of exactly the wanted length; None: if the server takes the field."""
    calibrate: bool = True
    """Learn the bytes per token from two probes per model."""
    in_flight_max: int = 4096
    """Requests at a time; one that is due beyond them is not sent, and reported."""
    connect_timeout_s: float = 5.0
    request_timeout_s: float = 600.0
    """From sending to the last byte."""
    probe_timeout_s: float = 300.0
    """Of each probe: it may have to wait for an instance to start, and that is how long a gateway holds a request."""
    probe_patience_s: float = 3.0
    """A probe without an answer for so long is told."""
    grace_s: float = 10.0
    """After a stop, requests in flight have this long to finish."""
    keepalive: bool = True
    """Reuse connections."""
    verify: bool = True
    """Check the server's certificate."""
    cacert: Path | None = None
    """PEM file of the authority that signed it; None: one of the system's."""

    def __post_init__(self) -> None:
        require(self.in_flight_max >= 1, "in_flight_max", self.in_flight_max, "1 or more")
        for name in ("connect_timeout_s", "request_timeout_s", "probe_timeout_s", "probe_patience_s"):
            require(0 < getattr(self, name) < inf, name, getattr(self, name), "above 0 and finite")
        require(0 <= self.grace_s < inf, "grace_s", self.grace_s, "0 or more and finite")

    @property
    def origin(self) -> str:
        """The URL without ``/v1``, which the paths of requests begin with."""
        return self.url.rstrip("/").removesuffix("/v1")
