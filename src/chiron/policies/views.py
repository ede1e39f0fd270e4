"""What policies read and return: frozen values, taken once per decision.

The views hold what a live controller would know: its own bookkeeping (queues, dispatches, first tokens, ends) at
once, and what engines report (KV in use, step times) as old as the last scrape. No view holds a future arrival or a
true output length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any, NamedTuple

from chiron.core.types import PipelineKind, RequestClass, Role, StageKind, StartSource, State


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """A learned step-time model: seconds = fixed + per_sequence*B + per_context*S + per_prefill*n + per_square*n^2."""

    fixed_s: float
    per_sequence_s: float
    per_context_token_s: float
    per_prefill_token_s: float
    per_prefill_square_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassMix:
    """What the requests of one class have looked like lately."""

    cls: RequestClass
    input_tokens: float
    """Mean prompt."""
    input_square: float
    """Mean squared prompt."""
    output_tokens: float
    """Mean output of finished requests, shrunk towards the prior while few have finished."""
    output_sd: float
    finished: int
    output_low: int = 1
    """Output tokens that all but a few requests have; 1 until that is known."""
    input_tail: tuple[tuple[float, float], ...] = ()
    """(tokens, share of prompts that are about so long) of the longest twentieth at most, longest first; empty until
    that is known."""


class InstanceView(NamedTuple):
    """One instance at a fleet tick. A tuple, because a tick makes one for each instance while requests wait."""

    id: int
    role: Role
    state: State
    age_s: float
    """Since ready, or since created while starting."""
    dispatched: int
    """Requests dispatched here that have not ended."""
    dispatched_interactive: int
    max_batch_size: int
    kv_capacity_tokens: int
    sample_age_s: float
    """Age of the last scrape; inf before the first."""
    running: int
    """The next five as of that scrape (0 before the first)."""
    waiting: int
    waiting_tokens: int
    head_tokens: int
    kv_used_tokens: int
    itl_s: float
    """Mean step over the last scrape interval; nan when idle or unknown."""
    gpus: int = 1
    """That it takes: kinds of one model may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """A request group: queued batch requests of similar deadline."""

    deadline_s: float
    requests: int
    input_tokens: float
    """Sum over the group, as the next two."""
    input_square: float
    output_tokens: float
    """Expected output still to come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalView:
    """Arrivals of one class in one full second, seen for the first time at this fleet tick.

    Of a second that was seen before: what ended since then without having run, as negative figures. Added up by
    second, views leave only what ran, what may yet run and what was turned away for want of room."""

    second: int
    """Whole seconds on the control plane's clock, before the one under way."""
    cls: RequestClass
    requests: int
    input_tokens: float
    input_square: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """One model at a fleet tick."""

    name: str
    min_instances: int
    max_instances: int
    gpu: str
    """GPU type of the preferred kind, and how many of it one instance takes."""
    gpus_per_instance: int
    price_per_hour: float
    """Of one instance of the preferred kind."""
    kv_capacity_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    """The most that the token budget of the preferred kind's steps can be."""
    planned: Mapping[Role, int]
    """The plan in force."""
    instances: tuple[InstanceView, ...]
    arrivals: tuple[ArrivalView, ...]
    mixes: tuple[ClassMix, ...]
    waiting_interactive: int
    waiting_input_tokens: float
    waiting_input_square: float
    oldest_wait_s: float
    """How long the first waiting interactive request has waited."""
    groups: tuple[GroupView, ...]
    """Earliest deadline first; groups beyond a limit are merged into the last."""
    running_batch: int
    attained: int
    """Interactive requests that ran and ended since the last tick with every SLO met, and those without or turned
    away for want of room or time."""
    missed: int
    itl_missed: float
    """Share of recent interactive requests that missed their ITL SLO."""
    step_times: StepTimes
    cold_start_s: float
    """From the plan to ready: measured, or the prior before the first start. Sleepers that woke do not count."""
    cold_starts_seen: int
    start_s: Mapping[StartSource, float] = field(default_factory=dict)
    """The same by source, of those by which instances have started."""
    asleep: int = 0
    """Sleepers: the next starts wake them, if there are GPUs for them."""
    over_budget: int = 0
    """Instances that start or are ready with a larger token budget than new ones get, and keep it while they run."""

    def count(self, *states: State, role: Role | None = None) -> int:
        return sum(1 for i in self.instances if i.state in states and (role is None or i.role == role))


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetView:
    """Every model at a fleet tick."""

    now_s: float
    since_s: float
    """Seconds since the last tick."""
    models: tuple[ModelView, ...]
    gpus_max: Mapping[str, float] = field(default_factory=dict)
    """GPUs of each type that exist; a type not named is unlimited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudget:
    """How many tokens one step of an engine may take."""

    max_num_batched_tokens: int
    """At most as many as its kind has."""
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """How many instances of each role one model should have, and why."""

    counts: Mapping[Role, int]
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    ibp: float = nan
    ibp_target: float = nan
    bbp: float = nan
    token_budget: TokenBudget | None = None
    """That instances are started with from now on; None: that of their kind."""
    batch_at_risk: bool = False
    """Batch work will miss its deadline unless it goes before requests that are lost anyway (``Order.only_lost``). They
    evict none of it either."""
    spread_over: int = 0
    """Over how many instances, the first by rank, interactive requests are spread by load, because those stay anyway;
    0: requests are packed. For a router that can do both."""
    renews: int = 0
    """Of those counted, how many are to take the place of instances that keep a larger token budget. Until they have,
    none that drains with one is taken back."""
    asleep: int = 0
    """How many sleepers there may be: instances that the plan has no use for go to sleep up to this number, where the
    fleet can do that and has the host memory; others are stopped."""


FleetPlan = Mapping[str, ModelPlan]


class LocalView(NamedTuple):
    """One instance, each time a scrape of it arrives. A tuple for the same reason."""

    now_s: float
    role: Role
    max_batch_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    """Token budget of its engine's steps now."""
    token_budget_max: int
    """The most that it can be."""
    prefill_limit_s: float
    """The limit in force; inf: none."""
    batch_limit: int | None
    """Likewise; None: none."""
    batch_waits: bool
    """Batch work of this model is queued."""
    itl_missed: float
    """Share of this model's recent interactive requests that missed their ITL SLO, in the class where it is largest."""
    dispatched: int
    at_cap: bool
    """It runs as many sequences as its max batch size allows."""
    itl_slo_s: float
    """Tightest ITL among the classes that run here; inf if none has one."""
    itl_s: float
    """Mean step time since the last scrape; nan when idle."""
    decode_batch: float
    """Mean decoding sequences per step since the last scrape."""
    throughput: float
    """Decoded tokens per second since the last scrape."""
    class_counts: Mapping[str, int]
    mixes: Mapping[str, ClassMix]
    step_times: StepTimes
    learned: bool
    """The step-time model has seen enough to be trusted."""


