"""Requests wait in front of the instances: each goes to the one with the fewest that has room, or to none."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from chiron.core.types import Instance, Placement, Request
from chiron.policies.policy import Estimates
from chiron.policies.routers.stale_entries import Changes, Entry, closed, current, opened
from chiron.policies.size import fits, kv_tokens, may_hold, placed, within

VICTIMS_MAX = 8
"""Instances that are looked at for batch work that could make way."""


class GatedRouter:
    """Room is a place within the max batch size and KV for the expected end. One that turned a request away is asked
    again when its load changed, or by a smaller request. O(log n) a change, amortised, while requests do not take turns
    in size. ``room_for`` is for routers on top of it."""

    def __init__(self, estimates: Estimates) -> None:
        self.room_tokens = 0
        self.count = 0
        """Instances that take work."""
        self._estimates = estimates
        self._open: list[Entry] = []
        self._aside: list[Entry] = []
        """Those with room, but none for requests as large as those that they turned away: of so many sequences and so
        much KV at the most."""
        self._aside_size = (0, 0.0)
        self._batch: list[Entry] = []
        """Those that run batch work, most first."""
        self._most = 64

    def add(self, instance: Instance) -> None:
        if opened(instance):
            self.count += 1
            self.changed(instance)

    def remove(self, instance: Instance) -> None:
        if closed(instance):
            self.count -= 1

    def changed(self, instance: Instance) -> None:
        changes: Changes = instance.index
        if changes.open:
            changes.last += 1
            heappush(self._open, (instance.sequences, instance.id, changes.last, instance))
            if instance.batch:
                heappush(self._batch, (-instance.batch_sequences, instance.id, changes.last, instance))
            if len(self._open) + len(self._aside) + len(self._batch) > self._most:
                self._open, self._batch = current(self._open), current(self._batch)
                self._aside = current(self._aside)
                self._most = 64 + 2 * (len(self._open) + len(self._aside) + len(self._batch))

    def place(self, request: Request, waited_s: float) -> Placement | None:
        instance = self.room_for(request)
        return None if instance is None else placed(self._estimates, request, instance)

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()

    def room_for(self, request: Request) -> Instance | None:
        need = kv_tokens(self._estimates, request)
        sequences, tokens = self._aside_size
        if self._aside and (request.sequences < sequences or need < tokens):
            for entry in self._aside:
                heappush(self._open, entry)
            self._aside, self._aside_size = [], (0, 0.0)
        small: list[Entry] = []
        chosen: Instance | None = None
        while self._open and chosen is None:
            entry = self._open[0]
            instance = entry[3]
            if entry[2] != instance.index.last:
                heappop(self._open)
            elif fits(instance, request, int(need)):
                chosen = instance
            else:
                heappop(self._open)
                if not may_hold(instance, request):  # Whatever leaves it.
                    small.append(entry)
                elif within(instance, instance.sequences + 1, instance.kv_reserved_tokens + 1):
                    self._aside.append(entry)
                    sequences, tokens = self._aside_size
                    self._aside_size = (max(sequences, request.sequences), max(tokens, need))
        for entry in small:
            heappush(self._open, entry)
        return chosen

    def make_way(self, request: Request) -> Placement | None:
        """A place where batch work leaves, last come first, as much as it takes; None: there is not enough."""
        need = int(kv_tokens(self._estimates, request))
        passed: list[Entry] = []
        made: Placement | None = None
        while self._batch and made is None and len(passed) < VICTIMS_MAX:
            entry = heappop(self._batch)
            instance = entry[3]
            if entry[2] == instance.index.last:
                passed.append(entry)
                evict = _leaving(instance, request, need)
                if evict:
                    made = placed(self._estimates, request, instance)
                    made.evict = evict
        for entry in passed:
            heappush(self._batch, entry)
        return made


def _leaving(instance: Instance, request: Request, need: int) -> tuple[Request, ...]:
    """The batch requests that must leave it; none if that is not enough."""
    if not may_hold(instance, request):
        return ()
    sequences, reserved = instance.sequences + request.sequences, instance.kv_reserved_tokens + need
    evict: list[Request] = []
    for victim in reversed(instance.batch.values()):
        if within(instance, sequences, reserved):
            break
        sequences -= victim.sequences
        reserved -= victim.reserved_tokens
        evict.append(victim)
    return tuple(evict) if within(instance, sequences, reserved) else ()
