"""``chiron plan``: how many GPUs keep the SLOs of a workload, under the policy that runs them.

A *case* is one model on one kind of instance under one set of assumptions. Two fleets are sought for it: a fixed one,
the fewest instances that keep the target; and one that the policy scales, with the lowest upper bound that keeps it,
or, where no upper bound does because starts take too long, the lowest number that must stay up. Attainment grows with
the fleet, so the number is found between bounds, a few probes at a time. Searches of all cases go on side by side, so
that every core has work; the probes of a search do not depend on how many cores there are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal, TypeVar

import numpy as np

from chiron.config.build import setups
from chiron.config.read import ConfigError
from chiron.config.scenario import Scenario
from chiron.core.types import RequestClass
from chiron.sim.initial import initial_instances
from chiron.sim.setup import Setup
from chiron.studies.objective import worst_class
from chiron.studies.runner import Runner
from chiron.studies.trial import Outcome, Trial, trial
from chiron.telemetry.format import percent
from chiron.workload.select import kept
from chiron.workload.types import Workload

T = TypeVar("T")
Search = Generator[list[Trial], list[Outcome], T]
"""Yields trials, is sent their outcomes, returns what it found."""

PROBES = 3
"""Fleet sizes that a search tries at a time."""
DEFERRED_S = 3600.0
"""Deadline of interactive requests that become batch work, where the scenario has no batch class."""
INSTANCES_MAX = 10_000
Mode = Literal["fixed", "autoscaled"]


class PlanError(ConfigError):
    """No fleet can be planned. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """An assumption that is changed, one at a time."""

    name: str
    overrides: tuple[str, ...] = ()
    deferred: float = 0.0
    """Share of the interactive requests that become batch work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A fleet that was tried, over all seeds."""

    least: int
    """Instances that stay up."""
    most: int
    worst: float
    """Attainment of the worst class in the worst seed."""
    gpu_hours: float
    """Mean over seeds, as the next."""
    cost: float
    gpus_peak: int
    """Most over seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What was found in one mode."""

    mode: Mode
    kept: bool
    """Whether the target is kept; if not, ``at`` is the closest that was tried."""
    at: Point
    tried: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model on a kind of instance under some assumptions."""

    model: str
    kind: str
    gpus: int
    """Of one instance."""
    price_per_gpu_hour: float
    change: Change | None
    """None: the scenario as it is."""
    bases: tuple[Setup, ...] = field(repr=False, compare=False)
    """One per seed, with this model and kind alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    case: Case
    fixed: Fleet
    autoscaled: Fleet

    @property
    def cheaper(self) -> Fleet:
        """By GPU-hours, which one kind's price does not change; one that keeps the target before one that does not."""
        return min((self.autoscaled, self.fixed), key=lambda fleet: price_of(fleet, priced=False))


def price_of(fleet: Fleet, *, priced: bool) -> tuple[bool, float, float]:
    return not fleet.kept, fleet.at.cost if priced else 0.0, fleet.at.gpu_hours


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    options: tuple[Sized, ...]
    """Every model and kind, as the scenario is."""
    changes: tuple[Sized, ...] = ()
    """What assumptions change, for the cheapest kind of each model."""

    def best(self, model: str) -> Sized:
        """The cheapest kind: by price if every kind has one, for without it a kind would look free; else by
        GPU-hours."""
        priced = not self.unpriced(model)
        return min(self.options_of(model), key=lambda sized: price_of(sized.cheaper, priced=priced))

    def options_of(self, model: str) -> list[Sized]:
        return [sized for sized in self.options if sized.case.model == model]

    def unpriced(self, model: str) -> list[str]:
        """Kinds without a price, such as those of fitted profiles."""
        return [sized.case.kind for sized in self.options_of(model) if not sized.case.price_per_gpu_hour]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(sized.case.model for sized in self.options))


