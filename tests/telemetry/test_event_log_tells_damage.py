"""Bits of an event log that the disk has flipped: no event is other than it was written, and each damaged line is
named. The same for results that were saved."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from chiron.cli import app
from chiron.core.types import Decision
from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter
from chiron.telemetry.errors import LogError, StoreError
from chiron.telemetry.event_log import decision_line, read_event_log
from chiron.telemetry.store import load_result, save_result
from result_factory import hour


def grown(after: float, numbers: dict[str, float]) -> Decision:
    return Decision(kind="fleet", subject="m", before=1.0, after=after, reason="queue", numbers=numbers)


def written(path: Path) -> list[dict[str, Any]]:
    log = EventWriter(EventLogSettings(path=path, rotate_bytes=4096), wall_origin_s=0.0, facts={"policy": "chiron"})
    for number in range(300):
        log.write({"t": float(number), "event": "arrival", "request": number, "model": "m", "text": "x" * 40})
        decision = grown(2.0, {"waiting": float(number)})
        log.write(decision_line(number + 0.5, decision))
    log.close()
    return list(read_event_log(path))


def flip(random: Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 16)):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("seeds", [range(30), pytest.param(range(30, 300), marks=pytest.mark.slow)])
def test_no_event_is_other_than_it_was_written(seeds: range, tmp_path: Path) -> None:
    texts = [json.dumps(event) for event in written(tmp_path / "log")]
    files = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    assert len(files) > 1
    for seed in seeds:
        random = Random(f"log:{seed}")
        path = random.choice(list(files))
        flip(random, path)
        damage: list[str] = []
        found = [json.dumps(event) for event in read_event_log(tmp_path / "log", damaged=damage.append)]
        places = iter(texts)
        assert all(text in places for text in found), f"{seed}: an event that nobody wrote, or out of order"
        assert damage, seed
        assert all(str(path) in words for words in damage)
        # A flipped line break takes the line behind it along.
        assert len(texts) - len(found) <= 32
        with pytest.raises(LogError, match=r"line \d+ is damaged"):
            list(read_event_log(tmp_path / "log"))
        path.write_bytes(files[path])


def test_explain_goes_on_and_names_what_it_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = EventWriter(EventLogSettings(path=path), wall_origin_s=0.0)
    for number in range(3):
        log.write(decision_line(float(number), grown(2.0 + number, {})))
        log.write({"t": float(number), "event": "arrival", "request": number, "model": "m"})
    log.close()
    path.write_bytes(path.read_bytes().replace(b'"after":3.0', b'"after":7.0'))
    said = CliRunner().invoke(app, ["explain", str(path)])
    assert said.exit_code == 0
    assert "line 4 is damaged" in said.output
    assert "2 changes" in said.output
    assert "7" not in said.output.replace(str(path), "")


@pytest.mark.parametrize("seeds", [range(30), pytest.param(range(30, 300), marks=pytest.mark.slow)])
def test_a_saved_result_with_flipped_bits_is_refused_or_the_same(seeds: range, tmp_path: Path) -> None:
    path = save_result(hour("chiron"), tmp_path / "run.chiron")
    data = path.read_bytes()
    for seed in seeds:
        random = Random(f"result:{seed}")
        flip(random, path) if seed % 3 else path.write_bytes(data[: random.randrange(len(data))])
        try:
            found = load_result(path)
        except StoreError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            save_result(found, tmp_path / "again.chiron")
            assert (tmp_path / "again.chiron").read_bytes() == data
        path.write_bytes(data)
