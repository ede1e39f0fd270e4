"""A TCP proxy that passes everything on a while later, as a network over some distance does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def delaying_proxy(port: int, delay_s: float) -> Iterator[int]:
    """In front of a port on loopback that may be listened on later; each way takes ``delay_s``. Yields its own port."""
    loop, ready, ports = asyncio.new_event_loop(), threading.Event(), list[int]()

    async def serve() -> None:
        server = await asyncio.start_server(pass_on, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_later(reader, far_writer, delay_s), _later(far_reader, writer, delay_s))

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.create_task(serve())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60.0), "it listens"
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def _later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    data = b"-"
    while data:
        data = b""
        with suppress(OSError):
            data = await reader.read(1 << 16)
        loop.call_later(delay_s, writer.write if data else lambda _: writer.close(), data)
