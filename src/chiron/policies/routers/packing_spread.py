"""The instances that interactive requests are spread over, where packing would free none: the least loaded first."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from math import log2
from typing import Final

from chiron.core.types import Instance
from chiron.policies.policy import Estimates
from chiron.policies.routers.packing_pools import Note
from chiron.policies.routers.stale_entries import Entry, current

_LEAST_S: Final = 0.01
"""Work of a mean request, until sizes are known."""
_MOST_S: Final = 3600.0
"""Likewise, whatever engines said of their steps."""
_PER_OCTAVE: Final = 3
"""That work is known in steps of a third of an octave, so that it seldom changes; all loads are looked at anew then."""
_DIGITS: Final = 9
"""Of a load in seconds: sums that requests were added to and taken from leave dust, which must not order equal ones."""


class LeastLoaded:
    """Load is what a request would wait for there and be slowed by: prefill that waits, and for each sequence the work
    of a mean request. O(log instances) a change, amortised."""

    def __init__(self, estimates: Estimates) -> None:
        self.count = 0
        """Instances, the first by rank of those that take work; 0: requests are packed."""
        self._estimates = estimates
        self._request_s = _LEAST_S
        """Work of a mean request, of which all entries are made: what comes next depends on no entry's age."""
        self._rank_max = -1
        self._heap: list[Entry] = []
        self._heap_max = 64

    def begin(self, by_rank: Sequence[Instance], count: int) -> None:
        """Spread over the first ``count`` of these from now on. Those of batch work come last and are left alone,
        though GPUs or bounds made the plan smaller than it was."""
        self.count = count
        self._request_s = self._work_s()
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

    def stale(self) -> bool:
        """Whether the loads are to be looked at anew."""
        return self._request_s != self._work_s()

    def _load_s(self, instance: Instance) -> float:
        return round(instance.prefill_backlog_s + instance.sequences * self._request_s, _DIGITS)

    def _work_s(self) -> float:
        estimates = self._estimates
        usual, times = estimates.usual, estimates.step_times
        prefill_s = usual.input_tokens * estimates.prefill_token_s + usual.input_square * estimates.prefill_square_s
        output = usual.need_tokens - usual.input_tokens
        decode_s = output * (times.per_sequence_s + times.per_context_token_s * usual.need_tokens)
        work_s = min(max(_LEAST_S, prefill_s + decode_s), _MOST_S)  # In this order NaN is the least.
        return float(2.0 ** (round(log2(work_s) * _PER_OCTAVE) / _PER_OCTAVE))
