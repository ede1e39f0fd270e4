"""The event log's writer: lines are made and queued on the loop's thread, written on a thread of its own.

JSON and checksum cost the loop two microseconds a line, in groups of lines; one at a time it would be twice that. The
other thread would take as long, and the interpreter's lock with it; what is left there is to wait for the disk. In a
grouped log a group is one line with one checksum: its rows are written as they were noted down.

What a full disk or a full queue costs is lines of this log, never a request: they are counted, an event ``dropped``
says how many, and writing goes on when it can.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import orjson

from chiron.gateway.reporting.groups import Group
from chiron.gateway.reporting.lines import Line
from chiron.telemetry.event_log import closed, log_file, log_numbers, summed

log = logging.getLogger("chiron.events")

VERSION = 1
"""Of the line format, in the first line of each file."""
VERSION_GROUPED = 3
"""Version 2 had rows in JSON."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that pass, and that must not keep a gateway from starting."""
_PIECE = 256
"""Lines written at once; a file may grow by so many beyond ``rotate_bytes``."""
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLogSettings:
    """Where events go, and how much of them is kept."""

    path: Path
    """The file being written; older ones are ``NAME.1``, ``NAME.2`` and so on. Its directory must exist."""
    rotate_bytes: int = 256 * 1024 * 1024
    """A file that has reached this size is put aside and the next one begun."""
    rotate_keep: int = 8
    """Files kept besides the one being written; 0 keeps none."""
    flush_s: float = 0.5
    """Lines reach the file at latest this long after they were queued; kill -9 loses no more than that."""
    queue_max: int = 100_000
    """Lines that may wait for the disk; more are dropped and counted. One takes some 200 to 450 bytes, in a group half
    of that or less. In a group, an arrival and its dispatch at once count as one."""
    grouped: bool = False
    """What happens to requests is written as one line for some hundred events: smaller, and quicker to write."""

    def __post_init__(self) -> None:
        for name, low in (("rotate_bytes", 4096), ("rotate_keep", 0), ("queue_max", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"event log: {name} is {getattr(self, name)}; it must be at least {low}")
        if not 0.01 <= self.flush_s <= 3600.0:
            raise ValueError(f"event log: flush_s is {self.flush_s}; it must lie in 0.01..3600")


def wall_time(wall_s: float) -> str:
    """Unix time as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(wall_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class EventWriter:
    """``write`` from one thread, the loop's. OSError from the constructor: the file cannot be opened."""

    def __init__(
        self, settings: EventLogSettings, *, wall_origin_s: float, facts: Mapping[str, Any] | None = None
    ) -> None:
        """``wall_origin_s`` is the Unix time at ``t == 0``; ``facts`` go into the first line of every file."""
        self.dropped = 0
        """Lines that found the queue full."""
        self.lost = 0
        """Lines that could not be written."""
        self.grouped = settings.grouped
        self.standing: Callable[[], Mapping[str, Any]] | None = None
        """What the first line of a file that begins later says of that moment. Called on the writer's thread, it may be
        ahead of lines that are queued."""
        self._settings = settings
        self._wall_origin_s = wall_origin_s
        self._facts = dict(facts or {})
        self._queue: deque[tuple[float, int, bytes]] = deque()
        """Time of the first of some lines, how many they are, and the lines."""
        self._queue_max = settings.queue_max
        self._queued = 0
        self._taken = 0
        """Lines so far; each of the two is counted by one thread only."""
        self._encode = msgspec.json.Encoder().encode_lines
        self._told = 0
        """Lines dropped or lost that the log has told of."""
        self._failing = False
        self._at_s = 0.0
        """Time of the line that is written next."""
        self._fd = -1
        self._size = 0
        try:
            self._begin()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self._failing = True
            log.error("the event log %s cannot be begun, its lines are lost for now: %s", settings.path, error)
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="chiron-event-log", daemon=True)
        self.thread.start()

    def write(self, event: Mapping[str, Any]) -> None:
        """Queue one line; it has at least ``t`` and ``event``."""
        if self._queued - self._taken >= self._queue_max:
            self.dropped += 1
            return
        try:
            line = summed(orjson.dumps(event, default=str, option=_OPTIONS))
        except (TypeError, ValueError) as error:
            self.lost += 1
            log.error("an event could not be written: %s", error)
            return
        self._queued += 1
        self._queue.append((event["t"], 1, line))

    def write_group(self, group: Group) -> None:
        """Queue all of them, as one line if they are not few."""
        count = self._room(len(group))
        if not count:
            return
        lines, lost = (group if count == len(group) else group.cut(count)).lines()
        if lost:
            self.lost += lost
            log.error("%d of %d events could not be written: the names of their requests are no text", lost, count)
        self._queued += count
        self._queue.append((group.t_s, count, b"".join(map(closed, lines))))

    def write_lines(self, events: Sequence[Line]) -> None:
        """Queue a line each, several at a time."""
        events = events[: self._room(len(events))]
        if not events:
            return
        # JSON has no bare line break.
        bodies = self._encoded(events).split(b"}\n")[:-1]
        data = b"".join(map(closed, bodies))
        self._queued += len(bodies)
        self._queue.append((events[0].t, len(bodies), data))

    def _room(self, count: int) -> int:
        """How many of so many the queue takes; the others are dropped."""
        taken = min(count, max(0, self._queue_max - (self._queued - self._taken)))
        self.dropped += count - taken
        return taken

    def _encoded(self, events: Sequence[Line]) -> bytes:
        """A line each; one that cannot be encoded costs none of the others."""
        try:
            return self._encode(events)
        except (TypeError, ValueError) as error:
            if len(events) == 1:
                self.lost += 1
                log.error("an event could not be written: %s", error)
                return b""
            return b"".join(self._encoded([event]) for event in events)

    def close(self) -> None:
        """Write what is queued and stop; lines that come later are not written."""
        self._stop.set()
        self.thread.join()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- the writer's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(self._settings.flush_s):
            self._drain()
        self._drain()

    def _drain(self) -> None:
        """Whatever is queued by now; a queue that grows all the time must not keep it here for ever."""
        queue = self._queue
        for _ in range(1 + (self._queued - self._taken) // _PIECE):
            piece: list[bytes] = []
            count = 0
            while queue and count < _PIECE:
                at_s, lines, data = queue.popleft()
                if not piece:
                    self._at_s = at_s
                piece.append(data)
                count += lines
            if not piece:
                break
            self._taken += count
            if not self._write(b"".join(piece)):
                self.lost += count
        missing = self.dropped + self.lost - self._told
        dropped = {"t": self._at_s, "event": "dropped", "lines": missing}
        if missing and self._write(summed(orjson.dumps(dropped, option=_OPTIONS))):
            self._told += missing

    def _write(self, data: bytes) -> bool:
        """All of it or nothing: half a line in the middle of a file would make the file unreadable."""
        try:
            if self._fd >= 0 and self._size >= self._settings.rotate_bytes:
                os.close(self._fd)
                self._fd = -1
            if self._fd < 0:
                self._begin()
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as error:
            if not self._failing:
                log.error("the event log %s cannot be written, its lines are lost: %s", self._settings.path, error)
            self._failing = True
            if self._fd >= 0:
                with suppress(OSError):
                    os.ftruncate(self._fd, self._size)
            return False
        if self._failing:
            log.warning("the event log %s is being written again", self._settings.path)
        self._failing = False
        self._size += len(data)
        return True

    def _begin(self) -> None:
        """A new file, with its first line. What lies in its place, of an earlier run too, is put aside."""
        path = self._settings.path
        if path.exists() and path.stat().st_size:
            self._put_aside()
        head = {
            "t": self._at_s,
            "event": "log",
            "version": VERSION_GROUPED if self.grouped else VERSION,
            "at": wall_time(self._wall_origin_s + self._at_s),
            "run": wall_time(self._wall_origin_s),
            **self._facts,
        }
        if self.standing is not None:
            head["standing"] = self.standing()
        data = summed(orjson.dumps(head, default=str, option=_OPTIONS))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data)
        except OSError:
            os.close(fd)
            raise
        self._fd, self._size = fd, len(data)

    def _put_aside(self) -> None:
        """``NAME`` becomes ``NAME.1`` and so on, as far as the first gap; those beyond the kept count go.

        No file moves down: readers count on it.
        """
        path, keep = self._settings.path, self._settings.rotate_keep
        numbers = log_numbers(path)
        gap = next(n for n in range(len(numbers) + 1) if n not in numbers)
        for number in reversed(numbers):
            after = number + (number < gap)
            if after > keep:
                log_file(path, number).unlink(missing_ok=True)
            elif after != number:
                log_file(path, number).rename(log_file(path, after))
