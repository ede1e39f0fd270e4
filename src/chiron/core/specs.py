"""What users write of requests and models: classes with their SLOs, kinds of instances, fleet bounds.

Not compiled: configuration is read by the annotations of a class, runs on other cores get these by pickle, and a
compiled frozen class has neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

Kind = Literal["interactive", "batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestClass:
    """A class of requests and its SLOs. ``inf`` means: no such SLO."""

    name: str
    kind: Kind
    ttft_s: float = inf
    """Time to first token, seconds."""
    itl_s: float = inf
    """Inter-token latency, seconds: mean over the request's tokens."""
    deadline_s: float = inf
    """Seconds from arrival to the last token."""
    weight: float = 1.0
    """Share of the fleet that the class may count on in an overload, beside the weights of the others."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "itl_s", "deadline_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"class {self.name!r}: {name} is {getattr(self, name)}; it must be above 0")
        if not 0 < self.weight < inf:
            raise ValueError(f"class {self.name!r}: weight is {self.weight}; it must be above 0 and finite")

    @property
    def interactive(self) -> bool:
        return self.kind == "interactive"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageKind:
    """One stage of a pipeline: a range of a model's layers, served by replicas of its own."""

    name: str
    layers: tuple[int, int]
    """First and last, both included, counted from 0. The embedding belongs to the first layer of the model, its norm
    and head to the last."""
    gpu: str
    gpus: int = 1
    """Of one replica."""
    price_per_gpu_hour: float = 0.0
    weight_bytes: int = 0
    """What a replica loads before it is ready."""
    kv_capacity_tokens: int = 262_144
    """Of one replica: tokens whose keys and values of these layers fit."""
    max_num_seqs: int = 1024
    """The most sequences that one replica ever runs."""
    min_replicas: int = 1
    max_replicas: int = 8
    initial_replicas: int = 1
    """Those that are up where the pipeline has been running before."""
    start_s: float = 60.0
    """From asking for a replica to its first token, until one has been timed."""
    step_times: tuple[tuple[int, float], ...] = ()
    """Seconds of one pass by its number of tokens, without attention to contexts, ascending: planned or measured."""
    context_token_s: float = 0.0
    """What each token of context adds to a pass."""

    def __post_init__(self) -> None:
        if not 0 <= self.layers[0] <= self.layers[1]:
            raise ValueError(f"stage {self.name!r}: layers are {self.layers}; they must ascend from 0 or later")
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"stage {self.name!r}: min_replicas {self.min_replicas} must lie in 1..max_replicas "
                f"({self.max_replicas})"
            )
        if not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError(
                f"stage {self.name!r}: initial_replicas {self.initial_replicas} must lie in min_replicas.."
                f"max_replicas ({self.min_replicas}..{self.max_replicas})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineKind:
    """How an instance that is a pipeline of stages is built."""

    stages: tuple[StageKind, ...]
    hop_s: float = 0.0
    """Latency of one message from a stage to the next."""
    hop_bytes_per_s: float = inf
    token_bytes: int = 0
    """Activations of one token between two stages."""
    micro_batches_max: int = 0
    """Groups of sequences that are on their way through the stages at once; 0: twice the stages, for each
    replica of the stage that has most."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a pipeline has at least one stage")
        if not (0 <= self.hop_s < inf and self.hop_bytes_per_s > 0 and self.token_bytes >= 0):
            raise ValueError(
                f"hop_s {self.hop_s} must be finite and not negative, hop_bytes_per_s {self.hop_bytes_per_s} above 0, "
                f"token_bytes {self.token_bytes} not negative"
            )
        expected = 0
        for stage in self.stages:
            if stage.layers[0] != expected:
                what = "a hole before" if stage.layers[0] > expected else "an overlap at"
                raise ValueError(f"stage {stage.name!r}: {what} layer {stage.layers[0]}; layer {expected} is the next")
            expected = stage.layers[1] + 1
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages need names of their own; there are {', '.join(names)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceKind:
    """A thing that can be started for a model: an engine on some GPUs."""

    name: str
    gpu: str
    gpus: int
    price_per_gpu_hour: float
    kv_capacity_tokens: int
    max_num_seqs: int
    """The most sequences the engine can ever run at once; a max batch size never exceeds it."""
    max_num_batched_tokens: int = 2048
    """The engine's token budget of one step, and the most that it can ever be."""
    live_token_budget: bool = False
    """The engine takes another budget while it runs; else at most as it starts."""
    start_token_budget: bool = True
    """Whoever starts it can start it with a smaller one."""
    max_instances: int = 1_000_000
    weight_bytes: int = 0
    """What an instance loads before it is ready."""
    pipeline: PipelineKind | None = None
    """Its stages, if it is a pipeline; ``gpus`` are then those of one replica of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A served model: its kinds of instances in order of preference, and its fleet bounds (instances)."""

    name: str
    kinds: tuple[InstanceKind, ...]
    min_instances: int = 1
    max_instances: int = 50

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError(f"model {self.name!r} has no instance kind")
        if not 0 <= self.min_instances <= self.max_instances:
            raise ValueError(
                f"model {self.name!r}: min_instances {self.min_instances} must lie in 0..max_instances "
                f"({self.max_instances})"
            )
