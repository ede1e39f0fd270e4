"""``dynamollm``: DynamoLLM's pools by request length and its epochs (HPCA '25), as far as GPU-hours show them.

Requests are of nine types: prompts and expected answers that are short, medium or long. Each type has a pool of
instances, in proportion to its share of the work; what is less than a whole instance of a pool goes to the next larger
one, as do requests while every instance of theirs is full. Once an epoch of half an hour, for the epoch to come::

    instances = ceil(sum over classes of requests: load expected / load that one instance serves within its SLOs)

The load expected is that of the busiest minute of the last epoch, or of the same epoch in earlier weeks. The paper
has no batch requests: their work counts as
if it had come evenly over an epoch, as long as the plan holds, or over the time that its class has until its deadline,
if that is less; else a job that comes at once would ask for everything (ours, in its favour).

Sources: the paper (arXiv 2408.00741), by its abstract and notes; no code is public. Left out are two of its three knobs
and two of its three levels: how many GPUs an instance is spread over, every 5 minutes, and their frequency, every 5 s.
They save energy, not GPU-hours, and neither is in the simulator. Its load predictor is a template made of earlier
weeks: where the epoch of one or two weeks ago is known (after that long, or from a history), the load expected is the
mean of theirs. Answers' types are predicted by a proxy model there, and are those of the request's class here, by the
mean of its answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, inf
from typing import Annotated, Any

from chiron.core.kept import Kept
from chiron.core.types import Instance, Placement, Request, RequestClass
from chiron.policies.capacity import capacity, decode_s, prefill_s
from chiron.policies.checks import above, at_least
from chiron.policies.policy import LOAD_AGE_MAX_S, PAST_MAX_S, ClassesOf, Estimates, Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model, held, mixed_plan, scraped, within_bounds
from chiron.policies.rivals.scalers.past import MOST, pairs, told_by
from chiron.policies.routers.least import LeastRouter
from chiron.policies.size import prompt_tokens
from chiron.policies.views import ClassMix, FleetPlan, FleetView, ModelPlan, ModelView

PROMPTS = (256, 1024)
"""Tokens below which a prompt is short, and medium: the paper's, as we remember it, as those of answers."""
ANSWERS = (100, 350)
"""Likewise an answer."""
TYPES = 9
SHARES_EVERY = 256
"""Requests between two looks at the shares. Ours: a look costs as much as there are instances."""
FOLLOWS = 0.002
"""Weight of a request in the shares of work: they are those of about the last 500."""
MINUTE_S = 60
MOST_EPOCHS = 16_384
"""That are remembered: two weeks of the shortest, and some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamoLlmSettings:
    epoch_s: Annotated[float, Between(120.0, 1800.0, log=True)] = 1800.0
    """Between two decisions of the cluster manager (the paper, by notes)."""
    first_s: float = 300.0
    """The first one, without a history. Ours: the paper begins with a prediction from earlier weeks."""
    week_s: float = 604_800.0
    """After which the load is expected to come back (the paper, by notes)."""
    tick_s: float = 60.0
    """How often the load is counted. Ours."""
    utilisation: Annotated[float, Between(0.3, 1.0)] = 0.8
    """Share of what an instance does within the SLO, by its step times, that is planned with. Ours: the paper's profile
    is measured, so waiting is in it."""
    stale_s: float = 30.0
    """Without a scrape that is younger the fleet is held. Ours."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "epoch_s", "week_s", "tick_s", "utilisation", "stale_s")
        at_least(0, self, "first_s")
        at_least(1, self, "max_num_seqs")
        if not self.tick_s <= self.epoch_s:
            raise ValueError(f"tick_s is {self.tick_s}; it must be at most epoch_s ({self.epoch_s})")
        if not self.utilisation <= 1:
            raise ValueError(f"utilisation is {self.utilisation}; it must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one model."""

    begun_s: float | None = None
    """When this epoch began."""
    next_s: float = inf
    """When the next epoch begins."""
    minutes: tuple[tuple[int, float], ...] = ()
    """(minute, instances that its interactive requests would have kept busy) of the epoch, the last one under way."""
    batch_s: float = 0.0
    """For how long batch requests of the epoch would have kept one busy, more where they are due within one."""
    epochs: tuple[tuple[float, float], ...] = ()
    """(when it began, its busiest minute) of those of the last two weeks."""
    expected: float = 0.0
    """Instances' worth of load that the plan in force is for."""
    adopts: bool = False
    """It is that of an earlier run, and is to be planned for now."""


State = dict[str, Memory]


def decide_fleet(settings: DynamoLlmSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself."""
    return each_model(_decide_model, Memory, settings, state, view)


def _decide_model(
    settings: DynamoLlmSettings, memory: Memory, model: ModelView, now_s: float
) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    if memory.begun_s is None:
        begun = Memory(begun_s=now_s, next_s=now_s + settings.first_s)
        return mixed_plan(within_bounds(model, current), "first_epoch"), begun
    began_s = memory.begun_s
    span_s = now_s - began_s
    oldest = (now_s - settings.epoch_s) // MINUTE_S
    minutes = {minute: busy for minute, busy in memory.minutes if minute >= oldest}
    batch_s = memory.batch_s
    for second, cls, busy_s in load(settings, model):
        minute = second // MINUTE_S
        minutes[minute] = minutes.get(minute, 0.0) + (busy_s / MINUTE_S if cls.interactive else 0.0)
        batch_s += 0.0 if cls.interactive else busy_s * max(1.0, settings.epoch_s / cls.deadline_s)
    memory = replace(memory, minutes=tuple(sorted(minutes.items())), batch_s=batch_s)
    if memory.adopts and now_s < memory.next_s - 1e-6:
        memory = replace(memory, adopts=False)
        return _planned(settings, model, current, memory.expected, {}), memory
    if now_s < memory.next_s - 1e-6:
        return mixed_plan(within_bounds(model, current), "within_epoch"), memory
    if scraped(model, settings.stale_s) is None:
        return held(model), memory
    busiest, batch = max(minutes.values(), default=0.0), batch_s / max(span_s, settings.epoch_s)
    oldest_s = now_s - 2.0 * settings.week_s - settings.epoch_s
    epochs = (*(each for each in memory.epochs if each[0] >= oldest_s), (began_s, busiest))[-MOST_EPOCHS:]
    template = expected(settings, epochs, now_s)
    memory = Memory(begun_s=now_s, next_s=now_s + settings.epoch_s, epochs=epochs)
    if template is not None:
        busiest = template
    elif not minutes:
        return mixed_plan(within_bounds(model, model.min_instances), "no_load"), memory
    memory = replace(memory, expected=busiest + batch)
    return _planned(settings, model, current, memory.expected, {"busiest": busiest, "batch": batch}), memory


def _planned(
    settings: DynamoLlmSettings, model: ModelView, current: int, expects: float, numbers: Mapping[str, float]
) -> ModelPlan:
    count = within_bounds(model, ceil(expects / settings.utilisation - 1e-9))
    reason = "load_above" if count > current else "load_below" if count < current else "steady"
    return mixed_plan(count, reason, numbers)


def expected(settings: DynamoLlmSettings, epochs: Sequence[tuple[float, float]], now_s: float) -> float | None:
    """The mean over the weeks that are known of the epoch that began nearest to now; None: of no week it is."""
    found = []
    for weeks in (1, 2):
        then_s = now_s - weeks * settings.week_s
        near = min(epochs, key=lambda each: abs(each[0] - then_s), default=None)
        if near is not None and abs(near[0] - then_s) <= settings.epoch_s / 2.0:
            found.append(near[1])
    return sum(found) / len(found) if found else None


def load(settings: DynamoLlmSettings, model: ModelView) -> list[tuple[int, RequestClass, float]]:
    """(second, class, seconds for which one instance would be busy with what came in it)."""
    mixes = {mix.cls.name: mix for mix in model.mixes}
    itl_s = min((mix.cls.itl_s for mix in _used(model) if mix.cls.interactive), default=inf)
    rates = {name: _work_rate(settings, model, mix, itl_s) for name, mix in mixes.items()}
    times = model.step_times
    came = []
    for arrival in model.arrivals:
        if arrival.requests > 0:
            mix, requests = mixes[arrival.cls.name], arrival.requests
            work = prefill_s(times, arrival.input_tokens, arrival.input_square)
            work += requests * decode_s(times, arrival.input_tokens / requests, mix.output_tokens)
            came.append((arrival.second, arrival.cls, work / rates[arrival.cls.name]))
    return came


def _used(model: ModelView) -> list[ClassMix]:
    return [mix for mix in model.mixes if mix.finished] or list(model.mixes)


def _work_rate(settings: DynamoLlmSettings, model: ModelView, mix: ClassMix, itl_s: float) -> float:
    """Work a second that one instance does of this class alone within the SLO."""
    carried = capacity(
        model.step_times,
        [(1.0, mix)],
        itl_target_s=itl_s,
        kv_capacity_tokens=model.kv_capacity_tokens,
        max_num_seqs=min(model.max_num_seqs, settings.max_num_seqs),
    )
    return max(1e-9, carried.work_rate)


# -- what the next run should know -------------------------------------------------------------------------------


def _told(settings: DynamoLlmSettings, memory: Memory, now_s: float) -> dict[str, Any]:
    """The epochs of two weeks and the one under way. The minute under way is a whole one once half of it is over."""
    if memory.begun_s is None:
        return {}
    this, over_s = floor(now_s / MINUTE_S), now_s % MINUTE_S
    whole = MINUTE_S / over_s if over_s > MINUTE_S / 2 else 0.0
    minutes = [[this - minute + (whole > 0.0), busy] for minute, busy in memory.minutes if minute < this]
    minutes += [[1, whole * busy] for minute, busy in memory.minutes if minute >= this and whole]
    return {
        "begun_ago_s": now_s - memory.begun_s,
        "next_in_s": max(0.0, memory.next_s - now_s),
        "minutes": minutes,
        "batch_s": memory.batch_s,
        "epochs": [[now_s - at_s, busy] for at_s, busy in memory.epochs],
        "expected": memory.expected,
    }


def _restored(
    settings: DynamoLlmSettings, kept: Mapping[str, Kept], classes: ClassesOf, now_s: float, age_s: float
) -> State:
    found = {name: _read(settings, part, now_s, age_s) for name, part in kept.items()}
    return {name: memory for name, memory in found.items() if memory is not None}


def _read(settings: DynamoLlmSettings, kept: Kept, now_s: float, age_s: float) -> Memory | None:
    """Epochs keep their time of the week. The one under way goes on as if no time had passed; of too long ago, a
    first one begins."""
    if "begun_ago_s" not in kept:
        return None
    told = pairs(kept, "epochs", MOST_EPOCHS)
    epochs = tuple((now_s - age_s - ago_s, busy) for ago_s, busy in told if age_s + ago_s <= PAST_MAX_S)
    begun_ago_s, next_in_s = kept.number("begun_ago_s", 0.0, MOST), kept.number("next_in_s", 0.0, settings.epoch_s)
    expects = kept.number("expected", 0.0, MOST)
    if age_s > LOAD_AGE_MAX_S or begun_ago_s is None or next_in_s is None or expects is None:
        return Memory(begun_s=now_s, next_s=now_s + settings.first_s, epochs=epochs)
    this = floor(now_s / MINUTE_S)
    return Memory(
        begun_s=now_s - begun_ago_s,
        next_s=now_s + next_in_s,
        minutes=tuple(sorted((this - round(ago), busy) for ago, busy in pairs(kept, "minutes", MOST_EPOCHS))),
        batch_s=kept.number("batch_s", 0.0, MOST) or 0.0,
        epochs=epochs,
        expected=expects,
        adopts=expects > 0.0,
    )


# -- pools ---------------------------------------------------------------------------------------------------------


def type_of(prompt: float, answer: float) -> int:
    """0: both are short; 8: both are long. Prompts count more: the next larger pool has longer ones."""
    return 3 * sum(prompt >= bound for bound in PROMPTS) + sum(answer >= bound for bound in ANSWERS)


def pools(shares: Sequence[float], count: int) -> list[int]:
    """How many of so many instances each type has, smallest first: whole ones, and what is left goes to the next."""
    total = sum(shares)
    made, given, so_far = [], 0, 0.0
    for share in shares:
        so_far += share
        upto = int(count * so_far / total + 1e-9) if total else 0
        made.append(upto - given)
        given = upto
    made[-1] += count - given
    return made


class Pools:
    """The router: the pool of a request's type, its instance with the fewest; a larger pool while that is full."""

    def __init__(self, estimates: Estimates) -> None:
        self.room_tokens = 0
        self._estimates = estimates
        self._pools = [LeastRouter(estimates, lambda instance: len(instance.requests)) for _ in range(TYPES)]
        self._counts = [0] * TYPES
        self._ready: dict[int, Instance] = {}
        self._pool_of: dict[int, int] = {}
        self._shares = [0.0] * TYPES
        self._places = 0
        """Until the shares are looked at again."""

    def add(self, instance: Instance) -> None:
        if instance.id not in self._ready:
            self._ready[instance.id] = instance
            self._share_out()

    def remove(self, instance: Instance) -> None:
        if self._ready.pop(instance.id, None) is not None:
            self._pools[self._pool_of.pop(instance.id)].remove(instance)
            self._share_out()

    def changed(self, instance: Instance) -> None:
        pool = self._pool_of.get(instance.id)
        if pool is not None:
            self._pools[pool].changed(instance)

    def _share_out(self) -> None:
        """Instances to pools, in the order of their ids, so that few change their pool."""
        self._places = SHARES_EVERY
        self._counts = pools(self._shares, len(self._ready))
        wanted = [pool for pool, count in enumerate(self._counts) for _ in range(count)]
        for id, pool in zip(sorted(self._ready), wanted, strict=True):
            before = self._pool_of.get(id)
            if before != pool:
                if before is not None:
                    self._pools[before].remove(self._ready[id])
                self._pool_of[id] = pool
                self._pools[pool].add(self._ready[id])

    def place(self, request: Request, waited_s: float) -> Placement | None:
        own = type_of(prompt_tokens(request), self._estimates.expected_output[request.class_name])
        first: Placement | None = None
        # Its own pool, then the larger ones; only where none of them has an instance, the smaller ones.
        for pool in (*range(own, TYPES), *range(own - 1, -1, -1)):
            if not self._counts[pool] or (pool < own and first is not None):
                continue
            placement = self._pools[pool].place(request, waited_s)
            if placement is None:
                continue
            first = first or placement
            if placement.instance.sequences < placement.instance.max_batch_size:
                first = placement
                break
        if first is not None:
            self._came(own, request)
        return first

    def _came(self, own: int, request: Request) -> None:
        times = self._estimates.step_times
        tokens, answer = float(request.input_tokens), self._estimates.expected_output[request.class_name]
        work = prefill_s(times, tokens, tokens * tokens) + decode_s(times, tokens, answer)
        self._shares = [(1.0 - FOLLOWS) * share for share in self._shares]
        self._shares[own] += FOLLOWS * work
        self._places -= 1
        if self._places <= 0:
            self._share_out()

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()


def make_dynamollm(settings: DynamoLlmSettings) -> Policy:
    def place(_: Any, estimates: Estimates) -> Pools:
        return Pools(estimates)

    return Policy(
        name="dynamollm",
        settings=settings,
        place=place,
        fleet=decide_fleet,
        learned=told_by(_told),
        restore=_restored,
        fleet_period_s=settings.tick_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
