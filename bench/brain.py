"""What the deciding part of a gateway costs, and how long a placement waits for it.

    python bench/brain.py [--instances 1000] [--rate 4000] [--seconds 20] [--together 1] [--log-lines] [--json F]

One control plane as ``chiron serve`` has it, with its limits of API keys, its journal and its event log, in front of
stand-in engines that take as long as an 8B model on an A100. Sockets, HTTP and tokens are left out: relays have those.
Time is virtual: each input (an arrival, a first token, an end, a round of samples, a tick of the fleet's loop) comes
when it comes at ``--rate`` arrivals a second, and what each one takes is measured in CPU time of this thread. So other
work on the machine disturbs little, and the rate can be one that this machine cannot carry.

Each input is taken by itself. With ``--together N`` up to N inputs that come within ``TOGETHER_S`` are taken in one
go, at the time of the last, as they are when a relay's messages come in one read: so they do when a brain is busy.

Placements/s of a core: what the loops leave of it, which take the same however much comes, over the CPU time of what
one placement brings: an arrival, a first token, an end, and their share of the event log's thread. The wait of a
placement follows from the same measured times by Lindley's recursion: one server, first come, first served, at several
shares of what it can carry (time is compressed for it, the loops' periods are not).
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import platform
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.compiled import build
from chiron.core.types import Instance, InstanceKind, ModelSpec, Request, RequestClass, Sample
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key, hash_secret
from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter
from chiron.gateway.reporting.journal import LiveJournal
from chiron.gateway.reporting.live_result import LiveRecorder
from chiron.gateway.serving import GC_THRESHOLD
from chiron.policies.registry import make_policy

KEYS = 50
STEP_S = 0.025
PREFILL_S_PER_TOKEN = 40e-6
WARM_UP_S = 15.0
"""Not measured: the fleet fills, tables grow."""
LOADS = (0.1, 0.5, 0.8)
TOGETHER_S = 0.005
LOOPS = ("timers (ticks, holds)", "round of samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one sort of input."""

    what: str
    count: int
    mean_us: float
    p99_us: float
    longest_us: float
    per_placement_us: float


