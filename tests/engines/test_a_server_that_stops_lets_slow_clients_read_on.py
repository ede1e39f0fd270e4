"""What a client has not read yet when the engine has drained, it may read for as long as the grace lasts."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from chiron.engines.serve import http
from chiron.net.server import Incoming

BODY = b"x" * (16 << 20)
"""More than all buffers between two sockets hold."""


class Front:
    def handle(self, incoming: Incoming) -> None:
        incoming.respond(200, BODY)


@asynccontextmanager
async def stopped_while_a_client_reads(
    capsys: pytest.CaptureFixture[str], grace_s: float
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.Task[None]]]:
    """Its connection, which has read the head of an answer, and the server's task, which has drained."""
    drained = asyncio.Event()

    async def drain() -> None:
        drained.set()

    task = asyncio.create_task(
        http.serve_until_stopped(
            Front(), host="127.0.0.1", port=0, failed=asyncio.Event(), drain=drain, grace_s=grace_s
        )
    )
    said = ""
    async with asyncio.timeout(60.0):
        while not (ready := re.search(r"ready port=(\d+)", said)):
            await asyncio.sleep(0.01)
            said += capsys.readouterr().out
        reader, writer = await asyncio.open_connection("127.0.0.1", int(ready[1]))
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        os.kill(os.getpid(), signal.SIGTERM)
        await drained.wait()
        for _ in range(10):  # The server has gone on from there.
            await asyncio.sleep(0)
        yield reader, task
        await task
    writer.close()


def test_it_reads_to_the_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(http, "_STOP_GRACE_S", 0.0)

    async def main() -> None:
        async with stopped_while_a_client_reads(capsys, 600.0) as (reader, task):
            assert not task.done()
            assert len(await reader.readexactly(len(BODY))) == len(BODY)

    asyncio.run(main())


@pytest.mark.parametrize("second", [False, True])
def test_no_longer_than_the_grace_nor_after_a_second_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], second: bool
) -> None:
    monkeypatch.setattr(http, "_STOP_GRACE_S", 0.0)

    async def main() -> None:
        async with stopped_while_a_client_reads(capsys, 600.0 if second else 0.1) as (reader, task):
            if second:
                os.kill(os.getpid(), signal.SIGTERM)
            await task
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await reader.readexactly(len(BODY))

    asyncio.run(main())
