"""What the control plane asks of the world, and what the world tells it.

Ports are small: a simulated and a real implementation of each exist or will. Calls never block; what follows from
them comes back later as a call on ``control.plane.ControlPlane``.
"""

from __future__ import annotations

from typing import Protocol

from chiron.core.types import Decision, Instance, Request


class Engine(Protocol):
    """One instance's engine."""

    def start(self, request: Request) -> None:
        """Run (or resume) a request. Answered by ``first_token`` and ``finished``."""

    def evict(self, request: Request) -> None:
        """Stop a request at the next step and keep its KV if the engine can. Answered by ``evicted`` (or by
        ``finished``, if that came first)."""

    def set_max_batch_size(self, max_batch_size: int) -> None: ...


class Fleet(Protocol):
    """Creates and removes instances."""

    def create(self, instance: Instance) -> None:
        """Start an instance. Answered by ``instance_ready`` or ``instance_failed``."""

    def remove(self, instance: Instance) -> None:
        """Stop an instance at once; it is drained already."""


class Journal(Protocol):
    """Hears everything worth remembering."""

    wants_events: bool
    """Whether ``event`` is called for requests: it costs time on the path of each. For instances it always is."""

    def decided(self, now_s: float, decision: Decision) -> None: ...

    def ended(self, request: Request) -> None:
        """Its ``outcome`` is set; nothing more will happen to it."""

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None:
        """``arrival``, ``dispatch``, ``first_token``, ``evicted``, ``ended`` with the request; ``created``,
        ``ready``, ``draining``, ``gone``, ``failed`` with the instance."""