class StandIn:
    """All engines: answers after as long as an engine takes, by one heap. What it is asked for is only noted down while
    time is taken."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self._asked: list[tuple[bool, Request]] = []
        self.due: list[tuple[float, int, str, Request]] = []
        self._runs: dict[int, int] = {}
        self._last = 0

    def start(self, request: Request) -> None:
        self._asked.append((True, request))

    def evict(self, request: Request) -> None:
        self._asked.append((False, request))

    def work(self) -> None:
        """On what was asked for."""
        now_s = self.clock.now_s
        for starts, request in self._asked:
            run = self._begin(request)
            if starts:
                first_s = now_s + STEP_S + PREFILL_S_PER_TOKEN * request.input_tokens
                heapq.heappush(self.due, (first_s, run, "first token", request))
                heapq.heappush(self.due, (first_s + STEP_S * request.payload.output_tokens, run, "end", request))
            else:
                heapq.heappush(self.due, (now_s + STEP_S, run, "evicted", request))
        self._asked.clear()

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """Nothing batches here."""

    def holds(self, run: int, request: Request) -> bool:
        return self._runs.get(request.id) == run

    def left(self, request: Request) -> None:
        del self._runs[request.id]

    def _begin(self, request: Request) -> int:
        """What its earlier run had due is nothing any more."""
        self._last += 1
        self._runs[request.id] = self._last
        return self._last


@dataclass(slots=True)
class Payload:
    """What the journal asks of a live request."""

    request_id: str
    key_name: str
    output_tokens: int
    prompt_tokens: int = 0


class Standing:
    """A fleet that neither grows nor shrinks."""

    def create(self, instance: Instance) -> None:
        raise AssertionError("the fleet is as large as it may be")

    def remove(self, instance: Instance) -> None:
        raise AssertionError("the fleet is as small as it may be")


class Brain:
    """The measured parts, and the clock of the measurement."""

    def __init__(self, *, policy: str, instances: int, folder: Path, grouped: bool) -> None:
        kind = InstanceKind(
            name="a100",
            gpu="A100",
            gpus=1,
            price_per_gpu_hour=2.0,
            kv_capacity_tokens=440_000,
            max_num_seqs=256,
        )
        spec = ModelSpec(name="m", kinds=(kind,), min_instances=instances, max_instances=instances)
        self.classes = (
            RequestClass(name="interactive", kind="interactive", ttft_s=5.0, itl_s=0.2),
            RequestClass(name="flex", kind="batch", deadline_s=600.0),
        )
        self.clock = VirtualClock()
        self.writer = EventWriter(
            EventLogSettings(path=folder / "events.jsonl", grouped=grouped), wall_origin_s=time.time()
        )
        recorder = LiveRecorder(models=(spec,), classes=self.classes)
        self.journal = LiveJournal(recorder=recorder, writer=self.writer)
        self.keys = KeyRing(
            [
                Key(name=f"k{i}", hash=hash_secret(b"%d" % i), requests_per_minute=1e9, tokens_per_minute=1e12)
                for i in range(KEYS)
            ]
        )
        self.named = [self.keys.named(f"k{i}") for i in range(KEYS)]
        self.plane = ControlPlane(
            clock=self.clock,
            fleet=Standing(),
            journal=self.journal,
            ends=self,
            models=(spec,),
            classes=self.classes,
            policy=make_policy(policy),
            observer=self.journal.observe,
        )
        self.engines = StandIn(self.clock)
        self.plane.adopt("m", instances, lambda instance: self.engines)
        self.plane.begin()
        self.spent: dict[str, list[int]] = {}
        """Nanoseconds of each input, by sort."""
        self.order: list[tuple[float, int, bool]] = []
        """When each came, what it took, and whether it is an arrival."""
        self.measuring = False
        self.log_s = 0.0
        """CPU time of the event log's thread."""
        self.log_clock = time.pthread_getcpuclockid(self.writer.thread.ident or 0)
        self._totals: dict[int, tuple[int, int, float]] = {}
        self._sampled_s = 0.0

    def ended(self, request: Request) -> None:
        key = self.keys.named(request.payload.key_name)
        assert key is not None
        self.keys.charge(key, request.tokens_done)

    def take(self, what: str, call: Callable[[], None]) -> None:
        began_ns = time.thread_time_ns()
        call()
        spent_ns = time.thread_time_ns() - began_ns
        self.engines.work()
        if self.measuring:
            self.spent.setdefault(what, []).append(spent_ns)
            self.order.append((self.clock.now_s, spent_ns, what == "arrival"))

    def arrive(self, number: int, key: int, input_tokens: int, output_tokens: int, cls: RequestClass) -> None:
        now_s = self.clock.now_s
        owner = self.named[key]
        assert owner is not None
        self.keys.take(owner, now_s, input_tokens)
        request = Request(
            number, "m", cls, now_s, input_tokens, Payload(f"req-00000000-{number:x}", owner.name, output_tokens)
        )
        request.pinned, request.flex, request.tenant = cls.interactive, not cls.interactive, owner.name
        self.plane.submit(request)

    def tell(self, what: str, request: Request) -> None:
        if what == "first token":
            self.plane.first_token(request)
        elif what == "evicted":
            request.tokens_done = request.kv_saved_tokens = 0
            self.engines.left(request)
            self.plane.evicted(request)
        else:
            self.engines.left(request)
            request.tokens_done = request.payload.output_tokens
            self.plane.finished(request)

    def samples(self) -> list[Sample]:
        """Of all engines; made outside of what is measured."""
        now_s, made = self.clock.now_s, []
        passed_s, self._sampled_s = now_s - self._sampled_s, now_s
        for instance in self.plane.instances.values():
            running = len(instance.requests)
            steps, tokens, context = self._totals.get(instance.id, (0, 0, 0.0))
            grown = round(passed_s / STEP_S) if running else 0
            steps, tokens, context = steps + grown, tokens + grown * running, context + 400.0 * grown * running
            self._totals[instance.id] = steps, tokens, context
            made.append(
                Sample(
                    instance_id=instance.id,
                    taken_s=now_s,
                    running=running,
                    waiting=0,
                    waiting_tokens=0,
                    head_tokens=0,
                    kv_used_tokens=400 * running,
                    steps=steps,
                    busy_s=steps * STEP_S,
                    decode_tokens=tokens,
                    prefill_tokens=0,
                    context_tokens=context,
                    preemptions=0,
                )
            )
        return made