def plan(
    scenario: Scenario,
    label: str,
    seeds: Sequence[int],
    changes: Sequence[Change],
    runner: Runner,
    *,
    target: float,
    most: int | None = None,
) -> Plan:
    """Size every model on every kind, then the cheapest kind of each model under each change. ``most``: instances that
    may be tried; default: the scenario's bound of the model."""
    if not 0 < target <= 1:
        raise PlanError(f"--target is {target:g}; it must be above 0 and at most 1, such as 0.99")
    if most is not None and not 1 <= most <= INSTANCES_MAX:
        raise PlanError(f"--max is {most}; it must be 1 to {INSTANCES_MAX}")
    wanted = cases(scenario, label, seeds)
    limits = {case.model: most or scenario.models[case.model].max_instances for case in wanted}
    options = together([size(case, limits[case.model], target) for case in wanted], runner)
    found = Plan(options=tuple(options))
    best = {model: found.best(model) for model in found.models}
    asked = [
        case
        for change in changes
        for case in cases(_changed(scenario, change), label, seeds, change)
        if case.model in best and best[case.model].case.kind == case.kind
    ]
    sizes = together([size(case, limits[case.model], target) for case in asked], runner)
    return replace(found, changes=tuple(sizes))


def usual_changes(scenario: Scenario) -> list[Change]:
    """What a planner asks about: looser SLOs, faster starts, longer deadlines, more batch work."""
    found: list[Change] = []
    for key, factor in (("ttft", 2.0), ("itl", 1.5), ("deadline", 2.0)):
        values = {name: getattr(cls, f"{key}_s") * factor for name, cls in scenario.classes.items()}
        overrides = [f'classes."{name}".{key}={value!r}' for name, value in values.items() if value < inf]
        if key == "deadline":
            # Those of jobs stand in place of the class's.
            jobs = [(i, job.deadline_s) for i, job in enumerate(scenario.batch_job)]
            overrides += [f"batch_job.{i}.deadline={factor * own!r}" for i, own in jobs if own is not None]
        what = {"ttft": "TTFT SLOs", "itl": "ITL SLOs", "deadline": "batch deadlines"}[key]
        if overrides:
            found.append(Change(name=f"{what} x {factor:g}", overrides=tuple(overrides)))
    starts = ("node_start", "model_load", "warm_load")
    quarter = tuple(f"cold_start.{key}={getattr(scenario.cold_start, f'{key}_s') / 4!r}" for key in starts)
    found.append(Change(name="starts in a quarter of the time", overrides=quarter))
    if any(cls.interactive for cls in scenario.classes.values()):
        found.append(Change(name="a quarter of the interactive requests as batch work", deferred=0.25))
    return found


def _changed(scenario: Scenario, change: Change) -> Scenario:
    try:
        return scenario.with_overrides(*change.overrides)
    except ConfigError as error:
        raise PlanError(f"--what-if {change.name}: {error}") from error


def cases(scenario: Scenario, label: str, seeds: Sequence[int], change: Change | None = None) -> list[Case]:
    """Every model on every kind of its instances."""
    if scenario.choice(label).stages:
        raise PlanError(f"--policy {label}: has a stage policy; only whole instances can be planned")
    made = [replace(setup, gpus_max={}) for setup in setups(scenario, policies=[label], seeds=seeds)]
    past = made[0].history
    if made[0].workload.cascades is not None or (past is not None and past.cascades is not None):
        raise PlanError(
            "each model is planned alone, and in a cascade one gets what another was not sure of: let [[workload]] "
            "and [[history]] name its models, or size it with `chiron compare`"
        )
    found = []
    for spec in made[0].models:
        if spec.name not in made[0].workload.models:
            continue
        for kind in spec.kinds:
            bases = tuple(_alone(setup, scenario, spec.name, kind.name, change) for setup in made)
            found.append(
                Case(
                    model=spec.name,
                    kind=kind.name,
                    gpus=kind.gpus,
                    price_per_gpu_hour=kind.price_per_gpu_hour,
                    change=change,
                    bases=bases,
                )
            )
    return found


def _alone(setup: Setup, scenario: Scenario, model: str, kind: str, change: Change | None) -> Setup:
    """One model with its requests on one kind, and as many instances at time 0 as the scenario says."""
    (spec,) = (spec for spec in setup.models if spec.name == model)
    (chosen,) = (each for each in spec.kinds if each.name == kind)
    spec = replace(spec, kinds=(replace(chosen, max_instances=INSTANCES_MAX),))
    workload = only_model(setup.workload, model)
    if change is not None and change.deferred:
        workload = deferred(workload, change.deferred, scenario.classes, setup.seed)
    initial = scenario.models[model].initial
    count = initial_instances(workload, spec, setup.profiles[kind]) if initial == "auto" else initial
    past = setup.history if setup.history is None or model in setup.history.models else None
    own = None if past is None else only_model(past, model)
    history = own if own is not None and len(own) else None
    return replace(
        setup,
        history=history,
        models=(spec,),
        profiles={kind: setup.profiles[kind]},
        workload=workload,
        initial={model: count},
    )


