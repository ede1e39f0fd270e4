"""Small random simulations for the law tests: tiny KV, ties, failures, every kind of instance lifecycle.

``Wild`` is a policy that decides at random, as a pure function of what it sees: it takes the control plane and the
engine to corners that no sensible policy visits. Times are often multiples of 1/64 s, which floats hold exactly, so
that simultaneous events really are.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from random import Random
from typing import Any

import numpy as np
from hypothesis import strategies as st

from chiron.core.clock import VirtualClock
from chiron.core.types import InstanceKind, ModelSpec, Request, RequestClass
from chiron.engines.profile import Profile
from chiron.fleet.model import ColdStart, Failures, Sleep
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.instances import label_by_rank, take_back_fullest
from chiron.policies.policy import Estimates, Order, Policy, PolicyEntry, Refusal, Router
from chiron.policies.queues.deadline_groups import DeadlineGroups
from chiron.policies.queues.overload import OverloadOrder, OverloadSettings
from chiron.policies.registry import POLICIES
from chiron.policies.rivals.scalers.static import StaticSettings
from chiron.policies.routers.least import LeastRouter
from chiron.policies.routers.packing import PackingRouter, PackingSettings
from chiron.policies.views import FleetPlan, FleetView, LocalDecision, LocalView, Migration, ModelPlan, TokenBudget
from chiron.sim.run import Simulation
from chiron.sim.setup import Setup
from chiron.telemetry.result import Result
from chiron.workload.types import Workload
from policy_names import ALL_CODE

TICK_S = 1 / 64
CLASSES = (
    RequestClass(name="chat", kind="interactive", ttft_s=1.0, itl_s=0.05),
    RequestClass(name="agent", kind="interactive", ttft_s=4.0),
    RequestClass(name="night", kind="batch", deadline_s=60.0),
    RequestClass(name="someday", kind="batch"),
)
PROFILE = Profile(
    name="small",
    model="m0",
    gpu="g",
    tp=1,
    engine="e",
    h_ms=1000 / 64,
    w0_ms=0.0,
    f_ms_per_token=0.0,
    c_ms_per_context_token=0.0,
    q_ms_per_token_squared=0.0,
    kv_capacity_tokens=200,
    kv_bytes_per_token=1_000_000,
    max_num_seqs=8,
    max_num_batched_tokens=32,
    price_per_gpu_hour=1.0,
)


def kind_of(profile: Profile, **changes: Any) -> InstanceKind:
    """An instance kind that runs this profile."""
    kind = InstanceKind(
        name=profile.name,
        gpu=profile.gpu,
        gpus=profile.tp,
        price_per_gpu_hour=profile.price_per_gpu_hour,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        max_num_seqs=profile.max_num_seqs,
    )
    return replace(kind, **changes)


def workload_of(rows: list[tuple[float, int, int, int, int]], models: tuple[str, ...] = ("m0",)) -> Workload:
    """From (arrival s, input tokens, output tokens, model, class) rows, in any order."""
    rows = sorted(rows)
    columns = [np.array([row[i] for row in rows], dtype=np.int64) for i in range(1, 5)]
    arrival_s = np.array([row[0] for row in rows], dtype=np.float64)
    return Workload(
        arrival_s=arrival_s,
        input_tokens=columns[0],
        output_tokens=columns[1],
        model=columns[2],
        cls=columns[3],
        deadline_s=arrival_s + np.array([c.deadline_s for c in CLASSES])[columns[3]],
        models=models,
        classes=CLASSES,
    )


def setup_of(
    rows: list[tuple[float, int, int, int, int]],
    *,
    policy: str = "static",
    settings: Any = None,
    profile: Profile = PROFILE,
    model: ModelSpec | None = None,
    initial: int = 1,
    **changes: Any,
) -> Setup:
    """One model, one profile, no noise: for scenarios that are worked out by hand. No settings: the defaults."""
    base = Setup(
        scenario="by hand",
        models=(model or ModelSpec(name="m0", kinds=(kind_of(profile),), min_instances=1, max_instances=4),),
        profiles={profile.name: profile},
        initial={"m0": initial},
        workload=workload_of(rows),
        policy=policy,
        settings=settings,
        cold_start=ColdStart(node_start_s=1.0, model_load_s=2.0, warm_load_s=1.0, warm_for_s=30.0, jitter=0.0),
    )
    return replace(base, **changes)


# -- a policy that does anything ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WildSettings:
    """What ``wild`` may do. Its draws are named by seed and by what it sees."""

    seed: int = 0
    packs: bool = True
    strict_roles: bool = False
    keeps_apart: bool = False
    defers_late: bool = False
    holds_batch: bool = True
    evicts: bool = True
    eviction_pause_s: float = 1.0
    revives: bool = True
    relabels: bool = False
    overload: bool = True
    refuses: bool = False
    migrates: bool = False
    resizes: bool = True
    caps: bool = True
    tick_s: float = 2.0
    drain_timeout_s: float = 3.0
    group_span_s: float = 10.0
    sleeps: bool = False
    budgets: bool = False


def make_wild(settings: WildSettings) -> Policy:
    """Any fleet, any cap, any move."""

    def router(_: Any, estimates: Estimates) -> Router:
        if settings.packs:
            return PackingRouter(
                PackingSettings(),
                estimates,
                evicts=settings.evicts,
                strict_roles=settings.strict_roles,
                keeps_apart=settings.keeps_apart,
                passes_long=settings.defers_late,
            )
        return LeastRouter(estimates, lambda instance: len(instance.requests))

    return Policy(
        name="wild",
        settings=settings,
        place=router,
        fleet=_wild_fleet,
        fleet_period_s=settings.tick_s,
        batch_size=_wild_cap if settings.caps else None,
        order_batch=_wild_order_batch if settings.holds_batch else None,
        eviction_pause_s=settings.eviction_pause_s,
        take_back=take_back_fullest if settings.revives else None,
        label=label_by_rank if settings.relabels else None,
        order=_wild_order if settings.overload else None,
        admit=_wild_admit if settings.overload and settings.refuses else None,
        group_span_s=settings.group_span_s,
        drain_timeout_s=settings.drain_timeout_s,
        migrate=_wild_moves if settings.migrates else None,
        migrate_period_s=0.5,
    )


def _wild_order(settings: WildSettings, estimates: Estimates) -> OverloadOrder:
    return OverloadOrder(OverloadSettings(late_turn=3, hold_s=2.0, refuse=settings.refuses), estimates)


def _wild_order_batch(settings: WildSettings, estimates: Estimates) -> DeadlineGroups:
    return DeadlineGroups(settings.group_span_s, estimates.shortest_s if settings.defers_late else None)


def _wild_admit(settings: WildSettings, order: Order, request: Request, now_s: float) -> Refusal | None:
    assert isinstance(order, OverloadOrder)
    return order.admit(request, now_s)


def _wild_fleet(settings: WildSettings, state: None, view: FleetView) -> tuple[FleetPlan, None]:
    plans = {}
    for model in view.models:
        draw = Random(f"{settings.seed}:fleet:{model.name}:{view.now_s}")
        counts = dict(model.planned)
        if settings.resizes and draw.random() < 0.6:
            counts = {"interactive": draw.randint(0, 1), "mixed": draw.randint(0, 2), "batch": draw.randint(0, 1)}
        seen = {f"kv_{i.id}": float(i.kv_used_tokens) for i in model.instances}
        risk = Random(f"{settings.seed}:risk:{model.name}:{view.now_s}").random() < 0.5
        asleep = draw.randint(0, 3) if settings.sleeps else 0
        budget = _wild_budget(settings, f"{model.name}:{view.now_s}", model.max_num_batched_tokens)
        plans[model.name] = ModelPlan(
            counts=counts,
            reason="wild",
            numbers=seen,
            batch_at_risk=risk,
            spread_over=Random(f"{settings.seed}:spread:{model.name}:{view.now_s}").choice((0, 0, 1, 2, 5)),
            asleep=asleep,
            token_budget=budget,
        )
    return plans, None


def _wild_budget(settings: WildSettings, what: str, most: int) -> TokenBudget | None:
    draw = Random(f"{settings.seed}:budget:{what}")
    if not settings.budgets or draw.random() < 0.3:
        return None
    return TokenBudget(max_num_batched_tokens=draw.choice((1, 3, most // 2, most, 2 * most)), reason="wild")


def _wild_cap(settings: WildSettings, state: None, view: LocalView) -> tuple[LocalDecision | None, None]:
    draw = Random(f"{settings.seed}:cap:{view.now_s}:{view.dispatched}:{view.throughput}")
    if draw.random() < 0.5:
        return None, None
    size = draw.choice((1, 2, 3, view.max_num_seqs))
    seen = {"itl_s": view.itl_s, "decode_batch": view.decode_batch, "throughput": view.throughput}
    step_s = draw.choice((inf, 0.0, TICK_S, 0.1))
    return LocalDecision(
        max_batch_size=size,
        prefill_limit_s=step_s * draw.choice((1, 4)) if step_s else 0.0,
        prefill_step_s=step_s,
        prefill_share=draw.choice((1.0, 0.1)),
        batch_limit=draw.choice((None, 0, 2)),
        token_budget=_wild_budget(settings, f"{view.now_s}:{view.dispatched}", view.token_budget_max),
        evicts=settings.evicts,
        reason="wild",
        numbers=seen,
    ), None


def _wild_moves(settings: WildSettings, state: None, view: FleetView) -> tuple[tuple[Migration, ...], None]:
    draw = Random(f"{settings.seed}:moves:{view.now_s}")
    moves = []
    for model in view.models:
        ids = [i.id for i in model.instances if i.state == "ready"]
        if len(ids) >= 2:
            source, destination = draw.sample(ids, 2)
            moves.append(Migration(source=source, destination=destination))
    return tuple(moves), None


WILD = PolicyEntry(settings=WildSettings, make=make_wild, about="random decisions, for tests")


# -- running --------------------------------------------------------------------------------------------------------


def build(
    setup: Setup, *, step_mode: bool = False, events: io.StringIO | None = None, clock: VirtualClock | None = None
) -> Simulation:
    """The simulation, not yet run; ``wild`` exists only while it is made."""
    POLICIES["wild"] = WILD
    try:
        return Simulation(setup, step_mode=step_mode, events=events, clock=clock)
    finally:
        del POLICIES["wild"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is left of a finished simulation."""

    simulation: Simulation
    result: Result
    log: str
    """The event log, as written."""

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.splitlines()]


