"""What the HTTP server makes of bytes, however they come: no sockets here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.net.server import Handler, HttpServer, ServerLimits
from effort import examples
from net_site import HELLO, Answer, Echo, Hold, Wire, answers


def on_wire(use: Callable[[Wire], object], handle: Handler, **limits: float) -> Wire:
    """``use`` a connection of a server that listens nowhere."""

    async def main() -> Wire:
        server = HttpServer(handle, ServerLimits(**limits), None, None)  # type: ignore[arg-type]
        wire = Wire(server.accept())
        use(wire)
        await server.close(0.0)
        return wire

    return asyncio.run(main())


def ask(*blocks: bytes, **limits: float) -> tuple[list[Answer], Echo, Wire]:
    echo = Echo()
    wire = on_wire(lambda wire: wire.feed(*blocks), echo, **limits)
    found, rest = answers(wire.sent)
    assert rest == b""
    return found, echo, wire


STREAM = (
    b"GET /one?a=b HTTP/1.1\r\nHost: x\r\n\r\n"
    b"POST /two HTTP/1.1\r\ncontent-length: 5\r\n\r\nhello"
    b"POST /three HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nx-late: 1\r\n\r\n"
    b"\r\nGET http://localhost/four?q HTTP/1.1\r\n\r\n"
    b"DELETE /five HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    b"POST /six HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nok"
    b"GET /seven HTTP/1.1\r\nconnection: close\r\n\r\n"
)
TOLD = [
    b"GET /one?a=b ",
    b"POST /two? hello",
    b"POST /three? abcdefg",
    b"GET /four?q ",
    b"DELETE /five? ",
    b"POST /six? ok",
    b"GET /seven? ",
]


def test_many_requests_in_one_write_are_answered_in_order() -> None:
    found, echo, wire = ask(STREAM)
    assert [answer.body for answer in found] == TOLD
    assert {answer.status for answer in found} == {200}
    assert [("connection", "close") in answer.headers.items() for answer in found] == [False] * 6 + [True]
    assert wire.closing
    assert all(request.closed and request.complete for request in echo.seen)


def test_split_at_every_byte() -> None:
    for cut in range(1, len(STREAM)):
        assert [answer.body for answer in ask(STREAM[:cut], STREAM[cut:])[0]] == TOLD, cut
    assert [answer.body for answer in ask(*(STREAM[i : i + 1] for i in range(len(STREAM))))[0]] == TOLD


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
@settings(max_examples=examples(60))
def test_split_anywhere(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    blocks = [STREAM[a:b] for a, b in pairwise(edges) if a < b]
    assert [answer.body for answer in ask(*blocks)[0]] == TOLD


@given(st.binary(max_size=200), st.integers(0, len(STREAM)))
@settings(max_examples=examples(100))
def test_whatever_comes_the_answer_is_http_and_no_handler_sees_half_a_request(noise: bytes, cut: int) -> None:
    found, echo, _ = ask(STREAM[:cut] + noise)
    assert all(answer.status in (200, 400, 405, 501, 505) for answer in found)
    assert all(request.complete for request in echo.seen)


def test_trailers_are_no_headers() -> None:
    body = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nauthorization: Bearer x\r\n\r\n"
    _, echo, _ = ask(body)
    assert [name for name, _ in echo.seen[0].headers] == [b"transfer-encoding"]


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 3\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: 3\r\n",
        b"content-length: 3\r\ncontent-length: 3\r\n",
        b"content-length: 3\r\ncontent-length: 4\r\n",
        b"content-length: 3, 3\r\n",
        b"content-length: -1\r\n",
        b"content-length: +3\r\n",
        b"content-length: 0x3\r\n",
        b"content-length:\r\n",
        b"content-length: 99999999999999999999999999\r\n",
        b"content-length : 3\r\n",
        b"transfer-encoding : chunked\r\n",
        b"transfer-encoding: chunked, gzip\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"transfer-encoding: gzip, chunked\r\n",
        b"transfer-encoding: \x0bchunked\r\n",
        b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n",
        b"transfer-encoding:\r\n chunked\r\n",
        b"x: a\r\n folded\r\n",
        b"x: a\n",
        b"x: a\rb\r\n",
        b"x: a\x00b\r\n",
        b": nameless\r\n",
        b"a b: c\r\n",
    ],
)
def test_requests_that_two_servers_might_read_differently_are_refused(head: bytes) -> None:
    smuggled = b"3\r\nabc\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n"
    found, echo, wire = ask(b"POST / HTTP/1.1\r\n" + head + b"\r\n" + smuggled)
    assert [answer.status for answer in found] in ([400], [501])
    assert found[0].headers["connection"] == "close"
    assert echo.seen == []
    assert wire.ended


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\n\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\na\n0\n\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n-1\r\na\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\na\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 501),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET /\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET / HTTP/1.9\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\n\r\n", 405),
        (b"GET /a b HTTP/1.1\r\n\r\n", 400),
        (b"get / HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
def test_what_is_not_http_1_is_refused(request_: bytes, status: int) -> None:
    found, echo, _ = ask(request_)
    assert [answer.status for answer in found] == [status]
    assert b'"error"' in found[0].body
    assert echo.seen == []


def test_a_bad_request_does_not_take_the_answers_before_it_away() -> None:
    hold = Hold()

    def use(wire: Wire) -> None:
        wire.feed(HELLO + HELLO + b"nonsense\r\n\r\n")
        for number in (0, 1):
            hold.seen[number].respond(200, b"%d" % number)

    wire = on_wire(use, hold)
    assert [answer.body for answer in answers(wire.sent)[0]] == [b"0", b"1"]
    assert wire.ended


def test_of_too_many_pipelined_requests_the_first_are_answered() -> None:
    hold = Hold()

    def use(wire: Wire) -> None:
        wire.feed(HELLO * 200)
        assert not wire.reading
        for number in range(17):
            hold.seen[number].respond(200, b"%d" % number)

    wire = on_wire(use, hold)
    assert len(answers(wire.sent)[0]) == 17
    assert wire.ended


def test_who_does_not_read_is_not_served_more() -> None:
    echo = Echo()

    def use(wire: Wire) -> None:
        wire.feed(HELLO)
        wire.protocol.pause_writing()
        wire.feed(HELLO * 10)
        assert len(echo.seen) == 1
        assert not wire.reading
        wire.protocol.resume_writing()
        assert wire.reading

    wire = on_wire(use, echo)
    assert len(answers(wire.sent)[0]) == len(echo.seen) == 11


def test_head_has_the_length_and_no_body() -> None:
    echo = Echo()
    wire = on_wire(lambda wire: wire.feed(b"HEAD /x HTTP/1.1\r\n\r\n" + HELLO), echo)
    first, second = answers(wire.sent, 0)[0]
    assert (first.headers["content-length"], second.body) == ("9", b"GET /hello? ")


def test_a_streamed_answer_to_head_and_one_without_a_body() -> None:
    hold = Hold()

    def use(wire: Wire) -> None:
        wire.feed(b"HEAD /x HTTP/1.1\r\n\r\n" + HELLO + HELLO)
        hold.seen[0].start(200)
        hold.seen[0].write(b"not for you")
        hold.seen[0].finish()
        hold.seen[1].respond(204)
        hold.seen[2].start(200)
        hold.seen[2].write(b"some")
        hold.seen[2].write(b"")
        hold.seen[2].write(b"thing")
        hold.seen[2].finish()
        hold.seen[2].write(b"too late")

    found, rest = answers(on_wire(use, hold).sent, 0)
    assert [(answer.status, answer.body) for answer in found] == [(200, b""), (204, b""), (200, b"something")]
    assert "content-length" not in found[1].headers
    assert rest == b""


def test_http_1_0_keeps_a_connection_only_when_asked_and_ends_a_stream_by_closing() -> None:
    keeps = b"GET /x HTTP/1.0\r\nconnection: keep-alive\r\n\r\n"
    found, _, wire = ask(keeps + b"GET /y HTTP/1.0\r\n\r\n")
    assert [answer.headers["connection"] for answer in found] == ["keep-alive", "close"]
    assert wire.closing
    hold = Hold()

    def use(wire: Wire) -> None:
        wire.feed(keeps)
        hold.seen[0].start(200)
        hold.seen[0].write(b"abc")
        hold.seen[0].finish()

    wire = on_wire(use, hold)
    assert wire.sent.endswith(b"connection: close\r\n\r\nabc")
    assert wire.closing


def test_100_continue_comes_before_the_body_and_only_when_it_is_wanted() -> None:
    head = b"POST /x HTTP/1.%d\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    assert [a.status for a in ask(head % (1, 2), b"ab")[0]] == [100, 200]
    assert [a.status for a in ask(head % (0, 2), b"ab")[0]] == [200]
    assert [a.status for a in ask(head % (1, 2), b"ab", body_max_bytes=1)[0]] == [413]


@pytest.mark.parametrize("pieces", [1, 7, 100_000])
def test_heads_have_a_limit_in_bytes(pieces: int) -> None:
    def sent(length: int) -> list[int]:
        data = b"GET /x HTTP/1.1\r\nlong: " + b"y" * length + b"\r\n\r\n"
        blocks = [data[i : i + pieces] for i in range(0, len(data), pieces)]
        return [answer.status for answer in ask(*blocks, header_max_bytes=1000)[0]]

    assert (sent(900), sent(1100)) == ([200], [431])
    if pieces > 1:
        assert sent(90_000) == [431]


def test_a_large_body_does_not_make_its_head_large() -> None:
    body = b"z" * 5000
    data = b"POST /x HTTP/1.1\r\ncontent-length: 5000\r\n\r\n" + body + HELLO[:-4]
    found, _, _ = ask(data, HELLO[-4:], header_max_bytes=1000)
    assert [answer.status for answer in found] == [200, 200]


def test_heads_have_a_limit_in_headers() -> None:
    def sent(count: int) -> int:
        return ask(b"GET /x HTTP/1.1\r\n" + b"a: b\r\n" * count + b"\r\n", headers_max=10)[0][0].status

    assert (sent(10), sent(11)) == (200, 431)


def test_trailers_and_chunk_extensions_have_a_limit_too() -> None:
    head = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n"
    for endless in (b"0\r\nx: ", b"1;"):
        found, echo, _ = ask(head + endless, *[b"y" * 400] * 5, header_max_bytes=1000)
        assert ([answer.status for answer in found], echo.seen) == ([431], [])


def test_bodies_have_a_limit_by_length_and_by_what_comes() -> None:
    for body in (
        b"content-length: 1001\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\n" + b"fa\r\n" + b"x" * 250 + b"\r\n",
    ):
        more = b"fa\r\n" + b"x" * 250 + b"\r\n"
        found, echo, _ = ask(b"POST / HTTP/1.1\r\n" + body, *[more] * 5, body_max_bytes=1000)
        assert ([answer.status for answer in found], echo.seen) == ([413], [])


@given(st.lists(st.binary(min_size=1, max_size=5), max_size=600))
@settings(max_examples=examples(20))
def test_a_body_in_any_chunks_is_put_together(chunks: list[bytes]) -> None:
    data = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    _, echo, _ = ask(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", data, b"0\r\n\r\n")
    assert echo.seen[0].body == b"".join(chunks)


def test_a_handler_that_fails_is_a_500_and_the_next_request_is_served(caplog: pytest.LogCaptureFixture) -> None:
    def fails(request: object) -> None:
        raise RuntimeError("on purpose")

    wire = on_wire(lambda wire: wire.feed(HELLO + HELLO), fails)
    assert [answer.status for answer in answers(wire.sent)[0]] == [500, 500]
    assert b"on purpose" not in wire.sent
    assert "on purpose" in caplog.text
