"""``chiron explain --at`` takes the date and time of an on-call report, where the log says when the run began."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chiron.cli import app
from chiron.cli.explain import parse_moment
from chiron.config.read import ConfigError

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
