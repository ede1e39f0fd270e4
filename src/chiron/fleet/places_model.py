"""On which node each instance of a modelled fleet has its GPUs: what sleepers are bound to.

A node has GPUs of one type. An instance is placed on the node with the fewest free GPUs that has enough of them, so
that others stay whole for larger ones. Where GPUs are free but on no node enough of them, it is spread over several.
Where the number of GPUs of a type has no limit there is always another node. Replicas of stages are not placed.
"""

from __future__ import annotations

from collections.abc import Mapping

from chiron.core.types import Instance, InstanceKind

Node = tuple[str, int]
"""GPU type and number."""


class Places:
    """Of all instances that hold GPUs, from their creation on."""

    def __init__(self, gpus_per_node: int, limits: Mapping[str, int]) -> None:
        self._per_node = gpus_per_node
        self._limits = dict(limits)
        self._free: dict[str, list[int]] = {}
        """GPUs of each node, by type."""
        self._held: dict[int, list[tuple[Node, int]]] = {}

    def held(self) -> Mapping[Node, int]:
        """GPUs that are held, by node."""
        sums: dict[Node, int] = {}
        for node, gpus in (each for held in self._held.values() for each in held):
            sums[node] = sums.get(node, 0) + gpus
        return sums

    def free(self, node: Node) -> int:
        return self._nodes(node[0])[node[1]]

    def node(self, instance: Instance) -> Node | None:
        """None: it is spread over several, or holds nothing."""
        held = self._held.get(instance.id, [])
        return held[0][0] if len(held) == 1 else None

    def take(self, instance: Instance, node: Node | None = None) -> None:
        """``node``: where it must be."""
        kind = instance.kind
        if node is None:
            node = self._choose(kind)
        if node is not None:
            self._hold(instance, node, kind.gpus)
            return
        left, free = kind.gpus, self._nodes(kind.gpu)
        while kind.gpu not in self._limits and sum(free) < left:
            free.append(self._per_node)
        for number in sorted(range(len(free)), key=lambda number: (-free[number], number)):
            gpus = min(left, free[number])
            if gpus:
                self._hold(instance, (kind.gpu, number), gpus)
                left -= gpus
        assert not left, "the control plane keeps to the limits"

    def leave(self, instance: Instance) -> None:
        """Harmless twice."""
        for (gpu, number), gpus in self._held.pop(instance.id, []):
            self._free[gpu][number] += gpus

    def _hold(self, instance: Instance, node: Node, gpus: int) -> None:
        self._free[node[0]][node[1]] -= gpus
        self._held.setdefault(instance.id, []).append((node, gpus))

    def _choose(self, kind: InstanceKind) -> Node | None:
        free = self._nodes(kind.gpu)
        able = [number for number, gpus in enumerate(free) if gpus >= kind.gpus]
        if able:
            return kind.gpu, min(able, key=lambda number: (free[number], number))
        if kind.gpu in self._limits or kind.gpus > self._per_node:
            return None
        free.append(self._per_node)
        return kind.gpu, len(free) - 1

    def _nodes(self, gpu: str) -> list[int]:
        found = self._free.get(gpu)
        if found is None:
            limit = self._limits.get(gpu, 0)
            whole, rest = divmod(limit, self._per_node)
            found = self._free[gpu] = [self._per_node] * whole + ([rest] if rest else [])
        return found
