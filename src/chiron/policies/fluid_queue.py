"""A load that came, second by second, run through a fleet as a fluid: how long it would have waited.

``load`` and ``fleet`` are in instances, one value a second, shape (T,). Late requests make way for the others where it
is said so, as in the queue (``policies.queues.overload``). A backtest asks a hundred times a minute, so nothing is
looked at that no answer can depend on.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_NEARLY_S = 1e-6
"""Waits that differ by less are the same but for rounding."""
_AT_ONCE = 256
"""Seconds that are looked at before it is asked again whether it is enough."""


def wait_s(load: Floats, fleet: Floats) -> Floats:
    """What arrives in each second waits so long, in order of arrival: backlog by the reflection of its net input."""
    net = np.add.accumulate(load - fleet)
    waits: Floats = (net - np.minimum(np.minimum.accumulate(net), 0.0)) / fleet
    return waits


def meets_slos(load: Floats, counts: Floats, slack_s: Sequence[float], fleet: Floats, miss_max: float) -> bool:
    """Whether no class misses more of its requests than that, served in order of arrival."""
    waits = wait_s(load, fleet)
    for requests, slack in zip(counts, slack_s, strict=True):
        total = requests.sum()
        if total > 0 and requests[waits > slack].sum() > miss_max * total:
            return False
    return True


def late_makes_way(
    load: Floats, counts: Floats, slack_s: Sequence[float], fleet: Floats, allowed: Sequence[float]
) -> bool:
    """Whether no class misses more requests than it is allowed to, where late ones make way."""
    waits = wait_s(load, fleet)
    for requests, slack, most in zip(counts, slack_s, allowed, strict=True):
        # In order of arrival no fewer are late.
        in_order = float(requests[waits > slack].sum())
        if in_order > most and _late(load, requests, slack, fleet, waits, most) > most:
            return False
    return True


def late_requests(load: Floats, requests: Floats, slack_s: float, fleet: Floats, enough: float = inf) -> float:
    """How many would wait for longer than they can bear, where those that do make way for the others: the queue is
    never longer than can be borne, and what finds it so long is late. Counted no further than ``enough``."""
    return _late(load, requests, slack_s, fleet, wait_s(load, fleet), enough)


def _late(load: Floats, requests: Floats, slack_s: float, fleet: Floats, waits: Floats, enough: float) -> float:
    late = 0.0
    for begin, end in _busy(waits, slack_s - _NEARLY_S):
        backlog = 0.0
        for first in range(begin, end, _AT_ONCE):
            part = slice(first, min(first + _AT_ONCE, end))
            arrives: float
            serves: float
            count: float
            for arrives, serves, count in zip(
                load[part].tolist(), fleet[part].tolist(), requests[part].tolist(), strict=True
            ):
                backlog += arrives - serves
                if backlog <= 0.0:
                    backlog = 0.0
                    continue
                over = backlog - slack_s * serves
                if over > 0.0 and arrives > 0.0:
                    if over > arrives:
                        over = arrives
                    backlog -= over
                    late += count * over / arrives
                    if late > enough:
                        return late
    return late


def _busy(waits: Floats, longer_than_s: float) -> list[tuple[int, int]]:
    """(begin, end) of the busy periods in which somebody waits for longer than that, each with the idle second before
    it and the one after. In any other nobody is late: none waits for longer than in order of arrival."""
    late = np.flatnonzero(waits > longer_than_s)
    if not len(late):
        return []
    idle = np.flatnonzero(waits <= 0.0)
    after = idle.searchsorted(late)
    new = after[1:] != after[:-1]
    after = np.concatenate((after[:1], after[1:][new]))
    edges = np.concatenate(([0], idle, [len(waits) - 1]))
    return list(zip(edges[after].tolist(), (edges[after + 1] + 1).tolist(), strict=True))
