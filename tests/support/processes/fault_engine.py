"""The emulated engine with a diary, and with the faults that its prompts ask for: for tests of what survives what.

A line per event goes to ``DIRECTORY/engine-PID.log`` as it happens, also if kill -9 comes next: ``start ID RESUMED``,
``finish ID``, ``leave ID``; ID is the gateway's ``x-request-id`` but for the try.

Marks in a prompt: ``<die>`` ends the process, ``<500>`` is answered with that status, ``<hang-up>`` breaks the
connection, ``<hang>`` is never answered, ``<hold>`` is begun once ``DIRECTORY/go`` exists. Every request gets 503 with
``--sick``, and while ``DIRECTORY/sick`` exists.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from chiron.core.types import Request
from chiron.engines.model import StepTable
from chiron.engines.profile_store import load_profile
from chiron.engines.serve.emulated_engine import EmulatedEngine, EmulatedSettings, at_speed
from chiron.engines.serve.http import EngineServer, serve_until_stopped
from chiron.engines.serve.openai import GenerationRequest
from chiron.engines.serve.request_error import RequestError
from chiron.net.clock import LiveClock
from chiron.net.loop import run_on_loop
from chiron.net.server import Incoming

HOLD_PERIOD_S = 0.05


class FaultyEngine(EmulatedEngine):
    """Writes down what it does."""

    def __init__(self, directory: Path, *, sick: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._diary = os.open(directory / f"engine-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._sick = sick
        self._sick_file = directory / "sick"
        self._go_file = directory / "go"
        self._ids: dict[int, str] = {}

    def submit(self, request: GenerationRequest, incoming: Incoming) -> None:
        id = (incoming.header(b"x-request-id") or b"-").decode().partition(".")[0]
        if self._sick or self._sick_file.exists():
            self._write(f"refuse {id}")
            raise RequestError("This engine is sick.", status=503, type="server_error")
        self._write(f"start {id} {len(request.resume_token_ids)}")
        body = incoming.body
        if b"<die>" in body:
            os._exit(7)
        if b"<500>" in body:
            raise RequestError("A fault was asked for.", status=500, type="server_error")
        if b"<hang-up>" in body:
            incoming.abort()
            return
        if b"<hang>" in body:
            return
        if b"<hold>" in body:
            self._hold(id, request, incoming)
        else:
            self._run(id, request, incoming)

    def _hold(self, id: str, request: GenerationRequest, incoming: Incoming) -> None:
        if incoming.closed:
            return
        if self._go_file.exists():
            self._run(id, request, incoming)
        else:
            asyncio.get_running_loop().call_later(HOLD_PERIOD_S, self._hold, id, request, incoming)

    def _run(self, id: str, request: GenerationRequest, incoming: Incoming) -> None:
        self._ids[self._next_id + 1] = id
        super().submit(request, incoming)

    def finished(self, request: Request) -> None:
        self._write(f"finish {self._ids.pop(request.id, '-')}")
        super().finished(request)

    def evicted(self, request: Request) -> None:
        self._write(f"leave {self._ids.pop(request.id, '-')}")
        super().evicted(request)

    def _write(self, line: str) -> None:
        os.write(self._diary, line.encode() + b"\n")


async def run(options: argparse.Namespace) -> None:
    clock = LiveClock(asyncio.get_running_loop())
    profile = at_speed(load_profile("llama-3.1-8b/a100/tp1"), options.speedup)
    profile = replace(profile, max_num_seqs=options.max_num_seqs)
    engine = FaultyEngine(
        options.directory,
        sick=options.sick,
        clock=clock,
        number=0,
        name="m",
        profile=profile,
        times=StepTable(profile),
        settings=EmulatedSettings(),
        speedup=options.speedup,
    )
    await serve_until_stopped(
        EngineServer(engine, ["m"], {}), host="127.0.0.1", port=options.port, failed=asyncio.Event()
    )
    clock.stop()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True, help="of the diary")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--speedup", type=float, default=1.0)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--sick", action="store_true")
    run_on_loop(run(parser.parse_args()))


if __name__ == "__main__":
    main()
