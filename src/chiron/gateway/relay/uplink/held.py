"""What a relay knows of one request until it has ended."""

from __future__ import annotations

from chiron.control.dispatcher import RETRIES_MAX
from chiron.core.types import Outcome, Request
from chiron.gateway.port import messages as m
from chiron.gateway.relay.upstream import Placement, Run, blames_client

AGE_MAX_S = 1e7


class Held:
    """A request that the brain has not ended yet."""

    __slots__ = (
        "arrive",
        "instance",
        "last",
        "left",
        "losses",
        "placed",
        "request",
        "run",
        "shown_s",
        "tokens_before",
        "uncounted",
    )

    def __init__(self, request: Request, arrive: m.Arrive | None = None) -> None:
        self.request = request
        """Its dispatch and its first token are those of its latest placement."""
        self.arrive = arrive
        """What the brain was told of it; None: it is an item of a batch, which the brain knows better."""
        self.run: Run | None = None
        """Its placement, while it has one."""
        self.placed: Placement | None = None
        """The latest."""
        self.instance = 0
        """Of the latest."""
        self.tokens_before = 0
        """Output tokens with which the latest began."""
        self.last: m.Answered | m.Lost | m.Evicted | None = None
        """How the latest ended."""
        self.left = False
        """Its client has left."""
        self.shown_s = -1.0
        """When a cascade's first answer was found to do."""
        self.losses = 0
        """Placements that were lost."""
        self.uncounted = False
        """The brain does not know of the placement: it runs to its end by itself."""

    def began(self, run: Run, placed: Placement, instance: int, now_s: float) -> None:
        """It has been sent to an engine."""
        self.run, self.placed, self.instance = run, placed, instance
        self.last, self.uncounted = None, False
        self.tokens_before = placed.request.tokens_done
        self.request.dispatch_s, self.request.first_token_s = now_s, -1.0

    @property
    def outcome(self) -> Outcome | None:
        """How it has ended, as far as that needs no decision; None: it runs, or needs another placement."""
        last = self.last
        if self.run is not None:
            return None
        if self.left:
            return "cancelled"
        if isinstance(last, m.Answered):
            return "finished" if last.status < 400 else "rejected" if blames_client(last.status) else "failed"
        # What a client has seen a part of cannot be tried again.
        return "failed" if self.request.payload.visible or self.losses > RETRIES_MAX else None

    def running(self, now_s: float) -> m.Running:
        """Its latest placement, for a brain that does not know it."""
        request, placed = self.request, self.placed
        assert self.arrive is not None
        assert placed is not None
        return m.Running(
            request=self.arrive,
            run=placed.number,
            instance=self.instance,
            tokens_before=self.tokens_before,
            tokens=placed.tokens,
            arrived=_age_s(now_s, request.arrival_s),
            placed=_age_s(now_s, request.dispatch_s),
            began=_age_s(now_s, request.first_token_s) if request.first_token_s >= 0.0 else -1.0,
            silent=placed.silent,
            losses=self.losses,
        )

    def waits(self, now_s: float) -> m.Waits:
        assert self.arrive is not None
        return m.Waits(self.arrive, _age_s(now_s, self.request.arrival_s), self.losses)

    def turn(self) -> m.Turn | None:
        """What it is to a cascade; None: it is not of one."""
        call = self.request.payload
        return None if self.arrive is None or call.turn is None else m.Turn(call.number, *call.turn)

    def shown(self, now_s: float) -> m.Shown | None:
        """Since when its client can read it; None: it is no cascade's first answer that will do, or not yet."""
        return m.Shown(self.request.id, _age_s(now_s, self.shown_s)) if self.shown_s >= 0.0 else None


def _age_s(now_s: float, then_s: float) -> float:
    return min(max(0.0, now_s - then_s), AGE_MAX_S)
