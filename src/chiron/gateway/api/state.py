"""What the API's endpoints work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.settings import BatchSettings
from chiron.store.port import Batch, BatchStore


class BatchWork(Protocol):
    """Whoever validates and runs batches: ``batch_runner.BatchRunner``."""

    @property
    def busy(self) -> bool:
        """Too many batches wait for validation."""

    def created(self, batch: Batch) -> None: ...

    async def cancel(self, batch_id: str, owner: str | None) -> Batch: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiLimits:
    """Limits of the API besides the hot path; those that users change are in ``BatchSettings``."""

    body_max_bytes: int = 1 << 20
    """A JSON body."""
    uploads_max: int = 64
    """Files on their way in at a time; more get 429."""
    bodies_at_once_max: int = 256
    """JSON bodies on their way in at a time; more get 429."""
    body_timeout_s: float = 60.0
    """From a JSON body's first byte to its last (408)."""
    peer_share: float = 0.5
    """Of uploads and bodies at a time, what one address or API key may have."""
    upload_stall_s: float = 60.0
    """An upload that sends nothing for so long is refused (408)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiState:
    store: BatchStore
    keys: KeyRing
    models: Models
    work: BatchWork
    wall_s: Callable[[], float]
    """Unix time, now."""
    started_s: float
    """Unix time at which the models became known."""
    ready: Callable[[], str]
    """Why the gateway cannot serve yet, or no longer; "" if it can."""
    status: Callable[[], Mapping[str, Any]]
    """The status page's content."""
    drain: Callable[[], None]
    """Take no new requests, finish those under way."""
    desired: Callable[[], Mapping[str, Any]] = lambda: {"models": []}
    """How many instances there should be now, of each model and kind."""
    undrain: Callable[[], bool] = lambda: True
    """Take new requests again. Returns whether that is still possible: not once the gateway stops."""
    model_ready: Callable[[str], tuple[bool, str]] = lambda model: (True, "ready")
    """Whether it can serve one model, by its name, and how it stands with it in words."""
    retry_after_s: float = 1.0
    """When to ask again whether it is ready."""
    metrics: Callable[[], bytes] | None = None
    """Prometheus text; None: there is no such page."""
    batch: BatchSettings = field(default_factory=BatchSettings)
    limits: ApiLimits = field(default_factory=ApiLimits)
