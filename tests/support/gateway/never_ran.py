"""A control plane before engines that do as each request says, for laws about what never ran.

An engine here serves each request by itself, as if it were alone: what one request does cannot move another's times, so
a difference between two runs is one of the control plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from chiron.control.dispatcher import RETRIES_MAX
from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.types import Decision, Instance, InstanceKind, ModelSpec, Request, RequestClass, Sample
from chiron.fleet.model import ColdStart, FleetModel
from chiron.policies.registry import make_policy
from chiron.policies.views import FleetPlan, FleetView

MODEL = "m"
CHAT = RequestClass(name="chat", kind="interactive", ttft_s=60.0, itl_s=0.1)
VOICE = RequestClass(name="voice", kind="interactive", ttft_s=30.0, itl_s=0.05)
NIGHT = RequestClass(name="night", kind="batch", deadline_s=3600.0)
CLASSES = (CHAT, VOICE, NIGHT)
KIND = InstanceKind(name="k", gpu="g", gpus=1, price_per_gpu_hour=1.0, kv_capacity_tokens=2_000_000, max_num_seqs=256)
PREFILL_S, STEP_S = 0.05, 0.015

End = Literal["finish", "refuse", "fail", "lose", "leave", "leave waiting"]


@dataclass(frozen=True)
class Ask:
    """One request, and how it ends: ``after_s`` from its arrival if it never runs. ``lose``: every try of it."""

    at_s: float
    cls: RequestClass = CHAT
    tokens_in: int = 500
    tokens_out: int = 50
    end: End = "finish"
    after_s: float = 0.0
    ttft_s: float = 0.0
    """As its client asked for; 0: as configured."""

    @property
    def runs(self) -> bool:
        return self.end == "finish"


class Engine:
    """Counts what it ran, and nothing else."""

    def __init__(self, world: World, instance: Instance) -> None:
        self.world, self.instance = world, instance
        self.steps = self.decoded = self.prefilled = 0
        self.busy_s = self.context = 0.0
        self.here: dict[int, Request] = {}

    def start(self, request: Request) -> None:
        clock, plane, ask = self.world.clock, self.world.plane, request.payload
        self.here[request.id] = request

        def then(act: Any) -> Any:
            def due() -> None:
                if self.here.get(request.id) is request:
                    act()

            return due

        def over(tell: Any, *more: str) -> None:
            del self.here[request.id]
            tell(request, *more)

        if ask.end == "finish":
            clock.call_later(PREFILL_S, then(lambda: self.first(request)))
            clock.call_later(PREFILL_S + STEP_S * ask.tokens_out, then(lambda: over(self.finish)))
        elif ask.end == "refuse":
            clock.call_later(ask.after_s, then(lambda: over(plane.refused, "engine answered 400")))
        elif ask.end == "fail":
            clock.call_later(ask.after_s, then(lambda: over(plane.failed, "engine answered 501")))
        elif ask.end == "lose":
            clock.call_later(ask.after_s / (RETRIES_MAX + 1), then(lambda: over(plane.lost)))

    def first(self, request: Request) -> None:
        self.prefilled += request.input_tokens
        self.busy_s += 6e-5 * request.input_tokens + 1.5e-9 * request.input_tokens**2
        self.world.plane.first_token(request)

    def finish(self, request: Request) -> None:
        tokens = request.payload.tokens_out
        context = tokens * (request.input_tokens + tokens / 2)
        self.steps += tokens
        self.decoded += tokens
        self.context += context
        self.busy_s += 0.012 * tokens + 4e-5 * tokens + 6e-8 * context
        request.tokens_done = tokens
        self.world.plane.finished(request)

    def evict(self, request: Request) -> None:
        self.here.pop(request.id, None)
        self.world.clock.call_at(self.world.clock.now_s, lambda: self.world.plane.evicted(request))

    def set_max_batch_size(self, max_batch_size: int) -> None: ...

    def fail(self) -> None:
        self.here.clear()

    def sample(self) -> Sample:
        return Sample(
            instance_id=self.instance.id,
            taken_s=self.world.clock.now_s,
            running=len(self.here),
            waiting=0,
            waiting_tokens=0,
            head_tokens=0,
            kv_used_tokens=0,
            steps=self.steps,
            busy_s=self.busy_s,
            decode_tokens=self.decoded,
            prefill_tokens=self.prefilled,
            context_tokens=self.context,
            preemptions=0,
        )


class World:
    """Run to its end when it is made."""

    wants_events = False

    def __init__(
        self, asks: Sequence[Ask], *, until_s: float, policy: str = "chiron", settings: Any = None, initial: int = 1
    ) -> None:
        self.clock = VirtualClock()
        self.decisions: list[str] = []
        self.plans: list[tuple[float, dict[str, int]]] = []
        """At each tick."""
        self.engines: dict[int, Engine] = {}
        self.over: dict[int, Request] = {}
        self.fleet = FleetModel(
            clock=self.clock,
            cold_start=ColdStart(
                node_start_s=0.0,
                model_load_s=20.0,
                warm_load_s=20.0,
                warm_for_s=0.0,
                jitter=0.0,
            ),
            seed=1,
            make_engine=self._engine,
        )
        self.plane = ControlPlane(
            clock=self.clock,
            fleet=self.fleet,
            journal=self,
            models=(ModelSpec(name=MODEL, kinds=(KIND,), min_instances=1, max_instances=20),),
            classes=CLASSES,
            policy=make_policy(policy, settings),
            observer=self._observe,
        )
        self.state = self.plane.models[MODEL]
        self.fleet.listener = self.plane
        self.plane.adopt(MODEL, initial, self.fleet.attach_running)
        self.plane.begin()
        self.clock.call_later(1.0, self._scrape)
        for number, ask in enumerate(sorted(asks, key=lambda ask: (ask.at_s, not ask.runs))):
            self.clock.run_until(ask.at_s)
            self._submit(number, ask)
        self.clock.run_until(until_s)

    def learned(self) -> dict[str, Any]:
        """All that was learned from requests, scrapes and starts."""
        state, learner = self.state, self.state.learner
        return {
            "mixes": [mix.view() for mix in learner.mixes.values()],
            "seen": [mix.seen for mix in learner.mixes.values()],
            "outputs": dict(learner.expected_output),
            "usual": [(u.input_tokens, u.input_square, u.need_tokens) for u in (learner.usual, learner.usual_batch)],
            "ttft_s": (learner.ttft_min_s, learner.ttft_max_s),
            "step times": learner.step_times,
            "itl missed": state.itl_missed,
            "cold start": state.cold_start_s,
        }

    def history(self) -> Any:
        """What the policy remembers of arrivals."""
        memory = self.plane.fleet_state[MODEL]
        if hasattr(memory, "history"):
            return {name: getattr(memory.history, name).tolist() for name in ("counts", "tokens", "square")}
        return memory.arrivals.tolist()

    def limits(self) -> list[tuple[int, str, int, float]]:
        """Of every instance."""
        return [(i.id, i.role, i.max_batch_size, i.prefill_limit_s) for i in self.plane.instances.values()]

    # -- the Journal port ----------------------------------------------------------------

    def decided(self, now_s: float, decision: Decision) -> None:
        if decision.kind != "reject":
            self.decisions.append(repr((now_s, decision)))

    def ended(self, request: Request) -> None:
        assert request.id not in self.over
        self.over[request.id] = request

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...

    # -- the rest ------------------------------------------------------------------------

    def _submit(self, number: int, ask: Ask) -> None:
        cls = ask.cls
        if ask.ttft_s:
            cls = RequestClass(name=cls.name, kind=cls.kind, ttft_s=ask.ttft_s, itl_s=cls.itl_s)
        request = Request(number, MODEL, cls, self.clock.now_s, ask.tokens_in, ask)
        self.plane.submit(request)
        if ask.end in ("leave", "leave waiting"):
            if ask.after_s:
                self.clock.call_later(ask.after_s, lambda: self.plane.cancel(request))
            else:
                self.plane.cancel(request)

    def _engine(self, instance: Instance) -> Engine:
        engine = self.engines[instance.id] = Engine(self, instance)
        return engine

    def _scrape(self) -> None:
        self.plane.sampled([self.engines[number].sample() for number in self.fleet.engines])
        self.clock.call_later(1.0, self._scrape)

    def _observe(self, view: FleetView, plan: FleetPlan) -> None:
        self.plans.append((view.now_s, dict(plan[MODEL].counts)))
