"""Connections in memory: in order, both ways, held up by who does not read, refused where nobody listens."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import pytest

from chiron.net.client import ConnectError, Origin
from chiron.net.memory import MemoryNetwork, MemoryTransport
from chiron.net.server import HttpServer, Incoming, ServerLimits


class Wire:
    """Carries one message at a time, when it is told to."""

    def __init__(self) -> None:
        self.messages: deque[Callable[[], None]] = deque()

    def carry(self, message: Callable[[], None]) -> None:
        self.messages.append(message)

    def run(self) -> None:
        while self.messages:
            self.messages.popleft()()


class End(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: MemoryTransport
        self.heard: list[bytes | str] = []
        self.keeps_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, MemoryTransport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard.append(data)

    def eof_received(self) -> bool:
        self.heard.append("end")
        return self.keeps_open

    def pause_writing(self) -> None:
        self.heard.append("pause")

    def resume_writing(self) -> None:
        self.heard.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.heard.append("lost" if exc is None else "reset")


def joined() -> tuple[Wire, End, End]:
    wire, client, server = Wire(), End(), End()
    network = MemoryNetwork(wire.carry)
    network.listen("here", lambda: server)
    network.connect("here", lambda: client)
    wire.run()
    return wire, client, server


def test_bytes_arrive_in_order_and_when_the_wire_says() -> None:
    async def run() -> None:
        wire, client, server = joined()
        client.transport.write(b"one")
        client.transport.write(b"two")
        server.transport.write(b"three")
        assert client.heard == server.heard == []
        wire.run()
        assert (server.heard, client.heard) == ([b"one", b"two"], [b"three"])

    asyncio.run(run())


def test_what_was_written_before_a_close_arrives_and_then_the_end() -> None:
    async def run() -> None:
        wire, client, server = joined()
        server.transport.write(b"bye")
        server.transport.close()
        server.transport.write(b"too late")
        wire.run()
        await asyncio.sleep(0)
        assert client.heard == [b"bye", "end", "lost"]
        assert server.heard == ["lost"]

    asyncio.run(run())


def test_an_abort_resets_the_other_end() -> None:
    async def run() -> None:
        wire, client, server = joined()
        client.transport.write(b"half")
        client.transport.abort()
        wire.run()
        await asyncio.sleep(0)
        assert server.heard == [b"half", "reset"]
        assert client.heard == ["lost"]

    asyncio.run(run())


def test_who_does_not_read_holds_the_writer_up() -> None:
    async def run() -> None:
        wire, client, server = joined()
        client.transport.set_write_buffer_limits(high=10)
        server.transport.pause_reading()
        client.transport.write(b"x" * 8)
        wire.run()
        assert client.transport.get_write_buffer_size() == 8
        client.transport.write(b"y" * 8)
        wire.run()
        assert (client.heard, server.heard) == (["pause"], [])
        server.transport.resume_reading()
        await asyncio.sleep(0)
        assert (client.heard, server.heard) == (["pause", "resume"], [b"x" * 8, b"y" * 8])

    asyncio.run(run())


def test_http_over_it() -> None:
    async def run() -> None:
        network = MemoryNetwork(asyncio.get_running_loop().call_soon)

        def handle(incoming: Incoming) -> None:
            incoming.respond(200, incoming.body * 2)

        server = HttpServer(handle, ServerLimits(), None, None)
        network.listen("echo", server.accept)
        origin, nobody = Origin("memory:echo", network=network), Origin("memory:nobody", network=network)
        body = b"z" * 1_000_000
        for _ in range(3):
            assert (await origin.fetch("POST", "/", body=body)).body == body * 2
        assert len(server.connections) == 1, "it is kept"
        with pytest.raises(ConnectError, match="nobody listens on memory:nobody"):
            await nobody.fetch("GET", "/")
        await origin.close()
        await server.close(0)

    asyncio.run(run())
