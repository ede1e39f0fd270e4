"""The vocabulary: requests, classes, instances, samples, decisions.

Everything a policy returns and every rare input is a frozen value. ``Request`` and ``Instance`` are the two
mutable records; the control plane owns them, the per-request path reads them in place. Units are in the names:
seconds and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, Protocol

from chiron.core.specs import InstanceKind as InstanceKind
from chiron.core.specs import Kind as Kind
from chiron.core.specs import ModelSpec as ModelSpec
from chiron.core.specs import PipelineKind as PipelineKind
from chiron.core.specs import RequestClass as RequestClass
from chiron.core.specs import StageKind as StageKind

Role = Literal["interactive", "mixed", "batch"]
State = Literal["starting", "ready", "draining", "gone"]
StartSource = Literal["", "node", "disk", "peer", "memory"]
"""Where an instance's start took its weights from. ``node``: from storage, on a node that had to come up or had nothing
of them. ``disk``: from the node itself, which ran this model lately. ``peer``: from an instance of the same kind that
was ready. ``memory``: a sleeper woke, whose process and weights were still in host memory. Empty: not known."""
Outcome = Literal["finished", "rejected", "failed", "cancelled", "shed"]
"""``rejected``: something is wrong with the request itself. ``failed``: an engine failed. ``cancelled``: its client
cancelled it. ``shed``: Chiron refused it because it could not be served in time, or cut it off after too long a
time."""

ROLES: tuple[Role, ...] = ("interactive", "mixed", "batch")
KV_ANY = 1 << 60
"""No instance has room for so many tokens."""


class Request:
    """One request, from arrival to its end. ``payload`` is the driver's own (a body live, the true output length
    in the simulator); no policy may read it."""

    __slots__ = (
        "arrival_s",
        "booked",
        "called",
        "class_name",
        "cls",
        "counted",
        "cuts",
        "deadline_s",
        "dispatch_s",
        "epoch",
        "evict_asked_s",
        "evictions",
        "extends",
        "finish_s",
        "first_token_s",
        "flex",
        "id",
        "input_tokens",
        "instance",
        "instance_saved",
        "interactive",
        "itl_slo_s",
        "kv_most_tokens",
        "kv_saved_on",
        "kv_saved_tokens",
        "max_output_tokens",
        "migrating_to",
        "model",
        "outcome",
        "payload",
        "pinned",
        "predicted_tokens",
        "prefill_cost_s",
        "program",
        "ran",
        "refused_because",
        "reserved_tokens",
        "retries",
        "retry_after_s",
        "sequences",
        "submitted",
        "tenant",
        "tier",
        "tokens_done",
        "ttft_slo_s",
        "turn",
    )

    def __init__(
        self,
        id: int,
        model: str,
        cls: RequestClass,
        arrival_s: float,
        input_tokens: int,
        payload: Any = None,
        deadline_s: float | None = None,
        max_output_tokens: int | None = None,
    ) -> None:
        # What most events need comes first. Compiled, fields lie in this order, and of 20,000 open requests none is in
        # a cache when something happens to it.
        self.instance: Instance | None = None
        self.class_name = cls.name
        self.payload = payload
        self.called = ""
        """The journal's own note: what logs call it, once it has been asked for."""
        self.id = id
        self.model = model
        self.outcome: Outcome | None = None
        self.interactive = cls.kind == "interactive"
        """This, the name and the two SLOs are the class's, which is not compiled: read here once."""
        self.booked = False
        """It is among the ``requests`` of its instance. To ask those, of 20,000 that run, is to wait for memory."""
        self.ran = False
        """It has had a first token. Lengths and rates are learned from such requests only."""
        self.submitted = False
        """The control plane has taken it in."""
        self.counted = False
        """It was counted as an arrival, by this control plane and not by one before it."""
        self.pinned = False
        """It must end where it runs: its client sees the answer as it comes, and another instance would begin anew."""
        self.flex = False
        """Of a batch class, but no item of a job: its client waits for the answer. Not changed after ``submit``."""
        self.arrival_s = arrival_s
        self.dispatch_s = -1.0
        """First dispatch; -1 until then, as are the first token and the end."""
        self.first_token_s = -1.0
        self.finish_s = -1.0
        self.input_tokens = input_tokens
        self.tokens_done = 0
        """Output tokens that the gateway has for good: updated when the request is evicted or ends."""
        self.prefill_cost_s = 0.0
        """Seconds of prefill that dispatch counts for this request until its first token (an estimate)."""
        self.reserved_tokens = 0
        """KV tokens that dispatch counts for this request on its instance (an estimate)."""
        self.sequences = 1
        """Places that it takes on an instance: one for each choice of its answer, up to a limit. Not changed after
        ``submit``."""
        self.kv_most_tokens = KV_ANY
        """Only instances with room for at most so many KV tokens take it now: larger ones are kept for a longer prompt
        that waits ahead of it."""
        self.kv_saved_tokens = 0
        """Tokens whose KV an eviction saved in host memory; 0 means a resume prefills them again."""
        self.retries = 0
        """Engine failures survived."""
        self.evictions = 0
        self.epoch = 0
        """Number of its latest placement. What an engine tells late, twice or across a network is told of a placement:
        of an earlier one than this it is stale, and whoever stands between the two must drop it."""
        self.ttft_slo_s = cls.ttft_s
        self.itl_slo_s = cls.itl_s
        self.deadline_s = arrival_s + cls.deadline_s if deadline_s is None else deadline_s
        """Absolute time by which the last token is due."""
        self.refused_because = ""
        """Reason of the policy's admit hook, of one that it did not take."""
        self.cls = cls
        self.max_output_tokens = max_output_tokens
        self.evict_asked_s = -1.0
        """When its engine was last asked to let go of it."""
        self.kv_saved_on = -1
        """Instance that holds the saved KV, by id; ``instance_saved`` is its record."""
        self.instance_saved: Instance | None = None
        self.migrating_to: Instance | None = None
        self.tenant = ""
        """The tenant (an API key's name): overloads are kept apart by it. Not changed after ``submit``."""
        self.program = ""
        """The program (an agent, a chat) that makes this call, by a name of its own; empty: it is a request of its own.
        Not changed after ``submit``."""
        self.extends = False
        """The next prompt of its program begins with its own and the whole of its answer: for engine models."""
        self.cuts = 0
        """How often its program's conversation has been cut by then, likewise."""
        self.predicted_tokens = 0
        """Of its answer, by a predictor that a policy has; 0: nobody has predicted it."""
        self.tier = 0
        """How many sizes of its model's kinds are too small for it, as of when it was last queued."""
        self.turn: Any = None
        """The order's own note about the turn that it had."""
        self.retry_after_s = 0.0
        """Of one that was shed: when it is worth asking again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a scrape of one engine says. Totals only grow; a reader takes differences."""

    instance_id: int
    taken_s: float
    running: int
    waiting: int
    """Sequences inside the engine that wait for a slot or for KV space."""
    waiting_tokens: int
    """KV tokens that those would need."""
    head_tokens: int
    """KV tokens that the first of those would need."""
    kv_used_tokens: int
    steps: int
    busy_s: float
    decode_tokens: int
    prefill_tokens: int
    context_tokens: float
    """Sum over steps of the decoding sequences' contexts."""
    preemptions: int


