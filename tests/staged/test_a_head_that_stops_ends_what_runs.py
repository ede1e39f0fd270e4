"""SIGTERM: what runs is answered to its end, within a bound, and nothing new is taken."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from reference import recorded
from staged_models import need_torch, prompts, tiny

need_torch()

from chiron.engines.staged import head  # noqa: E402
from chiron.engines.staged.service import Pace  # noqa: E402
from chiron.engines.staged.split import read_range  # noqa: E402
from chiron.engines.staged.tokenizer import ModelTokenizer  # noqa: E402
from chiron.engines.staged.weights import read_model_files  # noqa: E402
from staged_processes import StageProcess, pid_at  # noqa: E402
from staged_site import LocalReplica, request, start_replica, until  # noqa: E402

PROMPT = prompts(3, seed=0)[0]
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": PROMPT,
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
}


@asynccontextmanager
async def running_head(
    capsys: pytest.CaptureFixture[str], grace_s: float
) -> AsyncIterator[tuple[int, LocalReplica, asyncio.Task[None]]]:
    """Its port, its only stage, and its task."""
    files = read_model_files(tiny())
    stage = await start_replica(files, read_range("0-3"), pace=Pace(fixed_s=0.01))
    arguments = ["--model", str(tiny()), "--stage", f"0-3={stage.address}", "--grace", str(grace_s)]
    options = head.parse_options([*arguments, "--served-model-name", "tiny", "--dtype", "float32"])
    task = asyncio.create_task(head.run(options, files, ModelTokenizer(tiny())))
    said = ""

    def ready() -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return "ready port=" in said

    await until(ready)
    found = re.search(r"port=(\d+)", said)
    assert found is not None
    try:
        await until(lambda: bool(stage.service.heads))
        yield int(found[1]), stage, task
    finally:
        await task
        await stage.die()


async def stopping(port: int) -> None:
    """It has heard the signal."""
    async with asyncio.timeout(60.0):
        while (await request(port, "/health", None, "GET"))[0] == 200:
            await asyncio.sleep(0.01)


def test_what_runs_is_answered_and_nothing_new_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with running_head(capsys, 60.0) as (port, stage, _):
            asking = asyncio.ensure_future(request(port, "/v1/completions", BODY))
            await until(lambda: stage.service.totals.steps > 1)
            release = threading.Event()
            stage.service._thread.submit(release.wait)
            os.kill(os.getpid(), signal.SIGTERM)
            await stopping(port)
            status, said = await request(port, "/v1/completions", BODY)
            assert (status, json.loads(said)["error"]["code"]) == (503, "stopping")
            assert not asking.done()
            release.set()
            status, said = await asking
            assert status == 200
            assert json.loads(said)["choices"][0]["token_ids"] == recorded("llama")[0]

    asyncio.run(main())


@pytest.mark.parametrize("second", [False, True])
def test_no_longer_than_it_may_nor_after_a_second_signal(capsys: pytest.CaptureFixture[str], second: bool) -> None:
    async def main() -> None:
        async with running_head(capsys, 600.0 if second else 0.1) as (port, stage, task):
            endless = asyncio.ensure_future(request(port, "/v1/completions", {**BODY, "max_tokens": 1900}))
            await until(lambda: stage.service.totals.steps > 1)
            stage.hold()
            os.kill(os.getpid(), signal.SIGTERM)
            if second:
                await stopping(port)
                os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(60.0):
                await asyncio.wait([task])
            with pytest.raises((IndexError, ConnectionError)):
                await endless

    asyncio.run(main())


@pytest.mark.slow
def test_a_whole_instance_answers_what_runs_after_a_signal_to_all_its_processes() -> None:
    """Ctrl-C in a terminal, and what a supervisor or systemd sends to each."""

    async def main(port: int, process: int) -> None:
        asking = asyncio.ensure_future(request(port, "/v1/completions", BODY))
        address = ""
        async with asyncio.timeout(60.0):
            while not address:
                said = json.loads((await request(port, "/chiron/stages", None, "GET"))[1])["stages"][1]
                address = said["replicas"][0]["address"] if said["passes"] > 1 else ""
        stage = pid_at(address)
        assert os.getpgid(stage) != process, "ctrl-\\ would end it"
        assert ignored(stage) >= {signal.SIGTERM, signal.SIGINT}, "it would be gone after a while"
        os.kill(stage, signal.SIGTERM)
        heard = False
        try:
            os.kill(stage, signal.SIGSTOP)  # Or all might be answered before the signal comes.
            os.killpg(process, signal.SIGINT)
            await stopping(port)
            heard = True
        finally:
            # Nobody else ends a process that is stopped, in a group of its own.
            os.kill(stage, signal.SIGCONT if heard else signal.SIGKILL)
        status, said = await asking
        assert status == 200
        assert json.loads(said)["choices"][0]["token_ids"] == recorded("llama")[0]

    specs = [{"layers": "0-1"}, {"layers": "2-3", "pace_ms": 20}]
    arguments = ["run", str(tiny()), "--stages", json.dumps(specs), "--served-model-name", "tiny", "--silent", "60"]
    with StageProcess(arguments) as running:
        asyncio.run(main(running.port, running.process.pid))
        assert running.process.wait(60.0) == 0


def ignored(pid: int) -> set[int]:
    """Signals that a process ignores."""
    (mask,) = re.findall(r"^SigIgn:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return {bit + 1 for bit in range(64) if int(mask, 16) >> bit & 1}
