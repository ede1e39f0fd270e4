"""Counts and distributions of requests by model and class, and by API key, made of rows of events.

What happens is only noted down, as a row (``telemetry.packed_events``). Here some thousand rows are added up by
columns, which costs a tenth of adding them up one by one as they come: what a request brings is spread over memory that
the deciding part does not keep in a cache. The same numbers serve Prometheus, the status and the terminal view.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import exp, inf, nan
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.ma  # Else np.unique imports it when it is first called, while requests wait.
import numpy.typing as npt

from chiron.core.types import RequestClass
from chiron.telemetry.packed_events import (
    ARRIVAL,
    END_COLUMNS,
    ENDED,
    EVENT_COLUMNS,
    EVICTED,
    FIRST_TOKEN,
    PLACED,
)
from chiron.telemetry.run_data import OUTCOMES

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
SLOS = ("ttft", "itl", "deadline")


FINISHED, REJECTED, CANCELLED = (OUTCOMES.index(name) for name in ("finished", "rejected", "cancelled"))
_COUNTED = ("finished", "rejected", "failed", "cancelled", "shed")

EVENTS = np.dtype(list(EVENT_COLUMNS))
ENDS = np.dtype(list(END_COLUMNS))
Rows = Any
"""An array of rows, a column by its name."""
Values: TypeAlias = npt.NDArray[np.float64]
Places: TypeAlias = npt.NDArray[np.int64]
Tally = TypeVar("Tally")


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """Rows of what happened, in order; of requests that ended those of ``ends`` belong to those of ``ended``."""

    events: Rows
    ended: Rows
    ends: Rows


def noted(rows: bytes, ends: bytes) -> Noted:
    events = np.frombuffer(rows, dtype=EVENTS)
    return Noted(events=events, ended=events[events["event"] == ENDED], ends=np.frombuffer(ends, dtype=ENDS))


class Histogram:
    """Counts by upper bound (the last: beyond all bounds) and the sum, since the start."""

    __slots__ = ("_counts", "bounds", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.sum = 0.0
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)

    @property
    def counts(self) -> list[int]:
        counts: list[int] = self._counts.tolist()
        return counts

    def add(self, values: Values) -> None:
        self._counts += np.bincount(np.searchsorted(self.bounds, values), minlength=len(self.bounds) + 1)
        self.sum += float(values.sum())


class Rolling:
    """The distribution over the last minute, in buckets of equal ratio."""

    __slots__ = ("_current", "_slot", "_slots", "_total")

    def __init__(self) -> None:
        self._slot = 0
        self._current: dict[int, int] = {}
        self._slots: deque[tuple[int, dict[int, int]]] = deque([(0, self._current)])
        self._total: dict[int, int] = {}
        """Of all slots but the current one."""

    def add(self, slot: int, values: Values) -> None:
        """Values of one slot; slots come in order."""
        if slot != self._slot:
            self._turn(slot)
        places = np.floor(np.log(np.maximum(values, _SHORTEST)) * _PER_E).astype(np.int64)
        buckets, counts = np.unique(places, return_counts=True)
        _add(self._current, dict(zip(buckets.tolist(), counts.tolist(), strict=True)))

    def quantiles(self, now_s: float, shares: Sequence[float]) -> list[float]:
        """At each share (0..1); nan while the last minute is empty."""
        slot = int(now_s / SLOT_S)
        if slot != self._slot:
            self._turn(slot)
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


class ClassTally:
    """One class of one model, since the start unless said otherwise."""

    __slots__ = (
        "_history",
        "_newest",
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
        "slos_met",
        "slos_missed",
        "ttft",
        "ttft_recent",
    )

    def __init__(self, cls: RequestClass) -> None:
        self.cls = cls
        self.arrived = 0
        self.outcomes = dict.fromkeys(_COUNTED, 0)
        self.attained = 0
        """Finished with every SLO met."""
        self.missed = 0
        """Ended otherwise. A request that was cancelled before it missed an SLO counts as neither, and so does one that
        was rejected: something was wrong with it."""
        self.slos_met = dict.fromkeys(SLOS, 0)
        """By name, as in ``SLOS``."""
        self.slos_missed = dict.fromkeys(SLOS, 0)
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

    def history(self, now_s: float) -> tuple[list[int], list[float]]:
        """Arrivals, and the longest TTFT in seconds (0: no first token), of each of the last ``HISTORY`` full slots."""
        last = int(now_s / SLOT_S)
        slots = {slot.slot: slot for slot in self._history}
        wanted = [slots.get(n) for n in range(last - HISTORY, last)]
        return [s.arrivals if s else 0 for s in wanted], [s.ttft_max_s if s else 0.0 for s in wanted]

    def slot(self, number: int) -> _Slot:
        """Of the history; slots come in order."""
        if self._newest.slot != number:
            self._newest = _Slot(number)
            self._history.append(self._newest)
        return self._newest


class Tallies:
    """All of them: rows point to a tally by its place."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, str], ClassTally] = {}
        """By model and class, in the order of their places."""
        self.keys: dict[str, KeyTally] = {}
        """By name of the API key, in that order too."""

    def add(self, noted: Noted) -> None:
        """What comes at one moment or later than what came before."""
        if not len(noted.events):
            return
        tallies, keys = list(self.of.values()), list(self.keys.values())
        _add_events(tallies, noted.events)
        if len(noted.ends):
            _add_ends(tallies, keys, noted.ended, noted.ends)


