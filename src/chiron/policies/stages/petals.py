"""``stage-petals``: a fixed number of replicas, each at the layers where the pipeline is weakest. Petals (arXiv
2312.08361, ``petals/server/block_selection.py`` and ``petals/client/routing/sequence_manager.py``).

Petals serves a model on machines that others lend: how many there are nobody decides, each decides which layers it
serves. It joins where the throughput is least, and now and then looks whether another place would be better. It moves
if what all machines would find after it (each moving to its best place, until none moves) is better than what there is
by enough: present over future least throughput below ``balance_quality``. A move is a replica less here and, once it
has loaded other layers, one more there. Nothing grows with the load.

A sequence takes the way with the least delay: to a replica half a round trip and a constant, there a step's time for
each layer, and ten seconds more where its KV does not fit. Load is no part of it.

Filled in: places are the stages of the configuration, where Petals takes any layers in a row; the throughput of a
replica follows from its layers alone (Petals measures machines, which are alike here); machines look in turn, where
Petals draws the moment and the order; the KV that a sequence needs is that of its prompt, where Petals' clients say
how long it may get. Round trips are the configuration's hops. Left out: bans, pings, and machines that come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from chiron.policies.checks import above, at_least
from chiron.policies.views import PipelineView, ReplicaView, StagePlan

EPSILON: Final = 1e-3
ROUNDS_MAX: Final = 100
"""Of all machines looking in turn: more than they need where none comes to rest."""
OVERHEAD_S: Final = 0.018
"""Of one message, as its authors measured it."""
LAYERS_PER_S: Final = 300.0
"""Steps of one layer that a replica makes, where it has not been measured."""
ALLOCATION_S: Final = 10.0
"""What it costs to wait for room for KV."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePetalsSettings:
    servers: int = 0
    """Replicas of all stages together; 0: those that there are at the first look."""
    balance_quality: float = 0.75
    """A replica moves where the least throughput is below this share of what it could be. Petals' default."""
    check_s: float = 120.0
    """Each replica looks once in this time (``mean_balance_check_period``, Petals' default)."""
    tick_s: float = 5.0
    route: Literal["min_latency", "max_throughput"] = "min_latency"
    """As Petals has it for answering; the other one, for training, spreads sequences evenly."""

    def __post_init__(self) -> None:
        above(0, self, "balance_quality", "check_s", "tick_s")
        at_least(0, self, "servers")


