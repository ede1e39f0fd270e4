"""A policy is a tuple of hooks; everything Chiron and its rivals differ in.

Hooks that are rare (a fleet tick, a scrape) are pure functions ``decide(settings, state, view) -> (decision, state)``.
The router is on the path of every request, so it is an object over indexes that it keeps up to date itself; it too
sees no clock and does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from chiron.core.types import Instance, Request
from chiron.policies.views import FleetPlan, FleetView, LocalDecision, LocalView, Migration, PolicyState


class Estimates(Protocol):
    """What has been learned of one model, for the per-request path. The control plane keeps it current."""

    prefill_token_s: float
    prefill_square_s: float

    @property
    def expected_output(self) -> Mapping[str, float]:
        """Mean output tokens by class name."""


class Router(Protocol):
    """Chooses instances for one model's requests. O(log instances) a call."""

    def add(self, instance: Instance) -> None:
        """It is ready."""

    def remove(self, instance: Instance) -> None:
        """It takes no more work."""

    def changed(self, instance: Instance) -> None:
        """Its load or its max batch size changed."""

    def choose(self, request: Request) -> Instance | None:
        """Where to run it now; None: nowhere yet, keep it queued."""

    def choose_victim(self, request: Request) -> Instance | None:
        """An instance where evicting batch work would make room for this interactive request; None: there is none."""

    def busiest_with_batch(self) -> Instance | None:
        """The first instance, in packing order, that runs batch work beside what waits; None: there is none."""


LocalHook = Callable[[Any, PolicyState, LocalView], tuple[LocalDecision | None, PolicyState]]
FleetHook = Callable[[Any, PolicyState, FleetView], tuple[FleetPlan, PolicyState]]
MigrationHook = Callable[[Any, PolicyState, FleetView], tuple[tuple[Migration, ...], PolicyState]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The hooks and constants of one policy under given settings."""

    name: str
    settings: Any
    router: Callable[[Any, Estimates], Router]
    """Makes the router of one model from (settings, estimates)."""
    fleet: FleetHook
    fleet_period_s: float
    fleet_first_s: float = 0.0
    """No fleet tick before this time."""
    local: LocalHook | None = None
    initial_max_batch_size: int | None = None
    """None: what the engine can at most."""
    initial_roles: Callable[[Any, int], Mapping[str, int]] | None = None
    """How an initial fleet of n splits into roles; None: all mixed."""
    holds_batch: bool = False
    """Batch requests wait in the global queue until a router has room for them."""
    evicts: bool = False
    shed_after: float = 0.1
    """With ``evicts``: once a queued interactive request has waited this share of its TTFT, batch work makes way on
    one instance after another, so that prefill has the steps to itself."""
    eviction_pause_s: float = 5.0
    """For this long after an eviction for a place, batch work on the instance may be replaced as it ends, and not grow.
    Shorter keeps a little more batch work where evicted work resumes, and loses more where it starts again."""
    revives: bool = False
    """A scale-up takes draining instances back first."""
    demotes_late: bool = False
    """A queued interactive request that can no longer meet its TTFT waits behind those that can."""
    group_span_s: float = 300.0
    """Batch requests whose deadlines share a span of this length form a group."""
    migrate: MigrationHook | None = None
    migrate_period_s: float = 1.0
    relabels: bool = False
    """Roles are labels: a plan re-labels instances in order of rank instead of starting and draining."""
    drain_timeout_s: float = 120.0
    """Batch work still running on a draining instance after this long is evicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEntry:
    """A policy by name: its settings type and how to make it."""

    settings: type[Any]
    make: Callable[[Any], Policy]
    about: str
