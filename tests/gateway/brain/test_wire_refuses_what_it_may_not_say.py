"""Whoever breaks the protocol between relay and brain is cut off, and the log says why."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, get_args

import msgspec
import pytest

from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import FRAME_MAX_BYTES, ProtocolError, Wire
from chiron.net.memory import MemoryNetwork

HELLO = [0, "chiron-relay", m.VERSION]


def frame(value: Any) -> bytes:
    body = msgspec.msgpack.encode(value)
    return len(body).to_bytes(4, "big") + body


ARRIVE: list[Any] = [1, 1, "r", "m", "c", 1.0, 1.0, "", 1, [], 1, False, 1, False]

BROKEN = {
    "another version": (frame([[0, "chiron-relay", 99]]), "version 99"),
    "versions that are too new": (frame([[0, "chiron-relay", 99, 98]]), "versions 98 to 99"),
    "another protocol": (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", "a frame of"),
    "no hello": (frame([[2, 1, 0]]), "does not speak chiron-relay"),
    "a long frame": (frame([HELLO]) + (FRAME_MAX_BYTES + 1).to_bytes(4, "big"), f"allowed: {FRAME_MAX_BYTES}"),
    "not msgpack": (frame([HELLO]) + b"\x00\x00\x00\x02\xc1\xc1", "cannot be read"),
    "no such message": (frame([HELLO]) + frame([[99, 1]]), "cannot be read"),
    "a message of the other side": (frame([HELLO]) + frame([[36, 1]]), "cannot be read"),
    "a negative count": (frame([HELLO]) + frame([[2, 1, -5]]), "cannot be read"),
    "an instance without successors": (frame([HELLO]) + frame([[15, 1 << 62, "m", "k", "u", 1, "mixed"]]), "<= 1099"),
    "an SLO of nothing": (
        frame([HELLO]) + frame([[1, 1, "r", "m", "c", 0.0, 1.0, "", 1, [], 1, False, 1, False]]),
        "> 0.0",
    ),
    "more losses than a request can have": (frame([HELLO]) + frame([[17, ARRIVE, 1.0, 1001]]), "<= 1000"),
    "the same of one that runs": (
        frame([HELLO]) + frame([[16, ARRIVE, 1, 1, 0, 0, 1.0, 1.0, -1, False, 1 << 32]]),
        "<= 1000",
    ),
    "tokens that no sum can hold": (frame([HELLO]) + frame([[4, 1, 200, 1 << 62, 0, 0]]), "<= 1099"),
    "a prompt that no sum can hold": (
        frame([HELLO]) + frame([[17, [*ARRIVE[:8], 1 << 62, *ARRIVE[9:]], 1, 0]]),
        "<= 1099",
    ),
    "text for a number": (frame([HELLO]) + frame([[2, "1", 0]]), "cannot be read"),
    "what the receiver refuses": (frame([HELLO]) + frame([[2, 7, 0]]), "seven is not allowed"),
}


class Peer(asyncio.Protocol):
    def __init__(self) -> None:
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


@pytest.mark.parametrize(("sent", "why"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("pieces", [1, 1000], ids=["in pieces", "at once"])
def test_it_is_cut_off(sent: bytes, why: str, pieces: int, caplog: pytest.LogCaptureFixture) -> None:
    closed: list[str] = []

    def receives(messages: Sequence[Any]) -> None:
        if messages[0].number == 7:
            raise ProtocolError("seven is not allowed")

    async def main() -> None:
        door = MemoryNetwork(asyncio.get_running_loop().call_soon)
        door.listen(
            "brain",
            lambda: Wire(name="relay 1", kind=m.Up, opened=lambda: None, received=receives, closed=closed.append),
        )
        peer = Peer()
        door.connect("brain", lambda: peer)
        for at in range(0, len(sent), pieces):
            peer.transport.write(sent[at : at + pieces])
        for _ in range(len(sent) + 20):
            await asyncio.sleep(0)
        assert peer.lost

    asyncio.run(main())
    assert len(closed) == 1
    assert why in closed[0]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        f"the connection to relay 1 is closed: {closed[0]}"
    ]


def test_a_newer_version_that_still_speaks_this_one_is_welcome() -> None:
    async def main() -> None:
        door = MemoryNetwork(asyncio.get_running_loop().call_soon)
        wire = Wire(name="relay 1", kind=m.Up, opened=lambda: None, received=print, closed=lambda why: None)
        door.listen("brain", lambda: wire)
        peer = Peer()
        door.connect("brain", lambda: peer)
        peer.transport.write(frame([[0, "chiron-relay", m.VERSION + 1, m.VERSION, 0, "", False, "what is new"]]))
        for _ in range(20):
            await asyncio.sleep(0)
        assert (wire.up, peer.lost) == (True, False)

    asyncio.run(main())


def test_messages_arrive_in_order_many_in_a_frame() -> None:
    async def main() -> None:
        taken: list[Any] = []
        frames: list[int] = []
        door = MemoryNetwork(asyncio.get_running_loop().call_soon)

        def receives(messages: Sequence[Any]) -> None:
            frames.append(len(messages))
            taken.extend(messages)

        door.listen(
            "brain", lambda: Wire(name="r", kind=m.Up, opened=lambda: None, received=receives, closed=lambda why: None)
        )
        wire = Wire(name="b", kind=m.Down, opened=lambda: None, received=print, closed=lambda why: None)
        sent = [m.Left(number, 0) for number in range(1, 501)]
        wire.send(sent[0])  # Before the hello it waits.
        door.connect("brain", lambda: wire)
        for message in sent[1:]:
            wire.post(message)
        while len(taken) < len(sent):
            await asyncio.sleep(0.001)
        assert taken == sent
        assert len(frames) <= 3
        wire.close("done")
        await asyncio.sleep(0)

    asyncio.run(main())


def test_every_message_is_of_one_side() -> None:
    sides = [set(get_args(m.Up)), set(get_args(m.Down))]
    every = {each for each in m.Message.__subclasses__() if each is not m.Hello}
    assert sides[0] | sides[1] == every
    assert not sides[0] & sides[1]
