"""A relay as a process of its own, on the port that all relays share.

It joins the brain first, and listens once it knows what the brain knows of engines and models. It ends when the brain
tells it to, with a grace period for what is under way, and at once when the brain is gone: its socket closes however
that comes about, ``kill -9`` included.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time

from chiron.gateway.port import messages as m
from chiron.gateway.processes.fork_server import RelayStart
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.keys import KeyRing
from chiron.gateway.relay.passing import Passing
from chiron.gateway.relay.relay import Relay
from chiron.gateway.reporting.metrics import LoopLag
from chiron.gateway.serving import served_models, server_limits, tls_context
from chiron.gateway.settings import ServeConfig
from chiron.net.clock import LiveClock
from chiron.net.files import files_open
from chiron.net.loop import run_on_loop
from chiron.net.server import HttpServer, serve

log = logging.getLogger("chiron.relay")

SWITCH_INTERVAL_S = 0.0005


class RelayServer:
    """A relay with its listening socket. ``over`` is set when there is nothing left to do."""

    def __init__(self, config: ServeConfig, start: RelayStart) -> None:
        """To be made on the loop that runs it."""
        loop = asyncio.get_running_loop()
        self.over = asyncio.Event()
        self.clock = LiveClock(loop, time_s=time.monotonic)
        self.relay = Relay(
            clock=self.clock,
            models=Models(served_models(config)),
            kinds=[kind for model in config.models for kind in model.kinds],
            keys=KeyRing(config.keys, config.admin_key_hash, admin_open=config.server.loopback),
            limits=config.limits,
            closed=self._brain_gone,
            own_hosts=config.server.own_hosts,
            ready=self._ready,
            stop=self._stop,
            health=self._health,
        )
        self._config = config
        self._start = start
        self._lag = LoopLag(loop)
        self._server: HttpServer | None = None
        self._task: asyncio.Task[None] | None = None

    async def join(self, brain: socket.socket) -> None:
        """Speak with the brain, which is at the other end of this socket."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self.relay.uplink.wire, sock=brain)

    def _ready(self) -> None:
        """All that the brain knows is known here."""
        self._task = asyncio.get_running_loop().create_task(self._listen())

    async def _listen(self) -> None:
        config, front = self._config, self.relay.front
        try:
            self._server = await serve(
                front.handle,
                host=config.server.host,
                port=self._start.port,
                ssl=tls_context(config),
                limits=server_limits(config, self._start.relays),
                streamed=Passing(self._start.api_path).handle,
                is_app=lambda incoming: not front.takes(incoming),
                screen=front.screen,
                reuse_port=True,
            )
        except Exception:
            log.exception("the relay cannot listen")
            self.over.set()
            return
        self.relay.uplink.tell_listening(self._server.port, os.getpid())

    def _health(self) -> m.Health:
        connections = len(self._server.connections) if self._server is not None else 0
        return m.Health(connections, files_open(), self._lag.worst_s)

    def _stop(self, grace_s: float) -> None:
        self.relay.front.draining = True
        self._task = asyncio.get_running_loop().create_task(self._close(grace_s))

    async def _close(self, grace_s: float) -> None:
        if self._server is not None:
            await self._server.close(grace_s)
        self.relay.uplink.wire.close("the relay stops")
        self.over.set()

    def _brain_gone(self, why: str) -> None:
        if not self.over.is_set():
            log.log(logging.DEBUG if self.relay.front.draining else logging.ERROR, "the relay ends: %s", why)
        self.over.set()

    async def close(self) -> None:
        """Cut off whatever there is."""
        self._lag.close()
        self.clock.stop()
        if self._server is not None:
            await self._server.close(0)
        for upstream in self.relay.uplink.upstreams.values():
            await upstream.origin.close()


def run_relay(config: ServeConfig, brain: socket.socket, start: RelayStart) -> int:
    """In a fresh process, until it is over. Returns its exit status."""
    # The terminal's ctrl-C and a service manager's SIGTERM reach every process; the brain tells relays what to do.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_INTERVAL_S)

    async def main() -> None:
        server = RelayServer(config, start)
        await server.join(brain)
        await server.over.wait()
        await server.close()

    try:
        run_on_loop(main())
    except Exception:
        log.exception("relay %d failed", os.getpid())
        return 1
    return 0
