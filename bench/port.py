"""What requests of relays cost the brain, with all that it does for each: decoding, limits, control plane, journal.

    python bench/port.py [--instances 1000] [--requests 20000] [--open 10000] [--relays 2] [--batch 50] [--json FILE]

A gateway's brain as ``chiron serve --workers`` has it, with limits of API keys, its journal and its event log, in front
of instances that nobody asks. Relays are frames of messages, ``--batch`` requests in each; the same number of requests
is open all the time. Each request arrives, is placed, has a first token and an answer: three messages up and two down.
CPU time of this thread, from the bytes that come to the bytes that go; sockets, samples and the fleet's loop are left
out (``bench/brain.py`` has the latter two).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from chiron.core.compiled import build
from chiron.core.types import Instance, InstanceKind, RequestClass
from chiron.fleet.endpoints import EndpointsSource
from chiron.fleet.port import FleetReport
from chiron.gateway.brain.relay_link import RelayLink
from chiron.gateway.gateway import Gateway
from chiron.gateway.instances.engines import Engines
from chiron.gateway.port import messages as m
from chiron.gateway.relay.admission import Models, ServedModel
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key, hash_secret
from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter
from chiron.gateway.reporting.journal import LiveJournal
from chiron.gateway.reporting.live_result import LiveRecorder
from chiron.gateway.settings import KindSettings, LimitSettings, ModelSettings
from chiron.net.clock import LiveClock
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.registry import make_policy

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=5.0, itl_s=0.2)
SETTINGS = ChironSettings(initial_max_batch_size=256, tune_batch_size=False)
"""Nothing waits for a max batch size to be learned."""
KEYS = 100
_ENCODER = msgspec.msgpack.Encoder()


class Standing:
    """A fleet that neither grows nor shrinks. ``LiveFleet``."""

    def create(self, instance: Instance) -> None: ...
    def remove(self, instance: Instance) -> None: ...
    def suspect(self, instance: Instance) -> None: ...

    def report(self) -> FleetReport:
        return FleetReport()

    async def close(self) -> None: ...


class Socket(asyncio.Transport):
    """What the brain sends a relay: placements, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.placed: deque[m.Place] = deque()
        self.sent_bytes = 0
        self._decoder = msgspec.msgpack.Decoder(list[m.Down | m.Hello])

    def write(self, data: Any) -> None:
        self.sent_bytes += len(data)
        at = 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 4], "big")
            said = self._decoder.decode(data[at + 4 : at + 4 + length])
            self.placed.extend(each for each in said if isinstance(each, m.Place))
            at += 4 + length

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...
    def abort(self) -> None: ...


class Brain:
    def __init__(self, instances: int, folder: Path) -> None:
        loop = asyncio.get_running_loop()
        self.clock = LiveClock(loop)
        kind = InstanceKind(
            name="a100", gpu="A100", gpus=1, price_per_gpu_hour=2.0, kv_capacity_tokens=440_000, max_num_seqs=256
        )
        source = EndpointsSource(urls=("http://127.0.0.1:9",))
        model = ModelSettings(
            name="m",
            kinds=(KindSettings(kind=kind, engine="openai", source=source, context_tokens=8192),),
            classes=("chat",),
            default_class="chat",
            batch_class="",
            min_instances=instances,
            max_instances=instances,
        )
        models = Models({"m": ServedModel(settings=model, classes={"chat": CHAT}, kv_capacity_tokens=440_000)})
        keys = KeyRing(
            [
                Key(name=f"k{i}", hash=hash_secret(b"%d" % i), requests_per_minute=1e9, tokens_per_minute=1e12)
                for i in range(KEYS)
            ]
        )
        recorder = LiveRecorder(models=[model.spec()], classes=[CHAT])
        writer = EventWriter(EventLogSettings(path=folder / "events.jsonl"), wall_origin_s=time.time())
        self.journal = LiveJournal(recorder=recorder, writer=writer)
        engines = Engines(
            clock=self.clock, kinds=model.kinds, models=models.by_name, make_fleet=lambda events: Standing()
        )
        self.gateway = Gateway(
            clock=self.clock,
            engines=engines,
            journal=self.journal,
            models=models,
            specs=[model.spec()],
            classes=[CHAT],
            policy=make_policy("chiron", SETTINGS),
            keys=keys,
            limits=LimitSettings(queue_max=10**7),
            next_id=itertools.count(1).__next__,
            responded=lambda status: None,
            observer=self.journal.observe,
            scrape_period_s=1e6,
        )
        self.relays = self.gateway.open_to_relays(responded=lambda status, count: None)

        def begin() -> None:
            self.gateway.begin({"m": instances}, attach=lambda i: engines.attach(i, "http://127.0.0.1:9"))

        self.clock.post(begin)


