"""``chiron explain --at`` takes the date and time of an on-call report, where the log says when the run began."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chiron.cli import app
from chiron.cli.explain.command import parse_moment
from chiron.cli.explain.moment import RunClock
from chiron.config.read import ConfigError
from chiron.telemetry.errors import StoreError
from chiron.telemetry.store import load_result, save_result
from result_factory import small

BEGAN = datetime(2026, 11, 20, 17, 54, 52, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-11-20T17:55:02Z", 10.0),
        ("2026-11-20 17:55:02", 10.0),
        ("2026-11-20T18:55:02+01:00", 10.0),
        ("0:10", 10.0),
    ],
)
def test_dates_and_times_count_from_the_beginning(text: str, seconds: float) -> None:
    assert parse_moment(text, BEGAN) == seconds


@pytest.mark.parametrize(
    ("text", "began", "why"),
    [
        ("2026-11-20T17:50Z", BEGAN, "began at 2026-11-20T17:54:52Z"),
        ("2026-11-20T25:00Z", BEGAN, "such as 2026-11-20T17:54:52Z"),
        ("2026-11-20T17:55Z", None, "since its start"),
    ],
)
def test_what_cannot_be_told_says_why(text: str, began: datetime | None, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_moment(text, began)


def test_the_log_says_when_it_began(tmp_path: Path) -> None:
    lines = (
        '{"t":0.0,"event":"log","version":1,"at":"2026-11-20T17:54:52Z","run":"2026-11-20T17:54:52Z"}',
        '{"t":1.0,"event":"created","instance":1,"model":"m","role":"mixed"}',
        '{"t":10.0,"event":"decision","kind":"fleet","subject":"m","before":1,"after":2,"reason":"load","numbers":{}}',
    )
    log = tmp_path / "events.jsonl"
    log.write_text("\n".join(lines) + "\n")
    told = CliRunner().invoke(app, ["explain", str(log), "--at", "2026-11-20T17:55:02Z"])
    assert told.exit_code == 0, told.output
    assert "grew from 1 to 2 instances at 0:10" in told.output


DAY_S = 86_400.0


@pytest.mark.parametrize(
    ("text", "ends_s", "at_s", "notes"),
    [
        # A run of half an hour from 17:54:52: the time of day is in it, as long after the start is not.
        ("18:00", 1800.0, 308.0, ("2026-11-20 18:00:00 UTC",)),
        ("18:00:30", 1800.0, 338.0, ("2026-11-20 18:00:30 UTC",)),
        ("19:00+01:00", 1800.0, 308.0, ("2026-11-20 18:00:00 UTC",)),
        ("17:54", 1800.0, 0.0, ("2026-11-20 17:54:52 UTC",)),
        # Not in it as a time of day, but as a time since the start; and as neither.
        ("12:41", 1800.0, 761.0, ()),
        ("12:41", 600.0, 761.0, ("12:41 is no time of day of this run, which lasted from 2026-11-20 17:54:52 to",)),
        # Both: the time of day is meant, and the other is told.
        ("18:00", 7200.0, 308.0, ("2026-11-20 18:00:00 UTC", "--at +0:18:00")),
        ("+18:00", 7200.0, 1080.0, ()),
        # On several days: the last one, and it is said which.
        (
            "12:41",
            3.5 * DAY_S,
            3 * DAY_S - 18_832.0,
            ("2026-11-23 12:41:00 UTC", "last of 3", "2026-11-21, 2026-11-22", "--at 2026-11-22T12:41:00Z"),
        ),
    ],
)
def test_a_time_of_day_is_found_in_a_live_run_and_the_day_is_said(
    text: str, ends_s: float, at_s: float, notes: tuple[str, ...]
) -> None:
    read = RunClock(ends_s=ends_s, began=BEGAN).read(text)
    assert read.at_s == at_s
    assert all(note in read.note for note in notes), read.note
    assert bool(read.note) == bool(notes)


@pytest.mark.parametrize(
    ("text", "ends_s", "at_s", "note"),
    [
        ("12:41", 3600.0, 761.0, ""),
        ("12:41", DAY_S, 45_660.0, "12:41 is read as 12 h 41 min of this run, which lasts 24:00:00"),
        ("0:41", DAY_S, 41.0, ""),
        ("0:12:41", DAY_S, 761.0, ""),
        ("41:00", DAY_S, 2460.0, ""),
    ],
)
def test_a_simulated_day_has_hours_and_minutes(text: str, ends_s: float, at_s: float, note: str) -> None:
    read = RunClock(ends_s=ends_s).read(text)
    assert read.at_s == at_s
    assert read.note.startswith(note)
    assert bool(read.note) == bool(note)


@pytest.mark.parametrize("began", [None, BEGAN, BEGAN.replace(microsecond=900_000)])
@pytest.mark.parametrize("ends_s", [50.0, 3599.0, 3600.0, 7 * DAY_S])
def test_what_is_shown_is_read_back(began: datetime | None, ends_s: float) -> None:
    clock = RunClock(ends_s=ends_s, began=began)
    for t_s in (0.0, 10.0, 61.0, 761.0, 3599.0, 5000.0, 90_000.0):
        if t_s <= ends_s:
            assert clock.read(clock.option(t_s)).at_s == t_s


def test_a_time_of_day_with_a_zone_that_is_not_in_the_run_is_refused_with_its_span() -> None:
    with pytest.raises(ConfigError, match="lasted from 2026-11-20 17:54:52 to 2026-11-20 18:04:52"):
        RunClock(ends_s=600.0, began=BEGAN).read("12:41Z")


def test_a_live_result_keeps_when_it_began(tmp_path: Path) -> None:
    live = replace(small(seed=None), began="2026-11-20T17:54:52.250Z")
    saved = save_result(live, tmp_path / "result.chiron")
    assert load_result(saved).began == live.began
    told = CliRunner().invoke(app, ["explain", str(saved), "--at", "17:55:02Z"])
    assert told.exit_code == 0, told.output
    assert "grew from 2 to 3 instances at 0:10 (17:55:02 UTC)" in told.output
    save_result(replace(live, began="noon"), saved)
    with pytest.raises(StoreError, match="began is 'noon'"):
        load_result(saved)
