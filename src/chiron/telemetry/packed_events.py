"""Events of requests as rows of fixed size: what a grouped event log of version 3 holds.

A group is one line. ``rows`` has what each event has, ``ends`` what those beside have that end a request, in the same
order, both as little-endian numbers in base64. What is text stands beside them: ``requests`` (a name for each row,
null: it could not be written), and tables that rows point into: ``of`` (models with classes), ``keys``, ``events`` and
``reasons``.
"""

from __future__ import annotations

from binascii import Error as NotBase64
from binascii import a2b_base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from struct import Struct
from typing import Any

from chiron.telemetry.run_data import OUTCOMES

PACKED = "packed"
"""The event that has many."""
EVENT = Struct("<ddqqiib")
INSTANCE = Struct("<q")
INSTANCE_AT = 24
"""Where in a row its instance stands. Its event is the last byte."""
EVENT_COLUMNS = (
    ("t", "<f8"),
    ("arrival_s", "<f8"),
    ("tokens", "<i8"),
    ("instance", "<i8"),
    ("of", "<i4"),
    ("key", "<i4"),
    ("event", "i1"),
)
"""``tokens``: of its prompt. ``instance``: -1 if there is none."""
END = Struct("<dddddqiiib")
END_COLUMNS = (
    ("dispatch_s", "<f8"),
    ("first_token_s", "<f8"),
    ("deadline_s", "<f8"),
    ("ttft_slo_s", "<f8"),
    ("itl_slo_s", "<f8"),
    ("tokens", "<i8"),
    ("evictions", "<i4"),
    ("retries", "<i4"),
    ("reason", "<i4"),
    ("outcome", "i1"),
)
"""Times below 0: it never came so far. ``tokens``: of its output. ``reason``: -1 if there is none. ``outcome``: place
in ``run_data.OUTCOMES``."""
FIXED = ("arrival", "ended", "first_token", "evicted", "arrival and dispatch")
"""Events with these numbers, in every log; others have the next ones, as ``events`` says. The last of them is two: most
requests are dispatched the moment they come, and one row less for each is a quarter of all."""
ARRIVAL, ENDED, FIRST_TOKEN, EVICTED, PLACED = range(5)

Event = dict[str, Any]


