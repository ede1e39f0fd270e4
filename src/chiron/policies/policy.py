"""A policy is a tuple of hooks; everything Chiron and its rivals differ in.

    admit       take this request, or refuse it
    order       which waiting request is next; ``order_batch``: likewise, of the batch requests that are held back
    place       where it runs, and who makes way for it
    compose     who gets the tokens of an engine's next step; of engine models only
    ended       a request ended: nothing is asked
    batch_size  an instance's max batch size from now on
    fleet       how many instances of each role; ``take_back`` and ``label``: which ones
    stages      how many replicas of each stage, where an instance is a pipeline
    migrate     which running request moves where

Hooks that are rare (a fleet tick, a scrape) are pure functions ``decide(settings, state, view) -> (decision, state)``.
Those on the path of every request make an object over indexes that it keeps up to date itself, one for each model; it
too sees no clock and does no I/O. A hook that is not set has a default (``policies.defaults``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final, Protocol

from chiron.core.kept import Kept
from chiron.core.types import Instance, Placement, Request, RequestClass, Role
from chiron.policies.views import (
    FleetPlan,
    FleetView,
    InstanceView,
    LocalDecision,
    LocalView,
    Migration,
    PipelineView,
    PolicyState,
    ReplicaView,
    StagePlan,
    StepTimes,
    StepView,
)

_USUAL_WEIGHT: Final = 0.01


class UsualSize:
    """What a request of common size is like: exponential means over about a hundred that ran lately."""

    __slots__ = ("input_square", "input_tokens", "need_tokens")

    def __init__(self) -> None:
        self.input_tokens = self.input_square = 0.0
        self.need_tokens = 0.0
        """Prompt and expected output."""

    def ran(self, tokens: int, need: float) -> None:
        self.input_tokens += _USUAL_WEIGHT * (tokens - self.input_tokens)
        self.input_square += _USUAL_WEIGHT * (tokens * tokens - self.input_square)
        self.need_tokens += _USUAL_WEIGHT * (need - self.need_tokens)


class Estimates:
    """What has been learned of one model, for the per-request path. The control plane keeps it current, from requests
    that ran: what is refused or taken back leaves no trace. A class and no protocol: it is read several times a
    placement, and compiled code reads the fields of a class that it knows without asking for their names."""

    def __init__(self, step_times: StepTimes, ttft_max_s: float) -> None:
        self.step_times = step_times
        self.prefill_token_s = step_times.per_prefill_token_s
        self.prefill_square_s = step_times.per_prefill_square_s
        self.ttft_min_s = inf
        """Tightest configured TTFT among the interactive classes that ran; inf before the first."""
        self.ttft_told_s = inf
        """Tightest one among the configured interactive classes, whether any of them ran or not; inf: there is none."""
        self.ttft_max_s = ttft_max_s
        """Loosest finite one among the configured interactive classes; inf if there is none."""
        self.itl_missed = 0.0
        """Share of recent interactive requests that missed their ITL SLO, in that class of those that still come where
        it is largest."""
        self.spread_over = 0
        """By the last plan (``ModelPlan.spread_over``)."""
        self.usual = UsualSize()
        """Of interactive requests."""
        self.usual_batch = UsualSize()
        self.expected_output: dict[str, float] = {}
        """Mean output tokens by class name."""
        self.first_token_lead_s: dict[str, float] = {}
        """By class name: time from dispatch to first token beyond the request's own prefill, as it is at the most for
        all but a few of those that had to wait for their dispatch."""

    def shortest_s(self, name: str) -> float:
        """What a mean answer of this class takes at the least."""
        raise NotImplementedError


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
        ``waited_s``: since it arrived; 0 for one that is not queued. An instance with a larger KV cache than
        ``request.kv_most_tokens`` is kept for a longer prompt that waits: to name one is to name none."""

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

    def only_lost(self) -> bool:
        """Nobody who waits can be served in time any more. Called after ``head``."""

    def lost(self) -> Request | None:
        """One that cannot be served in time any more, the oldest; None: there is none, or this order does not care."""

    def oldest_arrival_s(self) -> float:
        """inf when no request waits. Called rarely."""


