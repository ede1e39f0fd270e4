"""When work can be done: who may share a step, and how much fits into time that is paid for anyway.

Times are binned. A window covers every bin that it touches, so windows only grow and the results err on the safe
side: loads come out too high, absorbed work too high.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_BINS_MAX = 1 << 16
_SLOTS = 1024


def peak_load(arrival_s: Floats, due_s: Floats, load: Floats) -> Floats:
    """For each window [arrival, due] the most that the loads of windows open at one moment of it can sum to.

    O(n + bins log bins). ``due_s`` may be inf: open until after everything else.
    """
    if not len(load):
        return np.zeros(0)
    bins = min(_BINS_MAX, 1024 + 64 * len(load))
    finite = due_s[np.isfinite(due_s)]
    start_s = float(arrival_s.min())
    span_s = max(float(arrival_s.max()), float(finite.max(initial=start_s))) - start_s
    per_s = (bins - 1) / span_s if span_s > 0.0 else 0.0
    first = ((arrival_s - start_s) * per_s).astype(np.int64)
    last = ((np.minimum(np.maximum(due_s, arrival_s), start_s + span_s) - start_s) * per_s).astype(np.int64)
    change = np.bincount(first, load, bins + 1) - np.bincount(last + 1, load, bins + 1)
    # The sum of many floats may come out a little low; a bound needs it a little high.
    level = np.cumsum(change)[:bins] + 1e-12 * float(load.sum())
    return np.maximum(_range_max(level, first, last), load) * (1.0 + 1e-12)


def _range_max(level: Floats, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]) -> Floats:
    """max(level[first..last]), both ends included, by doubling: each range is covered by two powers of two."""
    table = [level]
    half = 1
    while 2 * half <= len(level):
        previous = table[-1]
        table.append(np.maximum(previous[:-half], previous[half:]))
        half *= 2
    power = np.frexp((last - first + 1).astype(np.float64))[1] - 1
    found = np.empty(len(first))
    for index in np.unique(power):
        rows = power == index
        ranges = table[index]
        found[rows] = np.maximum(ranges[first[rows]], ranges[last[rows] + 1 - (1 << int(index))])
    return found


def absorbed(arrival_s: Floats, due_s: Floats, work: Floats, *, rate: float, end_s: float) -> float:
    """The most work that a resource of ``rate`` (work a second) can do from 0 to ``end_s`` within the windows.

    Earliest due first is optimal for work that can be split at will: a slot given to later-due work can be swapped
    with any earlier-due work that is lost. This is the fluid linear program, solved exactly in O(slots^2).
    """
    if rate <= 0.0 or end_s <= 0.0:
        return 0.0
    slot_s = end_s / _SLOTS
    inside = arrival_s < end_s
    first = np.minimum(arrival_s[inside] / slot_s, _SLOTS - 1).astype(np.int64)
    last = np.maximum(np.minimum(due_s[inside] / slot_s, _SLOTS - 1).astype(np.int64), first)
    grouped = np.bincount(first * _SLOTS + last, work[inside], _SLOTS * _SLOTS).reshape(_SLOTS, _SLOTS)
    pending = np.zeros(_SLOTS)
    done = 0.0
    for slot in range(_SLOTS):
        pending += grouped[slot]
        open_ = pending[slot:]
        served = np.diff(np.minimum(np.cumsum(open_), rate * slot_s), prepend=0.0)
        pending[slot:] = open_ - served
        done += float(served.sum())
    return min(done, float(work.sum()))
