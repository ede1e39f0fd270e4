"""A TCP proxy that cuts connections at a COMMIT, or passes nothing on for a while.

Each connection has one thread, and whatever is cut is cut before anybody can hear of it: no test has to win a race.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from select import select
from threading import Event, Lock, Thread
from typing import Literal

When = Literal["before", "after", "answered"]
"""Before the server hears of the COMMIT, before the client hears the answer, or when it is about to hear it."""


class CuttingProxy:
    """In front of a server on loopback."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._when: When | None = None
        self._of = ""
        self._commits_before = 0
        self._then_down = False
        self._down = False
        self._passing = Event()
        self._passing.set()
        self._lock = Lock()
        self._clients: set[socket.socket] = set()
        self.was_cut = Event()
        self._accepting = Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def cut(self, when: When, *, of: str = "chiron writer", commits_before: int = 0, down: bool = False) -> None:
        """Armed for one COMMIT, behind ``commits_before`` others, of clients with ``of`` in their application's name;
        ``was_cut`` is set before anybody can tell. ``down``: everything else is cut too, and nobody gets through until
        ``mend``."""
        with self._lock:
            self.was_cut.clear()
            self._when, self._of, self._commits_before, self._then_down = when, of, commits_before, down

    def hold(self) -> None:
        """Connections stay, and nothing is passed on until ``mend``: a server that hangs."""
        self._passing.clear()

    def mend(self) -> None:
        with self._lock:
            self._down = False
        self._passing.set()

    def close(self) -> None:
        # Its number may be another listener's at once: whoever waits in it has to be out of it first.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self._passing.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._down:
                    client.close()
                    continue
                self._clients.add(client)
            Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        began = bytearray()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._server_port)) as server:
            while self._pass(client, server, began):
                pass
        with self._lock:
            self._clients.discard(client)
            client.close()

    def _pass(self, client: socket.socket, server: socket.socket, began: bytearray) -> bool:
        """Whether the connection lives on. ``began``: what the client sent first, its application's name among it."""
        source = select([client, server], [], [])[0][0]
        data = source.recv(1 << 16)
        self._passing.wait()
        if not data or self._down:
            return False
        if source is server:
            client.sendall(data)
            return True
        if len(began) < 1024:
            began += data
        when = self._armed_for(client, bytes(began), data)
        if when != "before":
            server.sendall(data)
        if when in ("after", "answered"):
            answer = b""
            while b"COMMIT" not in answer and (more := server.recv(1 << 16)):
                answer += more
            if when == "answered":
                client.sendall(answer)
        return when is None

    def _armed_for(self, client: socket.socket, began: bytes, data: bytes) -> When | None:
        with self._lock:
            if self._when is None or b"COMMIT" not in data or self._of.encode() not in began:
                return None
            if self._commits_before:
                self._commits_before -= 1
                return None
            when, self._when = self._when, None
            self.was_cut.set()
            if self._then_down:
                self._down = True
                for other in self._clients - {client}:
                    with suppress(OSError):
                        other.shutdown(socket.SHUT_RDWR)
            return when
