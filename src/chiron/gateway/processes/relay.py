"""A relay as a process of its own, on the port that all relays share.

It joins the brain first, and listens once it knows what the brain knows of engines and models. It outlives its brain
(``StaySettings``): the next one is at the same Unix socket. It ends when the brain or the keeper tells it to, with a
grace period for what is under way, and at once when the keeper is gone, ``kill -9`` included: its socket closes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from chiron.core.backoff import doubled_s
from chiron.gateway.port import messages as m
from chiron.gateway.processes.kept import KeeperLink
from chiron.gateway.processes.start import RelayStart
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.passing import Passing
from chiron.gateway.relay.relay import Relay
from chiron.gateway.relay.uplink.joining import StaySettings
from chiron.gateway.reporting.metrics import LoopLag
from chiron.gateway.serving import collect_rarely, models_of, served_models, server_limits, tls_context
from chiron.gateway.settings import ServeConfig
from chiron.net.clock import LiveClock
from chiron.net.files import files_open
from chiron.net.loop import run_on_loop
from chiron.net.server import HttpServer, serve

log = logging.getLogger("chiron.relay")

SWITCH_INTERVAL_S = 0.0005
CONNECT_MIN_S, CONNECT_MAX_S = 0.05, 0.5
"""Between two tries to reach the brain."""


class RelayServer:
    """A relay with its listening socket. ``over`` is set when there is nothing left to do."""

    def __init__(
        self,
        config: ServeConfig,
        start: RelayStart,
        *,
        stay: StaySettings | None = None,
        renewed: Callable[[], ServeConfig | None] | None = None,
    ) -> None:
        """To be made on the loop that runs it. With ``stay`` it outlives its brain. ``renewed`` is asked before each
        brain: the config, if other models are in it than the last time; None: they never change."""
        loop = asyncio.get_running_loop()
        self.over = asyncio.Event()
        self.clock = LiveClock(loop, time_s=time.monotonic)
        self.relay = Relay(
            clock=self.clock,
            models=models_of(config),
            kinds=[kind for model in config.models for kind in model.kinds],
            keys=KeyRing(config.keys, config.admin_key_hash, admin_open=config.server.loopback),
            limits=config.limits,
            closed=self._brain_gone,
            own_hosts=config.server.own_hosts,
            ready=self._ready,
            stop=self.stop,
            health=self._health,
            connect=self._connect if stay is not None else None,
            stay=stay,
            models_change=renewed is not None,
            gateway=config.gateways.name if config.gateways is not None else "",
        )
        self._config = config
        self._renewed = renewed or (lambda: None)
        self._stays = stay is not None
        self._start = start
        self._stopping = False
        self._lag = LoopLag(loop)
        self._server: HttpServer | None = None
        self._task: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Speak with the brain, once it is there."""
        if self._stays:
            self.relay.uplink.link.begin()
            return
        tries = 0
        while not self.over.is_set():
            try:
                await self._connect(lambda: self.relay.uplink.wire)
                return
            except OSError as error:
                log.debug("the brain cannot be reached: %s", error)
            await asyncio.sleep(doubled_s(CONNECT_MIN_S, CONNECT_MAX_S, tries))
            tries += 1

    async def _connect(self, make: Callable[[], Any]) -> None:
        self._renew()
        await asyncio.get_running_loop().create_unix_connection(make, str(self._start.brain_path))
        self._renew()  # This gateway's brain lets nobody through before it has written what the leader serves.

    def _renew(self) -> None:
        config = self._renewed()
        if config is not None:
            self.relay.renew(served_models(config), [kind for model in config.models for kind in model.kinds])

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
                streamed=Passing(
                    str(self._start.api_path),
                    self.relay.uplink.how_it_stands,
                    lambda: self.relay.uplink.serves,
                ).handle,
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

    def stop(self, grace_s: float) -> None:
        """Take no more, let open requests end for so long, and end. The brain says so, or the keeper, or both."""
        if self._stopping:
            return
        self._stopping = self.relay.front.draining = True
        self._task = asyncio.get_running_loop().create_task(self._close(grace_s))

    async def _close(self, grace_s: float) -> None:
        if self._server is not None:
            await self._server.close(grace_s)
        self.relay.uplink.link.close()
        self.relay.uplink.wire.close("the relay stops")
        self.over.set()

    def _brain_gone(self, why: str) -> None:
        if not self.over.is_set():
            log.log(logging.DEBUG if self.relay.front.draining else logging.ERROR, "the relay ends: %s", why)
        self.over.set()

    async def close(self) -> None:
        """Cut off whatever there is."""
        self.relay.uplink.link.close()
        self._lag.close()
        self.clock.stop()
        if self._server is not None:
            await self._server.close(0)
        for upstream in self.relay.uplink.instances.upstreams.values():
            for run in list(upstream.runs.values()):
                run.drop()  # Nobody waits for it, so that its engine was not lost.
            await upstream.origin.close()


def run_relay(
    config: ServeConfig,
    keeper: socket.socket,
    start: RelayStart,
    renewed: Callable[[], ServeConfig | None] | None = None,
) -> int:
    """In a fresh process, until it is over. Returns its exit status. ``renewed`` as ``RelayServer`` has it."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)

    async def main() -> None:
        server = RelayServer(config, start, stay=config.relays, renewed=renewed)

        def gone() -> None:
            start.clear()
            server.over.set()

        link = KeeperLink(stop=lambda number: server.stop(config.server.grace_s), gone=gone)
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=keeper)
        joining = asyncio.ensure_future(server.join())
        collect_rarely()
        await server.over.wait()
        joining.cancel()
        await server.close()
        link.close()

    try:
        run_on_loop(main())
    except Exception:
        log.exception("relay %d failed", os.getpid())
        return 1
    return 0
