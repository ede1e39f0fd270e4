"""Rows of events as one line of a grouped event log: ``telemetry.packed_events`` has its form.

A group has some 300 bytes beside its rows. So a few rows are a line each, as in a log that is not grouped, and a small
group has only the names that it needs: the log of a gateway with little to do is no larger than with a line each.
"""

from __future__ import annotations

from binascii import b2a_base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from chiron.gateway.reporting.tally import EVENTS
from chiron.telemetry.packed_events import END, ENDED, EVENT, PACKED, Tables, events_of

FEW = 32
"""Names of a table that are written whether or not a group has them, if it has as many rows."""
ROWS_MIN = 4
"""Fewer rows are a line each."""
Name = TypeVar("Name")

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """As the journal has noted it down."""

    rows: bytes
    ends: bytes
    requests: Sequence[str]
    of: Sequence[tuple[str, str]]
    keys: Sequence[str]
    events: Sequence[str]
    reasons: Sequence[str]

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def t_s(self) -> float:
        """Of its first row."""
        return float(EVENT.unpack_from(self.rows)[0])

    def cut(self, count: int) -> Group:
        """The first of them."""
        rows = self.rows[: count * EVENT.size]
        ended = int((np.frombuffer(rows, dtype=EVENTS)["event"] == ENDED).sum())
        return replace(self, rows=rows, ends=self.ends[: ended * END.size], requests=self.requests[:count])

    def lines(self) -> tuple[list[bytes], int]:
        """Each without its last brace; and how many of its events cannot be read there, because the name of their
        request is no text that can be encoded."""
        if len(self) < ROWS_MIN:
            return self._line_each()
        line, lost = self._line()
        return [line], lost

    def _line(self) -> tuple[bytes, int]:
        requests, lost = _names(self.requests)
        rows: bytes | bytearray = self.rows
        of, keys = self.of, self.keys
        few = min(FEW, len(self))
        if max(len(of), len(keys)) > few:
            rows = bytearray(rows)
            events = np.frombuffer(rows, dtype=EVENTS)
            if len(of) > few:
                events["of"], of = _used(events["of"], of)
            if len(keys) > few:
                events["key"], keys = _used(events["key"], keys)
        return (
            b'{"t":%b,"event":"%b","requests":%b,"of":%b,"keys":%b,"events":%b,"reasons":%b,"rows":"%b","ends":"%b"'
            % (
                repr(self.t_s).encode(),
                PACKED.encode(),
                requests,
                _encode(of),
                _table(keys),
                _encode(self.events),
                _table(self.reasons),
                b2a_base64(rows, newline=False),
                b2a_base64(self.ends, newline=False),
            ),
            lost,
        )

    def _line_each(self) -> tuple[list[bytes], int]:
        requests = _kept(self.requests)
        tables = Tables(of=self.of, keys=_replaced(self.keys), events=self.events, reasons=_replaced(self.reasons))
        events = events_of(self.rows, self.ends, requests, tables)
        return [_encode(event)[:-1] for event in events], requests.count(None)


def _used(places: npt.NDArray[np.int32], names: Sequence[Name]) -> tuple[npt.NDArray[np.int32], list[Name]]:
    """The places among the names that are used, and those names."""
    used = np.flatnonzero(np.bincount(places, minlength=len(names)))
    among = np.zeros(len(names), dtype=np.int32)
    among[used] = np.arange(len(used), dtype=np.int32)
    return among[places], [names[place] for place in used.tolist()]


def _names(texts: Sequence[str]) -> tuple[bytes, int]:
    """Null for each that cannot be encoded, and how many those are: they cost no other."""
    try:
        return _encode(texts), 0
    except (TypeError, ValueError):
        kept = _kept(texts)
        return _encode(kept), kept.count(None)


def _table(texts: Sequence[str]) -> bytes:
    try:
        return _encode(texts)
    except (TypeError, ValueError):
        return _encode(_replaced(texts))


def _kept(texts: Sequence[str]) -> list[str | None]:
    return [text if _encodes(text) else None for text in texts]


def _replaced(texts: Sequence[str]) -> list[str]:
    return [str(text).encode(errors="replace").decode() for text in texts]


def _encodes(text: str) -> bool:
    try:
        _encode(text)
    except (TypeError, ValueError):
        return False
    return True
