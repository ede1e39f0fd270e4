"""A fleet of emulated engines in this process: their own servers, reached over connections in memory.

Starts, sleepers, failures and the bill are the simulator's (``fleet.model``); each instance that is up is what
``python -m chiron.engines.serve.emulated`` runs, with its HTTP, its steps and its metrics page. Only sockets and
processes are missing, so that all of it can run under virtual time. An answer is as long as its request says
(``max_tokens`` with ``ignore_eos``), or drawn from the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from chiron.core.clock import Callback
from chiron.core.types import Engine, Instance, Request
from chiron.engines.model import StepTable
from chiron.engines.profile import Profile
from chiron.engines.serve.emulated_engine import EmulatedEngine, EmulatedSettings
from chiron.engines.serve.http import EngineServer
from chiron.fleet.model import ColdStart, Failures, FleetModel, Sleep
from chiron.fleet.port import Claim, FleetReport, LiveFleetEvents
from chiron.net.clock import LiveClock
from chiron.net.memory import MemoryNetwork
from chiron.net.server import HttpServer, Incoming, ServerLimits

Fault = Callable[[Incoming], bool]
"""Does something else to a request that arrives at an engine; False: it is let through."""


def wire(clock: LiveClock, network_s: float) -> MemoryNetwork:
    """A network of one process whose messages take ``network_s`` each way, by this clock."""

    def carry(message: Callback) -> None:
        def send() -> None:
            clock.call_later(network_s, message)

        clock.post(send)

    return MemoryNetwork(carry)


class EmulatedFleet:
    """Implements ``LiveFleet`` and ``LiveSleepers``; addresses are of its ``network``."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        events: LiveFleetEvents,
        profiles: Mapping[str, Profile],
        cold_start: ColdStart,
        failures: Failures,
        network: MemoryNetwork,
        seed: int = 0,
        settings: EmulatedSettings | None = None,
        fault: Fault = lambda incoming: False,
        notice_s: float = 0.0,
        sleep: Sleep | None = None,
    ) -> None:
        """``profiles`` by kind of instance; ``notice_s`` and ``sleep`` as ``FleetModel`` has them."""
        self.network = network
        self.model = FleetModel(
            clock=clock,
            cold_start=cold_start,
            failures=failures,
            seed=seed,
            make_engine=self._start,
            notice_s=notice_s,
            sleep=sleep,
        )
        self.model.listener = self
        self.model.sleep_listener = events
        sleeps = sleep is not None and sleep.host_memory_gb > 0
        self.sleeping_kinds = frozenset(profiles) if sleeps else frozenset()
        self._clock = clock
        self._events = events
        self._profiles = profiles
        self._times = {name: StepTable(profile) for name, profile in profiles.items()}
        self._settings = settings or EmulatedSettings()
        self._fault = fault
        self._hosted: dict[int, _Hosted] = {}
        self._closing: set[asyncio.Task[None]] = set()

    # -- LiveFleet -----------------------------------------------------------------------------------------------

    def create(self, instance: Instance) -> None:
        self.model.create(instance)

    def remove(self, instance: Instance) -> None:
        self.model.remove(instance)
        self._stop(instance)

    def sleep(self, instance: Instance) -> None:
        self.model.sleep(instance)
        self._stop(instance)

    def keep_asleep(self, kind: str, most: int) -> None:
        self.model.keep_asleep(kind, most)

    def suspect(self, instance: Instance) -> None:
        self.model.suspect(instance)

    def adopt(self, kind: str, url: str) -> Claim | None:
        return None  # They end with this process.

    def report(self) -> FleetReport:
        return FleetReport()

    async def close(self, *, hands_over: bool = False) -> None:
        self.model.close()
        for hosted in list(self._hosted.values()):
            self._stop(hosted.instance)
        while self._closing:
            await asyncio.wait(self._closing)

    # -- what the model of the fleet tells -----------------------------------------------------------------------

    def instance_ready(self, instance: Instance, engine: Engine) -> None:
        self._events.instance_ready(instance, self._hosted[instance.id].url)

    def instance_failed(self, instance: Instance) -> None:
        self._stop(instance)
        self._events.instance_failed(instance, "so it was emulated")

    # -- the rest ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Instances fail at their times from now on."""
        self.model.begin()

    def running(self, instance: Instance) -> str:
        """The address of an instance that has been up since before the start."""
        self.model.attach_running(instance)
        return self._hosted[instance.id].url

    def _start(self, instance: Instance) -> _Hosted:
        kind = instance.kind.name
        engine = EmulatedEngine(
            clock=self._clock,
            number=instance.id,
            name=instance.model,
            profile=self._profiles[kind],
            times=self._times[kind],
            settings=self._settings,
        )
        engine.model.set_max_num_batched_tokens(instance.max_num_batched_tokens)
        front = EngineServer(engine, [instance.model], {"max_model_len": engine.model_len_max})

        def handle(incoming: Incoming) -> None:
            if not self._fault(incoming):
                front.handle(incoming)

        server = HttpServer(handle, ServerLimits(), None, None)
        hosted = self._hosted[instance.id] = _Hosted(instance, engine, server, self.network)
        self.network.listen(hosted.name, server.accept)
        return hosted

    def _stop(self, instance: Instance) -> None:
        hosted = self._hosted.pop(instance.id, None)
        if hosted is not None:
            self.network.forget(hosted.name)
            task = asyncio.get_running_loop().create_task(hosted.server.close(0))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


class _Hosted:
    """An instance's engine and its server. To the model of the fleet it is an engine; who uses it goes to its URL."""

    def __init__(self, instance: Instance, engine: EmulatedEngine, server: HttpServer, network: MemoryNetwork) -> None:
        self.instance = instance
        self.server = server
        self.name = f"instance-{instance.id}"  # A host: models may have names that none can have.
        self.url = f"memory:{self.name}"
        self._engine = engine
        self._network = network

    def fail(self) -> None:
        self._network.cut(self.name)
        self._engine.fail()

    def start(self, request: Request) -> None:
        raise AssertionError(f"requests go to {self.url}")

    def evict(self, request: Request) -> None:
        raise AssertionError(f"requests go to {self.url}")

    def set_max_batch_size(self, max_batch_size: int) -> None:
        raise AssertionError(f"limits go to {self.url}")
