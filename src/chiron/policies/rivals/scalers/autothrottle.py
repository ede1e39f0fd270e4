"""``autothrottle``: Autothrottle's Captains and Tower (NSDI '24), on the max batch size of a fixed fleet.

It was made for CPU limits of microservices. Here the limit is an instance's max batch size, and a period in which it
throttles is one in which a request waits for a place. The Captain of an instance notes a period a second, and::

    throttled = share of the last 10 periods
    at each   : throttled > 3 * target after a step down: the step is taken back once over, margin += throttled - target
    every 10  : margin = max(0, margin + throttled - target), and
                throttled > 3 * target: size *= 1 + throttled - 3 * target
                else: wanted = most used + margin * its deviation, of 50 periods; if at most 0.9 of size:
                      size = max(half of it, wanted)

The Tower sets the target each minute, from a ladder of nine, by what each has cost at a like rate of requests::

    cost = share of the largest size that was given, if the SLOs were met; else 2 to 3, by how far they were missed

First each target is tried, the least tried first; then the cheapest is taken, or, one time in ten, its neighbour.

Source: microsoft/autothrottle, worker-daemon.py and utils.py. Its Tower is one contextual bandit (Vowpal Wabbit) over
the targets of two groups of services; here each instance has one of its own, for its one target, with medians by rate
in place of the regression. Time until the first token is estimated from what waits and how fast tokens come.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf, isnan
from statistics import median, pstdev
from typing import Annotated, Any

from chiron.core.kept import Kept
from chiron.policies.checks import above, at_least
from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.past import MOST
from chiron.policies.rivals.scalers.ray_serve import mixed
from chiron.policies.rivals.scalers.static import decide_fleet, initial_roles
from chiron.policies.views import LocalDecision, LocalView

LADDER = (0.0, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Targets: shares of periods that may throttle."""
MOST_TRIES = 600
"""Of a Tower that are remembered. Ours; the published code resamples to 10,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutothrottleSettings:
    period_s: float = 1.0
    """Of a Captain. Ours: the published code has a CPU's 0.1 s; nothing new is known before the next scrape."""
    periods: int = 10
    """Between a Captain's decisions (the published code, as all where nothing else is said)."""
    usage_periods: int = 50
    margin: Annotated[float, Between(0.0, 10.0)] = 3.0
    """Deviations of the usage above its most, to begin with."""
    tower_s: float = 60.0
    """Between a Tower's decisions."""
    explore: Annotated[float, Between(0.0, 0.5)] = 0.1
    """Share of a Tower's decisions that try a neighbour."""
    warm_up: int = 9
    """A Tower's decisions that try the least tried. Ours: each target once; the published one trains for hours."""
    rate_step_per_s: float = 1.0
    """Rates of requests within it are alike. Ours, for an instance; 20 in the published code, for an application."""
    instances: int = 0
    """Instances of each model; 0: the fleet stays that there is at the start."""
    fleet_factor: Annotated[float, Between(0.5, 4.0, log=True)] = 1.0
    """That one is the initial fleet, so many times as large, rounded up."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Largest max batch size, and the first: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "fleet_factor", "period_s", "tower_s", "rate_step_per_s")
        at_least(0, self, "margin", "warm_up", "instances")
        at_least(1, self, "periods", "usage_periods", "max_num_seqs")
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore is {self.explore}; it must be 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Captain:
    size: float
    last_size: float
    """Before the last decision."""
    margin: float
    stepped_down: bool = False
    """By the last decision."""
    throttled: tuple[bool, ...] = ()
    """By period, since the last decision."""
    usage: tuple[float, ...] = ()
    reason: str = "steady"


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """What a target has cost for a minute."""

    target: int
    """Place in the ladder, as everywhere in a Tower."""
    rate: int
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    target: int = 4
    since_s: float = -inf
    worst: float = 0.0
    """Of this minute: the largest of latency over its SLO."""
    given: float = 0.0
    """Sum of the shares of the largest size, over periods; ``requests_per_s``: likewise."""
    requests_per_s: float = 0.0
    periods: int = 0
    decisions: int = 0
    tries: tuple[Try, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one instance."""

    captain: Captain
    tower: Tower = Tower()
    last_s: float = -inf
    """When the last period was noted."""


