"""A gateway that starts again knows what it had learned, and one whose file is damaged starts without it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from chiron.config.serve import load_serve
from chiron.gateway.brain.learned import NAME
from chiron.gateway.processes.start import BrainStart, RelayStart
from chiron.gateway.service import Service
from scripted_engine import CHAT, Reader, ScriptedEngine, before, body, whole


def seen(service: Service) -> int:
    return sum(mix.finished for mix in service.plane.models["m"].learner.mixes.values())


async def serve_and_ask(directory: Path, times: int) -> tuple[int, int, Path]:
    """What it knew before and after so many requests, and its file."""
    async with before(directory, ScriptedEngine(whole)) as (service, origin):
        at_first = seen(service)
        for _ in range(times):
            await Reader(origin, body(), CHAT).end()
        return at_first, seen(service), service.config.data / f"learned.{NAME}"


def test_lengths_are_known_after_a_restart(tmp_path: Path) -> None:
    first, then, path = asyncio.run(serve_and_ask(tmp_path, 3))
    assert (first, then) == (0, 3)
    assert path.stat().st_mode & 0o777 == 0o600

    assert asyncio.run(serve_and_ask(tmp_path, 0))[:2] == (3, 3)


def test_one_that_is_stopped_while_its_relays_start_forgets_nothing(tmp_path: Path) -> None:
    async def stopped_early() -> None:
        opened = asyncio.Event()
        start = RelayStart(port=1, folder=tmp_path, relays=1)
        config = load_serve(tmp_path / "chiron.toml", [], None)
        service = Service(config, brain=BrainStart(relays=start, opened=opened.set))
        starting = asyncio.create_task(service.start())
        async with asyncio.timeout(60):
            await opened.wait()
        starting.cancel()
        await asyncio.wait([starting])
        await service.stop(0.0)

    asyncio.run(serve_and_ask(tmp_path, 3))
    asyncio.run(stopped_early())
    assert asyncio.run(serve_and_ask(tmp_path, 0))[:2] == (3, 3)


def test_a_damaged_file_is_said_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = asyncio.run(serve_and_ask(tmp_path, 1))[2]
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)

    with caplog.at_level(logging.WARNING, "chiron.learned"):
        assert asyncio.run(serve_and_ask(tmp_path, 0))[:2] == (0, 0)

    assert f"what was learned before is not used: {path}: " in caplog.text
