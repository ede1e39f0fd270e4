"""How long a modelled start takes, and which nodes are warm."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from chiron.core.clock import VirtualClock


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """How long an instance takes to come up. Billing starts with the model load."""

    node_start_s: float = 30.0
    """Until a node with free GPUs exists (0 on a fixed cluster). Not billed."""
    model_load_s: float = 30.0
    """Weights into the GPU and engine start, on a cold node. Billed. The paper's range is 15 s to 1 minute."""
    warm_load_s: float = 15.0
    """The same on a node that ran this model lately (weights still in its memory); no node start either. Billed."""
    warm_for_s: float = 600.0
    """How long a released node stays warm."""
    weights_gb_per_s: float = inf
    """How fast weights are read, in GB/s: what they take then comes on top of ``model_load_s``, which is the rest of a
    start. ``inf``: ``model_load_s`` is all of it, whatever their size."""
    jitter: float = 0.1
    """Each start takes uniformly +- this fraction of its time."""

    def __post_init__(self) -> None:
        if not self.weights_gb_per_s > 0:
            raise ValueError(f"weights_gb_per_s is {self.weights_gb_per_s}; it must be above 0")

    def load_s(self, *, warm: bool, weight_bytes: int) -> float:
        """Of these weights."""
        return self.warm_load_s if warm else self.model_load_s + weight_bytes / (self.weights_gb_per_s * 1e9)


class Nodes:
    """Nodes that were released a while ago, by what they served."""

    def __init__(self, clock: VirtualClock, warm_for_s: float) -> None:
        self._clock = clock
        self._warm_for_s = warm_for_s
        self._until: dict[str, list[float]] = {}

    def take(self, served: str) -> bool:
        """Whether there is a warm one, which is then taken: the latest."""
        now_s = self._clock.now_s
        nodes = [until for until in self._until.get(served, []) if until > now_s]
        warm = bool(nodes)
        if warm:
            nodes.remove(max(nodes))
        self._until[served] = nodes
        return warm

    def release(self, served: str) -> None:
        self._until.setdefault(served, []).append(self._clock.now_s + self._warm_for_s)
