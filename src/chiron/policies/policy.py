"""A policy is a tuple of hooks; everything Chiron and its rivals differ in.

Hooks that are rare (a fleet tick, a scrape) are pure functions ``decide(settings, state, view) -> (decision, state)``.
The router is on the path of every request, so it is an object over indexes that it keeps up to date itself; it too
sees no clock and does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from chiron.core.types import Instance, Placement, Request
from chiron.policies.views import FleetPlan, FleetView, LocalDecision, LocalView, Migration, PolicyState, StepTimes


class UsualSize(Protocol):
    """Running means over requests that ran lately."""

    input_tokens: float
    input_square: float
    need_tokens: float
    """Prompt and expected output."""


class Estimates(Protocol):
    """What has been learned of one model, for the per-request path. The control plane keeps it current, from requests
    that ran: what is refused or taken back leaves no trace."""

    prefill_token_s: float
    prefill_square_s: float
    ttft_min_s: float
    """Tightest configured TTFT among the interactive classes that ran; inf before the first."""
    ttft_max_s: float
    """Loosest finite one among the configured interactive classes; inf if there is none."""

    @property
    def usual(self) -> UsualSize:
        """Of interactive requests."""

    @property
    def usual_batch(self) -> UsualSize: ...

    @property
    def expected_output(self) -> Mapping[str, float]:
        """Mean output tokens by class name."""

    @property
    def step_times(self) -> StepTimes: ...

    @property
    def first_token_lead_s(self) -> Mapping[str, float]:
        """By class name: time from dispatch to first token beyond the request's own prefill, as it is at the most for
        all but a few of those that had to wait for their dispatch."""


class Router(Protocol):
    """Chooses instances for one model's requests. O(log instances) a call."""

    room_tokens: int
    """Where ``place`` refused a batch request only for the length of its prompt, and a shorter one may pass it: tokens
    that would have had room; else 0."""

    def add(self, instance: Instance) -> None:
        """It is ready."""

    def remove(self, instance: Instance) -> None:
        """It takes no more work."""

    def changed(self, instance: Instance) -> None:
        """Its load or its max batch size changed."""

    def place(self, request: Request, waited_s: float) -> Placement | None:
        """Where to run it now, and which batch work makes way for it there; None: nowhere yet, keep it queued.
        ``waited_s``: since it arrived; 0 for one that is not queued."""

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        """This one is the next, and was refused a place: batch requests that are to be evicted nevertheless, so that it
        gets one sooner."""


class Order(Protocol):
    """Which waiting request of one model is next. O(log requests) a call."""

    def __iter__(self) -> Iterator[Request]:
        """Everybody who waits, in any order."""

    def add(self, request: Request, now_s: float) -> None:
        """It waits."""

    def forget(self, request: Request) -> None:
        """It ended while it waited."""

    def head(self, now_s: float) -> Request | None:
        """Whose turn it is; it goes on waiting until ``remove_head``."""

    def remove_head(self, request: Request, now_s: float) -> None:
        """What ``head`` returned is dispatched."""

    def never_ran(self, request: Request) -> None:
        """It had its turn, and was refused, lost or taken back before its first token: nobody is charged for it."""

    def lost(self) -> Request | None:
        """One that cannot be served in time any more, the oldest; None: there is none, or this order does not care."""

    def oldest_arrival_s(self) -> float:
        """inf when no request waits. Called rarely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A request that is not taken."""

    reason: str
    retry_after_s: float
    """When it is worth asking again, seconds from now."""
    numbers: Mapping[str, float] = field(default_factory=dict)


AdmitHook = Callable[[Any, Order, Request, float], Refusal | None]
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
    eviction_pause_s: float = 5.0
    """For this long after an eviction for a place, batch work on the instance may be replaced as it ends, and not grow.
    Shorter keeps a little more batch work where evicted work resumes, and loses more where it starts again."""
    revives: bool = False
    """A scale-up takes draining instances back first."""
    order: Callable[[Any, Estimates], Order] | None = None
    """Makes the order of one model's waiting requests; None: earliest deadline first."""
    admit: AdmitHook | None = None
    """Asked about each arrival, with the order of the requests that wait and the time; None: everybody is taken."""
    defers_late: bool = False
    """Batch requests that cannot meet their deadline any more wait behind those that can, and one whose prompt is too
    long to be let in beside interactive requests is passed by shorter ones."""
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
