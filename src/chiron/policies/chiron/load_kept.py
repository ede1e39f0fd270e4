"""``chiron``, global loop: what is known of a model's load, as plain data for the next run."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import replace
from math import floor, inf
from typing import Any

import numpy as np

from chiron.core.kept import Kept
from chiron.core.types import RequestClass
from chiron.policies.chiron.load import FIRST_RULE, ModelMemory
from chiron.policies.chiron.load_history import remembered
from chiron.policies.chiron.long_history import (
    MINUTE_S,
    MINUTES_MAX,
    QUARTERS_MAX,
    LongHistory,
    nothing_before,
    resumed,
)
from chiron.policies.chiron.recurrence import PERIOD_MAX_S, RECORDS_MAX, Record, Recurrence
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.fluid_queue import Floats
from chiron.policies.headroom import CONSTANT, Headroom, Rule
from chiron.policies.policy import LOAD_AGE_MAX_S

_LOAD_MAX = 1e6
"""Instances' worth, or requests, in a second: what is more is not believed."""


def learned_load(memory: ModelMemory, classes: Sequence[RequestClass]) -> dict[str, Any]:
    """As plain data: 11 bytes for each second of the last hour and 11 more for each class, and 46 kB for two weeks."""
    rule, steady = memory.headroom.rule, memory.headroom.steady
    names = [cls.name for cls in classes if cls.interactive]
    return {
        **({"load": _packed(memory.load)} if memory.history.seconds else {}),
        "counts": {name: _packed(row) for name, row in zip(names, memory.counts, strict=True)},
        "window_s": rule.window_s,
        "settle_s": rule.settle_s,
        "period_s": rule.period_s,
        "span_s": rule.span_s,
        "h": memory.headroom.h,
        **({"steady": steady} if steady < inf else {}),
        "backtest_ago_s": max(0.0, memory.history.began_s + memory.history.seconds - memory.backtest_s),
        "pressure": memory.pressure,
        **({} if memory.itl_missed is None else {"itl_missed": memory.itl_missed}),
        "spare_trust": memory.spare_trust,
        **_learned_long(memory),
    }


def _learned_long(memory: ModelMemory) -> dict[str, Any]:
    """What left the last hour, and what periods there are in it."""
    long = memory.long
    parts = {"quarters": long.quarters, "minutes": long.minutes, "seconds": long.seconds}
    return {
        "long": {**{name: _packed(part, "<f4") for name, part in parts.items() if part.size}, "known_s": long.known_s},
        "records": [
            [r.period_s, r.without, r.within, r.looks, r.missed, r.requests] for r in memory.recurrence.records
        ],
        "recurs_s": memory.recurrence.period_s,
    }


def restored_load(
    settings: ChironSettings, kept: Kept, classes: Sequence[RequestClass], now_s: float, age_s: float
) -> ModelMemory | None:
    """The memory that this makes; None: it tells of no load, and all begins anew. Too old, its last hour is none of
    this one's."""
    # Who was stopped before the first tick knows of no last hour, but what it was told of the weeks before.
    nothing_recent = "load" not in kept and "long" in kept
    load = np.zeros(0) if nothing_recent else _unpacked(settings, kept, "load")
    if load is None:
        return None
    names = [cls.name for cls in classes if cls.interactive]
    headroom = Headroom(rule=FIRST_RULE, h=settings.headroom_prior, instances=1.0)
    slack_s = max(0.5, settings.slack_share * min((cls.ttft_s for cls in classes if cls.interactive), default=1.0))
    before = _restored_long(kept)
    before = replace(before, known_s=min(before.known_s, len(load)))  # Of no more than is there.
    long = resumed(before, load, age_s, slack_s)
    recurrence = _restored_recurrence(kept)
    if nothing_recent or age_s > LOAD_AGE_MAX_S:
        nothing = remembered(floor(now_s), np.zeros(0), np.zeros((len(names), 0)))
        long = replace(long, known_s=0)
        return ModelMemory(history=nothing, headroom=headroom, backtest_s=now_s, long=long, recurrence=recurrence)
    none = np.zeros(len(load))
    told = kept.part("counts")
    rows = [_unpacked(settings, told, name) if name in told else None for name in names]
    counts = np.array([row if row is not None and len(row) == len(load) else none for row in rows])
    rule, h = _restored_rule(settings, kept), kept.number("h", 0.01, 1e4)
    if rule is not None and h is not None:
        steady = kept.number("steady", 1.0, _LOAD_MAX) if "steady" in kept else None
        headroom = Headroom(rule=rule, h=h, instances=1.0, steady=inf if steady is None else steady)
    away = age_s > settings.hold_s
    return ModelMemory(
        history=remembered(floor(now_s) - len(load), load, counts.reshape(len(names), len(load))),
        headroom=headroom,
        backtest_s=now_s - (kept.number("backtest_ago_s", 0.0, 1e6) or 0.0),
        # Who was away for so long sees what comes before a fleet shrinks.
        last_change_s=now_s if away else -inf,
        last_direction=1 if away else 0,
        pressure=kept.number("pressure", 1.0, 1.25) or 1.0,
        itl_missed=kept.number("itl_missed", 0.0, 1.0) if "itl_missed" in kept else None,
        spare_trust=kept.number("spare_trust", 0.0, 1.0) or 0.0,
        long=long,
        recurrence=recurrence,
        look_s=now_s,
    )