Take = tuple[str, Callable[[], None]]


def drive(brain: Brain, *, rate: float, seconds: float, flex_share: float, seed: int, together: int = 1) -> int:
    """Returns the placements that were measured."""
    generator = random.Random(seed)
    clock, engines = brain.clock, brain.engines
    next_arrival_s, next_round_s, number, placed = 0.0, 1.0, 0, 0
    end_s = WARM_UP_S + seconds
    waiting: list[Take] = []
    """Inputs that are taken in one go."""
    first_s = log_began_s = 0.0
    while clock.now_s < end_s:
        if not brain.measuring and clock.now_s >= WARM_UP_S:
            brain.measuring, log_began_s = True, time.clock_gettime(brain.log_clock)
        due_s = engines.due[0][0] if engines.due else end_s
        timer_s = clock.next_s()
        at_s = min(next_arrival_s, due_s, next_round_s, end_s if timer_s is None else timer_s)
        rare = at_s in (timer_s, next_round_s)
        if waiting and (rare or len(waiting) >= together or at_s > first_s + TOGETHER_S):
            take_all(brain, waiting)
            continue
        if timer_s == at_s:
            brain.take(LOOPS[0], lambda at_s=at_s: clock.run_until(at_s))  # type: ignore[misc]
            continue
        clock.now_s = at_s
        if at_s == next_round_s:
            samples = brain.samples()
            brain.take(LOOPS[1], lambda samples=samples: brain.plane.sampled(samples))  # type: ignore[misc]
            next_round_s += 1.0
            continue
        if not waiting:
            first_s = at_s
        if at_s == next_arrival_s:
            number += 1
            placed += brain.measuring
            key, tokens = generator.randrange(KEYS), generator.randint(50, 600)
            output = max(1, round(generator.expovariate(1 / 200)))
            cls = brain.classes[generator.random() < flex_share]
            call = lambda n=number, k=key, t=tokens, o=output, c=cls: brain.arrive(n, k, t, o, c)  # type: ignore[misc] # noqa: E731
            waiting.append(("arrival", call))
            next_arrival_s = at_s + generator.expovariate(rate)
        else:
            _, run, what, request = heapq.heappop(engines.due)
            call = lambda r=run, w=what, q=request: brain.engines.holds(r, q) and brain.tell(w, q)  # type: ignore[misc] # noqa: E731
            if engines.holds(run, request):
                waiting.append((what, call))
    brain.log_s = time.clock_gettime(brain.log_clock) - log_began_s
    return placed


def take_all(brain: Brain, waiting: list[Take]) -> None:
    if len(waiting) == 1:
        brain.take(*waiting[0])
    else:
        calls = [call for _, call in waiting]

        def all_of_them() -> None:
            for call in calls:
                call()

        brain.take("inputs, several at a time", all_of_them)
    waiting.clear()


