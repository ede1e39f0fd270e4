"""What one peer may hold of a server's memory and connections, and which request goes first when they are short.

A peer is an address (of IPv6 a /64, which is what one customer has), and also what the handler names as the source of
a request, such as an API key. Behind a trusted proxy the address is the one that the proxy reports; the proxy's own
connections count against no peer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

LOOPBACK = ("127.0.0.0/8", "::1/128")
"""Proxies are trusted there by default: a local process could do worse than forge an address."""

Network = IPv4Network | IPv6Network


class Proxies:
    """Addresses that are trusted to say where a request is from."""

    def __init__(self, networks: Iterable[str] = LOOPBACK) -> None:
        """Raises ValueError for what is no address or network."""
        self._networks: tuple[Network, ...] = tuple(ip_network(each, strict=False) for each in networks)
        self._trusted = lru_cache(4096)(self._is_trusted)

    def peer_of(self, address: str) -> str:
        """The peer that a connection is from; "": none, as of a trusted proxy or a unix socket."""
        return "" if not address or self._trusted(address) else _peer(address)

    def forwarded(self, chain: Sequence[bytes]) -> str:
        """The peer that a trusted proxy speaks for, by the values of ``X-Forwarded-For``: the last address that is no
        trusted proxy itself, since anything further left may be forged. "": it names none."""
        for entry in reversed(b",".join(chain).decode("latin-1").split(",")):
            address = entry.strip().strip('"')
            address = address[1:].partition("]")[0] if address.startswith("[") else address
            if address.count(":") == 1:
                address = address.partition(":")[0]
            if not address or not self._trusted(address):
                return _peer(address) if address else ""
        return ""

    def _is_trusted(self, address: str) -> bool:
        try:
            found = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        return any(found in network for network in self._networks)


@lru_cache(4096)
def _peer(address: str) -> str:
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return "address unknown"
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            return f"address {found.ipv4_mapped}"
        return f"addresses {ip_network((int(found) >> 64 << 64, 64))}"
    return f"address {found}"


class Shares:
    """How much each peer holds of something, of which there is ``most`` in all."""

    def __init__(self, most: int, share: float, least: int = 1) -> None:
        """One peer may hold ``share`` of it, and ``least`` in any case."""
        self.each = max(least, int(most * share))
        self.held: Counter[str] = Counter()

    def add(self, peers: Iterable[str], amount: int) -> None:
        for peer in peers:
            self.held[peer] += amount
            if self.held[peer] <= 0:
                del self.held[peer]

    def over(self, peers: Iterable[str], more: int = 0) -> str:
        """The first of these that holds more than its share; "": none does."""
        return next((peer for peer in peers if self.held[peer] + more > self.each), "")
