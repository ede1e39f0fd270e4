"""Counts and distributions of requests by model and class, updated as they happen and read on request.

Own accumulators instead of the metric library's: a request costs a few additions here, under no lock, and the same
numbers serve Prometheus, the status and the terminal view. Values of a distribution are only noted down when they come;
they are sorted into it ``NOTED_MAX`` at a time, or when somebody reads it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import exp, inf, nan
from typing import Any, Final

import numpy as np

from chiron.core.types import Request, RequestClass

TTFT_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
ITL_BOUNDS_S = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
E2E_BOUNDS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
QUEUE_BOUNDS_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 86400.0)

SLOT_S = 2.0
SLOTS = 30
"""A rolling distribution covers the last minute: this many slots, the newest one still filling."""
HISTORY = 60
"""Slots of history that the status shows: two minutes."""
_PER_E = 20.0
"""Buckets per factor e of a rolling distribution: a quantile is right to some 2.5 %."""
_SHORTEST = 1e-6
NOTED_MAX: Final = 1024
"""Values that wait to be sorted into a distribution: some 0.1 ms of work. They wait side by side in memory: a list of
floats made at a thousand different moments takes longer to fetch than to sort."""

SLOS = ("ttft", "itl", "deadline")


def prompt_tokens(request: Request) -> int:
    """As its engine counted them (``payload.prompt_tokens``), else as estimated when it came."""
    return getattr(request.payload, "prompt_tokens", 0) or request.input_tokens


class Histogram:
    """Counts by upper bound (the last: beyond all bounds) and the sum, since the start."""

    __slots__ = ("_counts", "_noted", "_sum", "bounds")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self._counts: Any = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0
        self._noted = array("d")

    @property
    def counts(self) -> list[int]:
        self._sort()
        counts: list[int] = self._counts.tolist()
        return counts

    @property
    def sum(self) -> float:
        self._sort()
        return self._sum

    def observe(self, value: float) -> None:
        noted = self._noted
        noted.append(value)
        if len(noted) >= NOTED_MAX:
            self._sort()

    def _sort(self) -> None:
        if self._noted:
            values = np.frombuffer(self._noted)
            self._noted = array("d")
            places = np.searchsorted(self.bounds, values)
            self._counts += np.bincount(places, minlength=len(self.bounds) + 1)
            self._sum += float(values.sum())


class Rolling:
    """The distribution over the last minute, in buckets of equal ratio."""

    __slots__ = ("_current", "_noted", "_slot", "_slots", "_total")

    def __init__(self) -> None:
        self._slot = 0
        self._noted = array("d")
        """Of the current slot."""
        self._current: dict[int, int] = {}
        self._slots: deque[tuple[int, dict[int, int]]] = deque([(0, self._current)])
        self._total: dict[int, int] = {}
        """Of all slots but the current one."""

    def observe(self, now_s: float, value: float) -> None:
        slot = int(now_s / SLOT_S)
        if slot != self._slot:
            self._turn(slot)
        noted = self._noted
        noted.append(value)
        if len(noted) >= NOTED_MAX:
            self._sort()

    def quantiles(self, now_s: float, shares: Sequence[float]) -> list[float]:
        """At each share (0..1); nan while the last minute is empty."""
        slot = int(now_s / SLOT_S)
        if slot != self._slot:
            self._turn(slot)
        self._sort()
        total = dict(self._total)
        _add(total, self._current)
        count = sum(total.values())
        if not count:
            return [nan] * len(shares)
        buckets = sorted(total)
        ranks = list(accumulate(total[bucket] for bucket in buckets))
        return [exp((buckets[bisect_left(ranks, share * count)] + 0.5) / _PER_E) for share in shares]

    def _turn(self, slot: int) -> None:
        """Begin a slot and forget those of more than a minute ago."""
        self._sort()
        self._slot = slot
        _add(self._total, self._current)
        self._current = {}
        self._slots.append((slot, self._current))
        while self._slots[0][0] <= slot - SLOTS:
            _, gone = self._slots.popleft()
            for bucket, number in gone.items():
                left = self._total[bucket] - number
                if left:
                    self._total[bucket] = left
                else:
                    del self._total[bucket]

    def _sort(self) -> None:
        if self._noted:
            values = np.maximum(np.frombuffer(self._noted), _SHORTEST)
            self._noted = array("d")
            buckets, counts = np.unique(np.floor(np.log(values) * _PER_E).astype(np.int64), return_counts=True)
            _add(self._current, dict(zip(buckets.tolist(), counts.tolist(), strict=True)))


def _add(total: dict[int, int], counts: dict[int, int]) -> None:
    for bucket, number in counts.items():
        total[bucket] = total.get(bucket, 0) + number


@dataclass(slots=True)
class _Slot:
    slot: int
    arrivals: int = 0
    ttft_max_s: float = 0.0


class KeyTally:
    """Ended requests of one API key, batch items among them, since the start."""

    __slots__ = ("generation_tokens", "prompt_tokens", "requests")

    def __init__(self) -> None:
        self.requests: dict[str, int] = {}
        """By outcome."""
        self.prompt_tokens = 0
        self.generation_tokens = 0

    def end(self, request: Request, prompt: int) -> None:
        """``prompt``: its ``prompt_tokens``."""
        outcome = request.outcome
        assert outcome is not None
        self.requests[outcome] = self.requests.get(outcome, 0) + 1
        self.generation_tokens += request.tokens_done
        if request.first_token_s >= 0.0:
            self.prompt_tokens += prompt


class ClassTally:
    """One class of one model, since the start unless said otherwise."""

    __slots__ = (
        "_deadlines_met",
        "_deadlines_missed",
        "_history",
        "_itl_met",
        "_itl_missed",
        "_newest",
        "_ttft_met",
        "_ttft_missed",
        "arrived",
        "attained",
        "cls",
        "e2e",
        "evictions",
        "generation_tokens",
        "itl",
        "itl_recent",
        "missed",
        "outcomes",
        "prompt_tokens",
        "queue",
        "retries",
        "ttft",
        "ttft_recent",
    )

    def __init__(self, cls: RequestClass) -> None:
        self.cls = cls
        self.arrived = 0
        self.outcomes = {"finished": 0, "rejected": 0, "failed": 0, "cancelled": 0, "shed": 0}
        self.attained = 0
        """Finished with every SLO met."""
        self.missed = 0
        """Ended otherwise. A request that was cancelled before it missed an SLO counts as neither, and so does one that
        was rejected: something was wrong with it."""
        self._ttft_met = self._ttft_missed = 0
        self._itl_met = self._itl_missed = 0
        self._deadlines_met = self._deadlines_missed = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.evictions = 0
        self.retries = 0
        self.ttft = Histogram(TTFT_BOUNDS_S)
        self.itl = Histogram(ITL_BOUNDS_S)
        self.e2e = Histogram(E2E_BOUNDS_S)
        self.queue = Histogram(QUEUE_BOUNDS_S)
        self.ttft_recent = Rolling()
        self.itl_recent = Rolling()
        self._newest = _Slot(0)
        self._history: deque[_Slot] = deque([self._newest], maxlen=HISTORY + 1)

    @property
    def ended(self) -> int:
        return sum(self.outcomes.values())

    @property
    def slos_met(self) -> dict[str, int]:
        """By name, as in ``SLOS``."""
        return {"ttft": self._ttft_met, "itl": self._itl_met, "deadline": self._deadlines_met}

    @property
    def slos_missed(self) -> dict[str, int]:
        return {"ttft": self._ttft_missed, "itl": self._itl_missed, "deadline": self._deadlines_missed}

    def arrival(self, now_s: float) -> None:
        self.arrived += 1
        self._slot(now_s).arrivals += 1

    def first_token(self, now_s: float, request: Request) -> None:
        ttft_s = now_s - request.arrival_s
        self.ttft.observe(ttft_s)
        self.ttft_recent.observe(now_s, ttft_s)
        slot = self._slot(now_s)
        if ttft_s > slot.ttft_max_s:
            slot.ttft_max_s = ttft_s

    def end(self, request: Request, prompt: int) -> None:
        """``prompt``: its ``prompt_tokens``."""
        outcome, finish_s, tokens = request.outcome, request.finish_s, request.tokens_done
        assert outcome is not None
        self.outcomes[outcome] += 1
        self.generation_tokens += tokens
        if request.first_token_s >= 0.0:
            self.prompt_tokens += prompt
        self.retries += request.retries
        if request.dispatch_s >= 0.0:
            self.queue.observe(request.dispatch_s - request.arrival_s)
        if outcome == "finished":
            self.e2e.observe(finish_s - request.arrival_s)
            if tokens > 1:
                itl_s = (finish_s - request.first_token_s) / (tokens - 1)
                self.itl.observe(itl_s)
                self.itl_recent.observe(finish_s, itl_s)
        if outcome != "rejected":
            self._judge(request, tokens)

    def history(self, now_s: float) -> tuple[list[int], list[float]]:
        """Arrivals, and the longest TTFT in seconds (0: no first token), of each of the last ``HISTORY`` full slots."""
        last = int(now_s / SLOT_S)
        slots = {slot.slot: slot for slot in self._history}
        wanted = [slots.get(n) for n in range(last - HISTORY, last)]
        return [s.arrivals if s else 0 for s in wanted], [s.ttft_max_s if s else 0.0 for s in wanted]

    def _slot(self, now_s: float) -> _Slot:
        slot = int(now_s / SLOT_S)
        if self._newest.slot != slot:
            self._newest = _Slot(slot)
            self._history.append(self._newest)
        return self._newest

    def _judge(self, request: Request, tokens: int) -> None:
        """Each SLO that can be judged. A request that failed or was shed met none. Of one that its client cancelled,
        only the SLOs that it had missed by then are judged."""
        outcome, first_s, finish_s = request.outcome, request.first_token_s, request.finish_s
        failed = outcome != "finished" and outcome != "cancelled"
        missed = False
        if request.ttft_slo_s != inf:
            late = failed or (first_s if first_s >= 0.0 else finish_s) - request.arrival_s > request.ttft_slo_s
            if late:
                missed = True
                self._ttft_missed += 1
            elif first_s >= 0.0:
                self._ttft_met += 1
        if request.itl_slo_s != inf and outcome != "cancelled":
            if failed or (tokens > 1 and (finish_s - first_s) / (tokens - 1) > request.itl_slo_s):
                missed = True
                self._itl_missed += 1
            else:
                self._itl_met += 1
        if request.deadline_s != inf:
            if failed or finish_s > request.deadline_s:
                missed = True
                self._deadlines_missed += 1
            elif outcome != "cancelled":
                self._deadlines_met += 1
        if outcome == "finished" and not missed:
            self.attained += 1
        elif missed or outcome != "cancelled":
            self.missed += 1
