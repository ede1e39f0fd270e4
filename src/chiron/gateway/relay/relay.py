"""One relay: clients' requests in, engines' answers out, a brain elsewhere. No listening socket and no process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import RIDE_S
from chiron.gateway.relay.admission import Models, ServedModel
from chiron.gateway.relay.cross_site import CrossSiteGuard
from chiron.gateway.relay.front import Front
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.uplink.joining import Connect, StaySettings
from chiron.gateway.relay.uplink.uplink import Uplink
from chiron.gateway.relay.upstream import address_of
from chiron.gateway.settings import KindSettings, LimitSettings
from chiron.net.clock import LiveClock
from chiron.net.memory import MemoryNetwork


class Relay:
    """``front.handle`` takes requests; ``uplink.wire`` is the protocol of the connection to the brain."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        models: Models,
        kinds: Sequence[KindSettings],
        keys: KeyRing,
        limits: LimitSettings,
        closed: Callable[[str], None],
        own_hosts: frozenset[str] | None = None,
        ready: Callable[[], None] = lambda: None,
        stop: Callable[[float], None] = lambda grace_s: None,
        health: Callable[[], m.Health] = lambda: m.Health(0, 0, 0.0),
        network: MemoryNetwork | None = None,
        ride_s: float = RIDE_S,
        connect: Connect | None = None,
        stay: StaySettings | None = None,
        models_change: bool = False,
        gateway: str = "",
    ) -> None:
        """``closed`` hears why the brain is gone, ``ready`` that all it knows is known here, ``stop`` that it is to
        end, with a grace period (s).

        With ``connect`` the relay outlives its brain, as ``stay`` says: ``uplink.link.begin()`` has it find one, and
        another one whenever that is gone. ``ready`` is then called for the first only, and ``closed`` never.
        Without it ``uplink.wire`` is the protocol of the one connection that there is. ``models_change``: another brain
        may have models that are not known here yet; a request for such a one waits for it a while."""
        self._models = models
        by_name = self._kinds = {each.kind.name: each for each in kinds}
        self.uplink = Uplink(
            clock=clock,
            models=models,
            address_of=lambda model, kind, url: address_of(by_name[kind], model, url),
            engine_stall_s=limits.engine_stall_s,
            request_timeout_s=limits.request_timeout_s,
            retry_after_s=limits.retry_after_s,
            closed=closed,
            drain=self._drain,
            ready=ready,
            joined=lambda: self.front.look_again(),
            stop=stop,
            health=health,
            network=network,
            ride_s=ride_s,
            connect=connect,
            stay=stay,
            gateway=gateway,
        )
        self.front = Front(
            desk=self.uplink,
            models=models,
            keys=keys,
            foreign=CrossSiteGuard(keys, own_hosts),
            responded=self.uplink.responded,
            retry_after_s=limits.retry_after_s,
            models_may_come=lambda: models_change and not self.uplink.has_brain,
        )

    def renew(self, models: Mapping[str, ServedModel], kinds: Sequence[KindSettings]) -> None:
        """Other models than before, for the next brain. What was learned of those that stay is kept, and what runs
        goes on."""
        self._models.renew(models)
        known = dict(self._kinds)
        self._kinds.clear()
        self._kinds.update({each.kind.name: each for each in kinds})

        def changed(kind: str, model: str) -> bool:
            now = self._kinds.get(kind)
            return now is None or address_of(now, model, "") != address_of(known[kind], model, "")

        self.uplink.instances.readdress(changed)

    def _drain(self, on: bool) -> None:
        self.front.draining = on
