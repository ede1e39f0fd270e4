"""A relay without a brain: what runs goes on, what ends is kept to be told, what comes is held.

Once the brain has been silent for a while, the relay places what waits by itself: on the instance with the least
outstanding, within its share of the instance's last known max batch size. What the other relays do it does not know:
where one of them had more than its share there already, the instance runs that much above its limit until those end,
and where there are fewer places than relays, each takes one. Nor does it know of prefill, KV or roles: this is for the
moments until another brain leads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import inf

from chiron.core.types import Outcome
from chiron.gateway.port import messages as m
from chiron.gateway.relay.body import places
from chiron.gateway.relay.errors import ApiError, unavailable
from chiron.gateway.relay.uplink.held import Held
from chiron.gateway.relay.uplink.joining import StaySettings
from chiron.gateway.relay.upstream import Upstream

AVOID_S = 5.0
"""An instance that has just lost a request gets no more for so long."""
UNABLE_S = 300.0
"""So long after a request has waited in vain clients are better sent elsewhere: if there is nowhere else, no longer."""


class Alone:
    """Used while there is no brain, and asked what the next one should be told."""

    def __init__(
        self,
        *,
        settings: StaySettings,
        retry_after_s: float,
        upstreams: Mapping[int, Upstream],
        known: Mapping[int, m.Known],
        carry: Callable[[Held, int], None],
        end: Callable[[Held, Outcome, ApiError | None], None],
    ) -> None:
        """``upstreams`` and ``known`` by instance; ``carry`` sends a request to one, ``end`` ends one."""
        self.waiting: dict[int, Held] = {}
        """Requests without a placement, by number, in the order in which they came."""
        self.untold: deque[Sequence[m.Message]] = deque()
        """What there is to say of requests that ended while nobody could be told."""
        self.relays = 1
        """How many share the instances, as last told."""
        self.placements = 0
        """Chosen here, since the last brain was told."""
        self.expired = 0
        self.forgotten = 0
        self._settings = settings
        self._retry_after_s = retry_after_s
        self._upstreams = upstreams
        self._known = known
        self._carry = carry
        self._end = end
        self._bytes = 0
        """Of the bodies of all that waits."""
        self._since_s = 0.0
        self._heard_s = 0.0
        self._avoided_s: dict[int, float] = {}
        self._answered_s = -inf
        """When an engine last gave a first token, or an end."""
        self._unable_s = -inf
        """When a request was last given up that no engine answered anything meanwhile."""

    def begin(self, now_s: float, heard_s: float) -> None:
        """The brain is gone; ``heard_s``: when it last said something."""
        self._since_s, self._heard_s = now_s, heard_s

    def over(self) -> None:
        """There is a brain again, which is told of all that waits."""
        self.waiting.clear()
        self._avoided_s.clear()
        self._bytes = 0
        self._unable_s = -inf

    def check_room(self, held: Held) -> None:
        """Raises ApiError where no more can wait."""
        body_bytes = held.request.payload.body_bytes
        settings = self._settings
        if len(self.waiting) >= settings.hold_max or self._bytes + body_bytes > settings.hold_max_bytes:
            raise unavailable("The gateway has no control plane now, and too many requests wait.", self._retry_after_s)

    def wait(self, held: Held) -> None:
        self.waiting[held.request.id] = held
        self._bytes += held.request.payload.body_bytes

    def no_longer_waits(self, held: Held) -> None:
        if self.waiting.pop(held.request.id, None) is not None:
            self._bytes -= held.request.payload.body_bytes

    def lost(self, instance: int, now_s: float) -> None:
        """A request was lost there."""
        self._avoided_s[instance] = now_s + AVOID_S

    def answered(self, now_s: float) -> None:
        """By an engine."""
        self._answered_s, self._unable_s = now_s, -inf

    def serves(self, now_s: float) -> bool:
        """As far as is known. Others may have a brain, and know where engines are by now."""
        return now_s - self._unable_s > UNABLE_S

    def keep(self, messages: Sequence[m.Message]) -> None:
        """To be told to the next brain."""
        if len(self.untold) >= self._settings.kept_max:
            self.untold.popleft()
            self.forgotten += 1
        self.untold.append(messages)

    def look(self, now_s: float) -> None:
        """A few times a second: give up what has waited for too long, place what can be placed."""
        for held in list(self.waiting.values()):
            request = held.request
            since_s = max(self._since_s, request.arrival_s)
            wait_max_s = min(self._settings.hold_s, request.payload.wait_max_s)
            if now_s > request.deadline_s or (request.interactive and now_s - since_s > wait_max_s):
                self.no_longer_waits(held)
                self.expired += 1
                if now_s - since_s >= self._settings.hold_s and self._answered_s < since_s:
                    self._unable_s = now_s
                words = f"The gateway has had no control plane for {now_s - self._since_s:.0f} s."
                self._end(held, "shed", unavailable(words, self._retry_after_s))
        self.place(now_s)

    def place(self, now_s: float) -> None:
        """What waits, if the brain has been silent for long enough: interactive requests first."""
        silent_s = now_s - self._heard_s
        if silent_s <= self._settings.fall_back_s or not self.waiting:
            return
        for interactive in (True, False) if silent_s <= self._settings.fall_back_batch_s else (True,):
            full: dict[str, int] = {}
            while (found := self._next(interactive, full, now_s)) is not None:
                held, instance = found
                self.no_longer_waits(held)
                self.placements += 1
                self._carry(held, instance)

    def _next(self, interactive: bool, full: dict[str, int], now_s: float) -> tuple[Held, int] | None:
        """The first that can be placed, and where; ``full``: the fewest sequences that found no room, by model."""
        models = {known.model for known in self._known.values()}
        if all(full.get(model) == 1 for model in models):
            return None
        for held in self.waiting.values():
            request = held.request
            if request.interactive is not interactive:
                continue
            sequences = places(request.payload.sequences)
            if sequences >= full.get(request.model, inf):
                continue
            instance = self._least_outstanding(request.model, sequences, now_s)
            if instance is not None:
                return held, instance
            full[request.model] = sequences
            if all(full.get(model) == 1 for model in models):
                break
        return None

    def _least_outstanding(self, model: str, sequences: int, now_s: float) -> int | None:
        """The instance, if any has room for so many sequences more."""
        best: tuple[int, int] | None = None
        for number, known in self._known.items():
            if known.model != model or self._avoided_s.get(number, 0.0) > now_s:
                continue
            running = self._upstreams[number].sequences
            share = max(min(1, known.max_batch_size), known.max_batch_size // self.relays)
            if running + sequences <= share and (best is None or (running, number) < best):
                best = (running, number)
        return best[1] if best is not None else None