class Relay:
    """One relay's frames."""

    def __init__(self, brain: Brain, number: int) -> None:
        self.link: RelayLink = brain.relays.link(f"relay {number}")
        self.socket = Socket()
        self.cpu_ns = 0
        self.numbers = itertools.count(1)
        self.link.wire.connection_made(self.socket)
        self.take([m.Hello()])
        self.cpu_ns = 0

    def take(self, messages: list[m.Message]) -> None:
        """The brain takes a frame, and sends what follows."""
        body = _ENCODER.encode(messages)
        frame = len(body).to_bytes(4, "big") + body
        decode, self.socket.write = self.socket.write, lambda data: kept.append(data)  # type: ignore[method-assign]
        kept: list[bytes] = []
        before_ns = time.thread_time_ns()
        self.link.wire.data_received(frame)
        self.link.wire.flush()
        self.cpu_ns += time.thread_time_ns() - before_ns
        self.socket.write = decode  # type: ignore[method-assign]
        for data in kept:
            self.socket.write(data)

    def arrivals(self, count: int) -> list[m.Message]:
        return [
            m.Arrive(
                number=number,
                request_id=f"req-0123abcd-{number:x}",
                model="m",
                cls="chat",
                ttft_s=CHAT.ttft_s,
                itl_s=CHAT.itl_s,
                key=f"k{number % KEYS}",
                input_tokens=300 + number % 400,
                peers=("address 192.0.2.1", f"API key 'k{number % KEYS}'"),
                sequences=1,
                streams=True,
                prompt_bytes=1200,
                collected=False,
            )
            for number in itertools.islice(self.numbers, count)
        ]

    def answers(self, count: int) -> list[m.Message]:
        """First tokens and ends of the oldest that run."""
        found: list[m.Message] = []
        for _ in range(min(count, len(self.socket.placed))):
            run = self.socket.placed.popleft().run
            found += [m.FirstToken(run, 1), m.Counted(1, 199), m.Answered(run, 200, 200, 310, 200)]
        return found


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        brain = Brain(arguments.instances, Path(folder))
        relays = [Relay(brain, number) for number in range(arguments.relays)]
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 50, 100)

        def drive(requests: int, *, answered: bool) -> None:
            for turn in range(requests // arguments.batch):
                relay = relays[turn % len(relays)]
                relay.take(relay.arrivals(arguments.batch) + (relay.answers(arguments.batch) if answered else []))

        drive(arguments.open, answered=False)
        drive(arguments.requests // 4, answered=True)
        for relay in relays:
            relay.cpu_ns = 0
        ended = len(brain.gateway.plane.models), brain.gateway.plane.open_requests
        drive(arguments.requests, answered=True)
        us = sum(relay.cpu_ns for relay in relays) / 1e3 / arguments.requests
        brain.clock.stop()
        brain.journal.close()
        for engine in brain.gateway.engines.live.values():
            await engine.origin.close()
        return {
            "build": build(),
            "instances": arguments.instances,
            "open_requests": ended[1],
            "relays": arguments.relays,
            "requests_in_a_frame": arguments.batch,
            "us_per_request": us,
            "placements_per_s": 1e6 / us,
            "late": sum(relay.link.late for relay in relays),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--open", type=int, default=10_000, help="requests that run all the time")
    parser.add_argument("--relays", type=int, default=2)
    parser.add_argument("--batch", type=int, default=50, help="requests in a frame")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    found = asyncio.run(run(given))
    print(
        "  ".join(
            f"{name} {value:,.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
        )
    )
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
