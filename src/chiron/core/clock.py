"""One heap of timers with one total order, ``(when_s, key)``.

Two drivers drain it: the simulator in a loop, the gateway on asyncio. Control code asks for ``now_s`` and for
timers and cannot tell which of the two drives it.

Keys break ties. Ordinary timers take the next number of a counter, so equal times fire in the order of asking.
An engine model takes one negative key for life (see ``engine_key``): its timer is moved often, and how often it
moved must not change the order of ties, or fast-forward and step mode would differ on simultaneous events.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

from chiron.core.mypyc import mypyc_attr

Callback = Callable[[], None]

_ENGINE_KEY_BASE = -(1 << 40)


def engine_key(instance_id: int) -> int:
    """The tie-breaking key of an instance's engine timer: before ordinary timers, by instance id."""
    return _ENGINE_KEY_BASE + instance_id


class Timer:
    """A callback that can be cancelled before it fires."""

    __slots__ = ("_callback", "cancelled")

    def __init__(self, callback: Callback) -> None:
        self._callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __call__(self) -> None:
        if not self.cancelled:
            self._callback()


@mypyc_attr(allow_interpreted_subclasses=True)  # The live clock is one.
class VirtualClock:
    """Timers under virtual time: ``run_until`` jumps from one to the next."""

    __slots__ = ("_heap", "_sequence", "key", "now_s")

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s
        self.key = 0
        """Key of the timer that is firing: with ``now_s``, the point reached in the total order."""
        self._heap: list[tuple[float, int, Callback]] = []
        self._sequence = 0

    def call_at(self, when_s: float, callback: Callback) -> Timer:
        """Call ``callback`` at ``when_s`` (seconds), or now if that has passed."""
        timer = Timer(callback)
        self._sequence += 1
        entry: tuple[float, int, Callback] = (max(when_s, self.now_s), self._sequence, timer)
        heappush(self._heap, entry)
        return timer

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        return self.call_at(self.now_s + delay_s, callback)

    def push(self, when_s: float, key: int, callback: Callback) -> None:
        """Call ``callback`` at ``when_s`` under a caller's own tie-breaking key; it cannot be cancelled.

        For engine models: they move their timer several times a request and know a stale call when they get one.
        """
        heappush(self._heap, (when_s, key, callback))

    def next_s(self) -> float | None:
        """Time of the earliest timer, or None."""
        return self._heap[0][0] if self._heap else None

    def run_until(self, end_s: float) -> None:
        """Fire every timer due at or before ``end_s``, in order, and leave ``now_s`` at ``end_s``."""
        heap = self._heap
        while heap and heap[0][0] <= end_s:
            self.now_s, self.key, callback = heappop(heap)
            callback()
        if end_s > self.now_s:
            self.now_s = end_s
        self._sequence += 1
        self.key = self._sequence

    def step(self) -> bool:
        """Fire the earliest timer; False when there is none."""
        if not self._heap:
            return False
        self.now_s, self.key, callback = heappop(self._heap)
        callback()
        return True