def decide_batch_size(
    settings: AutothrottleSettings, memory: Memory | None, view: LocalView
) -> tuple[LocalDecision | None, Memory]:
    """A period of one instance, each time that a scrape arrives."""
    most = min(settings.max_num_seqs, view.max_num_seqs)
    if memory is None:
        begun = Captain(size=float(most), last_size=float(most), margin=settings.margin)
        memory = Memory(captain=begun, tower=Tower(since_s=view.now_s))
    if view.now_s - memory.last_s < settings.period_s - 1e-6:
        return None, memory  # It was asked because something else changed.
    used = min(float(view.dispatched), memory.captain.size)
    tower = supervised(settings, memory.tower, view, memory.captain.size / most)
    captain = commanded(
        settings,
        memory.captain,
        throttled=view.dispatched > view.max_batch_size,
        used=used,
        target=LADDER[tower.target],
        most=most,
    )
    memory = replace(memory, captain=captain, tower=tower, last_s=view.now_s)
    size = ceil(captain.size - 1e-9)
    if size == view.max_batch_size:
        return None, memory
    numbers = {"target": LADDER[tower.target], "margin": captain.margin, "used": used}
    return LocalDecision(max_batch_size=size, reason=captain.reason, numbers=numbers), memory


# -- a Captain -----------------------------------------------------------------------------------------------------


def commanded(
    settings: AutothrottleSettings, captain: Captain, *, throttled: bool, used: float, target: float, most: int
) -> Captain:
    """After one more period."""
    captain = replace(
        captain,
        throttled=(*captain.throttled, throttled),
        usage=(*captain.usage, used)[-settings.usage_periods :],
        reason="steady",
    )
    share = sum(captain.throttled) / settings.periods
    if share > 3.0 * target and captain.stepped_down:
        size = _within(2.0 * captain.last_size - captain.size, most)
        margin = captain.margin + share - target
        return replace(
            captain, size=size, margin=margin, stepped_down=False, throttled=(), reason="throttled_after_step_down"
        )
    if len(captain.throttled) < settings.periods:
        return captain
    margin = max(0.0, captain.margin + share - target)
    captain = replace(captain, last_size=captain.size, margin=margin, stepped_down=False, throttled=())
    if share > 3.0 * target:
        size = _within(captain.size * (1.0 + share - 3.0 * target), most)
        return replace(captain, size=size, reason="throttled")
    wanted = max(captain.usage) + pstdev(captain.usage) * margin
    if wanted <= 0.9 * captain.size:
        size = _within(max(0.5 * captain.size, wanted), most)
        return replace(captain, size=size, stepped_down=True, reason="unused")
    return captain


def _within(size: float, most: int) -> float:
    return min(max(size, 1.0), float(most))


# -- a Tower -------------------------------------------------------------------------------------------------------


def supervised(settings: AutothrottleSettings, tower: Tower, view: LocalView, given: float) -> Tower:
    """After one more period; with a new target when a minute is over."""
    tower = replace(
        tower,
        worst=max(tower.worst, latency_over_slo(view)),
        given=tower.given + given,
        requests_per_s=tower.requests_per_s + view.throughput / _output_tokens(view),
        periods=tower.periods + 1,
    )
    if view.now_s - tower.since_s < settings.tower_s - 1e-6:
        return tower
    rate = round(tower.requests_per_s / tower.periods / settings.rate_step_per_s)
    tried = Try(target=tower.target, rate=rate, cost=cost(tower.worst, tower.given / tower.periods))
    tries = (*tower.tries, tried)[-MOST_TRIES:]
    number = tower.decisions
    draw = mixed(number ^ (int(view.now_s) << 20)) / 2.0**64
    return Tower(
        target=chosen(settings, tries, rate, number, draw), since_s=view.now_s, decisions=number + 1, tries=tries
    )