@dataclass(frozen=True, slots=True, kw_only=True)
class PetalsState:
    """Of one pipeline."""

    servers: int
    checked: int = 0
    """Looks since the start."""
    begun_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where replicas may be."""

    layers: tuple[int, ...]
    """Of each stage."""
    least: tuple[int, ...]
    most: tuple[int, ...]
    """Replicas that it may have."""

    @classmethod
    def of(cls, view: PipelineView) -> Places:
        kinds = [stage.kind for stage in view.stages]
        return cls(
            layers=tuple(kind.layers[1] - kind.layers[0] + 1 for kind in kinds),
            least=tuple(kind.min_replicas for kind in kinds),
            most=tuple(kind.max_replicas for kind in kinds),
        )

    def throughput(self, stage: int) -> float:
        """Of one replica, in units of what it would make of one layer: requests use half of its layers on average."""
        return 2.0 / (self.layers[stage] + 1)

    def throughputs(self, counts: Sequence[int]) -> list[float]:
        return [count * self.throughput(stage) for stage, count in enumerate(counts)]

    def weakest(self, throughputs: Sequence[float], counts: Sequence[int]) -> int:
        """The stage that one more replica should join; -1: all are full."""
        free = [stage for stage, count in enumerate(counts) if count < self.most[stage]]
        return min(free, key=lambda stage: (throughputs[stage], self.layers[stage], stage)) if free else -1


def decide_stages(
    settings: StagePetalsSettings, state: PetalsState | None, view: PipelineView
) -> tuple[tuple[StagePlan, ...], PetalsState]:
    places = Places.of(view)
    before = [stage.planned for stage in view.stages]
    if state is None:
        state = PetalsState(servers=settings.servers or sum(before), begun_s=view.now_s)
    counts = joined(places, before, state.servers)
    due = int((view.now_s - state.begun_s) / settings.check_s * state.servers)
    for check in range(state.checked, due):
        stage = _stage_of(counts, check)
        target = better_place(places, counts, stage, settings.balance_quality)
        if target >= 0:
            counts[stage] -= 1
            counts[target] += 1
    least = min(places.throughputs(counts))
    plans = tuple(
        StagePlan(replicas=count, reason=_reason(count, was), numbers={"least_throughput": least})
        for count, was in zip(counts, before, strict=True)
    )
    return plans, replace(state, checked=max(due, state.checked))


def joined(places: Places, counts: Sequence[int], servers: int) -> list[int]:
    """With replicas that join, or leave where most would be left, until there are so many."""
    found = list(counts)
    while sum(found) < servers and (stage := places.weakest(places.throughputs(found), found)) >= 0:
        found[stage] += 1
    while sum(found) > servers:
        spare = [stage for stage, count in enumerate(found) if count > places.least[stage]]
        if not spare:
            break
        left = {stage: (found[stage] - 1) * places.throughput(stage) for stage in spare}
        found[max(spare, key=lambda stage: (left[stage], -stage))] -= 1
    return found


def better_place(places: Places, counts: Sequence[int], stage: int, balance_quality: float) -> int:
    """Where a replica of this stage should move; -1: it should stay."""
    if counts[stage] <= places.least[stage]:
        return -1
    throughputs = places.throughputs(counts)
    initial = min(throughputs)
    own = places.throughput(stage)
    throughputs[stage] -= own * (1 + EPSILON)
    if initial > EPSILON and min(throughputs) <= 0:
        return -1  # Some layers would have nobody.
    target = places.weakest(throughputs, counts)
    if target in (stage, -1):
        return -1
    throughputs[stage] += own * EPSILON
    throughputs[target] += places.throughput(target)
    after = list(counts)
    after[stage] -= 1
    after[target] += 1
    _settle(places, throughputs, after)
    future = min(throughputs)
    if future < initial or future < EPSILON:
        return -1
    return target if initial / future < balance_quality - EPSILON else -1


def _settle(places: Places, throughputs: list[float], counts: list[int]) -> None:
    """Every replica moves to its best place, until none does."""
    for _ in range(ROUNDS_MAX):
        moved = False
        for stage in [stage for stage, count in enumerate(counts) for _ in range(count)]:
            if counts[stage] <= places.least[stage]:
                continue
            own = places.throughput(stage)
            throughputs[stage] -= own * (1 + EPSILON)
            counts[stage] -= 1
            target = places.weakest(throughputs, counts)
            throughputs[stage] += own * EPSILON
            counts[target] += 1
            throughputs[target] += places.throughput(target)
            moved = moved or target != stage
        if not moved:
            return


def _stage_of(counts: Sequence[int], number: int) -> int:
    """The stage of one replica of all, by its number; they are counted over and over again."""
    at = number % max(1, sum(counts))
    for stage, count in enumerate(counts):
        if at < count:
            return stage
        at -= count
    return 0


def _reason(count: int, before: int) -> str:
    if count == before:
        return "balanced"
    return "weakest" if count > before else "stronger_than_others"


def route(settings: StagePetalsSettings, replicas: Sequence[ReplicaView], kv_tokens: int, number: int) -> int:
    """Which replica of a stage a sequence takes. The way with the least delay is that of each stage by itself: whoever
    takes a replica goes to the end of its layers."""
    if settings.route == "max_throughput":
        # Even, as draws would be on average: by the golden ratio, of which multiples are spread evenly.
        return int((number * 0.6180339887498949) % 1.0 * len(replicas))
    return min(range(len(replicas)), key=lambda index: (delay_s(replicas[index], kv_tokens), index))


def delay_s(replica: ReplicaView, kv_tokens: int) -> float:
    """On the way through one replica."""
    wait_s = 0.0 if kv_tokens <= replica.kv_left_tokens else ALLOCATION_S
    return replica.hop_s + OVERHEAD_S + wait_s + replica.layers / LAYERS_PER_S
