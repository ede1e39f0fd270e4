"""The event log: one JSON object a line, from the simulator (``--events``) or from the gateway.

Every line has ``t`` (seconds since the run began) and ``event``. The gateway starts each of its files with an event
``log``: ``at`` is the wall time of that line, ``run`` the wall time at ``t == 0``, which also names the run. It rotates
its files: ``NAME`` is being written, ``NAME.1`` is the one before it, and so on; a restart begins a new file too.

Lines of the gateway end with a checksum, ``"sum"``, of the rest of the line, so that a bit that the disk has flipped
is not taken for a number. In a file where one line has a sum all must.

In a grouped log of the gateway, events of requests come many in a line: an event ``packed`` (``packed_events`` has its
form), or, in logs of version 2, an event ``group`` whose ``rows`` are each the values of what would have been its line,
in the order of ``ROWS``. Whoever reads gets single events.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from chiron.core.types import Decision
from chiron.telemetry.errors import LogError
from chiron.telemetry.packed_events import PACKED, PackedError, unpacked

GROUP = "group"
"""The event that has many, in logs of version 2."""
ROWS = {
    "arrival": ("t", "event", "request", "model", "class", "input_tokens", "key"),
    "ended": (
        "t",
        "event",
        "request",
        "model",
        "class",
        "key",
        "outcome",
        "reason",
        "instance",
        "input_tokens",
        "output_tokens",
        "queue_s",
        "ttft_s",
        "itl_s",
        "duration_s",
        "evictions",
        "retries",
    ),
}
"""Names of a row's values, by its event; of any other event they are ``ROW``."""
ROW = ("t", "event", "request", "instance")


def decision_line(now_s: float, decision: Decision) -> dict[str, Any]:
    """A decision as a line of the log; JSON has no nan, so such a number is null."""
    return {
        "t": now_s,
        "event": "decision",
        "kind": decision.kind,
        "subject": decision.subject,
        "before": decision.before,
        "after": decision.after,
        "reason": decision.reason,
        "numbers": {name: None if value != value else value for name, value in decision.numbers.items()},
    }


def summed(line: bytes) -> bytes:
    """A line, an object with its line break, with its checksum."""
    return closed(line[:-2])


def closed(body: bytes) -> bytes:
    """Likewise, of a line without its last brace."""
    return b'%b,"sum":"%08x"}\n' % (body, crc32(body))


def read_event_log(
    path: str | Path, *, last_run: bool = False, damaged: Callable[[str], None] | None = None
) -> Iterator[dict[str, Any]]:
    """The events of ``path`` and of its rotated files, oldest first; ``last_run``: only of the newest run in them.

    A last line that was cut off, as kill -9 leaves one, is passed over in every file. Reading while the log is being
    written is allowed. Raises OSError, and LogError, naming file and line, for anything else that is no event; lines
    that the disk has damaged are passed over instead if ``damaged`` is given, which hears of each.
    """
    with ExitStack() as stack:
        files = [(name, stack.enter_context(file)) for name, file in _open(Path(path))]
        if last_run:
            files = _of_last_run(files)
        for name, file in files:
            yield from _events(name, file, damaged)


def log_file(path: Path, number: int) -> Path:
    """The file of that number: 0 is ``path`` itself, 1 the one before it."""
    return path.with_name(f"{path.name}.{number}") if number else path


def log_numbers(path: Path) -> list[int]:
    """The numbers of the files that exist, newest first; while the log is rotated one may be missed."""
    prefix = path.name + "."
    ends = [file.name.removeprefix(prefix) for file in path.parent.glob(f"{_literal(prefix)}*")]
    return [0] * path.exists() + sorted(int(end) for end in ends if end.isdecimal() and end == str(int(end)) != "0")