def _add_events(tallies: list[ClassTally], events: Rows) -> None:
    t_s, of, number = (np.ascontiguousarray(events[name]) for name in ("t", "of", "event"))
    since_s = t_s - events["arrival_s"]
    for tally, count in _counts(tallies, of[number == EVICTED]):
        tally.evictions += count
    arrived, first = (number == ARRIVAL) | (number == PLACED), number == FIRST_TOKEN
    for slot, its in _slots(t_s):
        for tally, count in _counts(tallies, of[its][arrived[its]]):
            tally.arrived += count
            tally.slot(slot).arrivals += count
        for tally, ttft_s in _split(tallies, of[its][first[its]], since_s[its][first[its]]):
            tally.ttft.add(ttft_s)
            tally.ttft_recent.add(slot, ttft_s)
            seen = tally.slot(slot)
            seen.ttft_max_s = max(seen.ttft_max_s, float(ttft_s.max()))


def _add_ends(tallies: list[ClassTally], keys: list[KeyTally], ended: Rows, ends: Rows) -> None:
    of, key, prompt = ended["of"], ended["key"], ended["tokens"]
    outcome, tokens, first_s = ends["outcome"], ends["tokens"], ends["first_token_s"]
    finish_s, arrival_s, dispatch_s = ended["t"], ended["arrival_s"], ends["dispatch_s"]
    ran = np.where(first_s >= 0.0, prompt, 0)
    for number in np.unique(outcome).tolist():
        name = OUTCOMES[number]
        for tally, count in _counts(tallies, of[outcome == number]):
            tally.outcomes[name] += count
        for owner, count in _counts(keys, key[outcome == number]):
            owner.requests[name] = owner.requests.get(name, 0) + count
    for tally, sums in _sums(tallies, of, tokens, ran, ends["retries"]):
        tally.generation_tokens += sums[0]
        tally.prompt_tokens += sums[1]
        tally.retries += sums[2]
    for owner, sums in _sums(keys, key, tokens, ran):
        owner.generation_tokens += sums[0]
        owner.prompt_tokens += sums[1]
    queued = dispatch_s >= 0.0
    for tally, values in _split(tallies, of[queued], (dispatch_s - arrival_s)[queued]):
        tally.queue.add(values)
    finished = outcome == FINISHED
    for tally, values in _split(tallies, of[finished], (finish_s - arrival_s)[finished]):
        tally.e2e.add(values)
    itl_s = (finish_s - first_s) / np.maximum(tokens - 1, 1)
    several = finished & (tokens > 1)
    of_several, itl_several_s = of[several], itl_s[several]
    for slot, its in _slots(finish_s[several]):
        for tally, values in _split(tallies, of_several[its], itl_several_s[its]):
            tally.itl.add(values)
            tally.itl_recent.add(slot, values)
    _judge(tallies, ended, ends, itl_s)


def _judge(tallies: list[ClassTally], ended: Rows, ends: Rows, itl_s: Values) -> None:
    """Each SLO that can be judged. A request that failed or was shed met none. Of one that its client cancelled, only
    the SLOs that it had missed by then are judged. One that was rejected is not judged."""
    of, outcome, tokens, first_s = ended["of"], ends["outcome"], ends["tokens"], ends["first_token_s"]
    finish_s, arrival_s = ended["t"], ended["arrival_s"]
    finished, cancelled, rejected = outcome == FINISHED, outcome == CANCELLED, outcome == REJECTED
    failed, begun = ~(finished | cancelled), first_s >= 0.0
    told_s = np.where(begun, first_s, finish_s)
    late = failed | (told_s - arrival_s > ends["ttft_slo_s"])
    slow = failed | ((tokens > 1) & (itl_s > ends["itl_slo_s"]))
    overdue = failed | (finish_s > ends["deadline_s"])
    missed = np.zeros(len(ends), dtype=bool)
    for slo, applies, misses, meets in (
        ("ttft", ends["ttft_slo_s"] != inf, late, begun),
        ("itl", (ends["itl_slo_s"] != inf) & ~cancelled, slow, True),
        ("deadline", ends["deadline_s"] != inf, overdue, ~cancelled),
    ):
        applies = applies & ~rejected
        bad = applies & misses
        missed |= bad
        for tally, count in _counts(tallies, of[bad]):
            tally.slos_missed[slo] += count
        for tally, count in _counts(tallies, of[applies & ~misses & meets]):
            tally.slos_met[slo] += count
    for tally, count in _counts(tallies, of[finished & ~missed]):
        tally.attained += count
    for tally, count in _counts(tallies, of[~rejected & (missed | failed)]):
        tally.missed += count


# -- by place ----------------------------------------------------------------------------------------------------------


def _counts(tallies: list[Tally], places: Places) -> Iterator[tuple[Tally, int]]:
    """How often each is among the places, if it is."""
    for place, count in enumerate(np.bincount(places).tolist()):
        if count:
            yield tallies[place], count


def _sums(tallies: list[Tally], places: Places, *columns: Places) -> Iterator[tuple[Tally, list[int]]]:
    """Of whole numbers: exact. Each is at most 2^40 (``port.messages``), so thousands add up within 64 bits."""
    sums = np.zeros((len(tallies), len(columns)), dtype=np.int64)
    np.add.at(sums, places, np.stack(columns, axis=1))
    for place in np.unique(places).tolist():
        yield tallies[place], sums[place].tolist()


def _split(tallies: list[Tally], places: Places, values: Values) -> Iterator[tuple[Tally, Values]]:
    """The values of each that has some, in order."""
    ordered, counts = values[np.argsort(places, kind="stable")], np.bincount(places).tolist()
    for place, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        if count:
            yield tallies[place], ordered[end - count : end]


def _slots(t_s: Values) -> Iterator[tuple[int, slice]]:
    """Of times in order: each slot, and which they are."""
    if not len(t_s):
        return
    slots = (t_s / SLOT_S).astype(np.int64)
    for begin, end in pairwise([0, *(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(t_s)]):
        yield int(slots[begin]), slice(begin, end)
