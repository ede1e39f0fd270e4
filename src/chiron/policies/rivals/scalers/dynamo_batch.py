"""``dynamo-batch``: Dynamo's SLA planner with its batch scheduling by deadlines.

Interactive requests are planned for as by ``dynamo-planner``. Batch requests are held in front, earliest deadline
first, and every 5 s::

    required = most of: work due by d / (d - now - cold start - end), over the deadlines d to come; infinite once it
               leaves no time
    headroom = ready * safe - online, at least 0, while there is batch work
    floor    = ceil((online + required) / safe), and no less than ceil((online + headroom) / safe)
    replicas = max(what the planner says, floor)

So the fleet keeps its size while batch work is drained, and it is drained as fast as what is ready allows. A job whose
deadline has passed is expired there; here it is still served, from the headroom, and asks for no floor. A request is
released while one more in flight keeps the mean step of a replica within the ITL SLO and the KV within what it holds.

Source: ai-dynamo/dynamo, components/src/dynamo/planner/core/batch_policy.py, a proof of concept that a deployment has
to opt into. It counts requests of one kind, with a rate that one replica is safe with; here requests differ, so all is
counted in seconds of engine work, and the safe rate is what the learned step times allow within the ITL SLO. Its limit
of the drain is a rate that is leased to a dispatcher; here it is the number in flight that goes with that rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor, inf, isfinite
from typing import Any

from chiron.core.kept import Kept
from chiron.core.types import Instance, Placement, Request, RequestClass
from chiron.policies.capacity import arrivals_s, capacity, decode_s, prefill_s, work_s
from chiron.policies.checks import above, at_least
from chiron.policies.policy import Estimates, Policy
from chiron.policies.queues.deadline_groups import batch_due_s
from chiron.policies.queues.order import KeyOrder
from chiron.policies.rivals.scalers import dynamo
from chiron.policies.rivals.scalers.dynamo import DynamoSettings
from chiron.policies.rivals.scalers.each_model import each_model, mixed_plan, within_bounds
from chiron.policies.rivals.scalers.forecasters import needs
from chiron.policies.rivals.scalers.past import pairs, read_by, told_by
from chiron.policies.routers.least import LeastRouter
from chiron.policies.size import KV_FILL, kv_tokens
from chiron.policies.views import FleetPlan, FleetView, ModelPlan, ModelView, StepTimes

FOLLOWS = 0.01
"""Weight of a request in the mean of what requests cost a step."""
MOST_ONLINE = 100_000
"""Entries of the window that are kept for the next run: one for each class and second."""
DUST = 1e-9
"""Sums of floats are not taken for a replica more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamoBatchSettings(DynamoSettings):
    end_s: float = 30.0
    """Kept free before each deadline for what is still running. Ours: Dynamo has no default, and needs one."""
    online_window_s: float = 60.0
    """Over which the rate of interactive work is a mean. Ours."""
    batch_interval_s: float = 5.0
    """Between decisions. Its planner's load loop has this one."""

    def __post_init__(self) -> None:
        # Of a dataclass with slots, which is made anew: super() without arguments would look in the old one.
        DynamoSettings.__post_init__(self)
        above(0, self, "online_window_s", "batch_interval_s")
        at_least(0, self, "end_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Batch work with one deadline."""

    deadline_s: float
    work_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one model."""

    planner: dynamo.Memory = field(default_factory=dynamo.Memory)
    begun: int | None = None
    """Replicas at the first decision: the plan until there is a forecast."""
    online: tuple[tuple[int, float], ...] = ()
    """(second, interactive work) in the window."""


State = dict[str, Memory]


def required(jobs: Sequence[Job], now_s: float, margin_s: float) -> float:
    """Work a second that keeps every deadline, in the order of which it is done; inf: one has no time left."""
    most = total = 0.0
    for job in sorted(jobs, key=lambda each: each.deadline_s):
        total += job.work_s
        if isfinite(job.deadline_s):
            left_s = job.deadline_s - now_s - margin_s
            most = max(most, total / left_s) if left_s > 0.0 else inf
    return most


def replica_floor(
    *, online: float, needed: float, safe: float, ready: int, works: bool, least: int, most: int
) -> tuple[int, float]:
    """(fewest replicas, work a second that batch requests may take). ``works``: there is batch work."""
    floor = most
    if isfinite(needed):
        floor = max(least, 1 if works and not ready else 0, ceil((online + needed) / safe - DUST))
    drain = max(0.0, ready * safe - online) if works else 0.0
    if drain > 0.0:
        floor = max(floor, ceil((online + drain) / safe - DUST))
    floor = min(floor, most)
    return floor, min(drain, max(0.0, floor * safe - online))


def decide_fleet(settings: DynamoBatchSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself."""
    return each_model(_decide_model, Memory, settings, state, view)


def _decide_model(
    settings: DynamoBatchSettings, memory: Memory, model: ModelView, now_s: float
) -> tuple[ModelPlan, Memory]:
    begun = sum(model.planned.values()) if memory.begun is None else memory.begun
    plan, planner = dynamo.decide_model(settings, memory.planner, _online(model), now_s)
    wanted = plan.counts["mixed"] if settings.load else planner.floor or begun
    outputs = {mix.cls.name: mix.output_tokens for mix in model.mixes}
    new = [
        (each.second, arrivals_s(model.step_times, each, outputs[each.cls.name]))
        for each in model.arrivals
        if each.cls.interactive and each.requests > 0
    ]
    kept = tuple(each for each in (*memory.online, *new) if each[0] >= now_s - settings.online_window_s)
    online = sum(work for _, work in kept) / settings.online_window_s
    jobs = jobs_of(model, now_s)
    needed = required(jobs, now_s, model.cold_start_s + settings.end_s)
    floor, drain = replica_floor(
        online=online,
        needed=needed,
        safe=_safe(settings, model),
        ready=model.count("ready"),
        works=bool(jobs),
        least=model.min_instances,
        most=model.max_instances,
    )
    reason = plan.reason if floor <= wanted else "batch_deadlines"
    numbers = {**plan.numbers, "batch_floor": float(floor), "online": online, "required": needed, "drain": drain}
    count = within_bounds(model, max(wanted, floor))
    return mixed_plan(count, reason, numbers), replace(memory, planner=planner, begun=begun, online=kept)


def _online(model: ModelView) -> ModelView:
    """With interactive requests alone: Dynamo's batch requests are no part of what its planner forecasts."""
    return replace(
        model,
        arrivals=tuple(each for each in model.arrivals if each.cls.interactive),
        mixes=tuple(mix for mix in model.mixes if mix.cls.interactive) or model.mixes,
    )


def jobs_of(model: ModelView, now_s: float) -> list[Job]:
    """What is held, by deadline, overdue work at no time; what runs is due with the first of it."""
    times = model.step_times
    jobs = [
        Job(
            deadline_s=group.deadline_s if group.deadline_s > now_s else inf,
            work_s=prefill_s(times, group.input_tokens, group.input_square)
            + group.requests
            * decode_s(times, group.input_tokens / group.requests, group.output_tokens / group.requests),
        )
        for group in model.groups
        if group.requests
    ]
    if model.running_batch:
        mean_s = max((work_s(times, mix) for mix in model.mixes if not mix.cls.interactive), default=0.0)
        first_s = min((job.deadline_s for job in jobs), default=inf)
        jobs.append(Job(deadline_s=first_s, work_s=model.running_batch * mean_s))
    return jobs


def _safe(settings: DynamoBatchSettings, model: ModelView) -> float:
    """Work a second of one replica within the ITL SLO."""
    used = [mix for mix in model.mixes if mix.finished] or list(model.mixes)
    carried = capacity(
        model.step_times,
        [(float(max(1, mix.finished)), mix) for mix in used],
        itl_target_s=min((mix.cls.itl_s for mix in used if mix.cls.interactive), default=inf),
        kv_capacity_tokens=model.kv_capacity_tokens,
        max_num_seqs=min(model.max_num_seqs, settings.max_num_seqs),
    )
    return max(1e-9, carried.work_rate)


# -- batch work, and placement -------------------------------------------------------------------------------------


class Headroom:
    """The router: fewest outstanding first; batch work while the replicas together stay within what is safe."""

    def __init__(self, estimates: Estimates) -> None:
        self.room_tokens = 0
        self._estimates = estimates
        self._least = LeastRouter(estimates, lambda instance: len(instance.requests))
        self._counted: dict[int, tuple[int, int, int, int, int]] = {}
        """By replica that takes work: one, interactive and batch requests, KV booked, KV in all."""
        self._totals = [0, 0, 0, 0, 0]
        """Of them all."""
        self._places = 0
        """Max batch size of the last one that changed: they have the same."""
        self._slopes_s = [0.0, 0.0]
        """What an interactive and a batch request cost a step, on the mean."""
        self._itl_slo_s = inf

    def add(self, instance: Instance) -> None:
        self._counted.setdefault(instance.id, (0, 0, 0, 0, 0))
        self._least.add(instance)
        self._count(instance)

    def remove(self, instance: Instance) -> None:
        if instance.id in self._counted:
            self._change(self._counted.pop(instance.id), (0, 0, 0, 0, 0))
        self._least.remove(instance)

    def changed(self, instance: Instance) -> None:
        self._least.changed(instance)
        self._count(instance)

    def _count(self, instance: Instance) -> None:
        if instance.id not in self._counted:
            return
        batch = len(instance.batch)
        now = (
            1,
            len(instance.requests) - batch,
            batch,
            instance.kv_reserved_tokens,
            instance.kv_capacity_tokens,
        )
        self._change(self._counted[instance.id], now)
        self._counted[instance.id] = now
        self._places = instance.max_batch_size

    def _change(self, before: Sequence[int], after: Sequence[int]) -> None:
        self._totals = [total + b - a for total, a, b in zip(self._totals, before, after, strict=True)]

    def place(self, request: Request, waited_s: float) -> Placement | None:
        kind = 0 if request.interactive else 1
        slope_s = self._slope_s(request)
        if kind and not self._safe(request, slope_s):
            return None
        if not kind:
            self._itl_slo_s = min(self._itl_slo_s, request.itl_slo_s)
        placement = self._least.place(request, waited_s)
        if placement is not None:
            mean_s = self._slopes_s[kind]
            self._slopes_s[kind] = mean_s + FOLLOWS * (slope_s - mean_s) if mean_s else slope_s
        return placement

    def _safe(self, request: Request, slope_s: float) -> bool:
        """Whether the replicas stay within the SLO, their places and their KV with this batch request, too."""
        replicas, interactive, batch, booked_tokens, all_tokens = self._totals
        if interactive + batch >= replicas * self._places:
            return False
        if booked_tokens and booked_tokens + kv_tokens(self._estimates, request) > KV_FILL * all_tokens:
            return False
        work_s = self._slopes_s[0] * interactive + (self._slopes_s[1] or slope_s) * batch + slope_s
        return not batch or self._estimates.step_times.fixed_s + work_s / replicas <= self._itl_slo_s

    def _slope_s(self, request: Request) -> float:
        """What it costs a step while it decodes, with its prefill spread over its answer."""
        times: StepTimes = self._estimates.step_times
        output = max(1.0, self._estimates.expected_output[request.class_name])
        tokens = float(request.input_tokens)
        return (prefill_s(times, tokens, tokens * tokens) + decode_s(times, tokens, output)) / output

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()


def order_batch(settings: DynamoBatchSettings, estimates: Estimates) -> KeyOrder:
    return KeyOrder(batch_due_s)


def _told(settings: DynamoBatchSettings, memory: Memory, now_s: float) -> dict[str, Any]:
    online = [[floor(now_s) - second, work] for second, work in memory.online]
    return {**dynamo.told(settings, memory.planner, now_s), "online": online}


def _read(settings: DynamoBatchSettings, kept: Kept, classes: Sequence[RequestClass], now_s: float) -> Memory | None:
    planner = dynamo.read(settings, kept, classes, now_s)
    if planner is None:
        return None
    online = tuple((floor(now_s) - round(ago_s), work) for ago_s, work in pairs(kept, "online", MOST_ONLINE))
    return Memory(planner=planner, online=online)


def make_dynamo_batch(settings: DynamoBatchSettings) -> Policy:
    """Raises ImportError where the forecaster's library is not installed."""
    needs(settings.predictor)

    def place(_: Any, estimates: Estimates) -> Headroom:
        return Headroom(estimates)

    return Policy(
        name="dynamo-batch",
        settings=settings,
        order_batch=order_batch,
        place=place,
        fleet=decide_fleet,
        learned=told_by(_told),
        restore=read_by(_read),
        fleet_period_s=min(settings.batch_interval_s, settings.load_interval_s),
        initial_max_batch_size=settings.max_num_seqs,
    )
