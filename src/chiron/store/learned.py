"""What was learned, kept across restarts: named bytes with a checksum, whose meaning the store does not know."""

from __future__ import annotations

import re
from zlib import crc32

LEARNED_BYTES_MAX = 16 << 20
"""One piece; a snapshot of all models' histories has a few hundred kilobytes."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_SALT = crc32(b"learned")


def check_learned(name: str, data: bytes = b"") -> None:
    """Raises ValueError: names are the program's own, and a snapshot that grew beyond its bound is a fault of it."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: {name!r} must be 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a-z or 0-9")
    if len(data) > LEARNED_BYTES_MAX:
        raise ValueError(f"{name}: {len(data)} bytes must be at most {LEARNED_BYTES_MAX}")


def learned_sum(name: str, data: bytes) -> int:
    return crc32(data, crc32(name.encode(), _SALT))
