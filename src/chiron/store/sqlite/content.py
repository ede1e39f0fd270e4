"""Reading the content of an uploaded file: every block is checked before a byte of it is passed on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path
from typing import Any
from zlib import crc32

from chiron.store.port import StoreDamaged
from chiron.store.sums import BLOCK_BYTES, Row, unpack


class CheckedFile(RawIOBase):
    """A file of known size whose blocks have sums. Reading raises StoreDamaged where it is not what was uploaded."""

    def __init__(self, path: Path, row: Row) -> None:
        """``row``: of the file, checked. Raises OSError."""
        super().__init__()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._id = row["id"]
        self._size = row["bytes"]
        self._sums = None if row["block_sums"] is None else unpack(row["block_sums"])
        self._number = 0
        self._block = memoryview(b"")

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block:
            self._block = memoryview(self._next_block())
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._block))
        view[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def _next_block(self) -> bytes:
        begin = self._number * BLOCK_BYTES
        expected = min(BLOCK_BYTES, self._size - begin)
        if expected <= 0:
            if os.pread(self._descriptor, 1, self._size):
                raise StoreDamaged(f"file {self._id!r} is longer than the {self._size} bytes that were uploaded")
            return b""
        block = os.pread(self._descriptor, expected, begin)
        if len(block) < expected:
            raise StoreDamaged(
                f"file {self._id!r} is damaged: it ends after {begin + len(block)} of {self._size} bytes"
            )
        if self._sums is not None and crc32(block) != self._sums[self._number]:
            where = f"between the bytes {begin} and {begin + len(block)}"
            raise StoreDamaged(f"file {self._id!r} is damaged: {where} it is no longer what was uploaded")
        self._number += 1
        return block


def check_content(path: Path, row: Row) -> None:
    """Read it all once. Raises StoreDamaged and OSError."""
    with CheckedFile(path, row) as stream:
        for _ in _blocks(stream):
            pass


def _blocks(stream: CheckedFile) -> Iterator[bytes]:
    while block := stream.read(BLOCK_BYTES):
        yield block
