"""``ray-serve``: Ray Serve's autoscaling on ongoing requests, and its power of two choices.

Requests in flight and waiting, averaged over 30 s, against a target per replica::

    desired = ceil(running * (1 + (total / (target * running) - 1) * factor)), within the bounds
    a shrinking one that its factor rounds back to where it was is one less
    applied once it has been above the present number for 30 s, or below it for 600 s, without a break

Placement: of two replicas at random the one with fewer ongoing requests, unless it has ``max_ongoing`` of them; then
two others are asked, and after some tries again a little later. What finds no room waits in front of the replicas.

Sources: ray-project/ray, python/ray/serve/autoscaling_policy.py, config.py and _private/constants.py, and
python/ray/llm/_internal/serve/configs/constants.py (the two limits for LLMs). Ray decides ten times a second on figures
that are pushed every 10 s; here once a second on the control plane's own, which is kinder. It knows no SLO. Random
draws come from the request's number: the same request has the same luck under any settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Annotated, Any

from chiron.core.types import Instance, Placement, Request
from chiron.policies.checks import above, at_least
from chiron.policies.policy import Estimates, Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model, mixed_plan
from chiron.policies.size import placed, prompt_tokens
from chiron.policies.views import FleetPlan, FleetView, ModelPlan, ModelView

TRIES = 8
"""Pairs of replicas that a request asks before it waits."""
BACK_OFF_S = 0.025
"""Then it asks others; Ray's first back-off."""
_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RayServeSettings:
    target_ongoing: Annotated[float, Between(2.0, 200.0, log=True)] = 16.0
    """Ongoing requests per replica (Ray's constant for LLMs; elsewhere 2)."""
    max_ongoing: Annotated[int, Between(8, 512, log=True)] = 64
    """No more are sent to a replica (likewise; elsewhere 5, and no limit in later versions)."""
    upscale_delay_s: Annotated[float, Between(1.0, 60.0, log=True)] = 30.0
    """Ray Serve's default, as the next four."""
    downscale_delay_s: Annotated[float, Between(60.0, 900.0, log=True)] = 600.0
    upscale_factor: float = 1.0
    """Share of the missing replicas that is added."""
    downscale_factor: float = 1.0
    """Share of the idle replicas that is removed."""
    look_back_s: float = 30.0
    """Window of the mean."""
    tick_s: float = 1.0
    """Ours: see above."""
    max_num_seqs: int = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(
            0,
            self,
            "target_ongoing",
            "max_ongoing",
            "upscale_factor",
            "downscale_factor",
            "look_back_s",
            "tick_s",
            "max_num_seqs",
        )
        at_least(0, self, "upscale_delay_s", "downscale_delay_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one model."""

    totals: tuple[tuple[float, int], ...] = ()
    """(time, requests in flight and waiting) in the window."""
    sign: int = 0
    """Whether more (1) or fewer (-1) replicas have been desired without a break."""
    since_s: float = 0.0
    """Since when."""


State = dict[str, Memory]


def desired_replicas(settings: RayServeSettings, total: float, running: int) -> int:
    """For ``running`` replicas, before bounds and delays."""
    error = total / (settings.target_ongoing * running)
    factor = settings.upscale_factor if error >= 1.0 else settings.downscale_factor
    desired = ceil(running * (1.0 + (error - 1.0) * factor))
    if desired == running and ceil(running * error) < running:
        desired -= 1
    return desired


def decide_fleet(settings: RayServeSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself: one deployment each."""
    return each_model(_decide_model, Memory, settings, state, view)


def _decide_model(
    settings: RayServeSettings, memory: Memory, model: ModelView, now_s: float
) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    running = model.count("ready")
    now = model.waiting_interactive + sum(instance.dispatched for instance in model.instances)
    totals = (*(t for t in memory.totals if t[0] > now_s - settings.look_back_s), (now_s, now))
    total = sum(count for _, count in totals) / len(totals)
    memory = replace(memory, totals=totals)
    numbers = {"ongoing": total, "running": float(running)}
    if running == 0:
        count = max(current, ceil(settings.upscale_factor)) if now else current
        reason = "first_replica" if count > current else "nothing_runs"
        return mixed_plan(count, reason, numbers), replace(memory, sign=0)
    desired = min(max(desired_replicas(settings, total, running), model.min_instances), model.max_instances)
    sign = (desired > current) - (desired < current)
    if sign != memory.sign:
        memory = replace(memory, sign=sign, since_s=now_s)
    delay_s = settings.upscale_delay_s if sign > 0 else settings.downscale_delay_s
    numbers["desired"] = float(desired)
    if sign == 0 or now_s - memory.since_s < delay_s:
        return mixed_plan(current, "delayed" if sign else "steady", numbers), memory
    reason = "ongoing_above_target" if sign > 0 else "ongoing_below_target"
    return mixed_plan(desired, reason, numbers), replace(memory, sign=0)


# -- placement ---------------------------------------------------------------------------------------------------


class TwoChoices:
    """The router: two replicas at random, and the one with fewer requests."""

    def __init__(self, settings: RayServeSettings, estimates: Estimates) -> None:
        self.room_tokens = 0
        self._settings = settings
        self._estimates = estimates
        self._ready: list[Instance] = []

    def add(self, instance: Instance) -> None:
        """Its note is its place in the list; -1: it has none."""
        if instance.index is None or instance.index < 0:
            instance.index = len(self._ready)
            self._ready.append(instance)

    def remove(self, instance: Instance) -> None:
        place = instance.index
        if place >= 0:
            last = self._ready.pop()
            if last is not instance:
                self._ready[place] = last
                last.index = place
            instance.index = -1

    def changed(self, instance: Instance) -> None:
        """Nothing is kept of its load."""

    def place(self, request: Request, waited_s: float) -> Placement | None:
        ready = self._ready
        count = len(ready)
        limit, prompt = self._settings.max_ongoing, prompt_tokens(request)
        draw = mixed(request.id ^ (int(waited_s / BACK_OFF_S) << 32))
        for number in range(TRIES if ready else 0):
            draw = mixed(draw)
            first = draw % count
            chosen, other = ready[first], ready[(first + 1 + (draw >> 32) % max(1, count - 1)) % count]
            ongoing, its = len(chosen.requests), len(other.requests)
            if its < ongoing or (its == ongoing and other.id < chosen.id):
                chosen, ongoing = other, its
            if ongoing < limit and prompt < chosen.kv_capacity_tokens:
                return placed(self._estimates, request, chosen)
            # Further draws would find the same.
            if number == 0 and not any(len(instance.requests) < limit for instance in ready):
                return None
        return None

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()


def mixed(number: int) -> int:
    """64 bits that look random (SplitMix64)."""
    number = (number + 0x9E3779B97F4A7C15) & _BITS
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _BITS
    return number ^ (number >> 31)


def make_ray_serve(settings: RayServeSettings) -> Policy:
    def place(_: Any, estimates: Estimates) -> TwoChoices:
        return TwoChoices(settings, estimates)

    return Policy(
        name="ray-serve",
        settings=settings,
        place=place,
        fleet=decide_fleet,
        fleet_period_s=settings.tick_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
