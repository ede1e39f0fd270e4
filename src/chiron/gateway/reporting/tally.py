"""Counts and distributions of requests by model and class, and by API key, made of rows of events.

What happens is only noted down, as a row (``telemetry.packed_events``). Here some thousand rows are added up by
columns, which costs a tenth of adding them up one by one as they come: what a request brings is spread over memory that
the deciding part does not keep in a cache. It takes a few milliseconds, most of it numpy's calls, so it is cut into
steps of some tenths of one, and whoever counts may do something else between two. No call is made for a class or for a
slot by itself: there may be many. The same numbers serve Prometheus, the status and the terminal view.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import exp, inf, nan
from typing import Any, TypeAlias

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
        for _, counts, total in histograms(self.bounds, np.zeros(len(values), dtype=np.int64), values):
            self.add_counted(counts, total)

    def add_counted(self, counts: Places, total: float) -> None:
        """So many more by bound, and what they add up to."""
        self._counts += counts
        self.sum += total


class Rolling:
    """The distribution over the last minute, in buckets of equal ratio."""

    __slots__ = ("_current", "_slot", "_slots", "_total")

    def __init__(self) -> None:
        self._slot = 0
        self._current: dict[int, int] = {}
        self._slots: deque[tuple[int, dict[int, int]]] = deque([(0, self._current)])
        self._total: dict[int, int] = {}
        """Of all slots but the current one."""

    def add(self, slot: int, bucket: int, count: int) -> None:
        """So many values of one slot in this bucket (``rolling_buckets``); slots come in order."""
        if slot != self._slot:
            self._turn(slot)
        self._current[bucket] = self._current.get(bucket, 0) + count

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

    def add(self, noted: Noted) -> Iterator[None]:
        """What comes at one moment or later than what came before; in steps, of which none may be left out."""
        if len(noted.events):
            tallies = list(self.of.values())
            yield from _add_events(tallies, noted.events)
            if len(noted.ends):
                yield from _add_ends(tallies, list(self.keys.values()), noted.ended, noted.ends)


def _add_events(tallies: list[ClassTally], events: Rows) -> Iterator[None]:
    t_s, of, number = (np.ascontiguousarray(events[name]) for name in ("t", "of", "event"))
    for place, count in _counts(of[number == EVICTED]):
        tallies[place].evictions += count
    first = number == FIRST_TOKEN
    of_first, ttft_s = of[first], (t_s - events["arrival_s"])[first]
    slots, which = _slots(t_s)
    # Those of one slot and class have a place together.
    together = which * len(tallies) + of
    arrivals = np.bincount(together[(number == ARRIVAL) | (number == PLACED)], minlength=len(slots) * len(tallies))
    longest_s = np.zeros(len(arrivals))
    np.maximum.at(longest_s, together[first], ttft_s)
    for place in np.flatnonzero((arrivals > 0) | (longest_s > 0.0)).tolist():
        tally = tallies[place % len(tallies)]
        tally.arrived += int(arrivals[place])
        seen = tally.slot(slots[place // len(tallies)])
        seen.arrivals += int(arrivals[place])
        seen.ttft_max_s = max(seen.ttft_max_s, float(longest_s[place]))
    yield
    for place, counts, total in histograms(TTFT_BOUNDS_S, of_first, ttft_s):
        tallies[place].ttft.add_counted(counts, total)
    for slot, place, bucket, count in rolling_buckets(slots, which[first], of_first, ttft_s):
        tallies[place].ttft_recent.add(slot, bucket, count)
    yield


def _add_ends(tallies: list[ClassTally], keys: list[KeyTally], ended: Rows, ends: Rows) -> Iterator[None]:
    of, key, prompt = (np.ascontiguousarray(ended[name]) for name in ("of", "key", "tokens"))
    outcome, tokens, first_s = (np.ascontiguousarray(ends[name]) for name in ("outcome", "tokens", "first_token_s"))
    finish_s, arrival_s, dispatch_s = ended["t"], ended["arrival_s"], ends["dispatch_s"]
    ran = np.where(first_s >= 0.0, prompt, 0)
    for place, count in _counts(of * len(OUTCOMES) + outcome):
        tallies[place // len(OUTCOMES)].outcomes[OUTCOMES[place % len(OUTCOMES)]] += count
    for place, count in _counts(key * len(OUTCOMES) + outcome):
        requests, name = keys[place // len(OUTCOMES)].requests, OUTCOMES[place % len(OUTCOMES)]
        requests[name] = requests.get(name, 0) + count
    for place, (made, read, retries) in _sums(of, tokens, ran, ends["retries"]):
        tally = tallies[place]
        tally.generation_tokens += made
        tally.prompt_tokens += read
        tally.retries += retries
    for place, (made, read) in _sums(key, tokens, ran):
        keys[place].generation_tokens += made
        keys[place].prompt_tokens += read
    yield
    queued = dispatch_s >= 0.0
    for place, counts, total in histograms(QUEUE_BOUNDS_S, of[queued], (dispatch_s - arrival_s)[queued]):
        tallies[place].queue.add_counted(counts, total)
    finished = outcome == FINISHED
    for place, counts, total in histograms(E2E_BOUNDS_S, of[finished], (finish_s - arrival_s)[finished]):
        tallies[place].e2e.add_counted(counts, total)
    yield
    itl_s = (finish_s - first_s) / np.maximum(tokens - 1, 1)
    several = finished & (tokens > 1)
    of_several, itl_several_s = of[several], itl_s[several]
    for place, counts, total in histograms(ITL_BOUNDS_S, of_several, itl_several_s):
        tallies[place].itl.add_counted(counts, total)
    for slot, place, bucket, count in rolling_buckets(*_slots(finish_s[several]), of_several, itl_several_s):
        tallies[place].itl_recent.add(slot, bucket, count)
    yield
    _judge(tallies, ended, ends, itl_s)
    yield


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
        for place, count in _counts(of[bad]):
            tallies[place].slos_missed[slo] += count
        for place, count in _counts(of[applies & ~misses & meets]):
            tallies[place].slos_met[slo] += count
    for place, count in _counts(of[finished & ~missed]):
        tallies[place].attained += count
    for place, count in _counts(of[~rejected & (missed | failed)]):
        tallies[place].missed += count


# -- by place ----------------------------------------------------------------------------------------------------------


def _counts(places: Places) -> Iterator[tuple[int, int]]:
    """Those that are among the places, and how often."""
    counts = np.bincount(places)
    used = np.flatnonzero(counts)
    return zip(used.tolist(), counts[used].tolist(), strict=True)


def _sums(places: Places, *columns: Places) -> Iterator[tuple[int, list[int]]]:
    """Of whole numbers: exact. Each is at most 2^40 (``port.messages``), so thousands add up within 64 bits."""
    used = np.flatnonzero(np.bincount(places))
    sums = np.zeros((len(columns), int(used[-1]) + 1), dtype=np.int64)
    for row, column in zip(sums, columns, strict=True):
        np.add.at(row, places, np.ascontiguousarray(column, dtype=np.int64))  # Ten times as quick as with a stride.
    return zip(used.tolist(), sums[:, used].T.tolist(), strict=True)


def histograms(bounds: Sequence[float], places: Places, values: Values) -> Iterator[tuple[int, Places, float]]:
    """Of each place that has a value: how many there are by bound, and their sum."""
    if not len(values):
        return
    width = len(bounds) + 1
    counts = np.bincount(places * width + np.searchsorted(bounds, values))
    counts = np.pad(counts, (0, -len(counts) % width)).reshape(-1, width)
    sums = np.bincount(places, weights=values)
    for place in np.flatnonzero(counts.any(axis=1)).tolist():
        yield place, counts[place], float(sums[place])


def rolling_buckets(
    slots: Sequence[int], which: Places, places: Places, values: Values
) -> Iterator[tuple[int, int, int, int]]:
    """Slot, place, bucket of a rolling distribution, and how many values it has; in order of the slots, of which each
    value names one by its place."""
    if not len(values):
        return
    buckets = np.floor(np.log(np.maximum(values, _SHORTEST)) * _PER_E).astype(np.int64)
    lowest = int(buckets.min())
    width, wide = int(buckets.max()) - lowest + 1, int(places.max()) + 1
    used, counts = np.unique((which * wide + places) * width + (buckets - lowest), return_counts=True)
    for place, count in zip(used.tolist(), counts.tolist(), strict=True):
        rest, bucket = divmod(place, width)
        yield slots[rest // wide], rest % wide, bucket + lowest, count


def _slots(t_s: Values) -> tuple[list[int], Places]:
    """Of times in order: all slots, and which of them each is in."""
    each = (t_s / SLOT_S).astype(np.int64)
    begins = np.diff(each, prepend=each[:1] - 1) != 0
    return each[begins].tolist(), np.cumsum(begins) - 1