def waits_us(order: list[tuple[float, int, bool]], *, load: float) -> list[float]:
    """What arrivals wait until they are done with, microseconds, sorted, if the inputs came as much faster as makes
    the server busy for that share of the time."""
    busy_us = sum(spent_ns for _, spent_ns, _ in order) / 1e3
    squeeze = busy_us / load / ((order[-1][0] - order[0][0]) * 1e6)
    free_us, waits = 0.0, []
    for at_s, spent_ns, arrival in order:
        at_us = at_s * 1e6 * squeeze
        free_us = max(free_us, at_us) + spent_ns / 1e3
        if arrival:
            waits.append(free_us - at_us)
    return sorted(waits)


def costs(spent: dict[str, list[int]], placed: int) -> list[Cost]:
    made = []
    for what, each in spent.items():
        ordered = sorted(each)
        made.append(
            Cost(
                what=what,
                count=len(ordered),
                mean_us=sum(ordered) / len(ordered) / 1e3,
                p99_us=ordered[int(0.99 * (len(ordered) - 1))] / 1e3,
                longest_us=ordered[-1] / 1e3,
                per_placement_us=sum(ordered) / placed / 1e3,
            )
        )
    return sorted(made, key=lambda cost: -cost.per_placement_us)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        brain = Brain(
            policy=arguments.policy, instances=arguments.instances, folder=Path(folder), grouped=not arguments.log_lines
        )
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD, 50, 100)
        placed = drive(
            brain,
            rate=arguments.rate,
            seconds=arguments.seconds,
            flex_share=arguments.flex,
            seed=arguments.seed,
            together=arguments.together,
        )
        open_requests = brain.plane.open_requests
        brain.writer.close()
    brain.spent["event log's thread"] = [round(1e9 * brain.log_s)]
    made = costs(brain.spent, placed)
    us = sum(cost.per_placement_us for cost in made if cost.what not in LOOPS)
    loops = sum(cost.count * cost.mean_us for cost in made if cost.what in LOOPS) / 1e6 / arguments.seconds
    # Of inputs that are taken together nobody knows which of them waited for how long.
    waits = {load: waits_us(brain.order, load=load) for load in LOADS} if arguments.together == 1 else {}
    return {
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "build": build(),
        "instances": arguments.instances,
        "together": arguments.together,
        "open_requests": open_requests,
        "placed": placed,
        "costs": [asdict(cost) for cost in made],
        "us_per_placement": us,
        "loops_share": loops,
        "placements_per_s": 1e6 * (1.0 - loops) / us,
        "waits_us": {
            str(load): {"p50": each[len(each) // 2], "p99": each[int(0.99 * len(each))], "longest": each[-1]}
            for load, each in waits.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="chiron")
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=4000.0, help="arrivals/s; 4 per instance keep it busy")
    parser.add_argument("--flex", type=float, default=0.1, help="share of requests of the batch class")
    parser.add_argument("--seconds", type=float, default=20.0, help=f"measured, after {WARM_UP_S:g} s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--together", type=int, default=1, help="inputs that are taken in one go, at most")
    parser.add_argument("--log-lines", action="store_true", help="each event of a request is a line of the event log")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = run(arguments)
    print(
        f"{found['instances']} instances, {found['open_requests']} open requests, {found['placed']} placements "
        f"measured, {found['build']}; {found['machine']}"
    )
    print(f"{'input':24} {'count':>8} {'mean us':>9} {'p99':>9} {'longest':>9} {'a placement':>12}")
    for cost in found["costs"]:
        print(
            f"{cost['what']:24} {cost['count']:8} {cost['mean_us']:9.1f} {cost['p99_us']:9.1f} "
            f"{cost['longest_us']:9.1f} {cost['per_placement_us']:12.1f}"
        )
    print(
        f"the loops take {100 * found['loops_share']:.1f} % of a core, a placement {found['us_per_placement']:.1f} us: "
        f"{found['placements_per_s']:,.0f} placements/s on one core"
    )
    for load, wait in found["waits_us"].items():
        print(
            f"at {100 * float(load):.0f} % load a placement waits {wait['p50']:.0f} us (p50), {wait['p99']:.0f} (p99), "
            f"{wait['longest']:.0f} (longest)"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