def run(
    setup: Setup,
    *,
    step_mode: bool = False,
    clock: VirtualClock | None = None,
    watch: Callable[[Simulation], None] | None = None,
) -> Run:
    """Simulate and keep the log. ``watch`` looks inside after every event."""
    events = io.StringIO()
    watched = WatchedClock() if watch is not None else None
    simulation = build(setup, step_mode=step_mode, events=events, clock=watched or clock)
    if watched is not None and watch is not None:
        watched.watch = lambda: watch(simulation)
    simulation.run()
    result = simulation.result(wall_s=0.0, with_bound=False)
    return Run(simulation=simulation, result=result, log=events.getvalue())


class WatchedClock(VirtualClock):
    """Calls ``watch`` after every timer."""

    def __init__(self) -> None:
        super().__init__()
        self.watch: Callable[[], None] = lambda: None

    def run_until(self, end_s: float) -> None:
        while (next_s := self.next_s()) is not None and next_s <= end_s:
            self.step()
        super().run_until(end_s)

    def step(self) -> bool:
        fired = super().step()
        self.watch()
        return fired


def everything(run: Run) -> dict[str, str]:
    """All that a run left, as text: equal text means bit-equal figures."""
    requests = run.result.requests
    return {
        "log": run.log,
        "times": repr([requests.dispatch_s.tolist(), requests.first_token_s.tolist(), requests.finish_s.tolist()]),
        "ends": repr([requests.outcome.tolist(), requests.evictions.tolist()]),
        "decisions": repr(run.result.decisions),
        "fleet": repr(run.result.fleet),
        "batch_sizes": repr(run.result.batch_sizes),
        "summary": repr(run.result.summary),
    }


