"""A TCP proxy that cuts a connection in the middle of a COMMIT: before the server hears of it, or before the client
hears the answer."""

from __future__ import annotations

import socket
from contextlib import suppress
from threading import Event, Thread
from typing import Literal

When = Literal["before", "after"]


class CuttingProxy:
    """In front of a server on loopback. ``cut`` arms it for one COMMIT; ``was_cut`` is set once it happened."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.when: When | None = None
        self.was_cut = Event()
        Thread(target=self._accept, daemon=True).start()

    def cut(self, when: When) -> None:
        self.was_cut.clear()
        self.when = when

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server_port))
            Thread(target=self._pass, args=(client, server, True), daemon=True).start()
            Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, to_server: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                when = self.when if to_server and b"COMMIT" in data else None
                if when is None:
                    target.sendall(data)
                    continue
                self.when = None
                if when == "after":
                    # The client's end goes first, so that the server's answer reaches nobody.
                    source.shutdown(socket.SHUT_RDWR)
                    target.sendall(data)
                    while b"COMMIT" not in (answer := target.recv(1 << 16)) and answer:
                        pass
                self.was_cut.set()
                break
        except OSError:
            pass
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
