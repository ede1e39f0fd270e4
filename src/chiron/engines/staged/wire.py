"""Frames over a connection: two lengths, a msgpack header, raw bytes.

What arrives is read into one buffer, of which whole frames are taken; a long body gets memory of its own, into which
the rest is received, so that nothing of it is copied twice. A frame that is too long or cannot be read ends the
connection with a reason.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from chiron.engines.staged.errors import StagedModelError
from chiron.engines.staged.messages import BODY_MAX_BYTES, HEADER_MAX_BYTES, MAGIC, Message

log = logging.getLogger("chiron.staged")

_LENGTHS = struct.Struct("<II")
_READ_BYTES = 256 << 10
_UNREAD_MAX_BYTES = 2 << 30
"""What the other end may have left unread."""
_HELLO_MAX_BYTES = 64 << 10
"""Of the first frame, which has no body: before it nobody knows who sends."""


class FrameWire(asyncio.BufferedProtocol):
    """One end. ``received`` gets each message with its body, and may raise ValueError, which ends the connection."""

    def __init__(
        self,
        kind: Any,
        *,
        opened: Callable[[FrameWire], None],
        received: Callable[[Any, memoryview], None],
        closed: Callable[[str], None],
        speaks_first: bool,
    ) -> None:
        """``kind``: of messages that the other end may send. ``speaks_first``: sends the magic bytes."""
        self.over = False
        self.body_max = BODY_MAX_BYTES
        """Of what the other end may send."""
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._encoder = msgspec.msgpack.Encoder()
        self._opened, self._received, self._closed = opened, received, closed
        self._speaks_first = speaks_first
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(_READ_BYTES)
        self._filled = 0
        self._greeted = speaks_first
        self._known = False
        """The first message was taken."""
        self._long: bytearray | None = None
        """A frame that is longer than the buffer, without its lengths."""
        self._long_filled = 0
        self._long_header = 0

    def send(self, message: Message, *body: bytes | memoryview) -> None:
        """The memory of a body must not change afterwards."""
        if self.over or self._transport is None:
            return
        header = self._encoder.encode(message)
        length = sum(len(each) for each in body)
        self._transport.writelines([_LENGTHS.pack(len(header), length), header, *body])
        if self._transport.get_write_buffer_size() > _UNREAD_MAX_BYTES:
            self.abort(f"it has left more than {_UNREAD_MAX_BYTES} bytes unread")

    def abort(self, why: str) -> None:
        """At once; what is on its way in either direction is lost."""
        if self._transport is not None:
            self._transport.abort()
        self._end(why)

    def close(self) -> None:
        """Once all is written."""
        if self._transport is not None:
            self._transport.close()
        self._end("it was closed here")

    # -- asyncio -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        assert self._transport is not None
        wire = self._transport.get_extra_info("socket")
        if wire is not None:
            with suppress(OSError):
                wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._speaks_first:
            self._transport.write(MAGIC)
        self._opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._long is not None:
            return memoryview(self._long)[self._long_filled :]
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self.over:
            return
        try:
            if self._long is not None:
                self._long_filled += nbytes
                if self._long_filled == len(self._long):
                    frame, self._long = self._long, None
                    self._take(memoryview(frame), self._long_header)
                return
            self._filled += nbytes
            self._take_all()
        except (ValueError, msgspec.MsgspecError) as error:
            self.abort(f"it broke the protocol: {error}")

    def feed(self, data: bytes) -> None:
        """What was read before this end took the connection over."""
        view = memoryview(data)
        while view and not self.over:
            into = self.get_buffer(len(view))
            count = min(len(into), len(view))
            into[:count] = view[:count]
            self.buffer_updated(count)
            view = view[count:]

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("its connection was closed" if exc is None else f"its connection was lost: {exc}")

    # -- frames ------------------------------------------------------------------------------------------------

    def _take_all(self) -> None:
        at, size = 0, _LENGTHS.size
        if not self._greeted:
            if self._filled < len(MAGIC):
                return
            if self._buffer[: len(MAGIC)] != MAGIC:
                raise ValueError("it does not begin as a head does")
            self._greeted, at = True, len(MAGIC)
        while self._filled - at >= size and not self.over:
            header, body = _LENGTHS.unpack_from(self._buffer, at)
            most = (HEADER_MAX_BYTES, self.body_max) if self._known else (_HELLO_MAX_BYTES, 0)
            if header > most[0] or body > most[1]:
                raise ValueError(f"a frame of {header} and {body} bytes; allowed: {most[0]} and {most[1]}")
            if self._filled - at - size >= header + body:
                # Bodies are kept by whoever gets them, and the buffer is used again.
                frame = memoryview(bytearray(memoryview(self._buffer)[at + size : at + size + header + body]))
                at += size + header + body
                self._take(frame, header)
            elif size + header + body > len(self._buffer):
                have = self._filled - at - size
                self._long, self._long_filled, self._long_header = bytearray(header + body), have, header
                self._long[:have] = memoryview(self._buffer)[at + size : self._filled]
                self._filled = 0
                return
            else:
                break
        if at:
            left = self._filled - at
            self._buffer[:left] = self._buffer[at : self._filled]
            self._filled = left

    def _take(self, frame: memoryview, header: int) -> None:
        self._received(self._decoder.decode(frame[:header]), frame[header:])
        self._known = True

    def _end(self, why: str) -> None:
        if not self.over:
            self.over = True
            self._closed(why)


def read_tls(make: Callable[[Path, Path, Path], ssl.SSLContext], options: argparse.Namespace) -> ssl.SSLContext | None:
    """By the options ``--tls-...``; None without them. Raises StagedModelError."""
    if options.tls_cert is None:
        return None
    for name in ("tls_cert", "tls_key", "tls_ca"):
        option, file = f"--{name.replace('_', '-')}", getattr(options, name)
        try:
            file.read_bytes()
        except OSError as error:
            raise StagedModelError(f"{option} {file}: cannot be read: {error.strerror}") from None
    try:
        return make(options.tls_cert, options.tls_key, options.tls_ca)
    except OSError as error:
        files = f"--tls-cert {options.tls_cert}, --tls-key {options.tls_key}, --tls-ca {options.tls_ca}"
        raise StagedModelError(f"{files}: not a certificate, its key and an authority: {error}") from None


def tls_server(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """Both ends show a certificate of this authority. Raises OSError (``ssl.SSLError`` is one)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _with_files(context, certificate, key, authority)


def tls_client(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """The other end's certificate must be for the host that is called."""
    return _with_files(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, key, authority)


def _with_files(context: ssl.SSLContext, certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key, password="")
    context.load_verify_locations(authority)
    return context