# -- strategies -----------------------------------------------------------------------------------------------------


@st.composite
def profiles(draw: st.DrawFn, name: str = "small") -> Profile:
    """A small engine: KV for a handful of requests, a token budget of a few prompts."""
    return Profile(
        name=name,
        model="m",
        gpu=draw(st.sampled_from(("g", "h"))),
        tp=draw(st.sampled_from((1, 2))),
        engine="e",
        h_ms=draw(st.sampled_from((1000 / 64, 1000 / 64, 10.0, 17.3))),
        w0_ms=draw(st.sampled_from((0.0, 3.0))),
        f_ms_per_token=draw(st.sampled_from((0.0, 0.5))),
        c_ms_per_context_token=draw(st.sampled_from((0.0, 0.013))),
        q_ms_per_token_squared=draw(st.sampled_from((0.0, 0.002))),
        kv_capacity_tokens=draw(st.sampled_from((47, 90, 200, 350, 700, 1500))),
        kv_bytes_per_token=draw(st.sampled_from((1_000, 20_000_000))),
        max_num_seqs=draw(st.sampled_from((1, 3, 8, 16))),
        max_num_batched_tokens=draw(st.sampled_from((4, 16, 64))),
        request_overhead_ms=draw(st.sampled_from((0.0, 0.0, 1000 / 64, 7.0))),
        step_overhead_ms=draw(st.sampled_from((0.0, 1.0))),
        captured_sizes=draw(st.sampled_from(((), (), (2, 5, 16)))),
        admission_ms=draw(st.sampled_from((0.0, 0.0, 2.3))),
        price_per_gpu_hour=1.5,
    )