def only_model(workload: Workload, model: str) -> Workload:
    mine = workload.model == workload.models.index(model)
    part = kept(workload, mine)
    return replace(part, model=np.zeros_like(part.model), models=(model,))


def deferred(workload: Workload, share: float, classes: Mapping[str, RequestClass], seed: int) -> Workload:
    """The same requests, of which a share of the interactive ones are batch work with the longest deadline."""
    batch = [cls for cls in classes.values() if not cls.interactive and cls.deadline_s < inf]
    default = RequestClass(name="deferred", kind="batch", deadline_s=DEFERRED_S)
    cls = max(batch, key=lambda each: each.deadline_s, default=default)
    known = workload.classes if cls in workload.classes else (*workload.classes, cls)
    interactive = np.array([each.interactive for each in known])[workload.cls]
    moved = interactive & (np.random.default_rng(seed).random(len(workload)) < share)
    return replace(
        workload,
        classes=known,
        cls=np.where(moved, known.index(cls), workload.cls).astype(workload.cls.dtype),
        deadline_s=np.where(moved, workload.arrival_s + cls.deadline_s, workload.deadline_s),
    )


def size(case: Case, most: int, target: float) -> Search[Sized]:
    """Both fleets of a case."""
    floor = min(case.bases[0].models[0].min_instances, most)

    def fixed(counts: Sequence[int]) -> Search[list[Point]]:
        return tried(case, [(count, count) for count in counts])

    def up_to(counts: Sequence[int]) -> Search[list[Point]]:
        return tried(case, [(floor, count) for count in counts])

    def at_least(counts: Sequence[int]) -> Search[list[Point]]:
        return tried(case, [(count, most) for count in counts])

    stays = yield from fewest("fixed", fixed, max(1, floor), most, target)
    # It takes no fewer at its peak than a fleet that is always up.
    scaled = yield from fewest("autoscaled", up_to, stays.at.most if stays.kept else most, most, target)
    if not scaled.kept and stays.kept:
        held = yield from fewest("autoscaled", at_least, floor + 1, most, target) if floor < most else _nothing(scaled)
        scaled = replace(held, tried=(*scaled.tried, *held.tried))
    return Sized(case=case, fixed=stays, autoscaled=scaled)


def _nothing(found: Fleet) -> Search[Fleet]:
    yield from ()
    return found


def fewest(
    mode: Mode, probe: Callable[[Sequence[int]], Search[list[Point]]], low: int, high: int, target: float
) -> Search[Fleet]:
    """The least number from ``low`` to ``high`` that keeps the target."""
    seen: dict[int, Point] = {}
    wave = sorted({high, *_between(low - 1, high, geometric=True)})
    while wave:
        points = yield from probe(wave)
        seen.update(zip(wave, points, strict=True))
        if seen[high].worst < target:
            break
        best = min(count for count, point in seen.items() if point.worst >= target)
        below = max((count for count in seen if count < best), default=low - 1)
        wave = _between(below, best)
    kept = seen[high].worst >= target
    at = seen[best] if kept else max(seen.values(), key=lambda point: (point.worst, -point.gpu_hours))
    return Fleet(mode=mode, kept=kept, at=at, tried=tuple(seen[count] for count in sorted(seen)))


def _between(low: int, high: int, *, geometric: bool = False) -> list[int]:
    """A few numbers above ``low`` and below ``high``."""
    shares = [(i + 1) / (PROBES + 1) for i in range(PROBES)]
    first = max(low, 1)
    places = [first * (high / first) ** s if geometric else low + s * (high - low) for s in shares]
    return sorted({min(max(round(place), low + 1), high - 1) for place in places}) if high - low > 1 else []


def tried(case: Case, bounds: Sequence[tuple[int, int]]) -> Search[list[Point]]:
    """Fleets within these bounds, over all seeds."""
    trials = [_trial(case, base, least, most) for least, most in bounds for base in case.bases]
    outcomes = yield trials
    seeds = len(case.bases)
    return [_point(case, least, most, outcomes[i * seeds : (i + 1) * seeds]) for i, (least, most) in enumerate(bounds)]


