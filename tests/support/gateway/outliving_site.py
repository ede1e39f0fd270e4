"""Relays that outlive their brain, in virtual time: engines, relays and clients stay, brains die and come.

Engines answer a request (prompt ``[number, tokens]``) with so many chunks, a step apart, each with its number in it,
so that what a client got can be compared byte for byte. They count what they run.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from chiron.core.types import Decision, Instance, InstanceKind, ModelSpec, Request, RequestClass
from chiron.fleet.endpoints import EndpointsSource
from chiron.fleet.port import Claim, FleetReport, LiveFleetEvents
from chiron.gateway.brain.relays import Relays
from chiron.gateway.gateway import BEFORE_S, Gateway
from chiron.gateway.instances.engines import Engines
from chiron.gateway.port.wire import Wire
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.relay import Relay
from chiron.gateway.relay.uplink.joining import StaySettings
from chiron.gateway.settings import KindSettings, LimitSettings
from chiron.net.clock import LiveClock
from chiron.net.memory import MemoryNetwork
from chiron.net.server import HttpServer, Incoming, ServerLimits
from chiron.policies.registry import POLICIES, make_policy
from chiron.runtime.input_log import MarkedLiveClock, Point, RecordedInputs, RecordedOutputs, described
from real_path import Client, completion, served

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.5)
NIGHT = RequestClass(name="night", kind="batch", deadline_s=86_400.0)
STEP_S = 0.125
SSE = ((b"content-type", b"text/event-stream"),)
STREAMED = b"data: [DONE]\n\n"


def chunk(number: int, token: int, tokens: int, logprob: float | None = None) -> bytes:
    finish = "length" if token == tokens - 1 else None
    choice: dict[str, Any] = {"index": 0, "text": f"{number}.{token} ", "finish_reason": finish}
    if logprob is not None:
        choice["logprobs"] = {"tokens": [str(token)], "token_logprobs": [logprob]}
    return b"data: " + json.dumps({"id": f"c{number}", "choices": [choice]}).encode() + b"\n\n"


def whole_stream(number: int, tokens: int) -> bytes:
    return b"".join(chunk(number, token, tokens) for token in range(tokens)) + STREAMED


def own_clock(ahead_s: float = 0.0, point: Point | None = None) -> LiveClock:
    """One that begins now. Virtual time stands still until a timer is due, and a clock whose sums round down would wait
    for that for ever: each look at this one takes what no test can see."""
    loop, looks = asyncio.get_running_loop(), itertools.count()

    def time_s() -> float:
        return loop.time() + next(looks) * 1e-13

    if point is None:
        return LiveClock(loop, wall_s=0.0, time_s=time_s, ahead_s=ahead_s)
    return MarkedLiveClock(loop, point, wall_s=0.0, time_s=time_s, ahead_s=ahead_s)


class SteppingEngine:
    """One engine."""

    def __init__(self) -> None:
        self.running: Counter[int] = Counter()
        """Requests, by number."""
        self.most = 0
        self.seen: list[int] = []
        self.logprob: float | None = None
        """Of each token; None: it tells none."""
        self.server = HttpServer(self._handle, ServerLimits(), None, None)

    def _handle(self, incoming: Incoming) -> None:
        if incoming.method != b"POST":
            incoming.respond(200, b"{}")
            return
        asked = json.loads(incoming.body)
        number, tokens = asked["prompt"][:2]
        self.seen.append(number)
        self.running[number] += 1
        self.most = max(self.most, self.running.total())
        incoming.on_close = lambda: self._over(number)
        loop = asyncio.get_running_loop()

        def step(token: int) -> None:
            if incoming.closed:
                return
            if not token:
                incoming.start(200, SSE)
            if token < tokens:
                incoming.write(chunk(number, token, tokens, self.logprob))
                loop.call_later(STEP_S, step, token + 1)
                return
            incoming.write(STREAMED)
            self._over(number)
            incoming.on_close = None
            incoming.finish()

        loop.call_later(STEP_S, step, 0)

    def _over(self, number: int) -> None:
        self.running[number] -= 1


class StandingFleet:
    """Implements ``LiveFleet``: engines that are up, whoever leads."""

    def __init__(
        self, urls: list[str], clock: LiveClock, events: LiveFleetEvents, found_after_s: float | None = None
    ) -> None:
        """``found_after_s``: of what was another brain's; None: it is known at once."""
        self.used: dict[int, str] = {}
        """By instance."""
        self._urls = urls
        self._clock = clock
        self._events = events
        self._found_after_s = found_after_s

    def create(self, instance: Instance) -> None:
        def ready() -> None:
            free = [url for url in self._urls if url not in self.used.values()]
            if free:
                self.used[instance.id] = free[0]
                self._events.instance_ready(instance, free[0])

        self._clock.call_later(0.01, ready)

    def adopt(self, kind: str, url: str) -> Claim | None:
        if url not in self._urls or url in self.used.values():
            return None

        def begin(instance: Instance) -> None:
            self.used[instance.id] = url
            if self._found_after_s is not None:
                self._clock.call_later(self._found_after_s, lambda: self._events.instance_ready(instance, url))

        return Claim(begin=begin, found=self._found_after_s is None)

    def remove(self, instance: Instance) -> None:
        self.used.pop(instance.id, None)

    def suspect(self, instance: Instance) -> None: ...

    def report(self) -> FleetReport:
        return FleetReport()

    async def close(self, *, hands_over: bool = False) -> None: ...


