"""A TCP proxy that passes everything on a while later, as a network over some distance does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def delaying_proxy(port: int, delay_s: float) -> Iterator[int]:
    """In front of a port on loopback that may be listened on later; each way takes ``delay_s``. Yields its own port."""
    proxy, ready = _Proxy(port, delay_s), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(proxy.serve(ready)), daemon=True)
    thread.start()
    assert ready.wait(60.0), "it listens"
    try:
        yield proxy.port
    finally:
        proxy.loop.call_soon_threadsafe(proxy.over.set)
        thread.join()


class _Proxy:
    def __init__(self, far_port: int, delay_s: float) -> None:
        self.port = 0
        self.loop: asyncio.AbstractEventLoop
        self.over: asyncio.Event
        self._far_port = far_port
        self._delay_s = delay_s
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self, ready: threading.Event) -> None:
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self.over.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(2 * self._delay_s)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._far_port)
        except OSError:
            writer.close()
            return
        self._writers.add(far_writer)
        await asyncio.gather(self._pass_on(reader, far_writer), self._pass_on(far_reader, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = b"-"
        while data:
            data = b""
            with suppress(OSError):
                data = await reader.read(1 << 16)
            self.loop.call_later(self._delay_s, writer.write if data else lambda _: writer.close(), data)
