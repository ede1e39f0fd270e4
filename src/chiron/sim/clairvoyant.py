"""How few GPUs somebody would need who knows the future: a schedule found by dynamic programming.

The state is (instances, work that waits). Every ``STEP_S`` the fleet may change to any number of whole instances; in
between, load flows through it second by second, as a fluid that is served in order of arrival. A step costs its
instances' time; an instance that is added costs its load, one that goes its drain; a request whose wait exceeds its
slack costs a multiplier, which is bisected for the least that keeps the misses of every class within ``MISS_MAX``.

The fluid knows nothing of routers, batches and steps, so the load is multiplied by a factor that is found by running
the simulation itself: the least, in steps of ``FACTOR``, with which every class attains its SLOs. So what comes out is
not the best possible, but an estimate from above of it: it pays cold starts and whole instances, and somebody might
find better. The lower bound is the estimate from below. Models are scheduled each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import numpy.typing as npt

from chiron.core.types import InstanceKind, ModelSpec
from chiron.engines.profile import Profile
from chiron.fleet.model import ColdStart
from chiron.policies.chiron.scheduled import ScheduledSettings
from chiron.sim.bound_work import request_work_s
from chiron.sim.setup import Setup
from chiron.telemetry.result import Result

Floats = npt.NDArray[np.float64]

STEP_S = 5
STEPS_MAX = 20_000
"""A longer workload has longer steps."""
CELLS_MAX = 2_000_000
"""Steps times numbers of instances to choose from: some 300 MB. Where there would be more, large fleets change by whole
hundredths of themselves; where that is not enough, steps are longer."""
MISS_MAX = 0.006
"""Share of each class that the schedule may let miss in the fluid, of the 1 % that the simulation may."""
TARGET = 0.99
FACTOR = 1.06
TRIES_MAX = 10
SLACK_SHARE = 0.8
"""Of TTFT, less the mean prefill: what may be spent waiting."""
_BISECTIONS = 9
_LEVELS = 36
"""Of work that waits."""
_WAIT_MAX_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """One model's interactive load, and what changing its fleet costs."""

    load: Floats
    """Instance-seconds that arrive in each second, shape (steps, seconds of a step)."""
    shares: tuple[Floats, ...]
    """Of each class: the share of its requests that arrive in each second, likewise."""
    slack_s: tuple[float, ...]
    counts: tuple[int, ...]
    """Numbers of instances to choose from, ascending, none below 1."""
    initial: int
    lead_steps: int
    """Before this step nothing that was not there from the start can be ready."""
    start_s: float
    """Instance-seconds that a start costs, and a stop."""
    stop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    instances: tuple[int, ...]
    """In each step."""
    missed: float
    """Share of the class that misses most."""
    cost_s: float
    """Instance-seconds, starts and stops included."""


def best_schedule(problem: Problem, miss_max: float = MISS_MAX) -> Schedule:
    """The cheapest found that keeps the misses within ``miss_max``, or else the one with the fewest."""
    low, high = 0.0, 12.0
    best = _walked(problem, _values(problem, np.exp(high)))
    for _ in range(_BISECTIONS):
        if best.missed > miss_max:
            break
        middle = (low + high) / 2.0
        found = _walked(problem, _values(problem, float(np.exp(middle))))
        if found.missed <= miss_max:
            high = middle
            best = min(best, found, key=lambda schedule: schedule.cost_s)
        else:
            low = middle
    return best


def _levels(problem: Problem) -> Floats:
    most = _WAIT_MAX_S * problem.counts[-1]
    return np.concatenate(([0.0], np.geomspace(0.2, max(most, 1.0), _LEVELS - 1)))


def _flow(problem: Problem, step: int, backlog: Floats, counts: Floats, price: float) -> tuple[Floats, Floats]:
    """(work that waits after the step, price of the misses in it) for each pair of work that waits and instances."""
    missed = np.zeros(np.broadcast(backlog, counts).shape)
    for second in range(problem.load.shape[1]):
        backlog = np.maximum(0.0, backlog + problem.load[step, second] - counts)
        wait_s = backlog / counts
        for share, slack_s in zip(problem.shares, problem.slack_s, strict=True):
            if share[step, second] > 0.0:
                missed = missed + price * share[step, second] * (wait_s > slack_s)
    return backlog, missed


