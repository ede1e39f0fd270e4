"""How many commits were acknowledged, in a small file of its own.

SQLite ends its log at the first frame that does not fit its checksum: rightly so after a power cut, which tears what
was being written, and silently also where the disk has changed what was committed long ago. The database counts its
commits in ``meta``; this file says up to which of them callers have heard of. A database that knows fewer has lost
some; one that knows as many has at most a torn tail, of which nobody was told.

The number is written after the commit has reached the disk and is not itself waited for: after a power cut it may be
too small, never too large.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from zlib import crc32

NAME = "acknowledged"
_SALT = crc32(b"acknowledged")
_FORM = re.compile(rb"([0-9a-f]{16}) ([0-9a-f]{8})\n")


class Acknowledged:
    """The file, open for writing. Raises OSError."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, commits: int, *, durably: bool = False) -> None:
        number = b"%016x" % commits
        os.pwrite(self._descriptor, b"%b %08x\n" % (number, crc32(number, _SALT)), 0)
        if durably:
            os.ftruncate(self._descriptor, 26)
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def read_acknowledged(directory: Path) -> int | None:
    """None: there is no such file, or it is damaged, which ``exists`` tells apart."""
    try:
        found = _FORM.fullmatch((directory / NAME).read_bytes())
    except FileNotFoundError:
        return None
    if found is None or crc32(found[1], _SALT) != int(found[2], 16):
        return None
    return int(found[1], 16)


def exists(directory: Path) -> bool:
    return (directory / NAME).exists()
