"""``clairvoyant``: ``chiron`` whose fleet for interactive work follows a schedule by somebody who knows the future.

Only a simulation can have one (``sim.clairvoyant``). What a request costs, where it runs, how large batches are and
what is added for batch deadlines is decided as by ``chiron``, from what ``chiron`` would know. Nothing is held: who
knows what comes has no need to wait and see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

from chiron.core.types import Role
from chiron.policies.chiron.batch import batch_at_risk, batch_extra, instances_apart
from chiron.policies.chiron.global_loop import make_chiron, share_gpus
from chiron.policies.chiron.load import ModelMemory, first_memory, interactive_capacity, remember
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.policy import Policy
from chiron.policies.views import FleetPlan, FleetView, ModelPlan, ModelView

CLAIRVOYANT = "clairvoyant"

State = dict[str, ModelMemory]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSettings(ChironSettings):
    schedules: Mapping[str, tuple[int, ...]] | None = None
    """Instances for interactive work that are to be ready in each step, by model; the last one stays. A model without
    interactive work has none. None: not made yet."""
    step_s: float = 5.0
    ahead_s: float = 0.0
    """What a start takes at the most: an instance is asked for so long before it is to be ready."""


def scheduled(settings: ScheduledSettings, model: str, now_s: float) -> int:
    """Instances that must be up or on their way now."""
    schedule = (settings.schedules or {}).get(model, ())
    if not schedule:
        return 0
    first = min(int(now_s / settings.step_s), len(schedule) - 1)
    last = ceil((now_s + settings.tick_s + settings.ahead_s) / settings.step_s)
    return max(schedule[first : max(last, first + 1)])


def decide_fleet(settings: ScheduledSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    before: State = {}
    memories: State = {}
    plans: dict[str, ModelPlan] = {}
    for model in view.models:
        memory = (state or {}).get(model.name) or first_memory(settings, model, view.now_s - view.since_s)
        before[model.name] = memory
        plans[model.name], memories[model.name] = _decide_model(settings, memory, model, view.now_s)
    return share_gpus(settings, plans, before, memories, view)


def _decide_model(
    settings: ScheduledSettings, memory: ModelMemory, model: ModelView, now_s: float
) -> tuple[ModelPlan, ModelMemory]:
    serving = interactive_capacity(settings, model, memory)
    memory = remember(settings, memory, model, now_s, serving.work_rate * settings.utilisation)
    interactive = max(scheduled(settings, model.name, now_s), model.min_instances)
    extra, bbp, numbers, memory = batch_extra(settings, memory, model, serving, now_s, interactive)
    total = min(max(interactive + extra, model.min_instances), model.max_instances)
    batch = max(min(extra, max(0, total - interactive)), instances_apart(settings, memory, total, now_s))
    counts: dict[Role, int] = {"interactive": 0, "mixed": total - batch, "batch": batch}
    plan = ModelPlan(
        counts=counts,
        reason="schedule",
        numbers={"scheduled": float(interactive), **numbers},
        bbp=float(bbp),
        batch_at_risk=batch_at_risk(memory, model, now_s),
    )
    return plan, memory


def make_scheduled(settings: ScheduledSettings) -> Policy:
    return replace(
        make_chiron(settings), name=CLAIRVOYANT, fleet=decide_fleet, prepare=None, learned=None, restore=None
    )
