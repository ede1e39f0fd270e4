"""A proxy before PostgreSQL that poses as another server, or as a connection pooler.

Only what a server says of itself is changed, in the two answers in which our clients look for it.
"""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from select import select
from threading import Thread

SIGNED_IN = b"R\0\0\0\x08\0\0\0\0"
READY = b"Z\0\0\0\x05I"
NUMBER = re.compile(rb"K\0\0\0\x0c....", re.DOTALL)
VERSION = re.compile(rb"S....server_version\0[^\0]*\0", re.DOTALL)
ONE_VALUE = re.compile(rb"D....\0\x01....[0-9]+", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pose:
    version: str = ""
    """What it says it is; empty: what it is."""
    pools: bool = False
    """It gives connections numbers of its own."""
    shares: bool = False
    """All connections have one session, or so they are told."""


class PosingProxy:
    def __init__(self, port: int, pose: Pose) -> None:
        self._server_port = port
        self._pose = pose
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        # Its number may be another listener's at once: whoever waits in it has to be out of it first.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
            asked = b""
            while data := (source := select([client, server], [], [])[0][0]).recv(1 << 16):
                if source is client:
                    asked = data
                    server.sendall(data)
                else:
                    client.sendall(self._posed(server, asked, data))

    def _posed(self, server: socket.socket, asked: bytes, data: bytes) -> bytes:
        if SIGNED_IN in data:
            data = _to_its_end(server, data)
            if self._pose.pools or self._pose.shares:
                data = NUMBER.sub(b"K\0\0\0\x0c\x7f\xff\xff\xff", data)
            if self._pose.version:
                data = VERSION.sub(_message(b"S", b"server_version\0" + self._pose.version.encode() + b"\0"), data)
        elif self._pose.shares and b"pg_backend_pid" in asked:
            data = ONE_VALUE.sub(_message(b"D", b"\0\x01\0\0\0\x017"), _to_its_end(server, data))
        return data


def _to_its_end(server: socket.socket, data: bytes) -> bytes:
    while READY not in data and (more := server.recv(1 << 16)):
        data += more
    return data


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + (4 + len(body)).to_bytes(4, "big") + body
