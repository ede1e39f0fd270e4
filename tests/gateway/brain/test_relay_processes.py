"""`chiron serve --workers N`: relays as real processes, killed in every way there is."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from chiron.net.client import NetError, Origin
from ports import free_port
from scripted_engine import SSE, Reader, ScriptedEngine, body, chunk

pytestmark = pytest.mark.slow
DONE = b"data: [DONE]\n\n"
WAIT_S = 60.0


async def until(condition: Callable[[], Any], what: str) -> Any:
    end_s = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < end_s, f"not within {WAIT_S:g} s: {what}"
        await asyncio.sleep(0.05)
    return found


class Running:
    """A gateway of several processes."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url
        self.readers: list[tuple[Origin, Reader]] = []

    async def get(self, path: str) -> Any:
        """Asked again where the connection was one of a relay that was just killed."""
        end_s = time.monotonic() + WAIT_S
        while True:
            origin = Origin(self.url, keepalive=False, connect_timeout_s=60.0)
            try:
                return json.loads((await origin.fetch("GET", path, timeout_s=WAIT_S)).body)
            except NetError:
                assert time.monotonic() < end_s
                await asyncio.sleep(0.05)
            finally:
                await origin.close()

    async def relays(self) -> list[int]:
        return [relay["pid"] for relay in (await self.get("/chiron/status"))["relays"]]

    async def brain(self, but: psutil.Process | None = None) -> psutil.Process:
        """The one that is at work, once it is another: it writes the event log."""

        def found() -> psutil.Process | None:
            return next((each for each in self.family() if each != but and _is_brain(each)), None)

        process: psutil.Process = await until(found, "a brain is at work")
        return process

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stream(self) -> Reader:
        """On a connection of its own, so that any relay may have it."""
        origin = Origin(self.url, connect_timeout_s=60.0)
        reader = Reader(origin, body(stream=True))
        self.readers.append((origin, reader))
        return reader


def _is_brain(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any(file.path.endswith("events.jsonl") for file in process.open_files())
    return False


@asynccontextmanager
async def gateway(directory: Path, engine: ScriptedEngine, workers: int = 2) -> AsyncIterator[Running]:
    from chiron.net.server import serve

    engine.server = await serve(engine.handle)
    port = free_port()
    (directory / "chiron.toml").write_text(
        f'[server]\nport = {port}\n[models.m]\nengine = "openai"\nendpoints = ["{engine.url}"]\nmax_num_seqs = 64\n'
    )
    temporary = directory / "tmp"
    temporary.mkdir()
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "chiron", "serve", "chiron.toml", "--workers", str(workers)],
            cwd=directory,
            env=os.environ | {"TMPDIR": str(temporary)},
            stderr=log,
        )
    running = Running(process, f"http://127.0.0.1:{port}")
    family: list[psutil.Process] = []
    try:
        while not (await running.get("/chiron/status"))["models"][0]["ready"]:
            assert process.poll() is None, (directory / "log").read_text()
            await asyncio.sleep(0.05)
        family = running.family()
        yield running
    finally:
        for origin, _ in running.readers:
            await origin.close()
        if process.poll() is None:
            process.kill()
        process.wait(WAIT_S)
        _, alive = psutil.wait_procs(family, WAIT_S)
        assert not alive, "no process outlives the gateway"
        assert list(temporary.iterdir()) == [], "and no socket"
        await engine.close()


