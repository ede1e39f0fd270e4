"""How long one call holds the control plane, and with it every request that arrives meanwhile.

    python bench/plane_stalls.py [--instances 1000] [--requests 21000] [--check]
    python bench/plane_stalls.py --ages

A control plane over stand-in engines that do nothing: rounds of scrapes as they are taken (in slices) and in one go,
backtests in pieces and in one go, fleet ticks, placements, and full garbage collections with many open requests, with
``gc.freeze`` and without. The median and the longest of several rounds each, in milliseconds of one thread's CPU time:
what other work on the machine takes is not in them. ``--check`` fails if a slice or a piece takes a millisecond.

``--ages``: what the global loop of ``chiron`` takes after an hour, a day and two weeks, on average over half an hour of
ticks: the tick itself, and what is computed between two of them (a backtest each minute; every ten minutes one more for
each period that is tried).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from statistics import median
from typing import Any

import numpy as np

from chiron.control import scrapes
from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.types import Decision, Instance, InstanceKind, ModelSpec, Request, RequestClass, Sample
from chiron.gateway.instances.observer import EngineObserver
from chiron.policies.chiron.global_loop import make_chiron
from chiron.policies.chiron.load import STEPS_AT_ONCE
from chiron.policies.chiron.long_history import LongHistory, nothing_before
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.headroom import Backtest, advanced, answer

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.1)
NIGHT = RequestClass(name="night", kind="batch", deadline_s=3600.0)
LIMIT_MS = 1.0
OPEN = 50_000
"""Open requests of the garbage collection."""


class Still:
    """Engines, fleet and journal that do nothing."""

    wants_events = False

    def start(self, request: Request) -> None: ...
    def evict(self, request: Request) -> None: ...
    def set_max_batch_size(self, max_batch_size: int) -> None: ...
    def create(self, instance: Instance) -> None: ...
    def remove(self, instance: Instance) -> None: ...
    def decided(self, now_s: float, decision: Decision) -> None: ...
    def ended(self, request: Request) -> None: ...
    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


class TimedClock(VirtualClock):
    """Times every timer."""

    def __init__(self) -> None:
        super().__init__()
        self.took: list[float] = []

    def run(self, end_s: float) -> list[float]:
        """CPU milliseconds of each timer due by then."""
        took = []
        while (due_s := self.next_s()) is not None and due_s <= end_s:
            took.append(ms(self.step))
        self.run_until(end_s)
        return took


def ms(call: Callable[[], Any]) -> float:
    began = time.thread_time()
    call()
    return 1000.0 * (time.thread_time() - began)


def plane_of(instances: int) -> tuple[ControlPlane, TimedClock]:
    clock, still = TimedClock(), Still()
    kind = InstanceKind(name="k", gpu="g", gpus=1, price_per_gpu_hour=1.0, kv_capacity_tokens=400_000, max_num_seqs=256)
    plane = ControlPlane(
        clock=clock,
        fleet=still,
        journal=still,
        models=(ModelSpec(name="m", kinds=(kind,), min_instances=instances, max_instances=instances),),
        classes=(CHAT, NIGHT),
        policy=make_chiron(ChironSettings()),
    )
    plane.adopt("m", instances, lambda instance: still)
    return plane, clock


def load(plane: ControlPlane, count: int, first: int = 0) -> list[Request]:
    draw = Random(1)
    requests = []
    for number in range(first, first + count):
        request = Request(number, "m", CHAT, plane.clock.now_s, draw.randint(50, 2000))
        request.tenant = f"key-{number % 100}"
        plane.submit(request)
        if request.instance is not None:
            plane.first_token(request)
        requests.append(request)
    return requests


def samples(plane: ControlPlane, round_number: int) -> list[Sample]:
    draw = Random(round_number)
    steps = 50 * round_number
    return [
        Sample(
            instance_id=number,
            taken_s=plane.clock.now_s,
            running=20,
            waiting=0,
            waiting_tokens=0,
            head_tokens=0,
            kv_used_tokens=20_000,
            steps=steps,
            busy_s=steps * 0.02 * draw.uniform(0.99, 1.01),
            decode_tokens=20 * steps,
            prefill_tokens=1000 * round_number,
            context_tokens=20_000.0 * steps,
            preemptions=0,
        )
        for number in plane.instances
    ]


def rounds(instances: int, requests: int, slice_size: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each call that took scrapes, the first round excepted; and of placements meanwhile."""
    before, scrapes.SLICE = scrapes.SLICE, slice_size  # type: ignore[misc]
    try:
        plane, clock = plane_of(instances)
        load(plane, requests)
        took, placed = [], []
        for number in range(1, 12):
            clock.run_until(float(number))
            taken = samples(plane, number)
            calls = [ms(lambda taken=taken: plane.sampled(taken)), *clock.run(number + 0.9)]
            if number > 1:
                took += calls
            request = Request(10**6 + number, "m", CHAT, clock.now_s, 500)
            placed.append(ms(lambda request=request: plane.submit(request)))
        return took, placed
    finally:
        scrapes.SLICE = before  # type: ignore[misc]


