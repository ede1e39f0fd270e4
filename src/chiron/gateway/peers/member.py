"""The life of a brain that is one of several gateways': it stands by, leads, and hands over.

The lease is kept on a loop of its own: it is renewed also while this process computes for long, or is slow to start.
One that computes for ``HANGS_S`` hangs, and is over.

It leads at most once: a leader that is over ends at once, and the keeper starts it anew, standing by. One that is told
to stop hands over first: it stops deciding, closes the store and gives the lease back, so that another gateway leads
while this one's relays let their requests end; it hands their connections on until they have.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from chiron.gateway.peers.door import Door
from chiron.gateway.peers.election import election
from chiron.gateway.peers.leadership import Leadership, Peer
from chiron.gateway.peers.shared_models import IN_FORCE, Models, SharedModels
from chiron.gateway.peers.standby import Standby
from chiron.gateway.peers.wires import API, RELAY, renewing_client, renewing_server
from chiron.gateway.processes.fence import OVER, Fence, machine_s
from chiron.gateway.processes.start import BrainStart
from chiron.gateway.processes.workers import STOP_S
from chiron.gateway.service import Service, save
from chiron.gateway.settings import GatewaysSettings, ServeConfig
from chiron.net.own_loop import OwnLoop
from chiron.store.directory import hold
from chiron.store.lease import LEADER, Held, Leads
from chiron.store.postgres.learned import PostgresLearned
from chiron.store.postgres.settings import PostgresSettings

log = logging.getLogger("chiron.gateways")

HANGS_S = 5.0
BEAT_S = 0.25
"""Between two signs of life of the loop that decides."""


class Member:
    """``run`` is its life, until it is cancelled."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        advise: bool,
        brain: BrainStart,
        nonce: str,
        say: Callable[[str], None],
        say_at_once: Callable[[str], None],
        on_ready: Callable[[str], None],
        relays_ended: asyncio.Event,
        leading: Callable[[Service], None] = lambda service: None,
        hands_over: Callable[[], bool] = lambda: False,
        models: Models | None = None,
    ) -> None:
        """``nonce`` is the keeper's, ``say`` tells it something, and so does ``say_at_once``, from any thread;
        ``on_ready`` hears the URL once clients can come; ``leading`` and ``hands_over`` as ``service.run`` has them;
        ``models``: they may change, and whoever leads says which are in force."""
        settings = config.gateways
        assert settings is not None
        assert isinstance(config.store, PostgresSettings)
        host, port = settings.address
        self._config = config
        self._settings: GatewaysSettings = settings
        self._advise = advise
        self._brain = brain
        self._say = say
        self._on_ready = on_ready
        self._relays_ended = relays_ended
        self._leading = leading
        self._hands_over = hands_over
        self._holder = Peer(name=settings.name, host=host, port=port).holder(nonce)
        self._election = election(settings, config.store, self._holder)
        self._fence = Fence(lambda: _end("the lease is over"))
        self._leadership = Leadership(
            lease=self._election.lease,
            holder=self._holder,
            lease_s=settings.lease_s,
            fence=self._fence,
            told=lambda until_s: say_at_once(f"until {until_s:.3f}"),
            relays=lambda: self._relays,
            works=lambda: machine_s() - self._beat_s < HANGS_S,
        )
        self._certificates = renewing_server(settings)  # Not only once it leads: files may be of no use by then.
        self._own_loop = OwnLoop("lease")
        self._relays: frozenset[str] | None = None
        """Those that whoever follows has to wait for."""
        self._beat_s = machine_s()
        self._service: Service | None = None
        self._door: Door | None = None
        self._saved = PostgresLearned(config.store, IN_FORCE) if models is not None else None
        self._shared = (
            SharedModels(models, self._saved, self._led, late=lambda: self._standby.cut_relays())
            if models and self._saved
            else None
        )
        self._standby = Standby(
            start=brain.relays,
            contexts={purpose: renewing_client(settings, purpose) for purpose in (RELAY, API)},
            leader=self._whom_to_reach,
            lost=lambda: self._own_loop.call(self._leadership.look),
        )

    def _led(self) -> tuple[Peer | None, int]:
        return self._leadership.leader, self._leadership.term

    def _whom_to_reach(self) -> Peer | None:
        """Who leads, once its models are known here."""
        return self._leadership.leader if self._shared is None or self._shared.known else None

    async def run(self) -> None:
        directory = hold(self._config.data)  # Event log and result are this gateway's.
        following = asyncio.get_running_loop().create_task(self._shared.follow()) if self._shared is not None else None
        try:
            await self._standby.open()
            self._brain.opened()
            self._say("ready")
            self._on_ready(_url(self._config, self._brain))
            if self._brain.follows:
                await self._own_loop.run(self._leadership.release)  # Whoever had it here before is gone.
            held = await self._own_loop.run(self._leadership.take)
            await self._standby.close()
            await self._lead(held)
        except asyncio.CancelledError:
            if not self._hands_over():  # Else they go on with the next brain of this gateway.
                await self._let_relays_end()
            raise
        finally:
            await self._standby.close()
            await self._own_loop.run(self._close_election)
            await self._own_loop.close()
            if following is not None and self._saved is not None:
                following.cancel()
                await asyncio.wait((following,))
                await self._saved.close()
            os.close(directory)

    async def _lead(self, held: Held) -> None:
        """Until this is cancelled, or the lease is over, which ends the process."""
        token = held.token
        log.info("this gateway leads (term %d)", token)
        self._beat()
        keeping = asyncio.get_running_loop().create_task(self._own_loop.run(self._keep))
        leads = Leads(name=LEADER, holder=self._holder, token=token)
        start = replace(
            self._brain,
            opened=lambda: self._open_door(service),
            follows=True,
            term=token,
            leads=leads,
            settle_s=self._settings.settle_s,
            expects=0,
            awaited=held.relays,
            superseded=self._heard_of_another,
            time_s=self._fence.time_s,
        )
        service: Service | None = None
        started = False
        try:
            if self._shared is not None:
                self._config = await self._shared.config() or self._config
            service = Service(self._config, advise=self._advise, brain=start)
            self._service = service  # From now on others are told which relays come, also while it starts.
            await service.start()
            started = True
            self._leading(service)
            await asyncio.Event().wait()
        finally:
            if self._door is not None:
                self._door.close()
            if service is not None:
                await service.hand_over()
            keeping.cancel()
            await asyncio.wait((keeping,))
            await self._own_loop.run(self._leadership.release)
            log.info("this gateway has handed over")
            if service is not None and started:
                save(service)

    def _heard_of_another(self, term: int) -> None:
        """From a relay, which is not to be believed: only the lease says who leads."""
        self._own_loop.call(self._leadership.look)

    async def _close_election(self) -> None:
        await self._election.close()

    def _open_door(self, service: Service | None) -> None:
        """As early as it may be: what relays of others tell is waited for, and the rest of the start is not short."""
        assert service is not None
        api_path = self._brain.relays.api_path
        self._door = Door(context=self._certificates, relay=service.accept_relay, api_path=api_path)
        self._door.open(*self._settings.listen_address)

    async def _keep(self) -> None:
        """On the lease's loop, until it is cancelled."""
        try:
            _end(await self._leadership.keep())
        except Exception as error:
            _end(f"{error!r}")

    def _beat(self) -> None:
        self._beat_s = machine_s()
        if self._service is not None:
            self._relays = self._service.known_relays()
        asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    async def _let_relays_end(self) -> None:
        """Told to stop: while they have requests, they need whoever leads now."""
        await self._standby.open()
        watching = asyncio.get_running_loop().create_task(self._own_loop.run(self._leadership.watch))
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.server.grace_s + STOP_S):
                await self._relays_ended.wait()
        watching.cancel()


def _url(config: ServeConfig, brain: BrainStart) -> str:
    host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
    return f"{'https' if config.server.tls else 'http'}://{host}:{brain.relays.port}"


def _end(why: str) -> None:
    """Nothing more is decided, written or sent."""
    log.error("this gateway leads no more: %s", why)
    os._exit(OVER)
