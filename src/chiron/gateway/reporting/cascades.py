"""How cascades do, as their clients see it: the metrics of models have the two calls of a request one by one.

A client's request counts when its first call arrives, and is *escalated* when the second model is asked. Its TTFT is
from its arrival to what its client can read first: the end of an answer in one piece, else the first token of the
second model, or the moment at which the first model's answer was found to do.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from chiron.core.types import Request
from chiron.gateway.relay.turns import Turn
from chiron.gateway.reporting.tally import TTFT_BOUNDS_S, Histogram


class CascadeTally:
    """Of one cascade and class."""

    __slots__ = ("answered_first", "answered_then", "escalated", "requests", "ttft", "ttft_met", "ttft_missed")

    def __init__(self) -> None:
        self.requests = 0
        """Of clients, that arrived."""
        self.escalated: Counter[str] = Counter()
        """Those for which the second model was asked, by reason."""
        self.answered_first = 0
        self.answered_then = 0
        self.ttft = Histogram(TTFT_BOUNDS_S)
        self.ttft_met = 0
        self.ttft_missed = 0

    @property
    def share(self) -> float:
        """Of the requests, those for which the second model was asked. Of some only that is known: they came to a
        brain before this one."""
        return min(1.0, sum(self.escalated.values()) / self.requests) if self.requests else 0.0


class Cascades:
    """Fed by the desk."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, str], CascadeTally] = {}
        """By cascade and class."""
        self._shown_s: dict[int, float] = {}
        """When the clients of first calls that do could read, by id of request."""

    def arrived(self, turn: Turn, cls: str) -> None:
        tally = self.tallies.setdefault((turn.cascade, cls), CascadeTally())
        tally.requests += not turn.counted
        if turn.reason:
            tally.escalated[turn.reason] += 1

    def shown(self, turn: Turn, request: Request, now_s: float) -> None:
        self._shown_s[request.id] = now_s

    def ended(self, turn: Turn, request: Request) -> None:
        """One of the two calls."""
        shown_s = self._shown_s.pop(request.id, None)
        tally = self.tallies.get((turn.cascade, request.cls.name))
        if request.outcome != "finished" or tally is None or (not turn.reason and shown_s is None):
            return
        if turn.reason:
            tally.answered_then += 1
        else:
            tally.answered_first += 1
        whole_s = request.finish_s if shown_s is None or not turn.streams else shown_s
        read_s = request.first_token_s if turn.reason and turn.streams else whole_s
        ttft_s = max(0.0, read_s - request.arrival_s) + turn.before_s
        tally.ttft.add(np.array([ttft_s]))
        # An answer in one piece is judged by TTFT and ITL together, as everywhere.
        most_s = turn.ttft_s + (0.0 if turn.streams else request.cls.itl_s * request.tokens_done)
        if ttft_s <= most_s:
            tally.ttft_met += 1
        else:
            tally.ttft_missed += 1