class StepView(NamedTuple):
    """What the next step of an engine may hold besides a token of each sequence that decodes."""

    now_s: float
    step: int
    """Steps that were before it."""
    decoding: int
    tokens_max: int
    """Of prompts: what decoding leaves of the engine's token budget."""
    kv_free_tokens: int
    step_s: Callable[[int, int], float]
    """Its time with so many tokens of a prompt of which so many are done: what an engine's profile says."""
    kv_capacity_tokens: int = 0
    places: int = 0
    """The max batch size."""
    places_free: int = 0
    """Negative after the max batch size was lowered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDecision:
    """The max batch size from now on."""

    max_batch_size: int
    reason: str
    prefill_limit_s: float = inf
    """Most estimated prefill seconds in flight on this instance from now on."""
    prefill_step_s: float = inf
    """The same where batch work is added beside interactive requests: what keeps each step within the target."""
    prefill_share: float = 1.0
    """Share of the time that prefill may take there."""
    batch_limit: int | None = None
    """Requests on the instance up to which batch work is added; None: as the max batch size."""
    token_budget: TokenBudget | None = None
    """Of its engine, where that can be changed while it runs (``InstanceKind.live_token_budget``); None: as it is."""
    evicts: bool = False
    """Beside interactive requests, batch work beyond the max batch size is evicted; else it may end where it runs."""
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """One stage of a pipeline at a tick of the stage loop, as of the last scrape."""

    kind: StageKind
    """Its layers, what a replica is and costs, its bounds, and planned step times."""
    planned: int
    """Replicas by the plan in force."""
    ready: int
    starting: int
    draining: int
    utilisation: float
    """Share of the time since the last tick that its ready replicas worked; nan: unknown."""
    step_s: float
    """Mean time of a pass since the last tick; nan: none ran."""
    batch_tokens: float
    """Mean tokens in such a pass."""
    waiting: float
    """Sequences that wait for a replica of it."""
    kv_used: float
    """Share in use of the KV of its fullest replica."""
    start_s: float
    """From asking for a replica to ready: measured, or planned before the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineView:
    """One pipeline at a tick of the stage loop."""

    now_s: float
    since_s: float
    """Seconds since its last tick."""
    model: str
    instance: int
    kind: PipelineKind
    """Its hops and limits."""
    stages: tuple[StageView, ...]
    sample_age_s: float
    """Of what the engine reports; inf before the first scrape."""
    running: int
    waiting: int
    """Requests without a place on a replica of every stage, here and in the queue in front of all pipelines."""
    waiting_interactive: int
    """Of these, interactive ones."""
    context_tokens: float
    """Mean context of a running sequence; 0 when none runs."""
    arrival_rate: float
    """Interactive requests per second of this model since the last tick, over its pipelines."""
    batch_due: tuple[tuple[float, float], ...]
    """Batch requests that have not ended, over the pipelines: (when they are due, how many), earliest first."""
    pipelines: int
    """By the plan of the fleet policy: how much is needed is its decision, where in a pipeline the stage policy's."""
    mixes: tuple[ClassMix, ...]
    """What the requests have looked like, with their SLOs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """One replica of a stage that has room for a sequence, when that comes."""

    layers: int
    hop_s: float
    """Of a message to it."""
    sequences: int
    """That have a place there."""
    kv_left_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """How many replicas one stage should have, and why."""

    replicas: int
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """Move one running request between instances."""

    source: int
    destination: int


PolicyState = Any
