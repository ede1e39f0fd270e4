"""Whether it pays to plan for what came one period of more than half an hour ago.

A backtest of the last hour cannot tell: what comes once a day is mostly not in it. So a record is kept for each
period that was tried. Every ten minutes the backtest is run over the last hour as it would have been without knowing
any period, and once for each period as if the fleet had been at least what that foretold (``long_history``): the
instances that meet the SLOs in both. Where the two differ both are added up, over about a week. And what was found at
one look is run over the ten minutes until the next one: how many requests it would have made wait for too long.

A period is in force while it has cost less than having none by a tenth, and has missed no more than is allowed, or
than having none. So it is judged by what came after it was chosen, and one that foretells what never comes loses what
it costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp

from chiron.policies.headroom import Headroom

LOOK_S = 600.0
"""Between two looks."""
_REMEMBERED_S = 7 * 86_400.0
"""What a look showed counts a third as much after so long."""
_WORTH = 0.1
"""Share of its cost that a period must save."""
_KEPT_WORTH = 0.03
"""The same of the one in force."""
_LOOKS_LEAST = 9
"""That showed a difference, before one is adopted: an event is in six."""
RECORDS_MAX = 8
PERIOD_MAX_S = 14 * 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look shows of a period, or of having none."""

    found: Headroom
    instances: float
    """That meet the SLOs over the last hour, in the mean."""
    missed: float
    """Requests that what the look before found would have made wait for too long since, of so many."""
    requests: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Of one period, or of having none (0): what its looks add up to."""

    period_s: int
    without: float = 0.0
    """Mean instances, of the looks in which it made a difference, without it."""
    within: float = 0.0
    """With it."""
    looks: int = 0
    """Those."""
    missed: float = 0.0
    requests: float = 0.0
    found: Headroom | None = None
    """By the last look."""

    @property
    def saves(self) -> float:
        """Share of the cost without it."""
        return 1.0 - self.within / self.without if self.without > 0.0 else 0.0

    @property
    def misses(self) -> float:
        return self.missed / self.requests if self.requests > 0.0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    records: tuple[Record, ...] = ()
    """Latest tried last."""
    period_s: int = 0
    """In force; 0: none."""


def tried(periods: Sequence[int], known: Recurrence) -> tuple[int, ...]:
    """Those to be tried now: what looks like a period, and what is in force."""
    return tuple(dict.fromkeys((*periods, *((known.period_s,) if known.period_s else ()))))


def aged(known: Recurrence, passed_s: float) -> Recurrence:
    """So much later: what was seen counts for less, whether or not there has been anything to see since."""
    share = exp(-passed_s / _REMEMBERED_S)
    records = tuple(
        replace(
            record,
            without=share * record.without,
            within=share * record.within,
            missed=share * record.missed,
            requests=share * record.requests,
        )
        for record in known.records
    )
    return replace(known, records=records)


def looked(known: Recurrence, found: Mapping[int, Look], miss_max: float) -> Recurrence:
    """After a look; ``found`` by period, 0: none."""
    records = {record.period_s: record for record in known.records}
    # Last, so that it is never dropped.
    for period_s in (*(p for p in found if p), 0):
        record = records.pop(period_s, Record(period_s=period_s))
        records[period_s] = _with_look(record, found[period_s], found[0].instances)
    kept = tuple(records.values())[-RECORDS_MAX:]
    misses_max = max(miss_max, kept[-1].misses)
    able = [
        record
        for record in kept
        if record.period_s
        and record.looks >= _LOOKS_LEAST
        and record.misses <= misses_max
        and record.saves > (_KEPT_WORTH if record.period_s == known.period_s else _WORTH)
    ]
    best = max(able, key=lambda record: record.saves, default=None)
    present = next((record for record in able if record.period_s == known.period_s), best)
    if best is not None and present is not None and best.saves > present.saves + _KEPT_WORTH:
        present = best
    return Recurrence(records=kept, period_s=present.period_s if present is not None else 0)


def _with_look(record: Record, look: Look, without: float) -> Record:
    record = replace(
        record,
        missed=record.missed + look.missed,
        requests=record.requests + look.requests,
        found=look.found,
    )
    if look.instances == without:
        return record
    return replace(
        record,
        without=record.without + without,
        within=record.within + look.instances,
        looks=record.looks + 1,
    )
