"""What a study has simulated so far, on disk: a study that was stopped, by whatever means, goes on where it was.

A line of JSON per trial, written when the trial ended and flushed to disk. A line that is torn or damaged is not
believed: its trial is simulated again.
"""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

from chiron.studies.trial import Summary


class Journal:
    """Summaries by the key of their trial."""

    def __init__(self, path: Path | None) -> None:
        """None: nothing is kept."""
        self._path = path
        self._known: dict[str, Summary] = {}
        self.ignored = 0
        """Lines that could not be believed."""
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Summary | None:
        return self._known.get(key)

    def add(self, key: str, name: str, summary: Summary) -> None:
        self._known[key] = summary
        if self._path is None:
            return
        entry = {"key": key, "name": name, "sum": _sum(key, summary), "summary": dict(summary)}
        with self._path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        for line in data.splitlines():
            entry = _entry(line)
            if entry is None:
                self.ignored += 1
            else:
                self._known[entry["key"]] = entry["summary"]
        if data and not data.endswith(b"\n"):
            # The next entry begins on a line of its own.
            with path.open("ab") as file:
                file.write(b"\n")


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        fine = entry["sum"] == _sum(entry["key"], entry["summary"])
    except (ValueError, KeyError, TypeError):
        return None
    return entry if fine and isinstance(entry["summary"], dict) else None


def _sum(key: str, summary: Summary) -> str:
    return sha256(f"{key} {json.dumps(summary, sort_keys=True)}".encode()).hexdigest()[:16]
