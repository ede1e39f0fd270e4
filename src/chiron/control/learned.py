"""What a control plane has learned, as a value: kept by one run, and given to the next one.

Step times, lengths, time to first token, cold starts, and what the policy's fleet hook knows of the load. Not among it:
what runs and waits (soft state, told anew), plans, holds and outages, which are of the moment. Everything is checked
when it is read back (``core.kept``), and what is too old is dropped: each part with a note. The bytes end with their
checksum.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

from chiron.core.kept import Kept

VERSION: Final = 1
AGE_MAX_S: Final = 7 * 86400.0
"""Older than this nothing of it is used, two weeks of load neither; the last hour's load is no longer planned with
after ``policies.policy.LOAD_AGE_MAX_S``."""
CLOCK_SKEW_MAX_S: Final = 10.0
"""It may have been kept so long after now: by another machine, whose clock is a little ahead."""
WALL_MAX_S: Final = 1e11
BYTES_MAX: Final = 32 * 1024 * 1024


class LearnedError(Exception):
    """Bytes that are no learned state, or not one of this version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """Plain data: what ``Kept`` reads."""

    policy: str
    wall_s: float
    """Unix time at which this was so."""
    models: Mapping[str, Mapping[str, Any]]
    """By name. Under ``fleet`` the fleet hook's own."""

    def to_bytes(self) -> bytes:
        content = {"version": VERSION, "policy": self.policy, "wall_s": self.wall_s, "models": self.models}
        body = json.dumps(content, separators=(",", ":")).encode()
        return b"%b\n%08x\n" % (body, crc32(body))


def from_bytes(data: bytes) -> Learned:
    """Raises LearnedError."""
    if len(data) > BYTES_MAX:
        raise LearnedError(f"learned state of {len(data)} bytes; there are at most {BYTES_MAX}")
    body, _, end = data.rstrip(b"\n").rpartition(b"\n")
    if not body or end != b"%08x" % crc32(body):
        raise LearnedError("learned state does not fit its checksum: it is damaged, or was cut off")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise LearnedError(f"learned state is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else None
        raise LearnedError(f"learned state of version {found!r}; this is version {VERSION}")
    notes: list[str] = []
    told = Kept(content, "learned state", notes)
    policy, wall_s, models = told.text("policy", 100), told.number("wall_s", 0.0, WALL_MAX_S), content.get("models")
    if policy is None or wall_s is None:
        raise LearnedError(notes[0])
    if not isinstance(models, dict):
        raise LearnedError("learned state without models")
    return Learned(policy=policy, wall_s=wall_s, models=models)
