"""``tools/fuzz_gateway.py``: a short run against a gateway of its own, and that it finds what is wrong."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chiron.net.server import Incoming, serve
from fuzz_gateway import Report, fuzz
from fuzz_requests import request

TOOLS = Path(__file__).parents[2] / "tools"


def run(directory: Path, requests: int, seed: int) -> None:
    command = [sys.executable, str(TOOLS / "fuzz_gateway.py"), "--out", str(directory), "--workers", "16"]
    done = subprocess.run(
        [*command, "--requests", str(requests), "--seed", str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{requests} sent" in done.stdout
    assert not list(directory.iterdir())


@pytest.mark.slow
def test_mutated_requests_get_answers_that_are_in_order(tmp_path: Path) -> None:
    run(tmp_path, 250, seed=7)


@pytest.mark.slow
def test_many_mutated_requests_get_answers_that_are_in_order(tmp_path: Path) -> None:
    run(tmp_path, 12_000, seed=8)


def test_a_seed_and_a_number_name_a_request() -> None:
    made = [request(3, number, keys=("a", "b")) for number in range(300)]
    again = [request(3, number, keys=("a", "b")) for number in reversed(range(300))]
    assert made == again[::-1]
    assert len({wire.data for wire in made}) > 280
    assert len({wire.what for wire in made}) > 40


def error(**changes: Any) -> bytes:
    return json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": None} | changes}).encode()


RETRY = ((b"retry-after", b"1"),)
EVENTS = b"text/event-stream"


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (lambda incoming: incoming.respond(200, b"{}"), ""),
        (lambda incoming: incoming.respond(400, error()), ""),
        (lambda incoming: incoming.respond(503, error(), headers=RETRY), ""),
        (lambda incoming: incoming.respond(200, b'data: {"a": 1}\n\ndata: [DONE]\n\n', EVENTS), ""),
        (lambda incoming: incoming.respond(500, error()), "500"),
        (lambda incoming: incoming.respond(502, error()), "502"),
        (lambda incoming: incoming.respond(501, error()), "501"),
        (lambda incoming: incoming.respond(503, error()), "without Retry-After"),
        (lambda incoming: incoming.respond(400, error(message="")), "no error object"),
        (lambda incoming: incoming.respond(400, b"{}"), "no error object"),
        (lambda incoming: incoming.respond(400, b"<html>", b"text/html"), "without JSON"),
        (lambda incoming: incoming.respond(200, b"{"), "not JSON"),
        (lambda incoming: incoming.respond(200, b"data: {\n\n", EVENTS), "not JSON"),
        (lambda incoming: incoming.respond(200, b'data: {"a": 1}\n\n', EVENTS), "does not end"),
        (lambda incoming: incoming.respond(999, b"{}"), "status 999"),
        (lambda incoming: incoming.abort(), "no whole answer"),
        (lambda incoming: (incoming.start(200, (), 10), incoming.write(b"{}"), incoming.abort()), "no whole answer"),
    ],
)
def test_what_is_wrong_is_found(tmp_path: Path, answer: Callable[[Incoming], Any], wrong: str) -> None:
    async def main() -> Report:
        server, report = await serve(answer), Report()
        url = f"http://127.0.0.1:{server.port}"
        given: Any = {"workers": 4, "report": report, "out": tmp_path, "hear": lambda so_far: None}
        await fuzz(url, seed=1, first=0, count=40, **given)
        await server.close(0.0)
        return report

    report = asyncio.run(main())
    assert report.sent == 40
    assert bool(report.failures) == bool(wrong), report.failures
    assert all(wrong in failure for failure in report.failures if "HEAD" not in failure), report.failures
    assert bool(list(tmp_path.iterdir())) == bool(wrong)
