"""What a request costs the control plane while others wait: an arrival behind them, an end that makes room for one.

    python bench/queue_length.py [--instances 100] [--lengths 100,1000,10000,100000]

A full fleet whose engines do nothing, and a queue of constant length: one request arrives, one ends, and the first of
those that wait takes its place. Keys (tenants) are 50, every tenth request is of a batch class. Microseconds of this
thread's CPU time for each such pair, the median of the rounds.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import deque
from statistics import median

from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.compiled import build
from chiron.core.types import Decision, Instance, InstanceKind, ModelSpec, Request, RequestClass
from chiron.policies.registry import make_policy

SLOTS = 4
ROUND, ROUNDS = 500, 9


class Still:
    """Engines, fleet and journal; remembers what runs."""

    wants_events = False

    def __init__(self) -> None:
        self.running: deque[Request] = deque()

    def start(self, request: Request) -> None:
        self.running.append(request)

    def evict(self, request: Request) -> None:
        raise AssertionError("an eviction: the fleet is not full of interactive requests")

    def set_max_batch_size(self, max_batch_size: int) -> None: ...
    def create(self, instance: Instance) -> None: ...
    def remove(self, instance: Instance) -> None: ...
    def decided(self, now_s: float, decision: Decision) -> None: ...
    def ended(self, request: Request) -> None: ...
    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


def measure(instances: int, length: int) -> float:
    kind = InstanceKind(
        name="k", gpu="g", gpus=1, price_per_gpu_hour=1.0, kv_capacity_tokens=1_000_000, max_num_seqs=SLOTS
    )
    spec = ModelSpec(name="m", kinds=(kind,), min_instances=instances, max_instances=instances)
    # So patient that nobody is late: the queue is what is measured.
    classes = (
        RequestClass(name="interactive", kind="interactive", ttft_s=1e6),
        RequestClass(name="flex", kind="batch", deadline_s=1e6),
    )
    clock, still = VirtualClock(), Still()
    plane = ControlPlane(
        clock=clock,
        fleet=still,
        journal=still,
        models=(spec,),
        classes=classes,
        policy=make_policy("chiron"),
    )
    plane.adopt("m", instances, lambda _: still)
    number = 0

    def arrive(*, batch: bool) -> None:
        nonlocal number
        number += 1
        clock.now_s += 1e-4
        request = Request(number, "m", classes[batch], clock.now_s, 300)
        request.pinned, request.tenant = not batch, f"k{number % 50}"
        plane.submit(request)

    for _ in range(instances * SLOTS):
        arrive(batch=False)
        plane.first_token(still.running[-1])  # Else its prefill would be in the way of the next.
    assert len(still.running) == instances * SLOTS
    for _ in range(length):
        arrive(batch=number % 10 == 0)
    gc.collect()
    gc.freeze()
    gc.disable()
    rounds = []
    for _ in range(ROUNDS):
        began_s = time.thread_time()
        for _ in range(ROUND):
            arrive(batch=False)
            done = still.running.popleft()
            done.tokens_done = 200
            if done.first_token_s < 0.0:
                plane.first_token(done)
            plane.finished(done)
        rounds.append(1e6 * (time.thread_time() - began_s) / ROUND)
    gc.enable()
    assert plane.open_requests == instances * SLOTS + length
    return median(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--lengths", default="100,1000,10000,100000")
    given = parser.parse_args()
    print(f"{given.instances} instances, {build()}")
    for length in map(int, given.lengths.split(",")):
        print(f"{length:7} waiting: {measure(given.instances, length):6.1f} us an arrival and an end")


if __name__ == "__main__":
    main()
