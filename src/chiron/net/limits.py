"""Bounds of an HTTP server."""

from __future__ import annotations

from dataclasses import dataclass

from chiron.net.shares import LOOPBACK


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Bounds of what one client may take. Bytes and seconds."""

    body_max_bytes: int = 32 * 1024 * 1024
    """Of a body that a handler gets whole; streamed ones bound themselves."""
    bodies_max_bytes: int = 1024 * 1024 * 1024
    """Of those of all requests that are not answered yet, together."""
    header_max_bytes: int = 64 * 1024
    """Request line and headers together."""
    headers_max: int = 100
    host_required: bool = False
    """A request of HTTP/1.1 without the header Host is refused, as the protocol wants it. A second one always is."""
    connections_max: int = 10_000
    peer_share: float = 1.0
    """Of ``connections_max`` and ``bodies_max_bytes``, what one peer may hold."""
    trusted_proxies: tuple[str, ...] = LOOPBACK
    """Addresses and networks of proxies, which are no peers themselves."""
    files_max: int = (1 << 31) - 1
    """File descriptors of the process: those with the last of these numbers are not for clients."""
    idle_s: float = 75.0
    """A connection without a request is closed after this."""
    header_timeout_s: float = 20.0
    """From the first byte of a head to its last."""
    body_timeout_s: float = 120.0
    """Longest silence inside a body; one that a handler gets whole may not trickle either."""
    stall_s: float = 60.0
    """A client that takes nothing of a waiting answer for this long is cut off."""