class Engine(Protocol):
    """The port to one instance's engine."""

    def start(self, request: Request) -> None:
        """Run (or resume) a request. Answered by ``first_token`` and ``finished``."""

    def evict(self, request: Request) -> None:
        """Stop a request at the next step and keep its KV if the engine can. Answered by ``evicted`` (or by
        ``finished``, if that came first)."""

    def set_max_batch_size(self, max_batch_size: int) -> None: ...


class Instance:
    """The control plane's record of one instance. Counters are kept, never recounted."""

    __slots__ = (
        "avoided_until_s",
        "batch",
        "batch_limit",
        "batch_paced",
        "batch_sequences",
        "began_s",
        "class_counts",
        "created_s",
        "drain_started_s",
        "engine",
        "evicting",
        "eviction_left",
        "eviction_pause_until_s",
        "gpus",
        "heard_late",
        "id",
        "index",
        "kind",
        "kv_capacity_tokens",
        "kv_reserved_tokens",
        "leaving",
        "local",
        "max_batch_size",
        "max_num_batched_tokens",
        "model",
        "prefill_backlog_s",
        "prefill_batch_s",
        "prefill_limit_s",
        "prefill_share",
        "prefill_square_sampled",
        "prefill_square_total",
        "prefill_step_s",
        "previous_sample",
        "rank",
        "ready_s",
        "requests",
        "role",
        "running_interactive",
        "sample",
        "sequences",
        "source",
        "state",
    )

    def __init__(self, id: int, model: str, kind: InstanceKind, role: Role, created_s: float) -> None:
        # As of a request.
        self.requests: dict[int, Request] = {}
        """Everything dispatched here that has not ended, in order of dispatch."""
        self.index: Any = None
        """The router's own note about this instance."""
        self.sequences = 0
        """Of all these requests together: what the max batch size bounds."""
        self.batch_sequences = 0
        self.max_batch_size = kind.max_num_seqs
        self.max_num_batched_tokens = kind.max_num_batched_tokens
        """Token budget of its steps: as it is started, and from then on where the engine can change it."""
        self.kv_capacity_tokens = kind.kv_capacity_tokens
        self.kv_reserved_tokens = 0
        self.prefill_backlog_s = 0.0
        """Estimated prefill seconds of requests that have no first token yet."""
        self.prefill_limit_s = inf
        """Most of that which the local autoscaler wants in flight: requests that decode bear it as a mean."""
        self.role: Role = role
        self.state: State = "starting"
        self.id = id
        self.rank = id
        """Packing order: low ranks fill first."""
        self.batch: dict[int, Request] = {}
        """The batch requests among ``requests``."""
        self.class_counts: dict[str, int] = {}
        self.running_interactive = 0
        self.prefill_batch_s = 0.0
        """The batch requests' part of ``prefill_backlog_s``."""
        self.prefill_square_total = 0.0
        """Sum of squared prompt lengths whose prefill has ended: the attention term of prefill, seen from outside."""
        self.engine: Engine | None = None
        self.heard_late = False
        """What happens in its engine is heard of when the next step has begun: there is a wire between."""
        self.batch_limit: int | None = None
        """Requests here up to which batch work is added; None: as the max batch size."""
        self.prefill_step_s = inf
        """Most prefill in flight with which a step stays within the mean that is aimed at."""
        self.prefill_share = 1.0
        """Share of the time that prefill may take while steps are that long."""
        self.eviction_pause_until_s = -1.0
        """Until then batch work here does not grow beyond ``eviction_left`` requests, what the last eviction left:
        interactive requests needed the room a moment ago, and may again."""
        self.evicting: dict[int, Request] = {}
        """Told to leave; the engine has not released it yet."""
        self.model = model
        self.kind = kind
        self.gpus = kind.gpus
        """Of a pipeline: those of all its replicas, as of the last scrape."""
        self.created_s = created_s
        self.began_s = created_s
        """When its start began; later than ``created_s`` if it had to wait for its turn or for a device."""
        self.source: StartSource = ""
        """Told by the fleet by the time that it is ready."""
        self.ready_s = -1.0
        self.drain_started_s = -1.0
        self.leaving = False
        """It will be taken away whatever the plan says: once it drains it is not taken back."""
        self.eviction_left = 0
        self.avoided_until_s = -1.0
        """Nothing is dispatched here before this: it lost requests a moment ago."""
        self.batch_paced = False
        """A long batch prompt went in beside interactive requests; the next waits until they have made up for it."""
        self.prefill_square_sampled = 0.0
        """``prefill_square_total`` when the last scrape arrived."""
        self.sample: Sample | None = None
        self.previous_sample: Sample | None = None
        self.local: Any = None
        """State of the local autoscaler's policy for this instance."""

    @property
    def running(self) -> int:
        return len(self.requests)


class Placement:
    """Where a request runs, and what it takes there: decided by a policy's router, booked by the control plane. Not a
    frozen dataclass, because there is one for each dispatch."""

    __slots__ = ("evict", "instance", "kv_tokens", "prefill_s")

    def __init__(self, instance: Instance, prefill_s: float, kv_tokens: int, evict: tuple[Request, ...] = ()) -> None:
        self.instance = instance
        self.prefill_s = prefill_s
        """Seconds of prefill until its first token; 0 where its KV was saved."""
        self.kv_tokens = kv_tokens
        """KV that it will hold at its expected end."""
        self.evict = evict
        """Batch requests that make way for it, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was decided, why, and the numbers behind it. ``reason`` is one of a few constants."""

    kind: Literal["fleet", "batch_size", "role", "migrate", "reject", "stage", "token_budget"]
    subject: str
    """Model of a fleet decision, instance of a local one; of a stage its name and its instance."""
    before: int | float  # Compiled, a mere float would turn 1 into 1.0, and the event log would differ.
    after: int | float
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)