class BatchOrder(Protocol):
    """Which batch request is next, of those of one model that are held back. O(log requests) a call. They are released
    in this order while nobody else waits and the router has room."""

    def __iter__(self) -> Iterator[Request]:
        """Everybody who is held, in any order."""

    def add(self, request: Request, now_s: float) -> None:
        """It is held: it has just come, or was evicted."""

    def forget(self, request: Request) -> None:
        """It ended while it was held."""

    def head(self, now_s: float) -> Request | None:
        """Whose turn it is; it stays until ``remove_head``."""

    def shorter(self, now_s: float, tokens: int) -> Request | None:
        """The router has no room for a prompt as long as that of the last one, and had some for one of ``tokens``: who
        passes, with a shorter prompt; None: nobody."""

    def remove_head(self, request: Request, now_s: float) -> None:
        """What ``head`` or ``shorter`` returned is dispatched."""

    def only_lost(self) -> bool:
        """Nobody who is held can be done by its deadline any more. Called after ``head``."""


class Preempter(Protocol):
    """Takes places and KV back from sequences that decode, for prompts that wait. They wait again, behind or before
    others as the composer has it. Whoever is let in again must be left the time to make a token: else nothing ends."""

    swaps: bool
    """Their KV is saved in host memory where the engine can; else their tokens are prefilled again."""

    def steps_left(self, step: int) -> int:
        """In how many steps it wants to be asked again at the latest, where every place is taken; 1: before each. It
        may be asked more often, and must then do what it would have done."""

    def gives_way(self, view: StepView) -> Sequence[Request]:
        """Who gives place and KV back before the next step. Asked while a prompt waits, before ``Composer.tokens``."""

    def victim(self) -> Request | None:
        """KV has run out: who gives it back; None: who was admitted last."""


class Composer(Protocol):
    """Who gets the tokens of one engine's steps: each sequence that decodes gets one, and this decides about the rest.
    O(log requests) a call. It sees what the engine sees, at once."""

    preempter: Preempter | None
    """None: a sequence that decodes goes on until it ends, is evicted, or KV runs out."""

    def add(self, request: Request, tokens: int, begun: bool) -> None:
        """So many tokens of its prompt wait: it came, it was preempted, or (``begun``) a part of them is done."""

    def forget(self, request: Request) -> None:
        """The engine has it no more: it ended or was evicted."""

    def tokens(self, view: StepView) -> int:
        """How many tokens of prompts the next step takes at the most. Asked while some wait, before ``head``."""

    def head(self, now_s: float, begun: bool) -> Request | None:
        """Whose prompt is next; ``begun``: of those of which a part is done, for there is no room for another."""

    def remove_head(self, request: Request) -> None:
        """What ``head`` returned is in the next step. What that leaves of it is added again when the step is over."""

    def planned(self, tokens: int, step_s: float) -> None:
        """The next step takes so many tokens of prompts, and so long."""

    def began(self, request: Request, generated: int, step: int, now_s: float) -> None:
        """From this step on it decodes; so many tokens of its answer are made."""

    def left(self, request: Request) -> None:
        """It decodes no more. If it was preempted, it is added next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A request that is not taken."""

    reason: str
    retry_after_s: float
    """When it is worth asking again, seconds from now."""
    numbers: Mapping[str, float] = field(default_factory=dict)


