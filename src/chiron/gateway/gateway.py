"""A gateway between its clients' connections and its engines: no listening socket, no disk, no processes.

``service`` puts it behind a port with a store beside it, over fleets of processes and endpoints. Over emulated engines
in memory (``runtime.emulated``) it is the same path, on any event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from chiron.control.actuators import DirectActuators, NullActuators
from chiron.control.autoscaler import Observer
from chiron.control.plane import ControlPlane
from chiron.control.takeover import SETTLE_S
from chiron.core.ports import Journal, StageSamples
from chiron.core.types import ROLES, Instance, ModelSpec, Request, RequestClass
from chiron.gateway.brain.desk import Desk
from chiron.gateway.brain.relay_link import RelayLink
from chiron.gateway.brain.relays import Relays
from chiron.gateway.instances.engine import InstanceEngine
from chiron.gateway.instances.engines import Engines
from chiron.gateway.instances.scraper import Scraper
from chiron.gateway.port.messages import TERM_SHIFT, VERSION, Known
from chiron.gateway.port.wire import RIDE_S
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.cross_site import CrossSiteGuard
from chiron.gateway.relay.front import Front
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.outages import Outage, Outages
from chiron.gateway.settings import LimitSettings
from chiron.net.clock import LiveClock
from chiron.policies.advise import advising
from chiron.policies.policy import Policy
from chiron.runtime.assembly import Assembly, Attach, Loop
from chiron.runtime.input_log import Inputs, RecordedInputs

log = logging.getLogger("chiron.gateway")

BEFORE_S = 600.0
"""What the clock of a gateway that takes over should show at its start: relays tell of what began before that."""
WATCH_S = 1.0
"""Between two looks for requests that waited too long, at clients and at engines."""


class Adopting:
    """Implements ``Adoption``."""

    def __init__(self, plane: ControlPlane, inputs: Inputs, engines: Engines) -> None:
        self._engines = engines
        self._plane = plane
        self._inputs = inputs
        self.adopt_running = inputs.adopt_running
        self.told_all = inputs.told_all

    @property
    def settling(self) -> bool:
        return self._plane.settling

    def adopt_instance(self, said: Known) -> InstanceEngine | None:
        """Only while a control plane settles: later on it may have given the instance up."""
        plane, engines = self._plane, self._engines
        claim = engines.fleet.adopt(said.kind, said.url) if plane.settling else None
        if claim is None or said.model not in plane.models or said.role not in ROLES:
            return None

        def attach(instance: Instance) -> InstanceEngine:
            claim.begin(instance)
            return engines.attach(instance, said.url)

        self._inputs.adopt_instance(
            said.model,
            said.kind,
            said.role,
            number=said.instance,
            max_batch_size=said.max_batch_size or 1 << 30,
            attach=attach,
            found=claim.found,
        )
        return engines.live.get(said.instance)


class Gateway:
    """``front.handle`` takes requests."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        engines: Engines,
        journal: Journal,
        models: Models,
        specs: Sequence[ModelSpec],
        classes: Sequence[RequestClass],
        policy: Policy,
        keys: KeyRing,
        limits: LimitSettings,
        next_id: Callable[[], int],
        responded: Callable[[int], None],
        own_hosts: frozenset[str] | None = None,
        gpus_max: Mapping[str, int] | None = None,
        observer: Observer | None = None,
        scrape_period_s: float = 1.0,
        capacity_told: Callable[[InstanceEngine, int], None] = lambda engine, tokens: None,
        outage_changed: Callable[[str, Outage | None], None] = lambda model, outage: None,
        stages: Sequence[StageSamples] = (),
        advise: bool = False,
        recording: RecordedInputs | None = None,
    ) -> None:
        """``own_hosts`` as ``ServerSettings`` has them. ``stages`` hear of pipelines after the control plane.
        ``advise``: decisions are only told. ``recording`` writes down what the control plane is told."""
        self.clock = clock
        self.engines = engines
        self.relays: Relays | None = None
        self._models = models
        self._keys = keys
        self._limits = limits
        self._advise = advise
        self._assembly = Assembly(
            clock=clock,
            fleet=engines,
            journal=journal,
            ends=self,
            models=specs,
            classes=classes,
            policy=advising(policy) if advise else policy,
            gpus_max=gpus_max,
            observer=observer,
            actuators=NullActuators() if advise else DirectActuators(),
            sleepers=engines if engines.sleeps and not advise else None,
        )
        self.plane = self._assembly.plane
        self.inputs: Inputs = self.plane
        """Where the control plane is told what happens."""
        self._recording = recording
        if recording is not None:
            recording.plane = self.plane
            self.inputs = recording
        engines.events = engines.leaving = engines.listener = engines.sleep_listener = self.inputs
        self.scraper = Scraper(
            clock=clock,
            samples=self.inputs,
            engines=engines.live,
            period_s=scrape_period_s,
            capacity_told=capacity_told,
            context_told=lambda engine: engines.settle_context(engine.instance.model),
            stages=(self.inputs, *stages),
        )
        self.outages = Outages(
            plane=self.plane,
            report=engines.report,
            outage_wait_s=limits.outage_wait_s,
            retry_after_s=limits.retry_after_s,
            changed=outage_changed,
        )
        self.desk = Desk(
            clock=clock,
            completions=self.inputs,
            queues=self.inputs,
            keys=keys,
            limits=limits,
            outages=self.outages,
            next_id=next_id,
        )
        self.front = Front(
            desk=self.desk,
            models=models,
            keys=keys,
            foreign=CrossSiteGuard(keys, own_hosts),
            responded=responded,
            retry_after_s=limits.retry_after_s,
        )

    def open_to_relays(
        self,
        *,
        responded: Callable[[int, int], None],
        listening: Callable[[RelayLink], None] = lambda link: None,
        left: Callable[[RelayLink, str], None] = lambda link, why: None,
        ride_s: float = RIDE_S,
        term: int = 0,
        superseded: Callable[[int], None] = lambda term: None,
        expects: int = 0,
        protocol: int = VERSION,
        gateway: str = "",
    ) -> Relays:
        """Take requests from relays in other processes, too; arguments as ``Relays`` has them. ``expects``: how many
        there are; 0: that is not known."""
        self.engines.number_from((term << TERM_SHIFT) + 1)
        relays = self.relays = self.engines.relays = Relays(
            clock=self.clock,
            desk=self.desk,
            models=self._models,
            keys=self._keys,
            engines=self.engines.live,
            responded=responded,
            listening=listening,
            left=left,
            ride_s=ride_s,
            term=term,
            superseded=superseded,
            adoption=Adopting(self.plane, self.inputs, self.engines),
            protocol=protocol,
            gateway=gateway,
        )
        relays.expects = expects
        return relays

    def take_over(self, *, settle_s: float = SETTLE_S, awaited: frozenset[str] = frozenset()) -> None:
        """Follow another gateway, before ``begin``: relays tell what runs. Nothing new is placed, created or drained
        before as many relays as there are, or those that are ``awaited`` (by their nonces), have told, or for
        ``settle_s``."""
        self.inputs.take_over(settle_s)
        if self.relays is not None:
            self.relays.awaited = awaited

    def begin(self, initial: Mapping[str, int], *, attach: Attach | None = None, loops: Sequence[Loop] = ()) -> None:
        """Posted; see ``Assembly.begin``."""
        if self._recording is not None:
            self._recording.begin(initial, attached=attach is not None)
        self._assembly.begin(initial, attach=attach, loops=(self.scraper, *loops))
        self.clock.call_later(WATCH_S, self._watch)
        if self.relays is not None:
            self.relays.begin()

    def ended(self, request: Request) -> None:
        """The ``Ends`` port: whoever waits for it is told."""
        try:
            self.desk.ended(request, request.tokens_done or self.engines.tokens_of(request))
        except Exception:
            log.exception("the end of request %s could not be reported", request.id)
            abandon: Callable[[], None] | None = getattr(request.payload, "abandon", None)
            if abandon is not None:
                abandon()  # Better than a client that waits for ever.

    def _watch(self) -> None:
        self.clock.call_later(WATCH_S, self._watch)
        if not self._advise:
            self.inputs.kinds_limited(self.engines.limited())
        self.inputs.kinds_found(self.engines.found())
        self.outages.look(self.clock.now_s)
        self.desk.watch()
        self.engines.watch(self._limits.engine_stall_s)