def _values(problem: Problem, price: float) -> npt.NDArray[np.float32]:
    """What is still to be paid from each step on, if it runs with so many instances and so much work waits."""
    levels = _levels(problem)
    counts = np.array(problem.counts, dtype=float)[:, None]
    seconds = problem.load.shape[1]
    steps = problem.load.shape[0]
    values = np.zeros((steps, len(counts), len(levels)), dtype=np.float32)
    after = np.zeros((len(counts), len(levels)))
    rows = np.arange(len(counts))[:, None]
    for step in range(steps - 1, -1, -1):
        backlog, missed = _flow(problem, step, levels[None, :], counts, price)
        right = np.clip(np.searchsorted(levels, backlog), 1, len(levels) - 1)
        left = right - 1
        weight = np.clip((backlog - levels[left]) / (levels[right] - levels[left]), 0.0, 1.0)
        ahead = (1.0 - weight) * after[rows, left] + weight * after[rows, right]
        value = seconds * counts + missed + ahead
        if step < problem.lead_steps:
            value[counts[:, 0] > problem.initial] = np.inf
        values[step] = value
        after = _before_change(problem, value, counts)
    return values


def _before_change(problem: Problem, value: Floats, counts: Floats) -> Floats:
    """The least over all fleets to change to; costs are linear, so two running minima do it."""
    up = np.minimum.accumulate((value + problem.start_s * counts)[::-1], axis=0)[::-1] - problem.start_s * counts
    down = np.minimum.accumulate(value - problem.stop_s * counts, axis=0) + problem.stop_s * counts
    least: Floats = np.minimum(up, down)
    return least


def _walked(problem: Problem, values: npt.NDArray[np.float32]) -> Schedule:
    """The schedule that these values lead to, with the work that waits as it is, not in levels."""
    levels = _levels(problem)
    counts = np.array(problem.counts, dtype=float)
    seconds = problem.load.shape[1]
    backlog, now, cost_s = 0.0, float(problem.initial), 0.0
    missed = [0.0] * len(problem.shares)
    chosen: list[int] = []
    for step in range(problem.load.shape[0]):
        change = problem.start_s * np.maximum(0.0, counts - now) + problem.stop_s * np.maximum(0.0, now - counts)
        right = min(max(int(np.searchsorted(levels, backlog)), 1), len(levels) - 1)
        weight = min(1.0, (backlog - levels[right - 1]) / (levels[right] - levels[right - 1]))
        with np.errstate(invalid="ignore"):
            ahead = (1.0 - weight) * values[step, :, right - 1] + weight * values[step, :, right]
        index = int(np.argmin(np.nan_to_num(ahead, nan=np.inf) + change))
        cost_s += float(change[index]) + seconds * float(counts[index])
        now = float(counts[index])
        for second in range(seconds):
            backlog = max(0.0, backlog + float(problem.load[step, second]) - now)
            for number, (share, slack_s) in enumerate(zip(problem.shares, problem.slack_s, strict=True)):
                missed[number] += float(share[step, second]) * (backlog / now > slack_s)
        chosen.append(int(now))
    return Schedule(instances=tuple(chosen), missed=max(missed, default=0.0), cost_s=cost_s)


def problem_of(setup: Setup, spec: ModelSpec, factor: float) -> Problem | None:
    """Of one model; None: nothing interactive is asked of it."""
    workload, kind = setup.workload, spec.kinds[0]
    profile = setup.profiles[kind.name]
    interactive = np.array([cls.interactive for cls in workload.classes])
    mine = np.array([name == spec.name for name in workload.models])[workload.model] & interactive[workload.cls]
    if not mine.any():
        return None
    cls = workload.cls[mine]
    itl_s = np.array([c.itl_s for c in workload.classes])[cls]
    work_s = factor * request_work_s(profile, workload.input_tokens[mine], workload.output_tokens[mine], itl_s)
    work_s = np.where(np.isfinite(work_s), work_s, 0.0)
    second = workload.arrival_s[mine].astype(int)
    most = ceil(1.5 * float(np.bincount(second, weights=work_s).max()) + 1.0)
    limit = setup.gpus_max.get(kind.gpu, kind.gpus * spec.max_instances) // kind.gpus
    initial = setup.initial.get(spec.name, 1)
    highest = max(spec.min_instances, 1, min(spec.max_instances, limit, max(most, initial)))
    counts, step_s = _resolution(max(1, spec.min_instances), highest, initial, int(second[-1]) + 1)
    steps = ceil((int(second[-1]) + 1) / step_s)

    def by_second(weights: Floats) -> Floats:
        return np.bincount(second, weights=weights, minlength=steps * step_s).reshape(steps, step_s).astype(float)

    load = by_second(work_s)
    present = np.unique(cls).tolist()
    tokens = workload.input_tokens[mine].astype(float)
    return Problem(
        load=load,
        shares=tuple(by_second((cls == index) / float((cls == index).sum())) for index in present),
        slack_s=tuple(
            max(0.5, SLACK_SHARE * (workload.classes[index].ttft_s - _prefill_s(profile, tokens[cls == index])))
            for index in present
        ),
        counts=counts,
        initial=initial,
        lead_steps=ceil(ahead_s(setup.cold_start, kind) / step_s),
        start_s=setup.cold_start.load_s(warm=False, weight_bytes=kind.weight_bytes),
        stop_s=_drain_s(workload.output_tokens[mine].astype(float), itl_s),
    )


