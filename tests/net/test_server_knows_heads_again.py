"""A head that comes again on a connection is not parsed again, and its request is what the parser would have made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import pairwise

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.net.connection import Connection
from chiron.net.incoming import Incoming
from chiron.net.memory import MemoryNetwork
from chiron.net.server import HttpServer, ServerLimits
from net_site import Answer, answers


class Counting:
    """What a parser calls instead of its connection, whose class has no subclasses if compiled; counts heads."""

    parsed = 0

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def on_url(self, url: bytes) -> None:
        Counting.parsed += 1
        self._connection.on_url(url)

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)


@pytest.fixture(autouse=True, scope="module")
def counting() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        parser = httptools.HttpRequestParser
        patch.setattr(httptools, "HttpRequestParser", lambda connection: parser(Counting(connection)))
        yield


class Peer(asyncio.Protocol):
    def __init__(self) -> None:
        self.got = b""
        self.over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.got += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True


def told(incoming: Incoming) -> None:
    """Answers with all that a handler sees."""
    seen = [
        incoming.method,
        incoming.path,
        incoming.query,
        incoming.version,
        incoming.headers,
        incoming.body,
        incoming.peers,
        incoming.complete,
    ]
    incoming.respond(200, repr(seen).encode())


def screen(incoming: Incoming) -> Callable[[], None] | None:
    incoming.peers = (*incoming.peers, f"API key {incoming.header(b'authorization')!r}")
    if incoming.body == b"" and incoming.header(b"content-length") == b"13":
        return lambda: incoming.respond(401, b"unlucky")
    return None


def exchanged(
    connections: list[list[bytes]], limits: ServerLimits | None = None
) -> tuple[list[list[Answer]], int, HttpServer]:
    """What a server answers to the blocks of each connection, sent one after the other, and heads parsed."""

    async def main() -> tuple[list[list[Answer]], int, HttpServer]:
        Counting.parsed = 0
        network = MemoryNetwork(asyncio.get_running_loop().call_soon)
        server = HttpServer(told, limits or ServerLimits(), None, None, screen)
        network.listen("server", server.accept)
        found = []
        for blocks in connections:
            peer = Peer()
            network.connect("server", lambda peer=peer: peer)  # type: ignore[misc]
            for block in blocks:
                if not peer.over:
                    peer.transport.write(block)
                for _ in range(6):
                    await asyncio.sleep(0)
            found.append(answers(peer.got)[0])
        await server.close(0)
        return found, Counting.parsed, server

    return asyncio.run(main())


def post(body: bytes, *lines: bytes, target: bytes = b"/v1/x?a=b", length: bytes = b"content-length") -> bytes:
    head = [b"POST %b HTTP/1.1" % target, b"Host: h", *lines, b"%b: %d" % (length, len(body)), b"Accept: */*"]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def test_only_the_first_of_like_heads_is_parsed() -> None:
    (got,), parsed, server = exchanged([[post(b"x" * size) for size in (1, 9, 10, 5000, 100)]])
    assert [answer.status for answer in got] == [200] * 5
    assert parsed == 1
    assert server.held_bytes == 0
    assert not server.body_shares.held


BODIES = st.binary(max_size=30) | st.sampled_from([b"", b"\r\n\r\n", b"content-length: 3\r\n\r\n"])
LINES = st.sampled_from(
    [
        (),
        (b"Authorization: Bearer a",),
        (b"authorization: Bearer b", b"X-Forwarded-For: 10.0.0.7"),
        (b"X-One: content-length: 5",),
        (b"Expect: 100-continue",),
        (b"Content-Length: 3",),
        (b"Connection: close",),
    ]
)


def said(found: list[Answer]) -> list[tuple[int, bytes, str | None]]:
    return [(each.status, each.body, each.headers.get("connection")) for each in found if each.status != 100]


@settings(max_examples=30)
@given(
    requests=st.lists(
        st.builds(
            lambda body, lines, length: post(body, *lines, length=length),
            BODIES,
            LINES,
            st.sampled_from([b"content-length", b"Content-Length"]),
        ),
        min_size=2,
        max_size=4,
    ),
    repeats=st.integers(1, 3),
)
def test_requests_are_as_on_connections_of_their_own(requests: list[bytes], repeats: int) -> None:
    """Up to the first that ends the connection."""
    sent = [request for request in requests for _ in range(repeats)]
    (together,), _, server = exchanged([sent])
    alone = [said(found)[0] for found in exchanged([[request] for request in sent])[0]]
    ends = [status != 200 or connection == "close" for status, _, connection in alone]
    assert said(together) == alone[: ends.index(True) + 1 if True in ends else len(alone)]
    assert server.held_bytes == 0


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 600), max_size=5))
def test_so_they_are_however_they_are_cut(cuts: list[int]) -> None:
    sent = [post(b"a" * 40), post(b"b" * 9), post(b"c" * 110)]
    whole, places = b"".join(sent), sorted({0, 10_000, *cuts})
    (got,), _, _ = exchanged([[whole[a:b] for a, b in pairwise(places)]])
    (expected,), _, _ = exchanged([sent])
    assert [answer.body for answer in got] == [answer.body for answer in expected]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"x" * 101, 413), (b"x" * 13, 401), (b"x" * 100, 200)],
    ids=["too large", "refused by its head", "right"],
)
def test_what_holds_for_the_first_holds_for_the_next(body: bytes, status: int) -> None:
    (got,), _, server = exchanged([[post(b"x" * 5), post(b"x" * 6), post(body)]], ServerLimits(body_max_bytes=100))
    assert [answer.status for answer in got] == [200, 200, status]
    assert server.held_bytes == 0


def test_odd_lengths_are_the_parsers() -> None:
    for odd in (b"+5", b"5 ", b"0x5", b"5,5", b"1_0", b""):
        request = post(b"x" * 5).replace(b"content-length: 5", b"content-length: " + odd)
        (got,), parsed, _ = exchanged([[post(b"x" * 7), request]])
        (alone,), _, _ = exchanged([[request]])
        assert said(got[1:]) == said(alone), odd
        assert parsed == 2


def test_heads_that_differ_each_time_are_not_kept_for_long() -> None:
    sent = [post(b"x", b"x-request-id: %d" % number) for number in range(8)]
    (got,), parsed, _ = exchanged([[*sent, sent[-1], sent[-1]]])
    assert len(got) == 10
    assert parsed == 10


def test_a_long_head_is_parsed_each_time() -> None:
    (_,), parsed, _ = exchanged([[post(b"x", b"x-long: " + b"y" * 2048)] * 3])
    assert parsed == 3


def test_a_head_with_another_end_is_another_head() -> None:
    sent = [post(b"x" * 5), post(b"x" * 5).replace(b"Accept: */*", b"Accept: x/y"), post(b"x" * 6)]
    (got,), parsed, _ = exchanged([sent])
    assert [b"x/y" in answer.body for answer in got] == [False, True, False]
    assert parsed == 3


def test_what_comes_while_another_is_answered_waits_its_turn() -> None:
    async def main() -> None:
        network, open_now = MemoryNetwork(asyncio.get_running_loop().call_soon), list[Incoming]()
        server = HttpServer(open_now.append, ServerLimits(), None, None)
        network.listen("server", server.accept)
        peer = Peer()
        network.connect("server", lambda: peer)
        for number in range(3):
            peer.transport.write(post(b"%d" % number))
            for _ in range(6):
                await asyncio.sleep(0)
        for number in range(3):
            assert [incoming.body for incoming in open_now] == [b"%d" % number]
            open_now.pop().respond(200, b"answer %d" % number)
            for _ in range(6):
                await asyncio.sleep(0)
        assert [answer.body for answer in answers(peer.got)[0]] == [b"answer 0", b"answer 1", b"answer 2"]
        await server.close(0)

    asyncio.run(main())
