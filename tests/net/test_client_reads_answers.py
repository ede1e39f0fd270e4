"""The HTTP client before servers that answer in every way they may, and in some they may not."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.net.client import AnswerError, ConnectError, ConnectionLostError, NetError, Origin, TimedOutError
from net_site import Echo, certificate, serving, until

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CLOSE = b"!close"
"""In a script: close the connection."""
RESET = b"!reset"
WAIT = b"!wait"


class Script:
    """A server that answers the requests of each connection from lists of blocks, whatever they ask."""

    def __init__(self, *connections: list[list[bytes]]) -> None:
        self.connections = list(connections)
        self.accepted = 0
        self.requests: list[bytes] = []
        self.lost = 0
        self.port = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            for blocks in self.connections.pop(0) if self.connections else []:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                for block in blocks:
                    if block == CLOSE:
                        return
                    if block == RESET:
                        connection: socket.socket = writer.get_extra_info("socket")
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        writer.transport.abort()
                        return
                    if block == WAIT:
                        await reader.read()
                        return
                    writer.write(block)
                    await writer.drain()
                    await asyncio.sleep(0)
            await reader.read()
        except (ConnectionResetError, asyncio.IncompleteReadError):
            return
        finally:
            self.lost += 1
            writer.close()


@asynccontextmanager
async def scripted(*connections: list[list[bytes]], **options: Any) -> AsyncIterator[tuple[Script, Origin]]:
    script = Script(*connections)
    server = await asyncio.start_server(script.accept, "127.0.0.1", 0)
    script.port = server.sockets[0].getsockname()[1]
    origin = Origin(f"http://127.0.0.1:{script.port}", **options)
    try:
        yield script, origin
    finally:
        await origin.close()
        server.close()
        await until(lambda: script.lost == script.accepted)


class Heard:
    """A receiver that remembers."""

    def __init__(self) -> None:
        self.status = 0
        self.blocks: list[bytes] = []
        self.ends = 0
        self.errors: list[NetError] = []

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status

    def on_data(self, data: bytes) -> None:
        assert not self.over
        self.blocks.append(data)

    def on_end(self) -> None:
        assert not self.over
        self.ends += 1

    def on_error(self, error: NetError) -> None:
        assert not self.over
        self.errors.append(error)

    @property
    def over(self) -> int:
        return self.ends + len(self.errors)

    @property
    def data(self) -> bytes:
        return b"".join(self.blocks)


def with_script(
    use: Callable[[Script, Origin], Awaitable[None]], *connections: list[list[bytes]], **options: Any
) -> None:
    async def main() -> None:
        async with scripted(*connections, **options) as (script, origin):
            await use(script, origin)

    asyncio.run(main())


async def get(origin: Origin, method: str = "GET") -> tuple[int, bytes]:
    answer = await origin.fetch(method, "/x", timeout_s=60.0)
    return answer.status, answer.body


@pytest.mark.parametrize(
    ("blocks", "body"),
    [
        ([OK], b"ok"),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx: y\r\n\r\n"], b"ok"),
        ([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK], b"ok"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"], b""),
        ([b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok"], b"ok"),
        ([b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok"], b"ok"),
    ],
)
def test_an_answer_split_at_every_byte_and_its_connection_used_again(blocks: list[bytes], body: bytes) -> None:
    async def use(script: Script, origin: Origin) -> None:
        assert await get(origin) == (200, body)
        assert await get(origin) == (200, body)
        assert script.accepted == 1

    whole = b"".join(blocks)
    with_script(use, [[whole], [whole[i : i + 1] for i in range(len(whole))]])


def test_headers_of_hints_and_trailers_are_not_the_answers() -> None:
    async def use(script: Script, origin: Origin) -> None:
        answer = await origin.fetch("GET", "/x")
        assert dict(answer.headers) == {"transfer-encoding": "chunked", "a": "b"}

    hints = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    with_script(use, [[hints + b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nA: b\r\n\r\n0\r\nx: y\r\n\r\n"]])


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=20), st.lists(st.integers(0, 1500), max_size=10))
@settings(max_examples=25)
def test_chunks_and_blocks_in_any_sizes(chunks: list[bytes], cuts: list[int]) -> None:
    data = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    data += b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]

    async def use(script: Script, origin: Origin) -> None:
        assert await get(origin) == (200, b"".join(chunks))

    with_script(use, [[data[a:b] for a, b in pairwise(edges) if a < b]])


@pytest.mark.parametrize("head", [b"204 No Content", b"304 Not Modified"])
def test_answers_without_a_body_whatever_their_headers_say(head: bytes) -> None:
    async def use(script: Script, origin: Origin) -> None:
        assert await get(origin) == (int(head[:3]), b"")
        assert await get(origin) == (200, b"ok")
        assert script.accepted == 1

    with_script(use, [[b"HTTP/1.1 " + head + b"\r\nx: y\r\n\r\n"], [OK]])


def test_head_has_no_body_although_its_length_is_told() -> None:
    async def use(script: Script, origin: Origin) -> None:
        assert await get(origin, "HEAD") == (200, b"")
        assert await get(origin) == (200, b"ok")
        assert script.accepted == 1
        assert script.requests[0].startswith(b"HEAD /x HTTP/1.1\r\nhost: 127.0.0.1:")

    with_script(use, [[b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n"], [OK]])


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n"])
def test_without_a_length_the_answer_ends_with_the_connection_but_not_with_a_reset(head: bytes) -> None:
    async def use(script: Script, origin: Origin) -> None:
        assert await get(origin) == (200, b"part")
        with pytest.raises(ConnectionLostError):
            await get(origin)

    with_script(use, [[head, b"part", CLOSE]], [[head, b"part", RESET]])


@pytest.mark.parametrize(
    ("blocks", "error"),
    [
        ([CLOSE], ConnectionLostError),
        ([RESET], ConnectionLostError),
        ([b"HTTP/1.1 200 O", CLOSE], ConnectionLostError),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc", CLOSE], ConnectionLostError),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n", CLOSE], ConnectionLostError),
        ([b"garbage\r\n\r\n"], AnswerError),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nabc"], AnswerError),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"], AnswerError),
        ([b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"], AnswerError),
        ([b"HTTP/1.1 200 OK\r\nx: ", *[b"y" * 65536] * 5], AnswerError),
        ([b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000], AnswerError),
        ([WAIT], TimedOutError),
    ],
)
def test_half_answers_and_nonsense_are_errors(blocks: list[bytes], error: type[NetError]) -> None:
    async def use(script: Script, origin: Origin) -> None:
        with pytest.raises(error, match=str(script.port)):
            await origin.fetch("POST", "/x", timeout_s=0.3 if error is TimedOutError else 60.0)

    with_script(use, [blocks])


@pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", b"junk", b"\r\n\r\njunk"])
def test_what_follows_an_answer_is_not_the_answer_to_the_next_question(extra: bytes) -> None:
    async def use(script: Script, origin: Origin) -> None:
        assert await get(origin) == (200, b"ok")
        assert await get(origin) == (200, b"ok")
        assert script.accepted == 2

    with_script(use, [[OK + extra]], [[OK]])


def test_a_kept_connection_that_has_gone_stale_is_replaced_once() -> None:
    async def use(script: Script, origin: Origin) -> None:
        assert await get(origin) == (200, b"ok")
        assert await get(origin) == (200, b"ok")
        assert (script.accepted, len(script.requests)) == (2, 3)
        with pytest.raises(ConnectionLostError, match="before its answer"):
            await get(origin)
        assert script.accepted == 3

    with_script(use, [[OK], [CLOSE]], [[OK], [CLOSE]], [[CLOSE]])


def test_an_answer_that_breaks_off_is_never_asked_for_again() -> None:
    async def use(script: Script, origin: Origin) -> None:
        assert await get(origin) == (200, b"ok")
        with pytest.raises(ConnectionLostError, match="in the middle"):
            await get(origin)
        assert len(script.requests) == 2

    with_script(use, [[OK], [OK[:-1], CLOSE]], [[OK]])


def test_connections_close_when_told_when_idle_too_long_and_without_keepalive() -> None:
    closes = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"

    async def twice(script: Script, origin: Origin) -> None:
        assert await get(origin) == await get(origin) == (200, b"ok")
        assert script.accepted == 2

    with_script(twice, [[closes]], [[OK]])
    with_script(twice, [[OK]], [[OK]], keepalive=False)
    with_script(twice, [[OK]], [[OK]], idle_s=-1.0)


def test_a_cancelled_call_closes_its_connection_and_hears_nothing() -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n"

    async def use(script: Script, origin: Origin) -> None:
        for _ in range(2):
            heard = Heard()
            call = origin.send(b"GET", b"/x", (), b"", heard)
            await until(lambda heard=heard: heard.data == b"a")
            lost = script.lost
            call.cancel()
            call.cancel()
            await until(lambda lost=lost: script.lost == lost + 1)
            assert heard.over == 0
        early = Heard()
        origin.send(b"GET", b"/x", (), b"", early).cancel()
        assert await get(origin) == (200, b"ok")
        assert (early.status, early.over) == (0, 0)

    with_script(use, [[head, WAIT]], [[head, WAIT]], [[OK]], [[OK]])


def test_a_call_cancelled_by_its_own_receiver() -> None:
    async def use(script: Script, origin: Origin) -> None:
        heard = Heard()

        def stop(data: bytes) -> None:
            heard.blocks.append(data)
            call.cancel()

        heard.on_data = stop  # type: ignore[method-assign]
        call = origin.send(b"GET", b"/x", (), b"", heard)
        await until(lambda: heard.blocks and script.lost)
        assert (heard.data, heard.over) == (b"ok", 0)

    with_script(use, [[OK]])


def test_a_paused_call_reads_no_more_until_it_is_resumed() -> None:
    size = 32 << 20

    async def use(script: Script, origin: Origin) -> None:
        heard = Heard()
        call = origin.send(b"GET", b"/x", (), b"", heard)
        call.pause()
        await until(lambda: script.requests)
        assert not heard.status
        call.resume()
        await until(lambda: heard.blocks)
        call.pause()
        call.pause()
        taken = -1
        while taken != len(heard.blocks):
            taken = len(heard.blocks)
            await asyncio.sleep(0.05)
        assert len(heard.data) < size
        call.resume()
        await until(lambda: heard.ends)
        assert len(heard.data) == size
        assert await get(origin) == (200, b"ok")
        assert script.accepted == 1

    with_script(use, [[b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size, *[b"x" * (1 << 20)] * 32], [OK]])


def test_no_connection_is_a_connect_error() -> None:
    async def main() -> None:
        server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        bad_host = "http://" + "x" * 300
        for url in (f"http://127.0.0.1:{port}", "http://localhost.invalid", bad_host, "unix:/nowhere/at/all"):
            origin = Origin(url, connect_timeout_s=60.0)
            with pytest.raises(ConnectError):
                await origin.fetch("GET", "/")
            await origin.close()

    asyncio.run(main())


def test_closing_tells_calls_under_way_and_refuses_new_ones() -> None:
    async def use(script: Script, origin: Origin) -> None:
        heard = Heard()
        origin.send(b"GET", b"/x", (), b"", heard)
        await until(lambda: script.requests)
        connecting = Heard()
        origin.send(b"GET", b"/x", (), b"", connecting)
        await origin.close()
        assert [type(error) for error in heard.errors] == [ConnectionLostError]
        assert connecting.over == 1
        with pytest.raises(ConnectError, match="closed"):
            await get(origin)

    with_script(use, [[WAIT]])


def test_bodies_larger_than_wanted_and_line_breaks_in_headers_are_refused() -> None:
    async def use(script: Script, origin: Origin) -> None:
        with pytest.raises(AnswerError, match="more than 1 bytes"):
            await origin.fetch("GET", "/x", body_max=1)
        for path, headers in (("/x\r\nevil: 1", {}), ("/x", {"a": "b\r\nevil: 1"}), ("/x", {"a\n": "b"})):
            with pytest.raises(ValueError, match="line break"):
                await origin.fetch("GET", path, headers=headers)
        assert len(script.requests) == 1

    with_script(use, [[OK]])


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:80", "http://", "", "http:///path"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Origin(url)


def test_a_path_in_the_url_comes_before_every_path_and_ports_are_named() -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(echo) as server:
            origin = Origin(f"http://127.0.0.1:{server.port}/base/")
            assert (await origin.fetch("POST", "/x?y", body=b"z")).body == b"POST /base/x?y z"
            assert echo.seen[0].header(b"host") == f"127.0.0.1:{server.port}".encode()
            await origin.close()

    asyncio.run(main())


def test_tls_is_checked_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)

    async def main() -> None:
        async with serving(Echo(), ssl=context) as server:
            for url, verify, fine in (
                ("127.0.0.1", True, True),
                ("127.0.0.1", False, True),
                ("127.0.0.2", True, False),
            ):
                monkeypatch.setenv("SSL_CERT_FILE", str(cert) if verify else "/nowhere")
                origin = Origin(f"https://{url}:{server.port}", verify=verify)
                if fine:
                    assert (await origin.fetch("GET", "/x")).status == 200
                else:
                    with pytest.raises(ConnectError):
                        await origin.fetch("GET", "/x")
                await origin.close()
            monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
            for cacert in (cert, None):
                origin = Origin(f"https://127.0.0.1:{server.port}", cacert=cacert)
                if cacert:
                    assert (await origin.fetch("GET", "/x")).status == 200
                else:
                    with pytest.raises(
                        ConnectError, match=r"the certificate is not trusted \(self-signed certificate\)$"
                    ):
                        await origin.fetch("GET", "/x")
                await origin.close()

    asyncio.run(main())


def test_https_to_a_server_without_tls_says_so() -> None:
    async def main() -> None:
        async with serving(Echo()) as server:
            origin = Origin(f"https://127.0.0.1:{server.port}")
            with pytest.raises(ConnectError, match="does not speak TLS at this port; try http://"):
                await origin.fetch("GET", "/x")
            await origin.close()

    asyncio.run(main())
