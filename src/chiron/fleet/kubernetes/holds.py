"""An instance's claim to a replica of a workload, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from chiron.fleet.kubernetes.pods import Cause, Pod


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A pod that an instance had has ended."""

    reason: str
    taken: bool
    """It was deleted; otherwise its engine ended."""


class Hold:
    """One instance's claim to a replica."""

    __slots__ = ("_left", "address", "check_now", "ended", "leaving", "lost", "pod", "since_s", "without")

    def __init__(self, now_s: float, check_now: asyncio.Event, left: Callable[[str], None], address: str) -> None:
        self.address = address
        """Of the pod that it had under another gateway; empty: any pod will do."""
        self.since_s = now_s
        """Since when it has waited for a pod."""
        self.check_now = check_now
        """Set when the cluster doubts its pod."""
        self._left = left
        self.leaving = False
        """Its pod is about to go, and the instance has been told."""
        self.without = False
        """The replica that it had counts as nobody's already, while it still drains."""
        self.pod: asyncio.Future[Pod] = asyncio.get_running_loop().create_future()
        """Set when it gets one; an error if its pod cannot start."""
        self.lost: asyncio.Future[Loss] = asyncio.get_running_loop().create_future()
        """Set when that pod has ended."""
        self.ended = False

    def leave(self, reason: str) -> None:
        """Its pod is about to be deleted, not by its instance."""
        if not self.leaving:
            self.leaving = True
            self._left(reason)


class StartFailedError(Exception):
    """The pod of an instance cannot start."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(str(cause))
        self.cause = cause