def _resolution(least: int, highest: int, initial: int, seconds: int) -> tuple[tuple[int, ...], int]:
    """(numbers of instances to choose from, seconds of a step): as fine as memory allows."""
    step_s = max(STEP_S, ceil(seconds / STEPS_MAX))
    if ceil(seconds / step_s) * (highest - least + 1) <= CELLS_MAX:
        return tuple(range(least, highest + 1)), step_s
    chosen = {highest, min(max(initial, least), highest)}
    count = least
    while count < highest:
        chosen.add(count)
        count += max(1, count // 100)
    return tuple(sorted(chosen)), max(step_s, ceil(seconds / max(1, CELLS_MAX // len(chosen))))


def _prefill_s(profile: Profile, tokens: Floats) -> float:
    each = profile.f_ms_per_token * tokens + profile.q_ms_per_token_squared * tokens**2
    return float(each.mean()) / 1000.0


def _drain_s(output_tokens: Floats, itl_s: Floats) -> float:
    """A mean answer, at half of what its SLO allows or a twentieth of a second a token."""
    pace_s = np.minimum(np.where(np.isfinite(itl_s), 0.5 * itl_s, 0.05), 0.05)
    return float((output_tokens * pace_s).mean())


def ahead_s(cold_start: ColdStart, kind: InstanceKind) -> float:
    """What a start takes at the most."""
    load_s = cold_start.load_s(warm=False, weight_bytes=kind.weight_bytes)
    return cold_start.node_start_s + load_s * (1.0 + cold_start.jitter)


def scheduled_settings(setup: Setup, factor: float) -> ScheduledSettings:
    """With the schedule of each model, for the load times ``factor``."""
    problems = {spec.name: problem_of(setup, spec, factor) for spec in setup.models}
    steps_s = [problem.load.shape[1] for problem in problems.values() if problem is not None]
    step_s = max(steps_s, default=STEP_S)
    schedules = {
        name: _every(best_schedule(problem).instances, problem.load.shape[1], step_s)
        for name, problem in problems.items()
        if problem is not None
    }
    ahead = max(ahead_s(setup.cold_start, spec.kinds[0]) for spec in setup.models)
    settings: ScheduledSettings = setup.settings
    return replace(settings, schedules=schedules, step_s=float(step_s), ahead_s=ahead)


def _every(instances: Sequence[int], step_s: int, wanted_s: int) -> tuple[int, ...]:
    """The schedule in longer steps: the most within each."""
    seconds = np.repeat(np.array(instances), step_s)
    padded = np.concatenate((seconds, np.full(-len(seconds) % wanted_s, seconds[-1])))
    return tuple(padded.reshape(-1, wanted_s).max(axis=1).tolist())


def attains(summary: Mapping[str, float]) -> bool:
    return all(share >= TARGET for share in summary.values())


def found(setup: Setup, run: Callable[[Setup], Result]) -> Setup:
    """The setup whose schedule takes the fewest GPU-hours and attains the SLOs of every class; if none of those tried
    does, the one that comes closest. ``run`` simulates one."""
    best: tuple[tuple[bool, float], Setup] | None = None
    factor, direction = 1.0, 0
    for _ in range(TRIES_MAX):
        tried = replace(setup, settings=scheduled_settings(setup, factor))
        if not tried.settings.schedules:
            return tried  # No interactive work: whatever the factor, there is nothing to schedule.
        summary = run(tried).summary
        attainment = summary["attainment"]
        enough = attains(attainment)
        rank = (not enough, summary["gpu_hours"] if enough else -min(attainment.values(), default=0.0))
        if best is None or rank < best[0]:
            best = rank, tried
        if direction == 0:
            direction = -1 if enough else 1
        elif enough == (direction > 0):
            break
        factor *= FACTOR**direction
    assert best is not None
    return best[1]
