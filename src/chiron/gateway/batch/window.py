"""The window: work of one model that is out of the store, what to lease next, and what to give back.

What is queued of it is bounded in items and in bytes, and filled up again once half of it is gone: a lease brings
many. Work that is due before something queued comes in at once, and what is due last goes back for it.

No I/O and no clock. The runner leases, submits and withdraws.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from chiron.core.backoff import doubled_s
from chiron.gateway.batch.call import BatchCall
from chiron.gateway.batch.settings import RunnerSettings
from chiron.gateway.batch.writer import Place
from chiron.gateway.relay.admission import ServedModel
from chiron.store.port import Item


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What to lease."""

    items_max: int
    before_deadline_s: float | None = None
    """Unix time: only what is due earlier; None: whatever is next."""
    bytes_max: int


class Window:
    """Work of one model that is out of the store."""

    def __init__(self, model: ServedModel, *, items_max: int, tuning: RunnerSettings) -> None:
        self.model = model
        self.name = model.settings.name
        self.cls = model.classes[model.settings.batch_class]
        self.calls: dict[Place, BatchCall] = {}
        """Submitted and not ended."""
        self.suspects: deque[Item] = deque()
        """Leased, to be tried one at a time."""
        self.suspect: BatchCall | None = None
        self.held: deque[Item] = deque()
        """Leased, and waiting until their keys' limits let them run."""
        self.failing = 0
        """Items that failed since the last that got an answer."""
        self.resume_s = 0.0
        """Nothing is submitted before (the clock's time)."""
        self.lease_delay_s = 0.0
        """The pause if the next lease fails; 0: the last did not."""
        self._items_max = items_max
        self._tuning = tuning

    @property
    def engines_fail(self) -> bool:
        """So many items failed in a row that the engines are taken to be at fault."""
        return self.failing >= self._tuning.failing_max

    def queued(self) -> list[BatchCall]:
        """Submitted, and not on an instance."""
        return [call for call in self.calls.values() if call.request is not None and call.request.instance is None]

    def lease(self, now_s: float, earliest_s: float) -> Lease | None:
        """What to lease; None: nothing. ``earliest_s`` is the first deadline in the store (Unix time)."""
        if now_s < self.resume_s:
            return None
        bytes_max, items_max = self._tuning.window_bytes_max, self._items_max
        if self.engines_fail:
            waits = self.suspects or self.suspect or self.calls
            return None if waits else Lease(items_max=1, bytes_max=bytes_max)
        if len(self.suspects) >= items_max:
            return None
        queued = self.queued()
        room = bytes_max - _bytes(call.item for call in queued) - _bytes(self.suspects)
        if len(queued) <= items_max // 2 and room > 0:
            return Lease(items_max=items_max - len(queued), bytes_max=room)
        latest_s = max((call.item.deadline_s for call in queued), default=-inf)
        if earliest_s < latest_s:
            return Lease(items_max=items_max // 2, before_deadline_s=latest_s, bytes_max=bytes_max)
        return None

    def surplus(self) -> list[BatchCall]:
        """What goes back once work with an earlier deadline came in: due last, and with no tokens to lose."""
        queued = self.queued()
        over = len(queued) - self._items_max
        over_bytes = _bytes(call.item for call in queued) - 2 * self._tuning.window_bytes_max
        if over <= 0 and over_bytes <= 0:
            return []
        fresh = [call for call in queued if call.request is not None and not call.request.tokens_done]
        fresh.sort(key=lambda call: (call.item.deadline_s, call.item.index), reverse=True)
        back: list[BatchCall] = []
        for call in fresh:
            if over <= len(back) and over_bytes <= 0:
                break
            back.append(call)
            over_bytes -= len(call.item.body)
        return back

    def next_suspect(self, now_s: float) -> Item | None:
        """The one to try now, if there is one; it is the caller's then."""
        if self.suspects and self.suspect is None and now_s >= self.resume_s:
            return self.suspects.popleft()
        return None

    @property
    def held_batches(self) -> frozenset[str]:
        """Batches of which nothing more is leased: their keys have run out."""
        return frozenset(item.batch_id for item in self.held)

    def take_held(self, batch_id: str | None = None) -> list[Item]:
        """Those that are held (of one batch, or all) are the caller's."""
        taken = [item for item in self.held if batch_id in (None, item.batch_id)]
        self.held = deque(item for item in self.held if batch_id not in (None, item.batch_id))
        return taken

    def take_suspects(self, batch_id: str | None = None) -> list[Item]:
        """Those that wait (of one batch, or all) are the caller's."""
        taken = [item for item in self.suspects if batch_id in (None, item.batch_id)]
        self.suspects = deque(item for item in self.suspects if batch_id not in (None, item.batch_id))
        return taken

    def ended(self, call: BatchCall) -> None:
        """The control plane has done with it."""
        self.calls.pop((call.item.batch_id, call.item.index), None)
        if self.suspect is call:
            self.suspect = None

    def gave_up(self, now_s: float) -> float:
        """One more item got no answer. Returns for how long (s) nothing is submitted; 0: that is no reason to pause."""
        self.failing += 1
        if not self.engines_fail:
            return 0.0
        doublings = self.failing - self._tuning.failing_max
        delay_s = doubled_s(self._tuning.backoff_min_s, self._tuning.backoff_max_s, doublings)
        self.resume_s = now_s + delay_s
        return delay_s


def _bytes(items: Iterable[Item]) -> int:
    """Of their input lines."""
    return sum(len(item.body) for item in items)
