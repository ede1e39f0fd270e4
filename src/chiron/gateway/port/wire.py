"""The wire between a relay and the brain: frames of messages over a stream of bytes.

A frame is four bytes of length and a msgpack array of messages. What is urgent goes out at the end of the turn of the
loop in which it was sent, together with all that waits; the rest waits for it, at most ``ride_s``: waking up costs the
other end many times what a message does. With ``ride_s`` = 0 nothing waits, so that all messages arrive in the order in
which they were sent, over several wires too. The first frame of each end is a ``Hello`` with a version.

Whoever breaks the protocol is cut off, and the log says why: a frame that is too long or cannot be read, a version that
does not fit, an end that does not read what it is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from chiron.gateway.port.messages import NAME, VERSION_MIN, Hello, Message

log = logging.getLogger("chiron.port")

RIDE_S = 0.002
FRAME_MAX_BYTES = 128 << 20
"""Of one frame. Only an item of a batch and its answer are long; a frame of others is begun anew before it gets so."""
FRAME_FULL_BYTES = 64 << 10
UNREAD_MAX_BYTES = 512 << 20
"""What the other end may have left unread."""
_LENGTH_BYTES = 4


AGAIN_S = 60.0
"""Between two times that the same is said of a connection."""
_SAID_MAX = 64


class Seldom:
    """Keeps the log short: an end that is refused tries again several times a second."""

    def __init__(self) -> None:
        self._said_s: dict[str, float] = {}

    def is_due(self, words: str, now_s: float) -> bool:
        """Whether these words were not said just now."""
        due = now_s - self._said_s.get(words, -AGAIN_S) >= AGAIN_S
        if due:
            self._said_s.pop(words, None)
            self._said_s[words] = now_s
            if len(self._said_s) > _SAID_MAX:
                del self._said_s[next(iter(self._said_s))]
        return due


class ProtocolError(Exception):
    """The other end said what it may not. The message says what."""


class Wire:
    """One end of the connection between a relay and the brain. A protocol of asyncio's, without its class: see
    ``net.client``."""

    def __init__(
        self,
        *,
        name: str,
        kind: Any,
        opened: Callable[[], None],
        received: Callable[[Sequence[Any]], None],
        closed: Callable[[str], None],
        ride_s: float = RIDE_S,
        hello: Hello | None = None,
        greeted: Callable[[Hello], None] = lambda hello: None,
        seldom: Seldom | None = None,
    ) -> None:
        """``name`` is the other end's, for the log; ``kind`` is a union of the messages that it may send. ``hello`` is
        what this end says first; ``greeted`` hears the other one's, and may raise ProtocolError. ``opened`` is called
        once both have said hello, ``received`` with the messages of each read, and may raise ProtocolError; ``closed``
        once, with a reason. ``seldom``: shared by all that may be refused again and again for one reason."""
        self.name = name
        self.version = 0
        """Which both speak, once they have said hello."""
        self._seldom = seldom or Seldom()
        self.up = False
        """Both have said hello, and it is not ``over``."""
        self._hello = hello or Hello(version_min=VERSION_MIN)
        self._greeted = greeted
        self._decoder = msgspec.msgpack.Decoder(list[kind])
        self._encoder = msgspec.msgpack.Encoder()
        self._opened = opened
        self._received = received
        self._closed = closed
        self._ride_s = ride_s
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self.over = False
        """It is closed, for good."""
        self._unsent: list[Message] = []
        self._flushes: asyncio.Handle | None = None
        """At the end of this turn."""
        self._rides: asyncio.TimerHandle | None = None
        """A little later; it stays where something urgent takes what waits, for what comes after that: to arm a timer
        for each message would cost more than the message."""
        self._unread = bytearray()

    @property
    def transport(self) -> Any:
        return self._transport

    # -- what is sent ------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """At the end of this turn of the loop."""
        if self.over:
            return
        self._unsent.append(message)
        if not self._ride_s:
            self.flush()
        elif self._flushes is None:
            self._flushes = self._loop.call_soon(self.flush)

    def post(self, message: Message) -> None:
        """With the next that is urgent, or a little later."""
        if self.over:
            return
        self._unsent.append(message)
        if not self._ride_s:
            self.flush()
        elif self._flushes is None and self._rides is None:
            self._rides = self._loop.call_later(self._ride_s, self._ridden)

    def close(self, why: str) -> None:
        """Send what waits, and end."""
        if not self.over:
            self.flush()
            if self._transport is not None:
                self._transport.close()
            self._end(why)

    def abort(self) -> None:
        """End at once, as if this end had died."""
        if self._transport is not None:
            self._transport.abort()

    def flush(self) -> None:
        """Send what waits, now."""
        if self._flushes is not None:
            self._flushes.cancel()
            self._flushes = None
        if not self._unsent or self._transport is None or self.over or not self.up:
            return  # Before the hello it waits; afterwards nobody hears it.
        messages, self._unsent = self._unsent, []
        transport = self._transport
        transport.write(b"".join(self._frames(messages)))
        if transport.get_write_buffer_size() > UNREAD_MAX_BYTES:
            self.give_up(f"it has left more than {UNREAD_MAX_BYTES} bytes unread")

    def _ridden(self) -> None:
        self._rides = None
        self.flush()

    def _frames(self, messages: list[Message]) -> list[bytes]:
        found = [self._frame(messages)]
        if len(found[0]) <= FRAME_FULL_BYTES or len(messages) == 1:
            return found
        half = len(messages) // 2
        return self._frames(messages[:half]) + self._frames(messages[half:])

    def _frame(self, messages: Sequence[Message]) -> bytes:
        body = self._encoder.encode(messages)
        return len(body).to_bytes(_LENGTH_BYTES, "big") + body

    # -- asyncio -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        assert self._transport is not None
        self._transport.write(self._frame([self._hello]))

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        """``flush`` bounds what is unread."""

    def resume_writing(self) -> None: ...

    def data_received(self, data: bytes) -> None:
        if self.over:
            return
        self._unread += data
        try:
            messages = self._take()
            if messages:
                self._received(messages)
        except ProtocolError as error:
            self.give_up(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("its connection was lost" if exc is None else f"its connection was lost: {exc}")

    # -- what comes --------------------------------------------------------------------------------------------

    def _take(self) -> list[Any]:
        """The messages of all frames that are complete."""
        unread, messages, at = self._unread, [], 0
        while len(unread) - at >= _LENGTH_BYTES:
            length = int.from_bytes(unread[at : at + _LENGTH_BYTES], "big")
            if length > FRAME_MAX_BYTES:
                raise ProtocolError(f"a frame of {length} bytes; allowed: {FRAME_MAX_BYTES}")
            if len(unread) - at - _LENGTH_BYTES < length:
                break
            at += _LENGTH_BYTES
            frame = bytes(unread[at : at + length])
            at += length
            if not self.up:
                self._greet(frame)
                continue
            try:
                messages += self._decoder.decode(frame)
            except (msgspec.MsgspecError, ValueError) as error:
                raise ProtocolError(f"a frame that cannot be read: {error}") from None
        if at:
            del unread[:at]
        return messages

    def _greet(self, frame: bytes) -> None:
        try:
            (hello,) = msgspec.msgpack.decode(frame, type=list[Hello])
        except (msgspec.MsgspecError, ValueError):
            raise ProtocolError(f"it does not speak {NAME}") from None
        lowest, own = hello.version_min or hello.version, self._hello
        own_lowest = own.version_min or own.version
        if hello.name != NAME or hello.version < own_lowest or lowest > own.version:
            theirs, ours = _versions(lowest, hello.version), _versions(own_lowest, own.version)
            raise ProtocolError(f"it speaks {hello.name} {theirs}; this is {NAME} {ours}")
        self.version = min(hello.version, own.version)
        self._greeted(hello)
        self.up = True
        self._opened()
        self.flush()

    def give_up(self, why: str) -> None:
        """The other end cannot be spoken with."""
        if self._seldom.is_due(why, self._loop.time()):
            log.error("the connection to %s is closed: %s", self.name, why)
        if self._transport is not None:
            self._transport.abort()
        self._end(why)

    def _end(self, why: str) -> None:
        if not self.over:
            self.over, self.up = True, False
            for handle in (self._flushes, self._rides):
                if handle is not None:
                    handle.cancel()
            self._unsent.clear()
            self._closed(why)


def _versions(lowest: int, highest: int) -> str:
    return f"version {highest}" if lowest >= highest else f"versions {lowest} to {highest}"
