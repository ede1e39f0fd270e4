"""Chunks that are only passed on keep their framing, and nothing is passed on as a chunk that is none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron.net.client import AnswerError, Call, ConnectionLostError, Header, NetError, Origin
from chiron.net.memory import MemoryNetwork
from net_site import dechunk

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


class PassedOn:
    """A receiver that wants whole chunks as they come, and hears all else without framing."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.passed: list[bytes] = []
        self.body = b""
        self.ended = False
        self.error: NetError | None = None

    def on_head(self, status: int, headers: list[Header]) -> None:
        assert self.call is not None
        self.call.on_chunks = self.on_chunks

    def on_chunks(self, data: bytes) -> None:
        self.passed.append(data)
        payload, rest = dechunk(data + END)
        assert payload, "whole chunks, and not the last"
        assert not rest
        self.body += payload

    def on_data(self, data: bytes) -> None:
        self.body += data

    def on_end(self) -> None:
        self.ended = True

    def on_error(self, error: NetError) -> None:
        self.error = error


class Blocks(asyncio.Protocol):
    """A server that answers with these blocks, each of which arrives as one, and hangs up if it is to."""

    def __init__(self, blocks: list[bytes], hangs_up: bool) -> None:
        self._blocks = blocks
        self._hangs_up = hangs_up

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        blocks, self._blocks = self._blocks, []
        for block in blocks:
            self._transport.write(block)
        if self._hangs_up:
            self._transport.close()


class Answering(Blocks):
    """The same, to each request."""

    def __init__(self, blocks: list[bytes]) -> None:
        super().__init__(blocks, hangs_up=False)
        self._each = blocks

    def data_received(self, data: bytes) -> None:
        self._blocks = list(self._each)
        super().data_received(data)


def received(blocks: list[bytes], *, hangs_up: bool = False) -> PassedOn:
    async def main() -> PassedOn:
        network = MemoryNetwork(asyncio.get_running_loop().call_soon)
        network.listen("engine", lambda: Blocks(blocks, hangs_up))
        origin = Origin("memory:engine", network=network)
        receiver = PassedOn()
        receiver.call = origin.send(b"POST", b"/", (), b"{}", receiver)
        for _ in range(4 * len(blocks) + 20):
            await asyncio.sleep(0)
        await origin.close()
        return receiver

    return asyncio.run(main())


def framed(payload: bytes, line: Callable[[int], bytes] = lambda size: b"%x" % size) -> bytes:
    return line(len(payload)) + b"\r\n" + payload + b"\r\n"


def test_a_block_of_whole_chunks_comes_as_it_was_sent() -> None:
    one, two = framed(b"data: 1\n\n"), framed(b"x" * 3000) + framed(b"y")
    got = received([HEAD, one, two, END])
    assert got.passed == [one, two]
    assert got.ended
    assert got.body == b"data: 1\n\n" + b"x" * 3000 + b"y"


@pytest.mark.parametrize("size", [*range(1, 20), 255, 256, 2040, 2041, 2042, 2048, 4095, 4096])
def test_chunks_of_any_size_are_whole(size: int) -> None:
    chunk = framed(b"z" * size)
    got = received([HEAD, chunk, END])
    assert got.passed == [chunk]


@given(
    payloads=st.lists(
        st.binary(min_size=1, max_size=40) | st.sampled_from([b"\r\n", b"2\r\nab\r\n", b"0\r\n\r\n"]), max_size=6
    ),
    cuts=st.lists(st.integers(0, 400), max_size=6),
)
def test_however_an_answer_is_cut_its_body_is_the_same(payloads: list[bytes], cuts: list[int]) -> None:
    answer = HEAD + b"".join(map(framed, payloads)) + END
    places = sorted({0, len(answer), *(min(cut, len(answer)) for cut in cuts)})
    got = received([answer[a:b] for a, b in pairwise(places)])
    assert got.ended
    assert got.body == b"".join(payloads)


WHOLE = framed(b"whole")
ODD = {
    "an extension": (b"5;a=b\r\nwhole\r\n", True),
    "leading zeros": (b"0005\r\nwhole\r\n", True),
    "a sign": (b"+5\r\nwhole\r\n", False),
    "a prefix": (b"0x5\r\nwhole\r\n", False),
    "an underscore": (b"0_5\r\nwhole\r\n", False),
    "too long for its size": (b"4\r\nwhole\r\n", False),
    "no line end": (b"5\r\nwhole--", False),
    "a bare line feed": (b"5\nwhole\n", False),
}


@pytest.mark.parametrize(("odd", "right"), ODD.values(), ids=ODD.keys())
def test_what_the_parser_refuses_is_not_passed_on(odd: bytes, right: bool) -> None:
    got = received([HEAD, WHOLE, odd, WHOLE, END])
    if right:
        assert got.ended
        assert got.body == b"wholewholewhole"
    else:
        assert isinstance(got.error, AnswerError)
        assert got.body in (b"whole", b"wholewhol", b"wholewhole")
        assert got.passed == [WHOLE]


def test_an_answer_that_breaks_off_between_chunks_is_lost() -> None:
    got = received([HEAD, WHOLE, WHOLE], hangs_up=True)
    assert got.passed == [WHOLE, WHOLE]
    assert isinstance(got.error, ConnectionLostError)


def test_an_answer_with_a_length_is_not_looked_into_for_chunks() -> None:
    body = WHOLE * 3
    got = received([b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body), WHOLE, WHOLE, WHOLE])
    assert not got.passed
    assert got.ended
    assert got.body == body


def test_after_a_chunk_that_came_in_parts_whole_ones_are_passed_on_again() -> None:
    got = received([HEAD, WHOLE[:4], WHOLE[4:6], WHOLE[6:], WHOLE, WHOLE + WHOLE[:5], WHOLE[5:], WHOLE, END])
    assert got.passed == [WHOLE] * 3
    assert got.body == b"whole" * 5


def test_the_connection_carries_the_next_request_as_it_did_this_one() -> None:
    async def main() -> list[PassedOn]:
        network = MemoryNetwork(asyncio.get_running_loop().call_soon)
        accepted: list[Answering] = []

        def accept() -> Answering:
            accepted.append(Answering([HEAD, WHOLE, WHOLE, END]))
            return accepted[-1]

        network.listen("engine", accept)
        origin = Origin("memory:engine", network=network)
        receivers = [PassedOn() for _ in range(3)]
        for receiver in receivers:
            receiver.call = origin.send(b"POST", b"/", (), b"{}", receiver)
            for _ in range(40):
                await asyncio.sleep(0)
        await origin.close()
        assert len(accepted) == 1
        return receivers

    for got in asyncio.run(main()):
        assert (got.ended, got.error, got.passed) == (True, None, [WHOLE, WHOLE])