def cost(worst: float, given: float) -> float:
    """Of a minute whose largest latency over its SLO was that, and share of the largest size."""
    return given if worst <= 1.0 else 3.0 - 1.0 / worst


def chosen(settings: AutothrottleSettings, tries: tuple[Try, ...], rate: int, number: int, draw: float) -> int:
    """The target of the next minute; ``draw``: a random number from 0 to 1."""
    if number < settings.warm_up:
        return min(range(len(LADDER)), key=lambda target: sum(each.target == target for each in tries))
    best = min(range(len(LADDER)), key=lambda target: _expected(tries, target, rate))
    if draw < settings.explore / 2.0:
        return max(best - 1, 0)
    return min(best + 1, len(LADDER) - 1) if draw < settings.explore else best


def _expected(tries: tuple[Try, ...], target: int, rate: int) -> float:
    """Median cost of a target at the rate nearest to this one at which it was tried; inf: never."""
    own = [each for each in tries if each.target == target]
    if not own:
        return inf
    nearest = min(own, key=lambda each: (abs(each.rate - rate), each.rate)).rate
    return median(each.cost for each in own if each.rate == nearest)


def latency_over_slo(view: LocalView) -> float:
    """The larger of ITL and of the time until who came last has a first token, over its SLO."""
    itl = 0.0 if isnan(view.itl_s) else view.itl_s / view.itl_slo_s
    waiting = view.dispatched - view.max_batch_size
    ttft_slo_s = min(
        (view.mixes[name].cls.ttft_s for name in view.class_counts if view.mixes[name].cls.interactive), default=inf
    )
    if waiting <= 0 or ttft_slo_s == inf:
        return itl
    wait_s = waiting * _output_tokens(view) / view.throughput if view.throughput > 0.0 else inf
    return max(itl, wait_s / ttft_slo_s)


def _output_tokens(view: LocalView) -> float:
    """Of a mean answer of what runs here."""
    counts = view.class_counts or dict.fromkeys(view.mixes, 1)
    number = sum(counts.values())
    return max(1.0, sum(n * view.mixes[name].output_tokens for name, n in counts.items()) / number) if number else 1.0


# -- what the next run should know -------------------------------------------------------------------------------


def _told(settings: AutothrottleSettings, memory: Memory | None, now_s: float) -> dict[str, Any]:
    """What each target has cost, and where the Captain is. The minute under way is not among it."""
    if memory is None:
        return {}
    tower, captain = memory.tower, memory.captain
    return {
        "target": tower.target,
        "decisions": tower.decisions,
        "tries": [[each.target, each.rate, each.cost] for each in tower.tries],
        "size": captain.size,
        "margin": captain.margin,
        "usage": list(captain.usage),
    }


def _read(settings: AutothrottleSettings, kept: Kept, now_s: float) -> Memory | None:
    if "tries" not in kept:
        return None
    rows = kept.rows("tries", 0.0, MOST, width=3, most=MOST_TRIES) or []
    tries = tuple(Try(target=int(t), rate=round(rate), cost=cost) for t, rate, cost in rows if t < len(LADDER))
    size = kept.number("size", 1.0, float(settings.max_num_seqs)) or float(settings.max_num_seqs)
    captain = Captain(
        size=size,
        last_size=size,
        margin=kept.number("margin", 0.0, MOST) or 0.0,
        usage=tuple(kept.numbers("usage", 0.0, MOST, least=0, most=settings.usage_periods) or ()),
    )
    target = kept.whole("target", 0, len(LADDER) - 1)
    tower = Tower(
        target=Tower().target if target is None else target,
        since_s=now_s,
        decisions=kept.whole("decisions", 0, 10**9) or 0,
        tries=tries,
    )
    return Memory(captain=captain, tower=tower)


def make_autothrottle(settings: AutothrottleSettings) -> Policy:
    return Policy(
        name="autothrottle",
        settings=settings,
        batch_size=decide_batch_size,
        learned_sizes=_told,
        restore_sizes=_read,
        fleet=decide_fleet,
        initial_roles=initial_roles,
        fleet_period_s=30.0,
        initial_max_batch_size=settings.max_num_seqs,
    )