def test_a_killed_relay_is_replaced_and_streams_of_the_others_are_whole(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with gateway(tmp_path, engine) as running:
            before = await running.relays()
            assert len(before) == 2
            for _ in range(12):
                running.stream()
            await until(lambda: len(engine.seen) == 12, "they run")
            for incoming in engine.seen:
                incoming.start(200, SSE)
                incoming.write(chunk("one"))
            readers = [reader for _, reader in running.readers]
            await until(lambda: all(reader.data for reader in readers), "each has a token")
            os.kill(before[0], signal.SIGKILL)
            end_s = time.monotonic() + WAIT_S
            while len(after := await running.relays()) != 2 or before[0] in after:
                assert time.monotonic() < end_s
                await asyncio.sleep(0.05)
            assert before[1] in after
            for incoming in engine.seen:
                if not incoming.closed:
                    incoming.write(chunk("two") + DONE)
                    incoming.finish()
            await until(lambda: all(reader.over for reader in readers), "all are over")
            whole = [reader for reader in readers if reader.over == "end"]
            assert all(reader.data == chunk("one") + chunk("two") + DONE for reader in whole)
            assert all(reader.data == chunk("one") for reader in readers if reader not in whole)
            await until(lambda: len(engine.left) + len(whole) == 12, "the dead one's requests were stopped")
            end_s = time.monotonic() + WAIT_S
            while (left := (await running.get("/chiron/status"))["open_requests"]) != 0:
                assert time.monotonic() < end_s, f"{left} requests are open"
                await asyncio.sleep(0.05)

    asyncio.run(main())


def test_streams_outlive_a_killed_brain_and_what_comes_meanwhile_is_answered(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with gateway(tmp_path, engine) as running:
            relays = sorted(await running.relays())
            readers = [running.stream() for _ in range(8)]
            await until(lambda: len(engine.seen) == 8, "they run")
            for incoming in engine.seen:
                incoming.start(200, SSE)
                incoming.write(chunk("one"))
            await until(lambda: all(reader.data for reader in readers), "each has a token")
            brain = await running.brain()
            for number in range(2):
                brain.kill()
                readers.append(running.stream())
                brain = await running.brain(but=brain)
                await until(lambda: len(engine.seen) == len(readers), "what came meanwhile runs, once")
                engine.seen[-1].start(200, SSE)
                engine.seen[-1].write(chunk("one"))
                for incoming in engine.seen[number:6:2]:
                    incoming.write(chunk("two") + DONE)
                    incoming.finish()
            for incoming in engine.seen[6:]:
                incoming.write(chunk("two") + DONE)
                incoming.finish()
            await until(lambda: all(reader.over for reader in readers), "all are over")
            assert all(reader.data == chunk("one") + chunk("two") + DONE for reader in readers)
            assert len(engine.seen) == len(readers)
            assert not engine.left
            while (await running.get("/chiron/status"))["open_requests"]:
                await asyncio.sleep(0.05)
            assert sorted(await running.relays()) == relays, "no relay has ended"

    asyncio.run(main())


def test_a_killed_keeper_leaves_no_process(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path, ScriptedEngine()) as running:
            family = running.family()
            assert len(family) == 3, "two relays, and the brain"
            running.process.kill()
            _, alive = psutil.wait_procs(family, WAIT_S)
            assert not alive

    asyncio.run(main())


@pytest.mark.parametrize("whole_group", [False, True], ids=["the keeper", "every process"])
def test_a_stop_lets_streams_of_all_relays_end(tmp_path: Path, whole_group: bool) -> None:
    """A service manager signals every process, and a terminal its whole group."""

    async def main() -> None:
        engine = ScriptedEngine()
        async with gateway(tmp_path, engine) as running:
            readers = [running.stream() for _ in range(8)]
            await until(lambda: len(engine.seen) == 8, "they run")
            for incoming in engine.seen:
                incoming.start(200, SSE)
                incoming.write(chunk("one"))
            await until(lambda: all(reader.data for reader in readers), "each has a token")
            for process in [*(running.family() if whole_group else ()), psutil.Process(running.process.pid)]:
                process.send_signal(signal.SIGTERM)
            await until(lambda: b"stopping" in (tmp_path / "log").read_bytes(), "it stops")
            for incoming in engine.seen:
                incoming.write(chunk("two") + DONE)
                incoming.finish()
            await until(lambda: all(reader.over for reader in readers), "all are over")
            assert all(reader.data == chunk("one") + chunk("two") + DONE for reader in readers)
            await until(lambda: running.process.poll() is not None, "it has stopped")
            assert running.process.returncode == 0

    asyncio.run(main())


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path, ScriptedEngine()) as running:
            port = running.url.rpartition(":")[2]
            (tmp_path / "other.toml").write_text((tmp_path / "chiron.toml").read_text())
            command = [sys.executable, "-m", "chiron", "serve", "other.toml", "--workers", "2", "--data", "other"]
            said = await asyncio.to_thread(subprocess.run, command, cwd=tmp_path, capture_output=True, timeout=WAIT_S)
            assert said.returncode != 0
            assert f"127.0.0.1:{port} is in use".encode() in said.stderr

    asyncio.run(main())