def _literal(text: str) -> str:
    """``text`` for a glob pattern, standing for itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _open(path: Path) -> list[tuple[Path, BinaryIO]]:
    """Oldest first, without a hole. Raises FileNotFoundError if there is none.

    A rotation meanwhile only moves files up, so counting upwards passes by none, and the one met last is the oldest:
    a file that was met twice counts where it was met last.
    """
    opened: dict[tuple[int, int], tuple[Path, BinaryIO]] = {}
    number: int | None = 0
    while number is not None:
        name = log_file(path, number)
        try:
            file = name.open("rb")
        except FileNotFoundError:
            number = next((n for n in log_numbers(path) if n > number), None)
            continue
        about = os.fstat(file.fileno())
        met = opened.pop((about.st_dev, about.st_ino), None)
        if met is not None:
            met[1].close()
        opened[about.st_dev, about.st_ino] = (name, file)
        number += 1
    if not opened:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return list(reversed(opened.values()))


def _of_last_run(files: list[tuple[Path, BinaryIO]]) -> list[tuple[Path, BinaryIO]]:
    """The files from the first that belongs to the same run as the last one."""
    runs = [_run(file) for _, file in files]
    first = len(files) - 1
    # A file whose first line is damaged goes with the one after it.
    while first > 0 and runs[-1] is not None and runs[first - 1] in (runs[-1], _DAMAGED):
        first -= 1
    return files[max(first, 0) :]


def _run(file: BinaryIO) -> str | None:
    """The run that wrote this file, by its first line; the simulator's logs do not say."""
    line = file.readline()
    file.seek(0)
    if _sum_of(line) is False:
        return _DAMAGED
    try:
        head = json.loads(line)
    except (ValueError, RecursionError):
        head = None
    return str(head["run"]) if isinstance(head, dict) and head.get("event") == "log" and "run" in head else None


_DAMAGED = "damaged"
"""In place of the name of a run."""


def _sum_of(line: bytes) -> bool | None:
    """Whether a line fits its sum; None: it has none, or is cut off."""
    if not line.endswith(b"\n"):
        return None
    body, mark, end = line.rpartition(b',"sum":"')
    return f'{crc32(body):08x}"}}\n'.encode() == end if mark else None


def _events(name: Path, file: BinaryIO, damaged: Callable[[str], None] | None) -> Iterator[dict[str, Any]]:
    has_sums = _has_sums(file)
    for number, line in enumerate(file, 1):
        # A last line that was cut off has no whole sum.
        if has_sums and not _sum_of(line) and (line.endswith(b"\n") or _MARK.search(line)):
            what = f"{name}: line {number} is damaged: it does not fit its checksum"
            if damaged is None:
                raise LogError(what)
            damaged(what)
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n") and (number > 1 or line[:5] == b'{"t":'[: len(line)]):
                return
            raise LogError(
                f"{name}: line {number} is not an event ({error}); name a file that --save or --events wrote"
            ) from None
        if not isinstance(event, dict) or "event" not in event or not isinstance(event.get("t"), int | float):
            raise LogError(f"{name}: line {number} is not an event: it has no event and time t")
        if has_sums:
            event.pop("sum", None)
        if event["event"] == GROUP:
            yield from _rows(name, number, event.get("rows"))
        elif event["event"] == PACKED:
            try:
                yield from unpacked(event)
            except PackedError as error:
                raise LogError(f"{name}: line {number} is a group that is none: {error}") from None
        else:
            yield event


def _rows(name: Path, number: int, rows: Any) -> Iterator[dict[str, Any]]:
    """The events of a group, which is the line of this number."""
    for row in rows if isinstance(rows, list) else (None,):
        names = ROWS.get(str(row[1]), ROW) if isinstance(row, list) and len(row) > 1 else ROW
        if not isinstance(row, list) or len(row) != len(names) or not isinstance(row[0], int | float):
            raise LogError(f"{name}: line {number} is a group with {str(row)[:80]}, which is no row of an event")
        yield dict(zip(names, row, strict=True))


def _has_sums(file: BinaryIO) -> bool:
    """Whether one of the first lines fits a sum: all are then to have one."""
    found = any(_sum_of(line) for line in islice(file, _LINES_ASKED))
    file.seek(0)
    return found


_LINES_ASKED = 100
_MARK = re.compile(rb',"sum":"[0-9a-f]{8}"')
