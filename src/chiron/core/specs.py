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
    """The engine's token budget of one step."""
    max_instances: int = 1_000_000


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