class PackedError(ValueError):
    """A group that is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """What rows point into."""

    of: Sequence[tuple[str, str]]
    keys: Sequence[str]
    events: Sequence[str]
    reasons: Sequence[str]


def unpacked(group: Mapping[str, Any]) -> Iterator[Event]:
    """The events of a group, as those of a log with a line each. Raises PackedError before the first of them."""
    rows, ends = _rows(group, "rows", EVENT), _rows(group, "ends", END)
    requests = _texts(group, "requests", or_none=True)
    of = group.get("of")
    if not isinstance(of, list) or any(
        not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)) for pair in of
    ):
        raise PackedError(f"of is {str(of)[:80]}; it must be a list of models with classes")
    tables = Tables(
        of=[(model, cls) for model, cls in of],
        keys=_texts(group, "keys"),
        events=_texts(group, "events"),
        reasons=_texts(group, "reasons"),
    )
    if len(requests) != len(rows):
        raise PackedError(f"{len(requests)} requests for {len(rows)} rows")
    ended = sum(row[-1] == ENDED for row in rows)
    if ended != len(ends):
        raise PackedError(f"{len(ends)} ends for {ended} rows of requests that end")
    if tuple(tables.events[: len(FIXED)]) != FIXED:
        raise PackedError(f"events are {tables.events}; they begin with {', '.join(FIXED)}")
    for row in rows:
        _check_row(row, tables)
    for end in ends:
        _check(end[9], OUTCOMES, "outcome")
        if end[8] >= 0:
            _check(end[8], tables.reasons, "reason")
    return _events(rows, ends, requests, tables)


def events_of(rows: bytes, ends: bytes, requests: Sequence[str | None], tables: Tables) -> Iterator[Event]:
    """The same of rows that need no check: whoever asks has made them."""
    return _events(list(EVENT.iter_unpack(rows)), list(END.iter_unpack(ends)), requests, tables)


def _events(
    rows: Sequence[Sequence[Any]], ends: Sequence[Sequence[Any]], requests: Sequence[str | None], tables: Tables
) -> Iterator[Event]:
    next_end = iter(ends)
    for row, request in zip(rows, requests, strict=True):
        number = row[-1]
        end = next(next_end) if number == ENDED else ()
        if request is None:
            continue
        if number == ENDED:
            yield _end(row, end, request, tables)
        elif number in (ARRIVAL, PLACED):
            t, _, tokens, instance, of, key, _ = row
            model, cls = tables.of[of]
            yield {
                "t": t,
                "event": "arrival",
                "request": request,
                "model": model,
                "class": cls,
                "input_tokens": tokens,
                "key": tables.keys[key],
            }
            if number == PLACED:
                yield {"t": t, "event": "dispatch", "request": request, "instance": _id(instance)}
        else:
            yield {"t": row[0], "event": tables.events[number], "request": request, "instance": _id(row[3])}


def _end(row: Sequence[Any], end: Sequence[Any], request: str, tables: Tables) -> Event:
    finish_s, arrival_s, input_tokens, instance, of, key, _ = row
    dispatch_s, first_s, _, _, _, tokens, evictions, retries, reason, outcome = end
    model, cls = tables.of[of]
    return {
        "t": finish_s,
        "event": "ended",
        "request": request,
        "model": model,
        "class": cls,
        "key": tables.keys[key],
        "outcome": OUTCOMES[outcome],
        "reason": tables.reasons[reason] if reason >= 0 else None,
        "instance": _id(instance),
        "input_tokens": input_tokens,
        "output_tokens": tokens,
        "queue_s": dispatch_s - arrival_s if dispatch_s >= 0.0 else None,
        "ttft_s": first_s - arrival_s if first_s >= 0.0 else None,
        "itl_s": (finish_s - first_s) / (tokens - 1) if tokens > 1 and first_s >= 0.0 else None,
        "duration_s": finish_s - arrival_s,
        "evictions": evictions,
        "retries": retries,
    }


def _id(instance: int) -> int | None:
    return instance if instance >= 0 else None


def _rows(group: Mapping[str, Any], name: str, row: Struct) -> list[tuple[Any, ...]]:
    text = group.get(name)
    if not isinstance(text, str):
        raise PackedError(f"{name} is {str(text)[:80]}; it must be text in base64")
    try:
        data = a2b_base64(text, strict_mode=True)
    except (NotBase64, ValueError) as error:
        raise PackedError(f"{name} is no base64: {error}") from None
    if len(data) % row.size:
        raise PackedError(f"{name} has {len(data)} bytes; it must be a multiple of {row.size}")
    return list(row.iter_unpack(data))


def _texts(group: Mapping[str, Any], name: str, *, or_none: bool = False) -> list[Any]:
    texts = group.get(name)
    if not isinstance(texts, list) or not all(isinstance(text, str) or (or_none and text is None) for text in texts):
        raise PackedError(f"{name} is {str(texts)[:80]}; it must be a list of texts")
    return texts


def _check_row(row: Sequence[Any], tables: Tables) -> None:
    t, arrival_s, _, _, of, key, event = row
    if not (isfinite(t) and isfinite(arrival_s)):
        raise PackedError(f"a row of {t} s, of a request of {arrival_s} s; both must be numbers")
    _check(event, tables.events, "event")
    _check(of, tables.of, "of")
    _check(key, tables.keys, "key")


def _check(place: int, table: Sequence[Any], name: str) -> None:
    if not 0 <= place < len(table):
        raise PackedError(f"{name} is {place}; it must lie in 0..{len(table) - 1}")
