"""How long a modelled start takes, from each source of its weights, and which nodes are warm.

Besides a fresh node and a warm one (``ColdStart``) there are instances of the same kind that are ready, which can hand
over their weights, and sleepers (``fleet.sleepers_model``).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from chiron.core.clock import VirtualClock
from chiron.core.types import StartSource


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
    peer_load_s: float = inf
    """What a start takes whose weights come from an instance of the same kind that is ready, besides what they take at
    ``peer_gb_per_s``. ``inf``: none does. A node is needed all the same. Billed."""
    peer_gb_per_s: float = inf
    """How fast such an instance hands its weights over, in GB/s."""
    jitter: float = 0.1
    """Each start takes uniformly +- this fraction of its time."""

    def __post_init__(self) -> None:
        for name in ("weights_gb_per_s", "peer_gb_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    def fastest(self, *, warm: bool, peer: bool, weight_bytes: int) -> tuple[StartSource, float]:
        """Where the weights come from where all of them are to be had, and what loading them takes. ``peer``: an
        instance of the kind is ready."""
        own_s = self.load_s(warm=warm, weight_bytes=weight_bytes)
        peer_s = self.peer_load_s + weight_bytes / (self.peer_gb_per_s * 1e9)
        if peer and peer_s < own_s:
            return "peer", peer_s
        return "disk" if warm else "node", own_s

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
