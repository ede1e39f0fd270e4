"""The event log: written off the loop's thread, rotated, bounded, and readable after a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter
from chiron.telemetry.errors import LogError
from chiron.telemetry.event_log import log_file, log_numbers, read_event_log

WALL_S = 1_800_000_000.0


def writer(path: Path, **changes: Any) -> EventWriter:
    return EventWriter(EventLogSettings(path=path, **{"flush_s": 0.01, **changes}), wall_origin_s=WALL_S)


def numbers(path: Path, *, last_run: bool = False) -> list[int]:
    return [event["request"] for event in read_event_log(path, last_run=last_run) if event["event"] == "arrival"]


def write_all(log: EventWriter, first: int, count: int) -> None:
    for number in range(first, first + count):
        log.write({"t": float(number), "event": "arrival", "request": number})


def wait_until(true: Any, limit_s: float = 60.0) -> None:
    end_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end_s, "it never became true"
        threading.Event().wait(0.005)


def test_each_file_begins_with_the_wall_time_and_the_name_of_its_run(tmp_path: Path) -> None:
    log = EventWriter(EventLogSettings(path=tmp_path / "log"), wall_origin_s=WALL_S, facts={"policy": "chiron"})
    log.close()
    (head,) = read_event_log(tmp_path / "log")
    at = "2027-01-15T08:00:00.000Z"
    assert head == {"t": 0.0, "event": "log", "version": 1, "at": at, "run": at, "policy": "chiron"}


def test_lines_are_flushed_while_it_runs_and_at_the_end(tmp_path: Path) -> None:
    log = writer(tmp_path / "log")
    write_all(log, 0, 3)
    wait_until(lambda: len(numbers(tmp_path / "log")) == 3)
    write_all(log, 3, 2)
    log.close()
    assert numbers(tmp_path / "log") == [0, 1, 2, 3, 4]


def test_rotation_keeps_the_newest_files_in_order(tmp_path: Path) -> None:
    log = writer(tmp_path / "log", rotate_bytes=4096, rotate_keep=3)
    write_all(log, 0, 2000)
    log.close()
    assert log_numbers(tmp_path / "log") == [0, 1, 2, 3]
    files = [log_file(tmp_path / "log", number) for number in range(4)]
    assert max(file.stat().st_size for file in files) < 4096 + 256 * 60
    seen = numbers(tmp_path / "log")
    assert seen == list(range(seen[0], 2000))
    assert seen[0] > 0, "older ones are gone"
    for file in files:
        assert json.loads(file.read_text().splitlines()[0])["event"] == "log"


def test_nothing_is_kept_if_nothing_is_to_be_kept(tmp_path: Path) -> None:
    log = writer(tmp_path / "log", rotate_bytes=4096, rotate_keep=0)
    write_all(log, 0, 500)
    log.close()
    assert log_numbers(tmp_path / "log") == [0]
    assert numbers(tmp_path / "log")[-1] == 499


def test_a_restart_begins_a_new_file_and_the_last_run_can_be_read_alone(tmp_path: Path) -> None:
    for run in range(2):
        settings = EventLogSettings(path=tmp_path / "log", rotate_bytes=4096, rotate_keep=50)
        log = EventWriter(settings, wall_origin_s=WALL_S + 100 * run)
        write_all(log, 1000 * run, 300)
        log.close()
    assert numbers(tmp_path / "log") == [*range(300), *range(1000, 1300)]
    assert numbers(tmp_path / "log", last_run=True) == list(range(1000, 1300))


def test_lines_that_find_the_queue_full_are_counted_and_the_log_says_so(tmp_path: Path) -> None:
    log = writer(tmp_path / "log", queue_max=10, flush_s=3600)
    write_all(log, 0, 25)
    log.close()
    assert log.dropped == 15
    assert numbers(tmp_path / "log") == list(range(10))
    *_, last = read_event_log(tmp_path / "log")
    assert (last["event"], last["lines"]) == ("dropped", 15)


def test_a_full_disk_costs_lines_but_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = writer(tmp_path / "log")
    write_all(log, 0, 5)
    wait_until(lambda: len(numbers(tmp_path / "log")) == 5)
    real_write, full = os.write, True

    def write(fd: int, data: Any) -> int:
        if not full:
            return real_write(fd, data)
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(fd, data[:15])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        write_all(log, 5, 5)
        wait_until(lambda: log.lost == 5)
        full = False
    write_all(log, 10, 5)
    log.close()
    assert numbers(tmp_path / "log") == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert [e["lines"] for e in read_event_log(tmp_path / "log") if e["event"] == "dropped"] == [5]


def test_what_json_cannot_hold_is_written_as_null_or_text(tmp_path: Path) -> None:
    log = writer(tmp_path / "log")
    log.write({"t": 1.0, "event": "x", "odd": float("nan"), "path": tmp_path})
    log.write({"t": 2.0, "event": "y", "number": 1 << 70})
    log.close()
    events = list(read_event_log(tmp_path / "log"))
    assert events[1] == {"t": 1.0, "event": "x", "odd": None, "path": str(tmp_path)}
    assert log.lost == 1


KILLED = """
import sys
from pathlib import Path
from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter
settings = EventLogSettings(path=Path(sys.argv[1]), flush_s=0.01, rotate_bytes=65536, queue_max=10**7)
log = EventWriter(settings, wall_origin_s=0.0)
number = 0
while True:
    log.write({"t": float(number), "event": "arrival", "request": number})
    number += 1
    if number == 3000:
        print("going", flush=True)
    if number % 500 == 0:
        import time; time.sleep(0.002)
