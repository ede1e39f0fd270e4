"""The file of the input log. It is opened once the data directory and the port are this gateway's; what the control
plane was told before waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter
from chiron.net.clock import LiveClock
from chiron.runtime.input_log import Point, RecordedInputs

EARLY_MAX = 10_000
"""Lines that wait for the file."""


class InputFile:
    """``recording`` stands in front of the control plane."""

    def __init__(self, clock: LiveClock, point: Point) -> None:
        self.recording = RecordedInputs(clock=clock, point=point, write=self.write)
        self._clock = clock
        self._writer: EventWriter | None = None
        self._early: list[Mapping[str, Any]] = []
        self.recording.start()

    def write(self, line: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(line)
        elif len(self._early) < EARLY_MAX:
            self._early.append(line)

    def open(self, path: Path, *, rotate_bytes: int, rotate_keep: int, facts: Mapping[str, Any]) -> None:
        """Raises OSError."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings = EventLogSettings(path=path, rotate_bytes=rotate_bytes, rotate_keep=rotate_keep)
        self._writer = EventWriter(settings, wall_origin_s=self._clock.wall_origin_s, facts=facts)
        early, self._early = self._early, []
        for line in early:
            self._writer.write(line)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