@st.composite
def workloads(draw: st.DrawFn, models: tuple[str, ...]) -> Workload:
    """Bursts and stragglers; most arrivals on a grid of 1/64 s, so that many coincide with each other and with steps.

    Rows come from a seed: lists drawn one by one are mostly short, and short ones never fill an engine.
    """
    random = Random(draw(st.integers(0, 10_000)))
    span_s = draw(st.sampled_from((2, 6, 20)))
    input_max = draw(st.sampled_from((8, 60)))
    output_max = draw(st.sampled_from((2, 30, 30, 300)))
    classes = draw(st.sampled_from(((0,), (0, 0, 1, 2, 2, 3), (0, 2, 2, 2), (2, 3))))
    rows = []
    for _ in range(draw(st.integers(10, 60))):
        grid_s = random.choice((1.0, 1.0, TICK_S, 0.001))
        arrival_s = round(random.uniform(0, span_s) / grid_s) * grid_s
        lengths = random.randint(1, input_max), random.randint(1, output_max)
        rows.append((arrival_s, *lengths, random.randrange(len(models)), random.choice(classes)))
    return workload_of(rows, models)


wild_settings = st.builds(
    WildSettings,
    seed=st.integers(0, 9),
    packs=st.sampled_from((True, False, False)),
    strict_roles=st.booleans(),
    keeps_apart=st.booleans(),
    defers_late=st.booleans(),
    holds_batch=st.booleans(),
    evicts=st.sampled_from((True, True, False)),
    eviction_pause_s=st.sampled_from((0.0, 1.0)),
    revives=st.booleans(),
    relabels=st.booleans(),
    overload=st.booleans(),
    refuses=st.booleans(),
    migrates=st.booleans(),
    resizes=st.booleans(),
    caps=st.booleans(),
    tick_s=st.sampled_from((1.0, 2.5)),
    drain_timeout_s=st.sampled_from((0.5, 3.0)),
    sleeps=st.booleans(),
    budgets=st.booleans(),
)


