"""``chiron replay`` on the input log of a gateway that served, restarted and served again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from typer.testing import CliRunner

from chiron.cli import app
from scripted_engine import CHAT, Reader, ScriptedEngine, before, body, whole

LOG = ["telemetry.input_log=inputs.jsonl"]


async def served(directory: Path, requests: int) -> None:
    async with before(directory, ScriptedEngine(whole), changes=LOG) as (_, origin):
        for _ in range(requests):
            await Reader(origin, body(), CHAT).end()


def call(file: Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["replay", str(file)])
    return done.exit_code, done.output


def test_what_a_gateway_did_is_done_again(tmp_path: Path) -> None:
    file = tmp_path / "inputs.jsonl"
    for requests in (2, 3):  # The second run begins with what the first one has learned.
        asyncio.run(served(tmp_path, requests))
        status, said = call(file)
        assert (status, f"{requests} placements" in said) == (0, True), said
        assert "All of them are those of the log, to the last bit." in said
    assert any(json.loads(line).get("k") == "restore" for line in file.read_text().splitlines())


def test_a_difference_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "inputs.jsonl"
    asyncio.run(served(tmp_path, 2))
    lines = file.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"dispatch"' in line)
    file.write_bytes(b"".join(lines[:at] + lines[at + 1 :]))

    status, said = call(file)

    assert status == 1
    assert "Then they differ: the log has " in said


def test_an_event_log_is_no_input_log(tmp_path: Path) -> None:
    asyncio.run(served(tmp_path, 1))

    status, said = call(tmp_path / "chiron-data" / "events.jsonl")

    assert status == 2
    assert "this is no input log" in said