class Ends:
    """A journal that counts ends, by request."""

    wants_events = False

    def __init__(self) -> None:
        self.outcomes: dict[int, list[str]] = {}
        self.requests: list[Request] = []

    def decided(self, now_s: float, decision: Decision) -> None: ...

    def ended(self, request: Request) -> None:
        self.outcomes.setdefault(request.id, []).append(str(request.outcome))
        self.requests.append(request)

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


class Brain:
    """A gateway that leads."""

    def __init__(
        self,
        site: OutlivingSite,
        term: int,
        *,
        takes_over: bool,
        settle_s: float,
        queue_max: int,
        awaited: frozenset[str] = frozenset(),
    ) -> None:
        self.site = site
        point = Point()
        self.clock = clock = own_clock(BEFORE_S if takes_over else 0.0, point)
        self.ends = Ends()
        self.log: list[dict[str, Any]] = []
        """What the control plane was told and did, as a log has it."""
        recording = RecordedInputs(clock=clock, point=point, write=self._write)
        self.links: list[Wire] = []
        self.fleet: StandingFleet
        models, limits = site.models(), LimitSettings(queue_max=queue_max)
        numbers = iter(range(1, 10**9))

        def make_fleet(events: LiveFleetEvents) -> StandingFleet:
            self.fleet = StandingFleet(site.urls, clock, events, site.found_after_s)
            return self.fleet

        self.engines = Engines(
            clock=clock, kinds=[site.kind], models=models.by_name, make_fleet=make_fleet, network=site.network
        )
        count = len(site.urls)
        specs = [ModelSpec(name="m0", kinds=(site.kind.kind,), min_instances=count, max_instances=count)]
        policy = make_policy("chiron", POLICIES["chiron"].settings())
        self.log.append(described(policy, specs, [CHAT, NIGHT], None))
        self.gateway = Gateway(
            clock=clock,
            engines=self.engines,
            journal=RecordedOutputs(self.ends, self._write),
            models=models,
            specs=specs,
            classes=[CHAT, NIGHT],
            policy=policy,
            recording=recording,
            keys=site.keys,
            limits=limits,
            next_id=lambda: next(numbers),
            responded=lambda status: None,
        )
        self.superseded: list[int] = []
        self.relays: Relays = self.gateway.open_to_relays(
            responded=lambda status, count: None,
            ride_s=0.0,
            term=term,
            superseded=self.superseded.append,
            expects=len(site.relays) if takes_over and not awaited else 0,
        )

        def begin() -> None:
            recording.start()
            if takes_over:
                self.gateway.take_over(settle_s=settle_s, awaited=awaited)
            self.gateway.begin({})

        clock.post(begin)

    def _write(self, line: Mapping[str, Any]) -> None:
        self.log.append(orjson.loads(orjson.dumps(line)))

    def accept(self) -> Wire:
        link = self.relays.link(f"relay {len(self.links) + 1}")
        self.links.append(link.wire)
        return link.wire


class Deaf:
    """What hears in place of a brain's link, and does not listen. A compiled link's methods cannot be replaced."""

    def __init__(self, link: Wire) -> None:
        self._link = link

    def data_received(self, data: bytes) -> None:
        pass

    def __getattr__(self, name: str) -> object:
        return getattr(self._link, name)


