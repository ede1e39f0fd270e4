"""Reports of damage: in the log, and in a file that the next start, the doctor and the status read."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Literal

log = logging.getLogger("chiron.store")

NAME = "damage.jsonl"
BYTES_MAX = 1 << 20
"""The file's size; beyond it only the log is told."""
NOTES_MAX = 100
"""Notes kept in memory for the status."""

Kind = Literal["start", "read"]
"""Found and dealt with at a start; or met while reading, for the next start to deal with."""


class Damage:
    """The notes of one directory."""

    def __init__(self, directory: Path, wall: Callable[[], float]) -> None:
        self.path = directory / NAME
        self._wall = wall
        self._lock = Lock()
        self.notes: list[str] = []
        """Of this start, without repeats."""

    def note(self, what: str, kind: Kind = "read") -> None:
        with self._lock:
            if what in self.notes:
                return
            if len(self.notes) < NOTES_MAX:
                self.notes.append(what)
            log.error("damage: %s", what)
            at = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="seconds")
            line = json.dumps({"at": at, "kind": kind, "what": what}) + "\n"
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    if os.fstat(descriptor).st_size + len(line) <= BYTES_MAX:
                        os.write(descriptor, line.encode())
                finally:
                    os.close(descriptor)
            except OSError as error:
                log.error("%s cannot be written: %s", self.path, error.strerror)

    def is_undealt(self) -> bool:
        """Whether the last start ended with damage that it had met and not dealt with."""
        notes = read_notes(self.path.parent)
        return bool(notes) and notes[-1]["kind"] == "read"


def read_notes(directory: Path) -> list[dict[str, str]]:
    """All that were kept, oldest first; lines that are themselves damaged are passed over."""
    found = []
    try:
        lines = (directory / NAME).read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            note = json.loads(line)
        except ValueError:
            continue
        if isinstance(note, dict) and {"at", "kind", "what"} <= note.keys():
            found.append({name: str(note[name]) for name in ("at", "kind", "what")})
    return found
