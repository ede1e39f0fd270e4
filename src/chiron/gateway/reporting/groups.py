"""Rows of events as one line of a grouped event log: ``telemetry.packed_events`` has its form."""

from __future__ import annotations

from binascii import b2a_base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from chiron.gateway.reporting.tally import EVENTS
from chiron.telemetry.packed_events import END, ENDED, EVENT, PACKED

FEW = 32
"""Names of a table that are written whether or not a group has them."""
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

    def line(self) -> tuple[bytes, int]:
        """Without its checksum; and how many of its events cannot be read there, because the name of their request is
        no text that can be encoded."""
        requests, lost = _names(self.requests)
        rows, of, keys = self.rows, self.of, self.keys
        if len(of) > FEW or len(keys) > FEW:
            events = np.frombuffer(rows, dtype=EVENTS).copy()
            events["of"], of = _used(events["of"], of)
            events["key"], keys = _used(events["key"], keys)
            rows = events.tobytes()
        return (
            b'{"t":%b,"event":"%b","requests":%b,"of":%b,"keys":%b,"events":%b,"reasons":%b,"rows":"%b","ends":"%b"}\n'
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


def _used(places: npt.NDArray[np.int32], names: Sequence[Name]) -> tuple[npt.NDArray[np.intp], list[Name]]:
    """The places among the names that are used, and those names."""
    used, among = np.unique(places, return_inverse=True)
    return among, [names[place] for place in used.tolist()]


def _names(texts: Sequence[str]) -> tuple[bytes, int]:
    """Null for each that cannot be encoded, and how many those are: they cost no other."""
    try:
        return _encode(texts), 0
    except (TypeError, ValueError):
        kept = [text if _encodes(text) else None for text in texts]
        return _encode(kept), kept.count(None)


def _table(texts: Sequence[str]) -> bytes:
    try:
        return _encode(texts)
    except (TypeError, ValueError):
        return _encode([str(text).encode(errors="replace").decode() for text in texts])


def _encodes(text: str) -> bool:
    try:
        _encode(text)
    except (TypeError, ValueError):
        return False
    return True
