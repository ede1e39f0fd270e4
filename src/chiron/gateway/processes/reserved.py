"""An address that several processes listen on, kept from others."""

from __future__ import annotations

import socket


class Port:
    """Sockets that have the address and listen to nobody."""

    def __init__(self, sockets: list[socket.socket], number: int) -> None:
        self.number = number
        self._sockets = sockets

    def close(self) -> None:
        for each in self._sockets:
            each.close()


def reserve(host: str, port: int) -> Port:
    """Raises OSError: it is in use, or not ours. 0 is any that is free."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            if port:
                with socket.socket(family, kind, protocol) as probe:  # Another gateway's relays would let us in.
                    _bind(probe, (address[0], port, *address[2:]))
            wire = socket.socket(family, kind, protocol)
            sockets.append(wire)
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _bind(wire, (address[0], port, *address[2:]))
            port = port or wire.getsockname()[1]
    except OSError:
        for each in sockets:
            each.close()
        raise
    return Port(sockets, port)


def _bind(wire: socket.socket, address: tuple[object, ...]) -> None:
    if wire.family == socket.AF_INET6:
        wire.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # As asyncio listens.
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    wire.bind(address)