def _restored_long(kept: Kept) -> LongHistory:
    """Whatever of it is sound; a part that is not is missing with all that is older."""
    told = kept.part("long") if "long" in kept else Kept({}, "long", [])
    known_s = (told.whole("known_s", 0, 10**6) or 0) if "known_s" in told else 0
    parts = {"seconds": MINUTE_S, "minutes": 2 * MINUTES_MAX, "quarters": 2 * QUARTERS_MAX}
    empty = nothing_before(known_s)
    found: dict[str, Floats] = {"seconds": empty.seconds, "minutes": empty.minutes, "quarters": empty.quarters}
    for name, most in parts.items():
        values = _floats(told, name, "<f4", most) if name in told else None
        if name in told and values is None:
            break
        if values is not None and name != "seconds" and len(values) % 2:
            told.drop("it is of an odd length", name)
            break
        if values is not None:
            found[name] = values if name == "seconds" else values.reshape(2, -1)
    return LongHistory(quarters=found["quarters"], minutes=found["minutes"], seconds=found["seconds"], known_s=known_s)


def _restored_recurrence(kept: Kept) -> Recurrence:
    if "records" not in kept:
        return Recurrence()
    rows = kept.rows("records", 0.0, 1e12, width=6, most=RECORDS_MAX)
    records = tuple(
        Record(period_s=round(r[0]), without=r[1], within=r[2], looks=round(r[3]), missed=r[4], requests=r[5])
        for r in rows or ()
    )
    period_s = kept.whole("recurs_s", 0, PERIOD_MAX_S) or 0
    return Recurrence(
        records=records, period_s=period_s if any(record.period_s == period_s for record in records) else 0
    )


def _restored_rule(settings: ChironSettings, kept: Kept) -> Rule | None:
    window_s, settle_s = kept.whole("window_s", 0, 86400), kept.whole("settle_s", 0, 86400)
    if window_s is None or settle_s is None:
        return None
    period_s = (kept.whole("period_s", 0, 86400) or 0) if "period_s" in kept else 0
    span_s = (kept.whole("span_s", 1, 3600) or 0) if period_s else 0
    rule = Rule(window_s=window_s, settle_s=settle_s, period_s=period_s if span_s else 0, span_s=span_s)
    if rule != CONSTANT and window_s == 0:
        kept.drop("a rule without a window", "window_s")
        return None
    return rule


def _packed(values: Floats, kind: str = "<f8") -> str:
    return b64encode(values.astype(kind).tobytes()).decode()


def _unpacked(settings: ChironSettings, kept: Kept, name: str) -> Floats | None:
    """Up to ``memory_s`` figures, the newest, all of them sound."""
    values = _floats(kept, name, "<f8", 86400)
    return None if values is None else values[-settings.memory_s :]


def _floats(kept: Kept, name: str, kind: str, most: int) -> Floats | None:
    text = kept.text(name, 12 * most)
    if not text:
        return None
    try:
        values = np.frombuffer(b64decode(text, validate=True), dtype=kind).astype(np.float64)
    except ValueError as error:  # Not base64, or no whole number of figures.
        kept.drop(str(error), name)
        return None
    # A figure that is no number fails both comparisons.
    if not 0 < len(values) <= most or not ((values >= 0.0) & (values <= _LOAD_MAX)).all():
        kept.drop(f"not all of it are numbers in 0..{_LOAD_MAX:g}", name)
        return None
    return values