class OutlivingSite:
    """Some engines behind some relays, and at most one brain."""

    def __init__(
        self,
        *,
        engines: int = 2,
        slots: int = 2,
        relays: int = 1,
        stay: StaySettings | None = None,
        stays: Sequence[StaySettings] = (),
        keys: KeyRing | None = None,
        request_timeout_s: float = 3600.0,
        models_change: bool = False,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.network = MemoryNetwork(loop.call_soon)
        self.engines = [SteppingEngine() for _ in range(engines)]
        self.urls = [f"memory:engine-{number}" for number in range(engines)]
        for number, engine in enumerate(self.engines):
            self.network.listen(f"engine-{number}", engine.server.accept)
        kind = InstanceKind(
            name="small", gpu="g", gpus=1, price_per_gpu_hour=1.0, kv_capacity_tokens=100_000, max_num_seqs=slots
        )
        source = EndpointsSource(urls=("http://127.0.0.1:9",))
        self.kind = KindSettings(kind=kind, engine="openai", source=source, context_tokens=100_000)
        self.keys = keys or KeyRing()
        self.slots = slots
        self.door = MemoryNetwork(loop.call_soon)
        self.clients: dict[int, Client] = {}
        self.connecting: Callable[[], None] | None = None
        """Called before each try to reach a brain."""
        self.found_after_s: float | None = None
        """What fleets take to find what was another brain's; None: they know it."""
        self.brain: Brain | None = None
        self.brains: list[Brain] = []
        self.relays: list[Relay] = []
        self._servers: list[HttpServer] = []
        for number in range(relays):
            relay = Relay(
                clock=own_clock(),
                models=self.models(),
                kinds=[self.kind],
                keys=self.keys,
                limits=LimitSettings(request_timeout_s=request_timeout_s),
                closed=lambda why: None,
                network=self.network,
                ride_s=0.0,
                connect=self._connect,
                stay=stays[number] if stays else stay or StaySettings(),
                models_change=models_change,
            )
            self.relays.append(relay)
            server = HttpServer(relay.front.handle, ServerLimits(), None, None)
            self._servers.append(server)
            self.door.listen(f"relay-{number}", server.accept)
            relay.uplink.link.begin()

    def models(self) -> Models:
        return Models({"m0": served("m0", {"chat": CHAT, "night": NIGHT}, "night")})

    async def _connect(self, make: Callable[[], Wire]) -> object:
        if self.connecting is not None:
            self.connecting()
        return self.door.connect("brain", make)

    async def lead(
        self,
        *,
        term: int = 0,
        settle_s: float = 3.0,
        queue_max: int = 10_000,
        awaited: frozenset[str] = frozenset(),
    ) -> Brain:
        """Another brain; the first one takes nothing over."""
        term = term or len(self.brains) + 1
        brain = Brain(self, term, takes_over=bool(self.brains), settle_s=settle_s, queue_max=queue_max, awaited=awaited)
        self.brain = brain
        self.brains.append(brain)
        self.door.listen("brain", brain.accept)
        return brain

    def kill(self) -> None:
        """The brain's process ends."""
        assert self.brain is not None
        self.brain.clock.stop()
        self.brain = None
        self.door.cut("brain")

    def hang(self) -> None:
        """It neither reads nor says anything, and is connected."""
        assert self.brain is not None
        self.brain.clock.stop()
        for wire in self.brain.links:
            wire.transport.set_protocol(Deaf(wire))
        self.brain = None
        self.door.forget("brain")

    def ask(
        self,
        number: int,
        tokens: int,
        *,
        relay: int = 0,
        cls: str = "chat",
        stream: bool = True,
        padding: int = 0,
        secret: str = "none",
        model: str = "m0",
        headers: Sequence[str] = (),
    ) -> Client:
        """A client's request; its answer has so many chunks."""
        client = self.clients[number] = Client()
        content = {
            "model": model,
            "prompt": [number, tokens],
            "max_tokens": tokens,
            "stream": stream,
            "user": "x" * padding,
        }
        self.door.connect(f"relay-{relay}", lambda: client)
        client.transport.write(
            completion(content, f"x-chiron-class: {cls}", f"authorization: Bearer {secret}", *headers)
        )
        return client

    async def close(self) -> None:
        for relay in self.relays:
            relay.uplink.link.close()
            relay.uplink.clock.stop()
        for server in self._servers:
            await server.close(0)
        for engine in self.engines:
            await engine.server.close(0)
        if self.brain is not None:
            self.brain.clock.stop()


def parts(client: Client) -> tuple[int, bytes]:
    """Status, and body without the framing of chunks; 0: no answer yet."""
    head, _, rest = b"".join(client.received).partition(b"\r\n\r\n")
    if not head:
        return 0, b""
    if b"transfer-encoding: chunked" not in head.lower():
        return int(head.split()[1]), rest
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
    return int(head.split()[1]), body
