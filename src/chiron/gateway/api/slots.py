"""What is being received at a time: so much in all, a share of it for each peer, and who is slow goes first.

An upload may take an hour and be right; but when all places are taken, one that comes at a few bytes a second is there
only to hold its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.requests import Request

from chiron.gateway.relay.errors import too_many, unavailable
from chiron.gateway.relay.keys import Key
from chiron.net.shares import Shares

RETRY_S = 2.0
SLOW_AFTER_S = 5.0
"""Who has had its place for less is not slow."""
FAIR_BYTES_PER_S = 65_536.0
"""Who brings more keeps its place."""


class Slot:
    """A place that somebody has, and what came so far."""

    __slots__ = ("bytes", "given_up", "since_s", "task")

    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
        self.bytes = 0
        self.given_up = False
        self.task = asyncio.current_task()

    def late_s(self, now_s: float) -> float:
        return now_s - self.since_s - self.bytes / FAIR_BYTES_PER_S


class Slots:
    def __init__(self, most: int, share: float, what: str, time_s: Callable[[], float]) -> None:
        self._most = most
        self._what = what
        self._time_s = time_s
        self._shares = Shares(most, share)
        self._taken: set[Slot] = set()

    @contextmanager
    def taken(self, request: Request, key: Key) -> Iterator[Slot]:
        """A place while something is received. Raises ApiError 429, or 503 when it is lost to others."""
        peers: tuple[str, ...] = request.scope["state"].get("peers", ())
        if key.name:
            peers = (*peers, f"API key {key.name!r}")
        if over := self._shares.over(peers, 1):
            raise too_many(f"{over} sends {self._shares.each} {self._what} already.", RETRY_S)
        if len(self._taken) >= self._most and not self._make_room():
            raise too_many(f"{self._most} {self._what} are being sent already.", RETRY_S)
        slot = Slot(self._time_s())
        self._taken.add(slot)
        self._shares.add(peers, 1)
        try:
            yield slot
        except asyncio.CancelledError:
            if not slot.given_up or slot.task is None:
                raise
            slot.task.uncancel()
            raise unavailable("It came too slowly while others waited for the place.", RETRY_S) from None
        finally:
            self._taken.discard(slot)
            self._shares.add(peers, -1)

    def _make_room(self) -> bool:
        now_s = self._time_s()
        slowest = max(self._taken, key=lambda slot: slot.late_s(now_s))
        if slowest.late_s(now_s) < SLOW_AFTER_S or slowest.task is None:
            return False
        slowest.given_up = True
        self._taken.discard(slowest)
        slowest.task.cancel()
        return True
