"""A gateway that ends well leaves its run's result in the data directory; one that could not start leaves none."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

pytest.importorskip("httptools")

from chiron.config.serve import parse_serve
from chiron.gateway.service import RESULT, run
from chiron.net.client import Origin
from chiron.store.directory import lock
from chiron.store.port import StoreLocked
from chiron.telemetry.store import load_result

CONFIG = """
[models.m]
engine = "emulated"
profile = "llama-3.1-8b/a100/tp1"
args = ["--speedup", "50"]
env = { TOKEN = "secret-of-an-engine" }
max_instances = 1

[server]
port = 0
grace = "5s"
"""
BODY = b'{"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}'


async def serve_one(directory: Path) -> None:
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run(parse_serve(CONFIG, directory=directory), on_ready=url.set_result))
    try:
        done, _ = await asyncio.wait((task, url), timeout=60, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            await task
        origin = Origin(await url)
        answer = await origin.fetch("POST", "/v1/chat/completions", body=BODY, timeout_s=60)
        assert answer.status == 200
        await origin.close()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.slow
def test_the_result_is_that_of_the_run_and_holds_no_config(tmp_path: Path) -> None:
    asyncio.run(serve_one(tmp_path))
    saved = tmp_path / "chiron-data" / RESULT
    result = load_result(saved)
    assert result.policy == "chiron"
    assert (result.summary["requests"], result.summary["finished"]) == (1, 1)
    assert result.requests.output_tokens.tolist() == [5]
    assert result.summary["gpu_hours"] > 0
    assert b"secret-of-an-engine" not in saved.read_bytes()
    assert result.scenario_text == ""


def test_a_gateway_that_cannot_start_leaves_the_last_result_alone(tmp_path: Path) -> None:
    held = lock(tmp_path / "chiron-data")
    (tmp_path / "chiron-data" / RESULT).write_bytes(b"of the last run")
    try:
        with pytest.raises(StoreLocked):
            asyncio.run(serve_one(tmp_path))
    finally:
        os.close(held)
    assert (tmp_path / "chiron-data" / RESULT).read_bytes() == b"of the last run"
