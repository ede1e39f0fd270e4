"""Classes of requests and their SLOs: what users write. Not compiled: configuration is read by the annotations of a
class, and a compiled one has lost them."""

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
