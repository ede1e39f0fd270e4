"""What the processes of a gateway are started with, besides the config."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chiron.control.takeover import SETTLE_S
from chiron.store.lease import Leads


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayStart:
    port: int
    """Which all relays listen on."""
    folder: Path
    """Has the sockets below, and nobody else may look into it."""
    relays: int
    """How many share the limits of clients' connections."""

    @property
    def brain_path(self) -> Path:
        """Unix socket on which the brain hears relays."""
        return self.folder / "brain"

    @property
    def api_path(self) -> Path:
        """Unix socket of the brain's own HTTP server."""
        return self.folder / "api"

    def clear(self) -> None:
        """Nobody is left who would use the sockets."""
        with suppress(OSError):
            for path in (self.brain_path, self.api_path):
                path.unlink(missing_ok=True)
            self.folder.rmdir()


@dataclass(frozen=True, slots=True, kw_only=True)
class BrainStart:
    """For a brain that has relays in other processes."""

    relays: RelayStart
    opened: Callable[[], None] = lambda: None
    """Called once relays can come."""
    follows: bool = False
    """Another brain was at work before this one: what runs is told by relays, and no fleet shrinks until it is."""
    term: int = 1
    """Higher than those of the brains before it."""
    leads: Leads | None = None
    """It leads several gateways: the lease under which it uses the store."""
    settle_s: float = SETTLE_S
    """One that follows: for so long it waits for relays to tell."""
    expects: int = 0
    """How many relays there are; once all have told, it waits no longer. 0: that is not known."""
    awaited: frozenset[str] = frozenset()
    """Those that the brain before this one spoke with, by nonce; once they have told, it waits no longer."""
    superseded: Callable[[int], None] = lambda term: None
    """Called with the term of another brain that is at work meanwhile."""
    time_s: Callable[[], float] = time.monotonic
    """For its clock."""
