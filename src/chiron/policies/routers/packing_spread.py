"""The instances that interactive requests are spread over, where packing would free none: the least loaded first."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Final

from chiron.core.types import Instance
from chiron.policies.policy import Estimates
from chiron.policies.routers.packing_pools import Note
from chiron.policies.routers.stale_entries import Entry, current

_LEAST_S: Final = 0.01
"""Work of a mean request, until sizes are known."""


class LeastLoaded:
    """Load is what a request would wait for there and be slowed by: prefill that waits, and for each sequence the work
    of a mean request. O(log instances) a change, amortised."""

    def __init__(self, estimates: Estimates) -> None:
        self.count = 0
        """Instances, the first by rank of those that take work; 0: requests are packed."""
        self._estimates = estimates
        self._rank_max = -1
        self._heap: list[Entry] = []
        self._heap_max = 64

    def begin(self, by_rank: Sequence[Instance], count: int) -> None:
        """Spread over the first ``count`` of these from now on. Those of batch work come last and are left alone,
        though GPUs or bounds made the plan smaller than it was."""
        self.count = count
        self._heap = []
        self._rank_max = -1
        for instance in by_rank[:count]:
            if instance.role == "batch":
                break
            self._rank_max = instance.rank
            self.changed(instance)

    def changed(self, instance: Instance) -> None:
        if instance.rank > self._rank_max:
            return
        note: Note = instance.index
        note.last += 1
        heappush(self._heap, (self._load_s(instance), instance.rank, note.last, instance))
        if len(self._heap) > self._heap_max:
            self._heap = current(self._heap)
            self._heap_max = 64 + 2 * len(self._heap)

    def first(self) -> Instance | None:
        """The least loaded."""
        heap = self._heap
        while heap:
            _, _, last, instance = heap[0]
            note: Note = instance.index
            if note.open and note.last == last:
                return instance
            heappop(heap)
        return None

    def _load_s(self, instance: Instance) -> float:
        estimates = self._estimates
        usual, times = estimates.usual, estimates.step_times
        prefill_s = usual.input_tokens * estimates.prefill_token_s + usual.input_square * estimates.prefill_square_s
        output = usual.need_tokens - usual.input_tokens
        decode_s = output * (times.per_sequence_s + times.per_context_token_s * usual.need_tokens)
        return instance.prefill_backlog_s + instance.sequences * max(prefill_s + decode_s, _LEAST_S)