AdmitHook = Callable[[Any, Order, Request, float], Refusal | None]
OrderHook = Callable[[Any, Estimates], Order]
BatchOrderHook = Callable[[Any, Estimates], BatchOrder]
PlaceHook = Callable[[Any, Estimates], Router]
ComposeHook = Callable[[Any, Estimates], Composer]
EndedHook = Callable[[Any, Request, float], None]
BatchSizeHook = Callable[[Any, PolicyState, LocalView], tuple[LocalDecision | None, PolicyState]]
ClassesOf = Mapping[str, Sequence[RequestClass]]
"""Of each model, in the order of ``ModelView.mixes``."""
LOAD_AGE_MAX_S: Final = 3600.0
PAST_MAX_S: Final = 14 * 86_400
"""No policy keeps more of the past for the next run."""
LearnedHook = Callable[[Any, PolicyState, ClassesOf, float], Mapping[str, Mapping[str, Any]]]
RestoreHook = Callable[[Any, Mapping[str, Kept], ClassesOf, float, float], PolicyState]
LearnedSizesHook = Callable[[Any, PolicyState, float], Mapping[str, Any]]
RestoreSizesHook = Callable[[Any, Kept, float], PolicyState]
PrepareHook = Callable[[Any, PolicyState], PolicyState | None]
FleetHook = Callable[[Any, PolicyState, FleetView], tuple[FleetPlan, PolicyState]]
TakeBackHook = Callable[[Any, Sequence[InstanceView]], int]
LabelHook = Callable[[Any, Mapping[Role, int]], Sequence[Role]]
StagesHook = Callable[[Any, PolicyState, PipelineView], tuple[tuple[StagePlan, ...], PolicyState]]
RouteHook = Callable[[Any, Sequence[ReplicaView], int, int], int]
MigrationHook = Callable[[Any, PolicyState, FleetView], tuple[tuple[Migration, ...], PolicyState]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The hooks and constants of one policy under given settings."""

    name: str
    settings: Any
    """Passed to every hook."""
    admit: AdmitHook | None = None
    """Asked about each arrival, with the order of the requests that wait and the time; None: everybody is taken."""
    order: OrderHook | None = None
    """Makes the order of one model's waiting requests, and one more for each size of its kinds, where they differ in KV
    capacity; None: earliest TTFT deadline first."""
    order_batch: BatchOrderHook | None = None
    """Likewise of its batch requests, which are held in the global queue until the router has room and nobody else
    waits for that; None: they wait among the others."""
    place: PlaceHook | None = None
    """Makes the router of one model; None: least outstanding requests first."""
    compose: ComposeHook | None = None
    """Makes the composer of one engine; None: first come, first served. Engines that are not models have one of their
    own, so only a simulation can run it."""
    ended: EndedHook | None = None
    """Told of each request that ended, with the time: for policies that know what went before (programs)."""
    batch_size: BatchSizeHook | None = None
    """Asked at each scrape of an instance; None: max batch sizes stay."""
    fleet: FleetHook | None = None
    """None: the fleet stays as it is."""
    prepare: PrepareHook | None = None
    """Works on the fleet hook's state between two ticks, less than a millisecond a call; None when nothing is left to
    do. What it changes is when something is computed, never what comes out."""
    learned: LearnedHook | None = None
    """What the fleet hook's state knows of each model that the next run should know, at this time: plain data by
    model, of bounded size. None: nothing."""
    restore: RestoreHook | None = None
    """Makes the fleet hook's first state from that, which may be damaged, from the time, and from how long ago that
    was: load of more than ``LOAD_AGE_MAX_S`` ago says nothing of the next minutes."""
    learned_sizes: LearnedSizesHook | None = None
    """Likewise what the state of ``batch_size`` knows of one instance. None: nothing."""
    restore_sizes: RestoreSizesHook | None = None
    """Makes the first state of an instance from that of an earlier run's; None: it is of no use."""
    take_back: TakeBackHook | None = None
    """Which of the draining instances (by id) comes back before a new one is started; None: none does."""
    label: LabelHook | None = None
    """Roles are labels: makes the roles of a plan, in order of rank, and instances are re-labelled to them. None: an
    instance keeps its role, and instances of each role start and drain."""
    migrate: MigrationHook | None = None
    """None: no running request moves."""
    stages: StagesHook | None = None
    """Asked about each pipeline by itself, with a state of its own; gives a plan for each of its stages, in their
    order. None: they stay as configured."""
    stages_settings: Any = None
    """Passed to ``stages``, which may come from another policy than the rest (``policies.stages``)."""
    route: RouteHook | None = None
    """Which replica of a stage a sequence takes, of those that have room (never none): by its prompt's KV tokens and
    the request's id. With ``stages_settings``. None: the one with the fewest. Pipelines that are not models choose
    themselves, so only a simulation can run it."""
    stages_period_s: float = 15.0
    fleet_period_s: float = 30.0
    fleet_first_s: float = 0.0
    """No fleet tick before this time."""
    migrate_period_s: float = 1.0
    initial_max_batch_size: int | None = None
    """None: what the engine can at most."""
    initial_roles: Callable[[Any, int], Mapping[str, int]] | None = None
    """How an initial fleet of n splits into roles, or what the policy starts with in its place; None: all mixed."""
    eviction_pause_s: float = 5.0
    """For this long after an eviction for a place, batch work on the instance may be replaced as it ends, and not grow.
    Shorter keeps a little more batch work where evicted work resumes, and loses more where it starts again."""
    group_span_s: float = 300.0
    """Batch requests whose deadlines share a span of this length are one group to the fleet hook."""
    drain_timeout_s: float = 120.0
    """Batch work still running on a draining instance after this long is evicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEntry:
    """A policy by name: its settings type and how to make it."""

    settings: type[Any]
    make: Callable[[Any], Policy]
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePolicyEntry:
    """A stage policy by name: its settings type and its hook."""

    settings: type[Any]
    decide: StagesHook
    period_s: Callable[[Any], float]
    """Between two ticks, under these settings."""
    about: str
    route: RouteHook | None = None
