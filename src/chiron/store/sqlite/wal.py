"""SQLite's write-ahead log, read without SQLite: which frames are whole, and which SQLite would still use.

A log is a header and frames; each frame is one page, written by one commit. A frame's checksum goes on from the one
before it, so SQLite stops at the first frame that does not fit and takes the rest for never written. Here each frame
is judged by itself, from the checksum that the one before it has stored: damage to one frame does not cost the others.

The checksum is a recurrence over 32-bit words, s0 += x0 + s1; s1 += x1 + s0. It is linear, so a frame's sum is a dot
product with fixed weights, plus the sum before it times a fixed matrix, all modulo 2 ** 32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chiron.store.sqlite.database import PAGE_BYTES

HEADER_BYTES, FRAME_HEAD_BYTES = 32, 24
FRAME_BYTES = FRAME_HEAD_BYTES + PAGE_BYTES
_MAGIC = 0x377F0682
_CHUNK = 256
"""Frames summed at a time: two megabytes."""


@dataclass(frozen=True, slots=True)
class Frame:
    page: int
    is_commit: bool
    offset: int
    """Of the page's content, in the file."""
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    frames: tuple[Frame, ...] = ()
    """Of the log's present generation, in order, up to the last one; those of older ones behind it do not count."""
    used: int = 0
    """How many of them SQLite would use: up to the last commit before the first that does not fit."""
    header_fits: bool = True

    @property
    def goes_on(self) -> bool:
        """Whether there is more of this generation than SQLite would use: a torn tail, or damage before it."""
        return self.used < len(self.frames) or not self.header_fits

    @property
    def is_torn_inside(self) -> bool:
        """Whether a later commit began behind a frame that does not fit. It began only once the one before it was on
        the disk, so what does not fit was whole."""
        if not self.header_fits:
            return bool(self.frames)
        rest = self.frames[self.used :]
        bad = next((place for place, frame in enumerate(rest) if not frame.fits), None)
        if bad is None:
            return False
        commit = next((place for place, frame in enumerate(rest) if place >= bad and frame.is_commit), None)
        return commit is not None and commit + 1 < len(rest)


def read_log(path: Path) -> Log:
    """An absent or empty file is an empty log. Raises OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Log()
    count = max(0, len(data) - HEADER_BYTES) // FRAME_BYTES
    if len(data) <= HEADER_BYTES:
        return Log()
    header = np.frombuffer(data, ">u4", 8).astype(np.uint32)
    order = "<u4" if header[0] != _MAGIC + 1 else ">u4"
    header_sum = _sums(np.frombuffer(data, order, 6).astype(np.uint32)[None, :])[0]
    header_fits = bool(
        header[0] in (_MAGIC, _MAGIC + 1) and header[2] == PAGE_BYTES and (header_sum == header[6:]).all()
    )
    if not count:
        return Log(header_fits=header_fits)
    frames = np.frombuffer(data, np.uint8, count * FRAME_BYTES, HEADER_BYTES).reshape(count, FRAME_BYTES)
    heads = frames[:, :FRAME_HEAD_BYTES].copy().view(">u4").astype(np.uint32)
    salt = tuple(header[4:6].tolist()) if header_fits else _usual_salt(heads)
    ours = (heads[:, 2:4] == np.array(salt, np.uint32)).all(axis=1)
    end = int(np.flatnonzero(ours)[-1]) + 1 if ours.any() else 0
    parts = _parts(frames[:end], order)
    start = header[6:] if header_fits else header_sum
    fits, chained = _judge(heads[:end, 4:6], parts, [start, header[6:], header_sum])
    found = tuple(
        Frame(
            page=int(heads[place, 0]),
            is_commit=bool(heads[place, 1]),
            offset=HEADER_BYTES + place * FRAME_BYTES + FRAME_HEAD_BYTES,
            fits=bool(ours[place] and fits[place] and heads[place, 0]),
        )
        for place in range(end)
    )
    used = 0
    if header_fits:
        for place, frame in enumerate(found):
            if not (chained[place] and frame.fits):
                break
            used = place + 1 if frame.is_commit else used
    return Log(frames=found, used=used, header_fits=header_fits)


def _usual_salt(heads: Any) -> tuple[int, int]:
    """Where the header does not say: the one that the first frames agree on."""
    (salt, _), *_ = Counter((int(head[2]), int(head[3])) for head in heads[:16]).most_common(1)
    return salt


def _judge(stored: Any, parts: Any, starts: list[Any]) -> tuple[list[bool], list[bool]]:
    """Per frame: whether it fits what is before it, and whether it fits as SQLite reckons, from stored sums alone."""
    matrix = _power(PAGE_BYTES // 8 + 1)
    fits: list[bool] = []
    chained: list[bool] = []
    before = starts
    for place in range(len(stored)):
        sums = [matrix @ start + parts[place] for start in before]
        matches = [bool((one == stored[place]).all()) for one in sums]
        fits.append(any(matches))
        chained.append(matches[0])
        # The frame after this one goes on from what is stored here; if that is what is damaged, from what should be.
        before = [stored[place], *sums]
        before = before[:3]
    return fits, chained


def _parts(frames: Any, order: str) -> Any:
    """What the words of each frame add to its sum."""
    chunks = []
    for start in range(0, len(frames), _CHUNK):
        chunk = frames[start : start + _CHUNK]
        words = np.concatenate([chunk[:, :8], chunk[:, FRAME_HEAD_BYTES:]], axis=1).view(order).astype(np.uint32)
        chunks.append(_sums(words))
    return np.concatenate(chunks) if chunks else np.zeros((0, 2), np.uint32)


def _sums(words: Any) -> Any:
    """The checksum of each row of words, from zero."""
    weights = _weights(words.shape[1] // 2)
    return np.stack(
        [(words * weights[:, 0]).sum(axis=1, dtype=np.uint32), (words * weights[:, 1]).sum(axis=1, dtype=np.uint32)],
        axis=1,
    )


_STEP = np.array([[1, 1], [1, 2]], np.uint32)
"""What one pair of words does to (s0, s1) besides adding x0 to s0 and x0 + x1 to s1."""


def _power(count: int) -> Any:
    result = np.eye(2, dtype=np.uint32)
    for _ in range(count):
        result = (_STEP @ result).astype(np.uint32)
    return result


_known_weights: dict[int, Any] = {}


def _weights(pairs: int) -> Any:
    """Per word: its share in s0 and in s1."""
    if pairs not in _known_weights:
        found = np.zeros((2 * pairs, 2), np.uint32)
        power = np.eye(2, dtype=np.uint32)
        for pair in reversed(range(pairs)):
            found[2 * pair] = power @ np.array([1, 1], np.uint32)
            found[2 * pair + 1] = power @ np.array([0, 1], np.uint32)
            power = (_STEP @ power).astype(np.uint32)
        _known_weights[pairs] = found
    return _known_weights[pairs]