@st.composite
def setups(draw: st.DrawFn, policy: str | None = None) -> Setup:
    """Any small setup. ``policy`` fixes which one runs; by default many run ``wild``."""
    names = tuple(f"m{n}" for n in range(draw(st.sampled_from((1, 1, 2, 3)))))
    specs, made = [], {}
    for name in names:
        kinds = []
        for index in range(draw(st.sampled_from((1, 1, 2)))):
            profile = draw(profiles(name=f"{name}-{index}"))
            made[profile.name] = profile
            kinds.append(
                kind_of(
                    profile,
                    max_instances=draw(st.sampled_from((2, 1_000_000))),
                    max_num_batched_tokens=profile.max_num_batched_tokens,
                    live_token_budget=draw(st.booleans()),
                )
            )
        least = draw(st.integers(0, 1))
        specs.append(ModelSpec(name=name, kinds=tuple(kinds), min_instances=least, max_instances=3))
    chosen = policy or draw(st.sampled_from(("wild", "wild", "wild", *ALL_CODE)))
    settings: Any = {
        "wild": wild_settings,
        "chiron": st.just(ChironSettings(tick_s=2.0, hold_s=6.0)),
        "static": st.builds(StaticSettings, max_num_seqs=st.integers(1, 12)),
    }.get(chosen, st.none())
    return Setup(
        scenario="random",
        models=tuple(specs),
        profiles=made,
        initial={spec.name: draw(st.integers(spec.min_instances, 2)) for spec in specs},
        # Room for the initial fleets (two instances of two GPUs each), and sometimes for nothing more.
        gpus_max=draw(st.sampled_from(({}, {"g": 12, "h": 12}, {"g": 13, "h": 20}))),
        workload=draw(workloads(names)),
        policy=chosen,
        settings=draw(settings),
        seed=draw(st.integers(0, 99)),
        cold_start=ColdStart(
            node_start_s=draw(st.sampled_from((0.0, 1.0))),
            model_load_s=draw(st.sampled_from((1.0, 2.7))),
            warm_load_s=draw(st.sampled_from((0.5, 1.0))),
            warm_for_s=10.0,
            peer_load_s=draw(st.sampled_from((inf, 0.3))),
            jitter=draw(st.sampled_from((0.0, 0.2))),
        ),
        sleep=Sleep(
            host_memory_gb=draw(st.sampled_from((0.0, 20.0, 60.0))), sleeper_gb=10.0, fall_asleep_s=0.4, wake_s=0.2
        ),
        failures=Failures(
            mtbf_s=draw(st.sampled_from((inf, inf, 15.0))),
            at=tuple(draw(st.lists(st.sampled_from((1.0, 4.0, 4.5, 9.0)), max_size=2))),
            start_failure=draw(st.sampled_from((0.0, 0.0, 0.4))),
        ),
        scrape_period_s=draw(st.sampled_from((0.5, 1.0))),
        scrape_delay_s=draw(st.sampled_from((0.0, 0.2))),
        kv_transfer_gb_per_s=draw(st.sampled_from((0.0, 1.0, 20.0))),
        horizon_s=60.0,
    )


def in_two_sizes(setup: Setup) -> Setup:
    """The same with two kinds of each model: one instance that is too small for longer prompts, then larger ones."""
    specs, profiles = [], {}
    for spec in setup.models:
        kinds = []
        for name, capacity in (("small", 32), ("large", 350)):
            profile = replace(
                setup.profiles[spec.kinds[0].name], name=f"{spec.name}-{name}", kv_capacity_tokens=capacity
            )
            profiles[profile.name] = profile
            kinds.append(
                replace(
                    spec.kinds[0], name=profile.name, kv_capacity_tokens=capacity, max_instances=2 - (name == "small")
                )
            )
        specs.append(replace(spec, kinds=tuple(kinds)))
    return replace(setup, models=tuple(specs), profiles=profiles)


def example_setup(policy: str) -> Setup:
    """One fixed scenario of 150 requests with pressure, failures and cold starts."""
    random = Random("example")
    rows = [
        (random.uniform(0, 30), random.randint(1, 40), random.randint(1, 60), 0, random.randrange(4))
        for _ in range(150)
    ]
    wild = WildSettings(packs=False, migrates=True)
    return setup_of(
        rows,
        policy=policy,
        settings=wild if policy == "wild" else None,
        initial=2,
        failures=Failures(at=(5.0, 12.0), start_failure=0.2),
        horizon_s=120.0,
        seed=7,
    )