def _trial(case: Case, base: Setup, least: int, most: int) -> Trial:
    (spec,) = base.models
    initial = min(max(base.initial[case.model], least), most)
    setup = replace(
        base,
        models=(replace(spec, min_instances=least, max_instances=most),),
        initial={case.model: initial},
    )
    if setup.policy == "static":
        setup = replace(setup, settings=replace(setup.settings, instances=most))
    fleet = f"{most}" if least == most else f"{least} to {most}"
    return trial(setup, name=f"{case.model}: {fleet} x {case.kind}, seed {base.seed}")


def _point(case: Case, least: int, most: int, outcomes: Sequence[Outcome]) -> Point:
    summaries = []
    for outcome in outcomes:
        if outcome.summary is None:
            raise PlanError(f"{case.model} on {case.kind} with {least} to {most} instances: {outcome.error}")
        summaries.append(outcome.summary)
    count = len(summaries)
    return Point(
        least=least,
        most=most,
        worst=min(worst_class(summary) for summary in summaries),
        gpu_hours=sum(summary["gpu_hours"] for summary in summaries) / count,
        cost=sum(summary["cost"] for summary in summaries) / count,
        gpus_peak=max(summary["gpus_peak"] for summary in summaries),
    )


def together(searches: Sequence[Search[T]], runner: Runner) -> list[T]:
    """Run searches side by side: a wave of trials of all of them at a time."""
    found: dict[int, T] = {}
    wanted: dict[int, list[Trial]] = {}
    for number, search in enumerate(searches):
        _advance(number, search, None, wanted, found)
    while wanted:
        ended = iter(runner.run([each for trials in wanted.values() for each in trials]))
        outcomes = {number: [next(ended) for _ in trials] for number, trials in wanted.items()}
        wanted = {}
        for number, mine in outcomes.items():
            _advance(number, searches[number], mine, wanted, found)
    return [found[number] for number in range(len(searches))]


def _advance(
    number: int, search: Search[T], outcomes: Any, wanted: dict[int, list[Trial]], found: dict[int, T]
) -> None:
    try:
        wanted[number] = search.send(outcomes)
    except StopIteration as end:
        found[number] = end.value


def as_json(plan: Plan, *, scenario: str, policy: str, seeds: Sequence[int], target: float) -> dict[str, Any]:
    return {
        "scenario": scenario,
        "policy": policy,
        "seeds": list(seeds),
        "target": target,
        "best": {model: plan.best(model).case.kind for model in plan.models},
        "compared_by": {model: "gpu_hours" if plan.unpriced(model) else "cost" for model in plan.models},
        "options": [_sized_json(sized) for sized in plan.options],
        "changes": [_sized_json(sized) for sized in plan.changes],
    }


def _sized_json(sized: Sized) -> dict[str, Any]:
    case = sized.case
    return {
        "model": case.model,
        "kind": case.kind,
        "gpus_per_instance": case.gpus,
        "price_per_gpu_hour": case.price_per_gpu_hour,
        "change": None if case.change is None else case.change.name,
        **{fleet.mode: _fleet_json(fleet) for fleet in (sized.fixed, sized.autoscaled)},
    }


def _fleet_json(fleet: Fleet) -> dict[str, Any]:
    def said(point: Point) -> dict[str, Any]:
        return {name: getattr(point, name) for name in Point.__slots__}

    return {"kept": fleet.kept, **said(fleet.at), "tried": [said(point) for point in fleet.tried]}


def in_words(fleet: Fleet, case: Case, target: float) -> str:
    """A fleet as a planner says it."""
    if not fleet.kept:
        return f"not even {fleet.at.most} x {case.kind} keep {percent(target)}: {percent(fleet.at.worst)}"
    count = f"{fleet.at.most}" if fleet.at.least == fleet.at.most else f"{fleet.at.least} to {fleet.at.most}"
    return f"{count} x {case.kind}"


def expected_trials(options: int, changes: int, models: int, seeds: int, most: int) -> int:
    """About as many simulations as a plan takes."""
    rounds = 1
    while (PROBES + 1) ** rounds < most:
        rounds += 1
    return (options + changes * models) * seeds * (2 + PROBES * rounds + PROBES)


def points_of(sized: Sized) -> Iterator[tuple[Mode, Point]]:
    for fleet in (sized.fixed, sized.autoscaled):
        for point in fleet.tried:
            yield fleet.mode, point
