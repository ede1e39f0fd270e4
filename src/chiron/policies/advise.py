"""A policy that only advises: it sees and decides as always, and what it would do to requests is not done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from chiron.core.types import Placement, Request
from chiron.policies.defaults import least_outstanding
from chiron.policies.policy import Estimates, Policy, Router


class PeacefulRouter:
    """A router whose placements evict nobody."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.room_tokens = 0
        self.add = router.add
        self.remove = router.remove
        self.changed = router.changed

    def place(self, request: Request, waited_s: float) -> Placement | None:
        placement = self._router.place(request, waited_s)
        self.room_tokens = self._router.room_tokens
        return None if placement is None or placement.evict else placement

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()


def advising(policy: Policy) -> Policy:
    """The same policy where nobody is refused, evicted or moved, and batch sizes begin where the engines allow."""
    make = policy.place or least_outstanding

    def router(settings: Any, estimates: Estimates) -> PeacefulRouter:
        return PeacefulRouter(make(settings, estimates))

    return replace(policy, place=router, admit=None, migrate=None, initial_max_batch_size=None)
