"""Server-sent events, cut out of a stream that comes in pieces of any size."""

from __future__ import annotations

EVENT_MAX_BYTES = 8 << 20
"""One event of a stream, and so one line: with log probabilities of a long prompt it is megabytes."""


class EventError(ValueError):
    """An event that is too long."""


class Events:
    """Splits a stream into the data of its events; lines end with LF or CRLF."""

    __slots__ = ("_event", "_event_bytes", "_line")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what has not ended."""
        self._line = bytearray()
        """The line that has not ended: in one place, so that pieces of any size cost what their bytes cost."""
        self._event: list[bytes] = []
        self._event_bytes = 0
        """Of the event that has not ended, its open line included."""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that end in the next piece. Raises EventError."""
        found: list[bytes] = []
        lines = data.split(b"\n")
        unended = lines.pop()
        for line in lines:
            self._event_bytes += len(line) + 1
            if self._line:
                self._line += line
                line = bytes(self._line)
                self._line.clear()
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._event.append(line[5:])
            elif not line:
                self._event_bytes = 0
                if self._event:
                    found.append(b"\n".join(self._event).strip())
                    self._event = []
        self._line += unended
        self._event_bytes += len(unended)
        if self._event_bytes > EVENT_MAX_BYTES:
            raise EventError(f"an event of the engine's stream is larger than {EVENT_MAX_BYTES} bytes")
        return found
