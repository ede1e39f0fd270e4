"""Connections between gateways: TLS in which each end shows a certificate of the same authority, or there is none.

What a connection is for is said in the handshake (ALPN): a relay's messages, or a request to the leader's HTTP server.
Certificates that are renewed count for connections that are made from then on.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from chiron.gateway.settings import GatewaysSettings
from chiron.net.renewing import RenewingContext

RELAY, API = "chiron-relay", "chiron-api"
"""What a connection may be for."""
HANDSHAKE_S = 5.0
WRITE_HIGH_BYTES = 256 << 10


def server_context(settings: GatewaysSettings) -> ssl.SSLContext:
    """Raises OSError (``ssl.SSLError`` is one) for files that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([RELAY, API])
    return _with_files(context, settings)


def client_context(settings: GatewaysSettings, purpose: str) -> ssl.SSLContext:
    """It also requires the certificate of the other end to be for the host that was asked for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols([purpose])
    return _with_files(context, settings)


def renewing_server(settings: GatewaysSettings) -> RenewingContext:
    return RenewingContext(lambda: server_context(settings), _files(settings))


def renewing_client(settings: GatewaysSettings, purpose: str) -> RenewingContext:
    return RenewingContext(lambda: client_context(settings, purpose), _files(settings))


def _files(settings: GatewaysSettings) -> tuple[str, str, str]:
    return settings.certificate, settings.key, settings.ca


def _with_files(context: ssl.SSLContext, settings: GatewaysSettings) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.certificate, settings.key, password="")  # Nobody is there to be asked for one.
    context.load_verify_locations(settings.ca)
    return context


class PipeEnd(asyncio.Protocol):
    """One of two connections of which each gets what the other one reads, with backpressure."""

    def __init__(self, made: Callable[[PipeEnd], None] = lambda end: None) -> None:
        """``made`` is called once it is connected."""
        self.error: Exception | None = None
        """Of a connection that was lost."""
        self.gone = asyncio.Event()
        self._made = made
        self._early = b""
        self._full = False
        """As much waits to be written as may."""
        self._transport: asyncio.Transport | None = None
        self._other: PipeEnd | None = None

    def join(self, other: PipeEnd) -> None:
        """Both are connected; from now on they read."""
        self._other, other._other = other, self
        for end in (self, other):
            if early := end._early:
                end._early = b""
                end.data_received(early)
        for end, its_other in ((self, other), (other, self)):
            if end.gone.is_set():
                its_other.close()
            elif not its_other._full:
                end._resume()

    def close(self) -> None:
        """Once all is written."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """At once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        assert self._transport is not None
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        # Not at once: uvloop begins to read after this call, whatever it does.
        asyncio.get_running_loop().call_soon(self._wait)
        self._made(self)

    def data_received(self, data: bytes) -> None:
        if self._other is None:
            self._early += data  # A little, before it is paused.
        elif self._other._transport is not None:
            self._other._transport.write(data)

    def pause_writing(self) -> None:
        self._full = True
        if self._other is not None:
            self._other._pause()

    def resume_writing(self) -> None:
        self._full = False
        if self._other is not None:
            self._other._resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self.gone.set()
        if self._other is not None:
            self._other.close()

    def _wait(self) -> None:
        """For the other one."""
        if self._other is None:
            self._pause()

    def _pause(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
