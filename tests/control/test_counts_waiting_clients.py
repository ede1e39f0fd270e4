"""The count that limits how many clients wait is that of a look at every request, whatever happened before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.types import Decision, Instance, InstanceKind, ModelSpec, Request, RequestClass
from chiron.policies.registry import make_policy
from effort import examples

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=1.0, itl_s=0.1)
NIGHT = RequestClass(name="night", kind="batch", deadline_s=600.0)
KIND = InstanceKind(
    name="small", gpu="g", gpus=1, price_per_gpu_hour=1.0, kv_capacity_tokens=2000, max_num_seqs=2, max_instances=3
)


class World:
    """Engines, fleet and journal in one; what they report is for ``step`` to choose."""

    wants_events = False

    def __init__(self, policy: str) -> None:
        self.clock = VirtualClock()
        self.plane = ControlPlane(
            clock=self.clock,
            fleet=self,
            journal=self,
            models=[ModelSpec(name="m", kinds=(KIND,), min_instances=1, max_instances=3)],
            classes=[CHAT, NIGHT],
            policy=make_policy(policy, None),
        )
        self.requests: list[Request] = []
        self.running: list[Request] = []
        """In an engine, leaving or not."""
        self.leaving: list[Request] = []
        self.starting: list[Instance] = []
        self.plane.adopt("m", 1, lambda _: self)
        self.plane.begin()

    # -- the ports ---------------------------------------------------------------------------------------------

    def start(self, request: Request) -> None:
        self.running.append(request)

    def evict(self, request: Request) -> None:
        self.leaving.append(request)

    def set_max_batch_size(self, max_batch_size: int) -> None: ...

    def create(self, instance: Instance) -> None:
        self.starting.append(instance)

    def remove(self, instance: Instance) -> None: ...

    def decided(self, now_s: float, decision: Decision) -> None: ...

    def ended(self, request: Request) -> None: ...

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...

    # -- what may happen ---------------------------------------------------------------------------------------

    def send(self, number: int, cls: RequestClass, flex: bool = False) -> None:
        request = Request(len(self.requests), "m", cls, self.clock.now_s, 10 + number * 13 % 600)
        request.flex = flex
        self.requests.append(request)
        self.plane.submit(request)

    def leave(self, number: int) -> None:
        if self.requests:
            self.plane.cancel(self.requests[number % len(self.requests)])

    def report(self, number: int, tell: Callable[[Request], Any]) -> None:
        """An engine says something of a request that it lets go of with that."""
        if self.running:
            request = self.running.pop(number % len(self.running))
            if request in self.leaving:
                self.leaving.remove(request)
            tell(request)

    def let_go(self, number: int) -> None:
        if self.leaving:
            request = self.leaving.pop(number % len(self.leaving))
            self.running.remove(request)
            request.tokens_done += number % 3
            self.plane.evicted(request)

    def ready(self, number: int) -> None:
        if self.starting:
            instance = self.starting.pop(number % len(self.starting))
            if instance.state == "starting":
                self.plane.instance_ready(instance, self)

    def die(self, number: int) -> None:
        if alive := list(self.plane.instances.values()):
            instance = alive[number % len(alive)]
            self.running = [r for r in self.running if r.instance is not instance]
            self.leaving = [r for r in self.leaving if r.instance is not instance]
            self.plane.instance_failed(instance)

    def step(self, name: str, number: int) -> None:
        plane = self.plane
        {
            "chat": lambda: self.send(number, CHAT),
            "flex": lambda: self.send(number, NIGHT, flex=True),
            "item": lambda: self.send(number, NIGHT),
            "client leaves": lambda: self.leave(number),
            "first token": lambda: [plane.first_token(r) for r in self.running[number % 7 :][:1]],
            "finished": lambda: self.report(number, plane.finished),
            "lost": lambda: self.report(number, plane.lost),
            "failed": lambda: self.report(number, lambda request: plane.failed(request, "no")),
            "evicted": lambda: self.let_go(number),
            "instance ready": lambda: self.ready(number),
            "instance dies": lambda: self.die(number),
            "time": lambda: self.clock.run_until(self.clock.now_s + number / 10),
        }[name]()

    def check(self) -> None:
        waiting = [r for r in self.requests if r.outcome is None and r.instance is None]
        state = self.plane.models["m"]
        assert state.clients_waiting(interactive=True) == sum(r.interactive for r in waiting)
        assert state.clients_waiting(interactive=False) == sum(r.flex for r in waiting)
        assert state.waiting.count + state.batch.count == len(waiting)


STEPS = ["chat", "flex", "item"] * 3 + [
    "client leaves", "first token", "finished", "lost", "failed", "evicted", "instance ready", "instance dies", "time",
]  # fmt: skip


@pytest.mark.parametrize("policy", ["chiron", "chiron-paper", "llumnix", "hpa-queue"])
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 60)), max_size=80))
@settings(max_examples=examples(200))
def test_the_counts_are_those_of_a_look_at_every_request(policy: str, steps: list[tuple[str, int]]) -> None:
    world = World(policy)
    for name, number in steps:
        world.step(name, number)
        world.check()
