"""``chiron explain --events`` is about an event log, and about all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from chiron.cli import app
from chiron.telemetry.store import save_result
from result_factory import small


def test_a_saved_result_is_named_as_one(tmp_path: Path) -> None:
    saved = save_result(small(), tmp_path / "run.chiron")
    told = CliRunner().invoke(app, ["explain", str(saved), "--events"])
    assert told.exit_code == 2
    assert "a saved result, which has no events; name an event log" in " ".join(told.output.split())


@pytest.mark.parametrize("other", ["--at=12:41", "--model=a"])
def test_what_would_be_passed_over_is_refused(other: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"t":0.0,"event":"log"}\n')
    told = CliRunner().invoke(app, ["explain", str(tmp_path / "log"), "--events", other])
    assert told.exit_code == 2
    assert f"--events prints all events; {other.partition('=')[0]} does not go with it" in " ".join(told.output.split())