"""


def test_after_kill_9_everything_that_was_flushed_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "log"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"going\n"
        wait_until(lambda: path.exists() and len(numbers(path)) > 3000)
        seen = numbers(path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        if process.stdout is not None:
            process.stdout.close()
    after = numbers(path)
    assert after[: len(seen)] == seen or after[0] > 0
    assert after == list(range(after[0], after[0] + len(after))), "no gap, nothing twice"


@pytest.mark.parametrize("torn", ['{"t":7.0,"ev', '{"t":7.0,"event":"a"', '{"t'])
def test_a_torn_last_line_is_passed_over_in_every_file(tmp_path: Path, torn: str) -> None:
    (tmp_path / "log.1").write_text('{"t":1.0,"event":"arrival","request":1}\n' + torn)
    (tmp_path / "log").write_text('{"t":2.0,"event":"arrival","request":2}\n' + torn)
    assert numbers(tmp_path / "log") == [1, 2]


def test_a_log_that_was_cut_off_in_its_first_line_is_empty(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"t')
    assert numbers(tmp_path / "log") == []


def test_a_log_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_event_log(tmp_path / "log"))


def test_garbage_within_a_file_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"t":1.0,"event":"a"}\nrubbish\n{"t":2.0,"event":"b"}\n')
    with pytest.raises(LogError, match=r"log: line 2 is not an event"):
        list(read_event_log(tmp_path / "log"))


def test_a_rotation_that_was_interrupted_leaves_a_gap_in_the_names_and_nothing_else(tmp_path: Path) -> None:
    for number, name in enumerate(["log.4", "log.2", "log.1"]):
        (tmp_path / name).write_text(f'{{"t":{number}.0,"event":"arrival","request":{number}}}\n')
    (tmp_path / "log.old").write_text("not ours\n")
    assert numbers(tmp_path / "log") == [0, 1, 2]
    log = writer(tmp_path / "log")
    write_all(log, 3, 1)
    log.close()
    assert numbers(tmp_path / "log") == [0, 1, 2, 3]


def test_reading_during_rotation_sees_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = writer(path, rotate_bytes=4096, rotate_keep=200, flush_s=0.01)
    for first in range(0, 6000, 300):
        write_all(log, first, 300)
        seen = numbers(path)
        assert seen == list(range(len(seen)))
    log.close()
    assert numbers(path) == list(range(6000))


@given(st.lists(st.integers(0, 12), max_size=40))
def test_a_rotation_at_any_moment_of_opening_leaves_no_hole(steps: list[int]) -> None:
    """``steps``: how many renames and new files happen before the reader's first look at the folder, its second ..."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "log"
        written = 0

        def begin() -> None:
            nonlocal written
            with open(path, "w") as file:  # Path.open is the reader's.
                file.write(f'{{"t":0.0,"event":"arrival","request":{written}}}\n')
            written += 1

        def rotations() -> Iterator[None]:
            while True:
                for number in reversed(range(written)):
                    log_file(path, number).rename(log_file(path, number + 1))
                    yield
                begin()
                yield

        begin()
        writing, left = rotations(), list(steps)

        def meanwhile(look: Any) -> Any:
            def looked(*args: Any, **options: Any) -> Any:
                for _ in range(left.pop(0) if left else 0):
                    next(writing)
                return look(*args, **options)

            return looked

        for name in ("open", "exists", "glob"):
            patch.setattr(Path, name, meanwhile(getattr(Path, name)))
        before = written
        seen = numbers(path)
        patch.undo()
        assert seen == list(range(len(seen)))
        assert len(seen) >= before


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rotate_bytes": 10}, "rotate_bytes is 10; it must be at least 4096"),
        ({"rotate_keep": -1}, "rotate_keep is -1"),
        ({"flush_s": 0.0}, "flush_s is 0.0"),
        ({"queue_max": 0}, "queue_max is 0"),
    ],
)
def test_settings_are_checked(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        EventLogSettings(path=tmp_path / "log", **changes)


def test_a_log_that_cannot_be_opened_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        writer(tmp_path / "nowhere" / "log")
