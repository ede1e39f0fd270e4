"""When an engine loses requests: it gets none for a while, and is checked if it goes on.

The gateway's client of an engine judges by this, and so does its model in the simulator.
"""

from __future__ import annotations

from chiron.core.backoff import doubled_s

FAILURES_MAX = 2
"""Requests lost in a row before an engine is suspected."""
AVOID_S = 0.25
"""How long nothing is sent to an engine that lost a request; doubled with each further one."""
AVOID_MAX_S = 8.0


class Losses:
    """Requests that one engine lost in a row."""

    __slots__ = ("_in_a_row",)

    def __init__(self) -> None:
        self._in_a_row = 0

    def answered(self) -> None:
        """A complete answer came."""
        self._in_a_row = 0

    def lost(self, *, status: int = 0, connect: bool = False) -> tuple[bool, float]:
        """One more, by an answer with this ``status`` (0: none), or because it could not ``connect``. Returns whether
        the engine is suspected, and for how many seconds nothing should be sent there."""
        self._in_a_row += 1
        suspected = connect or self._in_a_row >= FAILURES_MAX
        # A 500 may be the request's own fault; anything else says that another instance should have the next try.
        if status == 500 and not suspected:
            return False, 0.0
        return suspected, doubled_s(AVOID_S, AVOID_MAX_S, self._in_a_row - 1)
