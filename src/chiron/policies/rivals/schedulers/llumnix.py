"""``llumnix``: dispatch, migration and scaling by freeness (OSDI '24), from the published artifact's rules.

Freeness is the number of decode steps that the free KV would last, in blocks of 16 tokens per request::

    free(i)     = total - used - watermark                                        blocks of instance i
    dispatch    : the instance with the greatest (free - waiting_blocks) / (running + waiting)
    F_up        = (sum free - sum waiting_blocks) / (sum running + sum waiting)
    F_down      = (max(0, sum unused - total of one) - watermark of the rest - sum waiting_blocks)
                  / (sum running + [any waits])
    migration   : from instances with (free - waiting_blocks) / (running + [any waits]) < 3, worst first, each to the
                  best of those above it, one request a pair

Every 10 s: F_up < 10 adds the fewest empty instances that mend it; else F_down > 60 removes one, which is emptied by
migration and comes back first if load returns meanwhile. It knows no SLO: batch requests are dispatched as they come.

Sources: the artifact (branch osdi24ae) for rules and settings; where v0.x has the same it is said. What follows from
the control plane here rather than from Llumnix is in docs/policies/scalers.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Annotated, Any, Literal

from chiron.core.types import Instance
from chiron.policies.checks import above
from chiron.policies.instances import take_back_fullest
from chiron.policies.policy import Estimates, Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import mixed_plan
from chiron.policies.routers.least import LeastRouter
from chiron.policies.views import FleetPlan, FleetView, InstanceView, Migration, ModelPlan, ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class LlumnixSettings:
    scale_up_blocks: Annotated[float, Between(5.0, 4000.0, log=True)] = 10.0
    """Add when average freeness is below this, blocks per request (artifact's experiment; v0.x default)."""
    scale_down_blocks: Annotated[float, Between(10.0, 16000.0, log=True)] = 60.0
    """Remove one when it would stay above this (likewise)."""
    interval_s: float = 10.0
    """Between scaling decisions (likewise)."""
    migrate_below_blocks: float = 3.0
    """Freeness that divides sources from destinations of migrations (artifact and v0.x)."""
    migrate_period_s: float = 1.0
    """Between rounds of migration. The artifact: four steps of the engines; here a scrape, nothing is seen between."""
    drain_moves: int = 5
    """Requests that a draining instance moves a round: as many as the artifact's shorter rounds would."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size (artifact; vLLM's default)."""
    block_tokens: int = 16
    """Tokens of a KV block (vLLM's default)."""
    watermark: float = 0.01
    """Share of blocks that vLLM keeps back."""
    while_starting: Literal["count", "hold"] = "count"
    """Instances that start count as empty, and more are added if that is not enough. "hold", the artifact: no
    scale-up until they run. Its instances are launched beforehand and take over at once; with a minute of cold start
    holding would cripple it."""
    stale_s: float = 5.0
    """No scaling while the last scrape of a ready instance is older than this."""

    def __post_init__(self) -> None:
        above(0, self, "interval_s", "migrate_period_s", "block_tokens", "max_num_seqs", "stale_s")
        if not self.scale_up_blocks < self.scale_down_blocks:
            raise ValueError(
                f"scale_up_blocks is {self.scale_up_blocks}; it must be below scale_down_blocks "
                f"({self.scale_down_blocks})"
            )
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark is {self.watermark}; it must lie in 0..1, 1 excluded")
        if self.drain_moves < 0:
            raise ValueError(f"drain_moves is {self.drain_moves}; it must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """KV blocks and requests of one instance, or of several together."""

    total: float = 0.0
    used: float = 0.0
    waiting_blocks: float = 0.0
    """Blocks that the waiting requests would need."""
    running: int = 0
    waiting: int = 0

    def __add__(self, other: Blocks) -> Blocks:
        return Blocks(
            total=self.total + other.total,
            used=self.used + other.used,
            waiting_blocks=self.waiting_blocks + other.waiting_blocks,
            running=self.running + other.running,
            waiting=self.waiting + other.waiting,
        )


def freeness(blocks: Blocks, watermark: float) -> float:
    """Of dispatch and scale-up; inf with no request."""
    requests = blocks.running + blocks.waiting
    free = blocks.total * (1.0 - watermark) - blocks.used - blocks.waiting_blocks
    return free / requests if requests else inf


def freeness_migrate(blocks: Blocks, watermark: float) -> float:
    """Of migration: everything that waits counts as one request, the next."""
    requests = blocks.running + (blocks.waiting > 0)
    free = blocks.total * (1.0 - watermark) - blocks.used - blocks.waiting_blocks
    return free / requests if requests else inf


def freeness_without(fleet: Blocks, one: float, watermark: float) -> float:
    """Of the fleet if an instance of ``one`` blocks left and its requests moved to the others."""
    requests = fleet.running + (fleet.waiting > 0)
    rest = fleet.total - one
    free = max(0.0, rest - fleet.used) - rest * watermark - fleet.waiting_blocks
    return free / requests if requests else inf


def blocks_of(instance: InstanceView, block_tokens: int) -> Blocks:
    """As of its last scrape."""
    return Blocks(
        total=instance.kv_capacity_tokens / block_tokens,
        used=instance.kv_used_tokens / block_tokens,
        waiting_blocks=instance.waiting_tokens / block_tokens,
        running=instance.running,
        waiting=instance.waiting,
    )


def decide_fleet(settings: LlumnixSettings, state: None, view: FleetView) -> tuple[FleetPlan, None]:
    """Every model by itself: Llumnix serves one."""
    return {model.name: _decide_model(settings, model) for model in view.models}, None


def _decide_model(settings: LlumnixSettings, model: ModelView) -> ModelPlan:
    current = sum(model.planned.values())
    ready = [i for i in model.instances if i.state == "ready"]
    starting = model.count("starting")
    one = model.kv_capacity_tokens / settings.block_tokens
    empty = Blocks(total=one)
    # One that has just come up and was not scraped yet is empty; one whose scrapes stopped is unknown.
    if not ready or any(settings.stale_s < i.sample_age_s < inf for i in ready):
        return mixed_plan(current, "metrics_missing", {})
    seen = sum((blocks_of(i, settings.block_tokens) for i in ready), Blocks())
    fleet = sum((empty for _ in range(starting)), seen) if settings.while_starting == "count" else seen
    up = freeness(fleet, settings.watermark)
    down = freeness_without(fleet, one, settings.watermark)
    numbers = {"freeness": up, "freeness_without_one": down}
    if up < settings.scale_up_blocks:
        if starting and settings.while_starting == "hold":
            return mixed_plan(current, "hold_while_starting", numbers)
        added = 0
        while freeness(fleet, settings.watermark) < settings.scale_up_blocks and current + added < model.max_instances:
            fleet += empty
            added += 1
        return mixed_plan(current + added, "freeness_low", numbers)
    if down > settings.scale_down_blocks and not model.count("draining"):
        return mixed_plan(max(current - 1, model.min_instances, 1), "freeness_high", numbers)
    return mixed_plan(current, "steady", numbers)


def decide_migrations(settings: LlumnixSettings, state: None, view: FleetView) -> tuple[tuple[Migration, ...], None]:
    """Pair the least free with the most free. A draining instance is the least free of all."""
    moves: list[Migration] = []
    for model in view.models:
        sources: list[tuple[float, InstanceView]] = []
        destinations: list[tuple[float, InstanceView]] = []
        for instance in model.instances:
            if instance.state == "draining":
                sources.append((-inf, instance))
            elif instance.state == "ready" and instance.sample_age_s <= settings.stale_s:
                free = freeness_migrate(blocks_of(instance, settings.block_tokens), settings.watermark)
                if free < settings.migrate_below_blocks:
                    sources.append((free, instance))
                elif free > settings.migrate_below_blocks:
                    destinations.append((free, instance))
        sources.sort(key=lambda entry: (entry[0], entry[1].id))
        destinations.sort(key=lambda entry: (-entry[0], entry[1].id))
        for (_, source), (_, destination) in zip(sources, destinations, strict=False):
            times = settings.drain_moves if source.state == "draining" else 1
            moves += [Migration(source=source.id, destination=destination.id)] * times
    return tuple(moves), None


def dispatch_load(instance: Instance, block_tokens: int, watermark: float) -> float:
    """Minus the freeness of dispatch, from the control plane's own books: known at once, where Llumnix waits for the
    next report. The KV of a request is booked as its prompt and the output expected of its class."""
    requests = len(instance.requests)
    if requests == 0:
        return -inf
    free = instance.kv_capacity_tokens * (1.0 - watermark) - instance.kv_reserved_tokens
    return -free / (block_tokens * requests)


def make_llumnix(settings: LlumnixSettings) -> Policy:
    def router(_: Any, estimates: Estimates) -> LeastRouter:
        return LeastRouter(
            estimates, lambda instance: dispatch_load(instance, settings.block_tokens, settings.watermark)
        )

    return Policy(
        name="llumnix",
        settings=settings,
        place=router,
        fleet=decide_fleet,
        fleet_period_s=settings.interval_s,
        initial_max_batch_size=settings.max_num_seqs,
        # A scale-up during a scale-down takes the leaving instance back (artifact).
        take_back=take_back_fullest,
        migrate=decide_migrations,
        migrate_period_s=settings.migrate_period_s,
    )
