"""The HTTP server's clients misbehave: they are slow, they leave, they send too much, or there are too many."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from chiron.net import connection
from net_site import HELLO, Echo, Hold, answers, certificate, peer, serving, until

BLOCK = b"x" * 65536


@pytest.mark.parametrize(
    ("sent", "limits"),
    [
        (b"GET /x HTTP/1.1\r\nslow: ", {"header_timeout_s": 1.0}),
        (b"POST /x HTTP/1.1\r\ncontent-length: 5\r\n\r\nabc", {"body_timeout_s": 0.1}),
    ],
)
def test_a_head_or_a_body_that_does_not_come_is_408(sent: bytes, limits: dict[str, float]) -> None:
    async def main() -> None:
        async with serving(Echo(), limits=limits) as server, peer(server.port) as client:
            client.send(sent)
            found, rest = answers(await client.rest())
            assert ([answer.status for answer in found], rest) == ([408], b"")

    asyncio.run(main())


def test_a_body_that_trickles_is_408_too() -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(echo, limits={"body_timeout_s": 0.5}) as server, peer(server.port) as client:
            client.send(b"POST /x HTTP/1.1\r\ncontent-length: 5000\r\n\r\n")
            started_s = time.monotonic()
            while client.reader._buffer == b"" and time.monotonic() - started_s < 8.0:  # type: ignore[attr-defined]
                client.send(b"y")
                await asyncio.sleep(0.05)
            assert [answer.status for answer in answers(await client.rest())[0]] == [408]
        assert echo.seen == []

    asyncio.run(main())


def test_connections_without_requests_are_closed() -> None:
    async def main() -> None:
        limits = {"idle_s": 1.0, "header_timeout_s": 1.0}
        async with serving(Echo(), limits=limits) as server, peer(server.port) as silent, peer(server.port) as done:
            done.send(HELLO)
            assert len(await done.answers(1)) == 1
            assert await silent.rest() == await done.rest() == b""
            await until(lambda: not server.connections)

    asyncio.run(main())


def test_a_client_that_still_sends_sees_why_it_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_LINGER_S", 60.0)

    async def main() -> None:
        async with serving(Echo(), limits={"body_max_bytes": 1000}) as server, peer(server.port) as client:
            client.send(b"POST /x HTTP/1.1\r\ncontent-length: 8000000\r\n\r\n")
            for _ in range(100):
                client.send(BLOCK)
                await asyncio.sleep(0)
            found, rest = answers(await client.rest())
            assert ([answer.status for answer in found], rest) == ([413], b"")
            await client.close()
            await until(lambda: not server.connections)

    asyncio.run(main())


def test_more_connections_than_allowed_are_refused_and_those_before_go_on() -> None:
    async def main() -> None:
        async with serving(Echo(), limits={"connections_max": 2}) as server:
            async with peer(server.port) as first, peer(server.port) as second:
                await until(lambda: len(server.connections) == 2)
                async with peer(server.port) as third:
                    refused = answers(await third.rest())[0]
                    assert [(answer.status, answer.headers["retry-after"]) for answer in refused] == [(503, "1")]
                for client in (first, second):
                    client.send(HELLO)
                    assert (await client.answers(1))[0].status == 200
            await until(lambda: not server.connections)
            async with peer(server.port) as client:
                client.send(HELLO)
                assert (await client.answers(1))[0].status == 200

    asyncio.run(main())


def test_the_bodies_of_open_requests_have_a_limit_together() -> None:
    post = b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 600\r\n\r\n"

    async def main() -> None:
        hold = Hold()
        limits = {"body_max_bytes": 1000, "bodies_max_bytes": 2000}
        async with serving(hold, limits=limits) as server, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(peer(server.port)) for _ in range(4)]
            for number, client in enumerate(clients[:3], 1):
                client.send(post + b"x" * 600)
                await until(lambda known=number: len(hold.seen) == known)
            clients[3].send(post + b"x" * 600)
            refused = answers(await clients[3].rest())[0]
            assert [(answer.status, answer.headers["retry-after"]) for answer in refused] == [(503, "1")]
            await clients[1].close()
            await until(lambda: hold.left)
            hold.seen[0].respond(200)
            clients[0].send(post + b"y" * 600 + post + b"z" * 600)  # As much as one left and one was answered.
            for number in (4, 5):
                await until(lambda known=number: len(hold.seen) == known)
                hold.seen[-1].respond(200)
            assert [answer.status for answer in await clients[0].answers(3)] == [200] * 3
            assert server.held_bytes == 600
            await clients[2].close()
            await until(lambda: server.held_bytes == 0)

    asyncio.run(main())


def test_a_client_that_leaves_is_told_of_once() -> None:
    async def main() -> None:
        hold = Hold()
        async with serving(hold) as server:
            for how in ("close", "reset", "half", "while streaming"):
                async with peer(server.port) as client:
                    client.send(HELLO)
                    await until(lambda: hold.seen)
                    request = hold.seen[0]
                    if how == "while streaming":
                        request.start(200)
                        request.write(b"x")
                    if how == "reset":
                        linger = b"\1\0\0\0\0\0\0\0"
                        client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    if how == "half":
                        client.writer.write_eof()
                    else:
                        client.writer.close()
                    await until(lambda: hold.left)
                request.respond(200, b"nobody hears")
                request.write(b"nobody")
                request.finish()
                request.abort()
                assert (hold.left, request.closed) == ([request], True), how
                hold.seen.clear()
                hold.left.clear()
            await until(lambda: not server.connections)

    asyncio.run(main())


def test_an_answer_cut_off_shows_as_such() -> None:
    async def main() -> None:
        hold = Hold()
        async with serving(hold) as server, peer(server.port) as client:
            client.send(HELLO)
            await until(lambda: hold.seen)
            hold.seen[0].start(200)
            hold.seen[0].write(b"abc")
            await asyncio.sleep(0)
            hold.seen[0].abort()
            assert not (await client.rest()).endswith(b"0\r\n\r\n")
        assert hold.left == []

    asyncio.run(main())


async def stuck(hold: Hold, client: Any) -> int:
    """Write until the server says that the client does not read; the bytes that it took."""
    client.send(HELLO)
    await until(lambda: hold.seen)
    hold.seen[0].start(200)
    written = 0
    while not hold.paused:
        hold.seen[0].write(BLOCK)
        written += len(BLOCK)
        await asyncio.sleep(0)
        assert written < 64 << 20
    return written


def test_a_slow_reader_pauses_its_answer_and_gets_all_of_it() -> None:
    async def main() -> None:
        hold = Hold()
        async with serving(hold, limits={"stall_s": 30.0}) as server, peer(server.port, limit=1024) as client:
            written = await stuck(hold, client)
            request = hold.seen[0]
            assert request.paused
            assert not hold.resumed
            reading = asyncio.create_task(client.answers(1))
            await until(lambda: hold.resumed == 1)
            assert not request.paused
            request.finish()
            assert (await reading)[0].body == b"x" * written
            client.send(HELLO)
            await until(lambda: len(hold.seen) == 2)

    asyncio.run(main())


@pytest.mark.slow
def test_a_reader_that_stalls_is_cut_off_and_one_that_is_slow_is_not() -> None:
    async def main() -> None:
        hold = Hold()
        async with serving(hold, limits={"stall_s": 3.0}) as server:
            async with peer(server.port, limit=1024) as client:
                await stuck(hold, client)
                await until(lambda: hold.left)
                await until(lambda: not server.connections)
            for _ in range(5):  # Once is enough, but where this test itself reads nothing for long.
                slow = Hold()
                server.handle = slow
                async with peer(server.port, limit=1024) as client:
                    began_s = time.monotonic()
                    await stuck(slow, client)
                    slow.seen[0].write(b"y" * (8 << 20))
                    if longest_pause_s([began_s, *await read_slowly(client, 7.0)]) < 2.0:
                        assert slow.left == []
                        return
            pytest.fail("this machine stalls all the time")

    async def read_slowly(client: Any, for_s: float) -> list[float]:
        """When something was read, as long as there was something."""
        read_s = [time.monotonic()]
        while read_s[-1] < read_s[0] + for_s and await asyncio.wait_for(client.reader.read(200_000), 30.0):
            await asyncio.sleep(0.1)
            read_s.append(time.monotonic())
        return read_s

    def longest_pause_s(read_s: list[float]) -> float:
        return max(other - one for one, other in pairwise([*read_s, time.monotonic()]))

    asyncio.run(main())


def test_an_answer_that_nobody_takes_is_not_kept_for_ever() -> None:
    async def main() -> None:
        async def client_of(server: Any, request: bytes) -> socket.socket:
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", server.port))
            await asyncio.get_running_loop().sock_sendall(client, request)
            return client

        hold = Hold()
        limits = {"stall_s": 0.2, "idle_s": 0.2}
        async with serving(hold, limits=limits) as server:
            closes = HELLO.replace(b"host: x", b"connection: close")
            for request, size in ((HELLO, 1 << 23), (closes, 1 << 23), (HELLO, 2_800_000)):
                client = await client_of(server, request)
                await until(lambda: hold.seen)
                hold.seen[0].respond(200, b"z" * size)
                await until(lambda: not server.connections)
                client.close()
                hold.seen.clear()

    asyncio.run(main())


def test_closing_lets_answers_end_and_then_cuts() -> None:
    async def main() -> None:
        ends, cut = Hold(), Hold()
        async with serving(ends) as server, peer(server.port) as idle, peer(server.port) as client:
            client.send(HELLO)
            await until(lambda: ends.seen)
            closing = asyncio.create_task(server.close(600.0))
            assert await idle.rest() == b""
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", server.port)
            ends.seen[0].respond(200, b"done")
            found = answers(await client.rest())[0]
            assert (found[0].body, found[0].headers["connection"]) == (b"done", "close")
            await asyncio.wait_for(closing, 60.0)
            assert not ends.left
        async with serving(cut) as server, peer(server.port) as client:
            client.send(HELLO)
            await until(lambda: cut.seen)
            await server.close(0.1)
            assert await client.rest() == b""
            assert len(cut.left) == 1

    asyncio.run(main())


def test_tls_with_a_client_that_does_not_shake_hands(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    trust = ssl.create_default_context(cafile=str(cert))

    async def main() -> None:
        hold = Hold()
        async with serving(hold, ssl=context, limits={"header_timeout_s": 0.3}) as server, peer(server.port) as silent:
            assert await silent.rest() == b""
        async with serving(hold, ssl=context, limits={"body_max_bytes": 10}) as server:
            async with peer(server.port), peer(server.port, ssl=trust) as client:
                client.send(HELLO)
                await until(lambda: hold.seen)
                assert hold.seen[0].secure
                hold.seen[0].respond(200, b"z" * 3_000_000)
                assert len((await client.answers(1))[0].body) == 3_000_000
                client.send(b"POST / HTTP/1.1\r\ncontent-length: 11\r\n\r\n")
                assert [answer.status for answer in answers(await client.rest())[0]] == [413]
            async with peer(server.port) as plain:
                plain.send(HELLO)
                assert b"HTTP/" not in await plain.rest()

    asyncio.run(main())


def test_an_application_gets_bodies_as_they_come_and_is_held_back_by_a_slow_client() -> None:
    told: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/leaves":
            told.append(await receive())
            told.append(await receive())
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-A", b"b")]})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        for _ in range(200 if scope["path"] == "/large" else 0):
            await send({"type": "http.response.body", "body": BLOCK, "more_body": True})
            told.append(len(BLOCK))
        await send({"type": "http.response.body"})

    async def main() -> None:
        async with serving(lambda request: None, app=app) as server:
            async with peer(server.port) as client:
                client.send(b"POST /a%20b HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
                await asyncio.sleep(0.01)
                client.send(b"2\r\nbc\r\n0\r\n\r\n" + HELLO)
                first, second = await client.answers(2)
                assert (first.body, first.headers["x-a"], second.body) == (b"abc", "b", b"")
            async with peer(server.port, limit=1024) as client:
                large = b"GET /large HTTP/1.1\r\n\r\n"
                client.send(large * 2 + large[:-2] + b"connection: close\r\n\r\n")
                await until(lambda: told)
                count = -1
                while count != len(told):
                    count = len(told)
                    await asyncio.sleep(0.05)
                assert count < 200
                assert [len(answer.body) for answer in answers(await client.rest())[0]] == [200 * len(BLOCK)] * 3
            told.clear()
            async with peer(server.port) as client:
                client.send(b"POST /leaves HTTP/1.1\r\ncontent-length: 5\r\n\r\nab")
                await until(lambda: told)
            await until(lambda: len(told) == 2)
            assert told[1] == {"type": "http.disconnect"}

    asyncio.run(main())


def test_what_an_application_does_not_read_does_not_hold_up_the_next_request() -> None:
    arrived = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await arrived.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def main() -> None:
        async with serving(lambda request: None, app=app) as server, peer(server.port) as client:
            client.send(b"POST /x HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % (5 * len(BLOCK)) + 5 * BLOCK)
            await until(lambda: any(c._serving and c._serving.complete for c in server.connections))
            arrived.set()
            client.send(HELLO)
            assert [answer.status for answer in await client.answers(2)] == [200, 200]

    asyncio.run(main())


def test_an_application_that_takes_its_time_is_not_its_clients_fault() -> None:
    ready = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await ready.wait()
        length, more = 0, True
        while more:
            message = await receive()
            length, more = length + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % length})

    async def main() -> None:
        limits = {"body_timeout_s": 1.0}
        async with serving(lambda request: None, app=app, limits=limits) as server, peer(server.port) as client:
            client.send(b"POST /x HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % (30 * len(BLOCK)) + 30 * BLOCK)
            await until(lambda: any(connection._read_paused for connection in server.connections))
            held_s = server.now_s
            await until(lambda: server.now_s > held_s + 2.5)
            ready.set()
            assert (await client.answers(1))[0].body == b"%d" % (30 * len(BLOCK))

    asyncio.run(main())
