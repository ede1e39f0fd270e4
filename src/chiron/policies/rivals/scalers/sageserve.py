"""``sageserve``: SageServe's LT-UA scaling (POMACS 2025): an hourly plan from a forecast, carried out by memory in use.

Once an hour, from the prompt tokens of interactive requests in each minute so far::

    tokens  = most of ARIMA's forecast for the minutes 20 to 60 from now + 0.1 * the busiest minute of batch work in
              the last hour
    plan    = ceil(tokens / tokens a minute of one instance)
    changes = plan - instances

What a plan takes away leaves at once, and changes is 0 then. At each decision between, with u the share of KV in use,
one instance at a time::

    changes > 0 and u > 0.5   : one more, changes - 1
    changes < 0 and u < 0.25  : one less, changes + 1
    changes = 0 and tokens of the last minute > 5 * those forecast for it : one more, changes - 1
    changes < 0, likewise, and u > 0.5 : likewise (ours)

Nothing starts while another does. Batch work waits in front, earliest deadline first, and is released while u is at
most 0.6. Requests go to the instance with the fewest tokens that are pending.

Source: shashwatj07/SageServe, arbiter.py (GlobalArbiterARIMAChecking), global_arbiter.py, long_term_allocation.py,
simulator.py (feed_async) and configs/config.yaml. What is filled in is in docs/policies/scalers.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, inf
from typing import Annotated, Any

from chiron.core.kept import Kept
from chiron.core.types import Instance, Placement, Request, RequestClass
from chiron.policies.capacity import capacity
from chiron.policies.checks import above, at_least
from chiron.policies.policy import Estimates, Policy
from chiron.policies.queues.deadline_groups import batch_due_s
from chiron.policies.queues.order import KeyOrder
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model, held, mixed_plan, scraped, within_bounds
from chiron.policies.rivals.scalers.forecasters import FEWEST, Fitted, arima, needs
from chiron.policies.rivals.scalers.past import fitted_of, of_fitted, pairs, read_by, series, told_by
from chiron.policies.routers.least import LeastRouter
from chiron.policies.views import FleetPlan, FleetView, InstanceView, ModelPlan, ModelView

MINUTE_S = 60
DAY_MINUTES = 24 * 60
MOST_MINUTES = 7 * DAY_MINUTES


@dataclass(frozen=True, slots=True, kw_only=True)
class SageServeSettings:
    plan_s: Annotated[float, Between(1800.0, 3600.0, log=True)] = 3600.0
    """Between two plans (the code, as all that follow where nothing else is said)."""
    first_s: float = 600.0
    """Of the first one. Ours: the code begins with a forecast from earlier weeks, as after a history; until then
    memory that interactive requests use adds instances, and none leaves."""
    ahead_from_s: float = 1200.0
    """The part of the forecast that a plan is for begins so far ahead, and ends ``plan_s`` ahead."""
    batch_share: float = 0.1
    """Of the busiest minute of batch work in the last hour that counts."""
    up_at: Annotated[float, Between(0.05, 0.9)] = 0.5
    """Share of KV in use above which an instance is added. Its paper, by notes, has 0.7."""
    down_at: Annotated[float, Between(0.01, 0.6)] = 0.25
    """Below which one leaves that a surprise added. Its paper, by notes, has 0.3."""
    down_waits: bool = False
    """Those that a plan takes away wait for that, too, and leave one by one (its paper, by notes)."""
    surprise: Annotated[float, Between(1.1, 10.0, log=True)] = 5.0
    """Times the forecast at which the plan no longer holds."""
    batch_until: Annotated[float, Between(0.1, 1.0)] = 0.6
    """Share of KV in use until which batch work is released."""
    utilisation: Annotated[float, Between(0.2, 1.0)] = 0.8
    """Share of what an instance does within the SLOs that plans count on. Ours: the code has a table of four models."""
    tick_s: float = 5.0
    """Between decisions. Ours: the code decides at each arrival."""
    stale_s: float = 15.0
    """How old a scrape may be; without it the fleet is held. Ours."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "plan_s", "up_at", "surprise", "batch_until", "utilisation", "tick_s", "stale_s", "max_num_seqs")
        at_least(0, self, "first_s", "ahead_from_s", "batch_share", "down_at")
        if not self.ahead_from_s < self.plan_s:
            raise ValueError(f"ahead_from_s is {self.ahead_from_s}; it must be below plan_s ({self.plan_s})")
        if not self.down_at < self.up_at:
            raise ValueError(f"down_at is {self.down_at}; it must be below up_at ({self.up_at})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one model."""

    minutes: tuple[float, ...] = ()
    """Prompt tokens of interactive requests, by minute."""
    batch_minutes: tuple[float, ...] = ()
    """Likewise of batch requests, of the last hour."""
    minute: int = -1
    """The one under way, and what has come in it so far, of interactive and of batch requests."""
    tokens: float = 0.0
    batch_tokens: float = 0.0
    last_minute: tuple[tuple[int, float], ...] = ()
    """(second, prompt tokens of interactive requests)."""
    forecast: tuple[float, ...] = ()
    """From ``forecast_minute`` on."""
    forecast_minute: int = 0
    planned_s: float = -inf
    fitted: Fitted | None = None
    chosen_from: int = 0
    """Minutes that there were when ARIMA's order was chosen."""
    changes: int | None = None
    """Instances that the plan still has to add, or to take away if negative; None: there is no plan yet."""
    has_past: bool = False
    """Of an earlier run: its first decision is a plan."""


State = dict[str, Memory]


def decide_fleet(settings: SageServeSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself."""
    return each_model(_decide_model, Memory, settings, state, view)


def _decide_model(
    settings: SageServeSettings, memory: Memory, model: ModelView, now_s: float
) -> tuple[ModelPlan, Memory]:
    memory = counted(memory, model, now_s)
    current = sum(model.planned.values())
    fresh = scraped(model, settings.stale_s)
    if fresh is None:
        return held(model), memory
    at_once = 0
    begun = memory.has_past or now_s >= settings.first_s
    if begun and now_s - memory.planned_s >= settings.plan_s and len(memory.minutes) >= FEWEST:
        memory = _planned(settings, memory, model, current, now_s)
        if memory.changes is not None and not settings.down_waits:
            at_once = min(0, memory.changes)
    used = used_share(fresh) if memory.changes is not None else used_share(fresh, interactive=True)
    if at_once:
        step, reason = at_once, "planned_down"
    else:
        step, reason = change(settings, memory, used, starting=model.count("starting") > 0)
    count = within_bounds(model, current + step)
    if memory.changes is not None and count != current:
        memory = replace(memory, changes=memory.changes - (count - current))
    numbers = {
        "kv_used": used_share(fresh),
        "changes": float(memory.changes or 0),
        "tokens": sum(tokens for _, tokens in memory.last_minute),
        "forecast": forecast_now(memory),
    }
    return mixed_plan(count, reason if count != current else "steady", numbers), memory


def used_share(instances: Sequence[InstanceView], *, interactive: bool = False) -> float:
    """Of the KV; ``interactive``: by requests of that kind, as their share of all that are there."""
    capacity_tokens = sum(each.kv_capacity_tokens for each in instances)
    used = 0.0
    for each in instances:
        share = each.dispatched_interactive / each.dispatched if interactive and each.dispatched else 1.0
        used += share * each.kv_used_tokens
    return used / capacity_tokens if capacity_tokens else 0.0


def forecast_now(memory: Memory) -> float:
    """Tokens forecast for the minute under way; inf: nothing is forecast."""
    place = memory.minute - memory.forecast_minute
    return memory.forecast[place] if 0 <= place < len(memory.forecast) else inf


def change(settings: SageServeSettings, memory: Memory, used: float, *, starting: bool) -> tuple[int, str]:
    """By how many instances the fleet changes now, and why."""
    left = memory.changes
    if starting:
        return 0, "one_starts"
    if left is None:
        return (1, "memory_above") if used > settings.up_at else (0, "steady")
    if left > 0:
        return (1, "planned_up") if used > settings.up_at else (0, "memory_enough")
    if left == 0 or used > settings.up_at:
        surprised = sum(tokens for _, tokens in memory.last_minute) > settings.surprise * forecast_now(memory)
        if surprised:
            return 1, "beyond_forecast"
    if left == 0:
        return 0, "steady"
    return (-1, "planned_down") if used < settings.down_at else (0, "memory_in_use")


# -- what has come, and the plan -----------------------------------------------------------------------------------


def counted(memory: Memory, model: ModelView, now_s: float) -> Memory:
    """With the arrivals since the last decision, in whole minutes."""
    minute = int(now_s // MINUTE_S)
    if memory.minute < 0:
        memory = replace(memory, minute=minute)
    come = [(each.second, each.input_tokens) for each in model.arrivals if each.cls.interactive and each.requests > 0]
    kept = tuple(each for each in (*memory.last_minute, *come) if each[0] >= now_s - MINUTE_S)
    tokens = memory.tokens + sum(each[1] for each in come)
    batch = memory.batch_tokens + sum(
        each.input_tokens for each in model.arrivals if not each.cls.interactive and each.requests > 0
    )
    if minute == memory.minute:
        return replace(memory, last_minute=kept, tokens=tokens, batch_tokens=batch)
    idle = (0.0,) * (minute - memory.minute - 1)
    return replace(
        memory,
        last_minute=kept,
        minutes=(*memory.minutes, tokens, *idle)[-MOST_MINUTES:],
        batch_minutes=(*memory.batch_minutes, batch, *idle)[-60:],
        minute=minute,
        tokens=0.0,
        batch_tokens=0.0,
    )


def _planned(settings: SageServeSettings, memory: Memory, model: ModelView, current: int, now_s: float) -> Memory:
    steps = max(1, ceil(settings.plan_s / MINUTE_S))
    anew = chooses_anew(memory)
    forecast, fitted = arima(memory.minutes, steps, None if anew else memory.fitted)
    tokens = tokens_planned(settings, forecast, memory.batch_minutes)
    count = within_bounds(model, ceil(tokens / tokens_per_minute(settings, model)))
    return replace(
        memory,
        forecast=forecast,
        forecast_minute=memory.minute,
        planned_s=now_s,
        fitted=fitted,
        chosen_from=len(memory.minutes) if anew else memory.chosen_from,
        changes=count - current,
    )


def chooses_anew(memory: Memory) -> bool:
    """Whether ARIMA's order is: with one that was chosen from a few minutes, forecasts would be little but their mean
    for days. A day says enough."""
    minutes, before = len(memory.minutes), memory.chosen_from
    return memory.fitted is None or (before < DAY_MINUTES and minutes >= 2 * before)


def tokens_planned(settings: SageServeSettings, forecast: Sequence[float], batch_minutes: Sequence[float]) -> float:
    """Prompt tokens a minute that a plan is for."""
    ahead = forecast[int(settings.ahead_from_s // MINUTE_S) :] or forecast[-1:]
    return max(ahead) + settings.batch_share * max(batch_minutes, default=0.0)


def tokens_per_minute(settings: SageServeSettings, model: ModelView) -> float:
    """Prompt tokens that one instance takes in, with their answers, within the SLOs."""
    used = [mix for mix in model.mixes if mix.finished and mix.cls.interactive]
    used = used or [mix for mix in model.mixes if mix.cls.interactive] or list(model.mixes)
    carried = capacity(
        model.step_times,
        [(float(max(1, mix.finished)), mix) for mix in used],
        itl_target_s=min((mix.cls.itl_s for mix in used if mix.cls.interactive), default=inf),
        kv_capacity_tokens=model.kv_capacity_tokens,
        max_num_seqs=min(model.max_num_seqs, settings.max_num_seqs),
    )
    output = sum(max(1, mix.finished) * max(1.0, mix.output_tokens) for mix in used)
    prompts = sum(max(1, mix.finished) * mix.input_tokens for mix in used)
    per_s = carried.batch_size / carried.step_s * prompts / output
    return max(1e-9, per_s * MINUTE_S * settings.utilisation)


def _told(settings: SageServeSettings, memory: Memory, now_s: float) -> dict[str, Any]:
    """The minutes so far, and ARIMA's order. The one under way is one of them once more than half of it is over."""
    minutes, batch_minutes = memory.minutes, memory.batch_minutes
    if memory.minute >= 0:
        over_s = now_s - MINUTE_S * memory.minute
        idle = (0.0,) * (int(over_s // MINUTE_S) - 1)
        if over_s > MINUTE_S / 2:
            whole = max(1.0, MINUTE_S / over_s)
            minutes = (*minutes, whole * memory.tokens, *idle)[-MOST_MINUTES:]
            batch_minutes = (*batch_minutes, whole * memory.batch_tokens, *idle)[-60:]
    return {
        "minutes": list(minutes),
        "batch_minutes": list(batch_minutes),
        "last_minute": [[floor(now_s) - second, tokens] for second, tokens in memory.last_minute],
        "fitted": of_fitted(memory.fitted),
        "chosen_from": memory.chosen_from,
    }


def _read(settings: SageServeSettings, kept: Kept, classes: Sequence[RequestClass], now_s: float) -> Memory | None:
    if "minutes" not in kept:
        return None
    last = pairs(kept, "last_minute", MOST_MINUTES)
    return Memory(
        minutes=series(kept, "minutes", MOST_MINUTES),
        batch_minutes=series(kept, "batch_minutes", 60),
        last_minute=tuple((floor(now_s) - round(ago_s), tokens) for ago_s, tokens in last),
        fitted=fitted_of(kept.part("fitted")),
        chosen_from=kept.whole("chosen_from", 0, MOST_MINUTES) or 0,
        has_past=True,
    )


# -- batch work, and placement -------------------------------------------------------------------------------------


class PendingTokens:
    """The router: fewest pending tokens first; batch work only while KV is left."""

    def __init__(self, settings: SageServeSettings, estimates: Estimates) -> None:
        self.room_tokens = 0
        self._settings = settings
        self._least = LeastRouter(estimates, lambda instance: instance.kv_reserved_tokens)
        self._capacity = 0
        self._reserved = 0
        self._counted: dict[int, int] = {}
        """KV that is counted of each instance that takes work."""

    def add(self, instance: Instance) -> None:
        if instance.id not in self._counted:
            self._counted[instance.id] = 0
            self._capacity += instance.kv_capacity_tokens
        self._least.add(instance)
        self._count(instance)

    def remove(self, instance: Instance) -> None:
        if instance.id in self._counted:
            self._reserved -= self._counted.pop(instance.id)
            self._capacity -= instance.kv_capacity_tokens
        self._least.remove(instance)

    def changed(self, instance: Instance) -> None:
        self._least.changed(instance)
        self._count(instance)

    def _count(self, instance: Instance) -> None:
        if instance.id in self._counted:
            self._reserved += instance.kv_reserved_tokens - self._counted[instance.id]
            self._counted[instance.id] = instance.kv_reserved_tokens

    def place(self, request: Request, waited_s: float) -> Placement | None:
        if not request.interactive and self._reserved > self._settings.batch_until * self._capacity:
            return None
        return self._least.place(request, waited_s)

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()


def order_batch(settings: SageServeSettings, estimates: Estimates) -> KeyOrder:
    return KeyOrder(batch_due_s)


def make_sageserve(settings: SageServeSettings) -> Policy:
    """Raises ImportError where ARIMA's library is not installed."""
    needs("arima")

    def place(_: Any, estimates: Estimates) -> PendingTokens:
        return PendingTokens(settings, estimates)

    return Policy(
        name="sageserve",
        settings=settings,
        order_batch=order_batch,
        place=place,
        fleet=decide_fleet,
        learned=told_by(_told),
        restore=read_by(_read),
        fleet_period_s=settings.tick_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