def made(instances: int, slice_size: int) -> list[float]:
    """Milliseconds that a gateway takes to make the samples of a slice."""
    kind = InstanceKind(name="k", gpu="g", gpus=1, price_per_gpu_hour=1.0, kv_capacity_tokens=1000, max_num_seqs=8)
    observers = [EngineObserver(Instance(number, "m", kind, "mixed", 0.0), 0.0) for number in range(instances)]
    figures = {"running": 3.0, "waiting": 0.0, "kv_usage": 0.3}
    took = []
    for round_number in range(1, 6):
        for first in range(0, instances, slice_size):
            part = observers[first : first + slice_size]
            took.append(ms(lambda part=part, at_s=float(round_number): [o.sample(at_s, figures) for o in part]))
    return took


def answered(plane: ControlPlane, number: int, now_s: float, input_tokens: int) -> None:
    """A request that is answered at once, with 200 tokens, unless it has to wait."""
    request = Request(number, "m", CHAT, now_s, input_tokens)
    plane.submit(request)
    if request.instance is not None:
        plane.first_token(request)
        request.tokens_done = 200
        plane.finished(request)


def backtests(instances: int) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of each fleet tick without a backtest, of each piece of one, and of one in one go."""
    plane, clock = plane_of(instances)
    plane.begin()
    draw = Random(2)
    ticks, pieces, whole = [], [], []
    number = 0
    for second in range(1500):
        for _ in range(draw.choice((1, 1, 1, 6))):
            answered(plane, number, clock.now_s, 400)
            number += 1
        known = backtest_of(plane)
        took = clock.run(second + 1.0)
        asked = backtest_of(plane)
        if second % 5 == 4 and took:
            ticks.append(took[0])
        if asked is not None and known is None:
            pieces += took[1:]
            fresh = Backtest(question=asked.question)
            whole.append(ms(lambda fresh=fresh: answer(fresh)))
            while not fresh.done:
                holder = [fresh]

                def piece(holder: list[Backtest] = holder) -> None:
                    holder[0] = advanced(holder[0], STEPS_AT_ONCE)

                pieces.append(ms(piece))
                fresh = holder[0]
    return ticks, pieces, whole


def backtest_of(plane: ControlPlane) -> Backtest | None:
    state = plane.fleet_state
    return state["m"].backtest if state else None


AGES_S = {"an hour": 3600, "a day": 86_400, "two weeks": 14 * 86_400}
AGED_TICKS = 360
TICK_S = int(ChironSettings().tick_s)


def of_age(seconds: int) -> tuple[float, float, int]:
    """(milliseconds of a tick, of what is prepared between two, periods tried), on average."""
    plane, clock = plane_of(20)
    plane.begin()
    draw, number = Random(3), 0
    ticks, prepared, periods = [], [], 0
    for second in range(3600 + TICK_S * AGED_TICKS):
        if second == 3600:
            plane.fleet_state["m"] = replace(plane.fleet_state["m"], long=long_history(seconds))
        for _ in range(draw.choice((1, 1, 1, 6)) if second % 900 < 300 else 1):
            answered(plane, number, clock.now_s, 3000)
            number += 1
        took = clock.run(second + 1.0)
        if second >= 3600:
            ticks += took[:1] if second % TICK_S == TICK_S - 1 else []
            prepared += took[1:] if second % TICK_S == TICK_S - 1 else took
            periods = max(periods, len(plane.fleet_state["m"].looks) - 1)
    return sum(ticks) / AGED_TICKS, sum(prepared) / AGED_TICKS, periods


def long_history(seconds: int) -> LongHistory:
    """Days and nights, with a surge in each quarter of an hour, until an hour ago."""
    long = nothing_before(0)
    for begin_s in range(0, seconds - 3600, 3600):
        at_s = np.arange(begin_s, begin_s + 3600)
        load = 3.0 + 2.0 * np.sin(2.0 * np.pi * at_s / 86_400) + np.where(at_s % 900 < 300, 2.0, 0.0)
        long = long.after(load, 2.0)
    return long


def show_ages() -> None:
    print("CPU ms of the global loop, on average over half an hour of ticks\n")
    print(f"{'known for':12s} {'a tick':>8s} {'between':>8s} {'periods':>8s} {'of a core':>10s}")
    for name, seconds in AGES_S.items():
        tick_ms, between_ms, periods = of_age(seconds)
        share = (tick_ms + between_ms) / (1000.0 * TICK_S)
        print(f"{name:12s} {tick_ms:8.2f} {between_ms:8.2f} {periods:8d} {share:10.2%}")


@contextmanager
def frozen(*, freeze: bool) -> Iterator[None]:
    gc.collect()
    if freeze:
        gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def collections(instances: int) -> dict[str, list[float]]:
    """Milliseconds of a full collection with many open requests: frozen before they came, as a gateway does, after, and
    not at all."""
    found: dict[str, list[float]] = {}
    for name, before, after in (("none", False, False), ("at the start", True, False), ("with them", True, True)):
        plane, _ = plane_of(instances)
        with frozen(freeze=before):
            held = load(plane, OPEN)
            if after:
                gc.freeze()
            found[name] = [ms(gc.collect) for _ in range(7)]
            del held
    return found


def show(name: str, took: list[float]) -> None:
    print(f"{name:52s} {median(took):8.3f} {max(took):8.3f} {len(took):6d}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=21_000)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--ages", action="store_true", help="only what the global loop takes, by age")
    options = parser.parse_args()
    if options.ages:
        show_ages()
        return 0
    print(f"{options.instances} instances, {options.requests} open requests; CPU ms of one call\n")
    print(f"{'':52s} {'median':>8s} {'longest':>8s} {'calls':>6s}")
    whole, _ = rounds(options.instances, options.requests, 10**9)
    show("scrapes, a round in one go", [took for took in whole if took > 0.05])
    slices, placed = rounds(options.instances, options.requests, scrapes.SLICE)
    show(f"scrapes, a slice of {scrapes.SLICE}", slices)
    show("samples of a round made in one go", made(options.instances, options.instances))
    show(f"samples of a slice of {scrapes.SLICE} made", made(options.instances, scrapes.SLICE))
    show("a placement", placed)
    ticks, pieces, whole = backtests(options.instances)
    show("backtest, in one go", whole)
    show(f"backtest, a piece of {STEPS_AT_ONCE} steps", pieces)
    show("fleet tick", ticks)
    for name, took in collections(options.instances).items():
        show(f"full collection, {OPEN} open requests, frozen: {name}", took)
    # A moment's interruption inside a call is not the call: of a hundred calls one may be that.
    worst = max(sorted(part)[: max(1, len(part) * 99 // 100)][-1] for part in (slices, pieces))
    print(f"\nlongest slice or piece but for one call in a hundred: {worst:.3f} ms")
    return int(options.check and worst >= LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())
