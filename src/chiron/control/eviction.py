"""Work taken off an instance: eviction of batch work, migration, and requests that were cancelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from chiron.control.booking import leave
from chiron.control.model import ModelState
from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, Placement, Request
from chiron.policies.size import prefill_s, within

REDONE_MAX: Final = 0.2
"""Share of an instance's time that prefill may take which is done again because batch work made way for prefill. Ours:
of five shares the one with the shortest TTFT in the co-serving test, whose batch ends 6 to 9 % later with it."""
ANSWER_MAX_S: Final = 60.0
"""For so long an engine may take to let go of a request. What is not answered by then is not there any more: a
message was lost, and an instance that drains would wait for it for ever."""


class Evictor:
    """Takes places away; what was evicted comes back as an event of its engine."""

    def __init__(self, clock: VirtualClock, pause_s: float) -> None:
        """``pause_s``: for so long a place that batch work has just left stays free."""
        self.evictions = 0
        self._clock = clock
        self._pause_s = pause_s

    def evict(self, state: ModelState, request: Request) -> None:
        request.evictions += 1
        self.evictions += 1
        self.stop(state, request)

    def stop(self, state: ModelState, request: Request) -> None:
        """Take its place away; the engine lets go of it at the next step."""
        instance = leave(state, request)
        assert instance is not None
        instance.evicting[request.id] = request
        request.evict_asked_s = self._clock.now_s
        assert instance.engine is not None
        instance.engine.evict(request)

    def unanswered(self, instance: Instance) -> list[Request]:
        """Requests that the engine ought to have let go of long ago."""
        if not instance.evicting:
            return []
        since_s = self._clock.now_s - ANSWER_MAX_S
        return [request for request in instance.evicting.values() if request.evict_asked_s <= since_s]

    def make_room(self, state: ModelState, request: Request, placement: Placement) -> None:
        """Evict whom the request's placement names. Where they leave for a place, and not for their prefill alone, the
        place stays free for a while."""
        instance = placement.instance
        for victim in placement.evict:
            had_room = within(
                instance, instance.sequences + request.sequences, instance.kv_reserved_tokens + placement.kv_tokens
            )
            self.evict(state, victim)
            if not had_room:
                self._pause(instance)

    def relieve(self, state: ModelState, victims: Sequence[Request]) -> None:
        """Evict batch work of one instance that makes way for prefill. It stays away for long enough that what it has
        to prefill again is a small share of the time; or it would come back as soon as nobody waits, leave once more
        in the next moment of need, and cost the instance one prefill after another. Work that is at risk has no time
        for that."""
        redone_s = 0.0
        for victim in victims:
            if not victim.prefill_cost_s:
                redone_s += prefill_s(state.learner, victim.input_tokens + victim.tokens_done)
        for victim in victims:
            instance = victim.instance
            self.evict(state, victim)
            if redone_s and instance is not None and not state.batch_at_risk:
                until_s = self._clock.now_s + redone_s / REDONE_MAX
                instance.eviction_pause_until_s = max(instance.eviction_pause_until_s, until_s)
                instance.eviction_left = len(instance.batch)

    def trim(self, state: ModelState, instance: Instance) -> None:
        """Evict batch work, last come first, beyond the max batch size."""
        while instance.batch and instance.sequences > instance.max_batch_size:
            self.evict(state, next(reversed(instance.batch.values())))
            self._pause(instance)

    def _pause(self, instance: Instance) -> None:
        """The next of a burst may want the place that batch work has just left."""
        instance.eviction_pause_until_s = self._clock.now_s + self._pause_s
        instance.eviction_left = len(instance.batch)

    def end_pause(self, state: ModelState, instance: Instance) -> None:
        """Let batch work grow again once the pause is over; soon, where some is at risk."""
        if state.batch_at_risk:
            soon_s = self._clock.now_s + self._pause_s
            instance.eviction_pause_until_s = min(instance.eviction_pause_until_s, soon_s)
        if 0.0 <= instance.eviction_pause_until_s <= self._clock.now_s:
            instance.eviction_pause_until_s = -1.0
            if instance.state == "ready":
                state.router.changed(instance)
