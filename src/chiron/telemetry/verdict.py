"""Which policy did best, in a sentence that a reader can check against the table.

A policy attains the target if every class does so in every seed. Among those the fewest GPU-hours (mean over seeds)
win. Policies are compared over the seeds that all of them ran. Attainment is rounded down: 98.97 % is not 99 %.
``clairvoyant`` competes with nobody: it knows the future. It says how much of the best one's distance to the lower
bound is knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from chiron.telemetry.errors import ReportError
from chiron.telemetry.format import amount, listed, percent, percent_at
from chiron.telemetry.run_data import RunData

TARGET = 0.99
CLAIRVOYANT = "clairvoyant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """A figure over seeds."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRuns:
    """The runs of one policy, by seed."""

    policy: str
    results: tuple[RunData, ...]

    def stat(self, *keys: str) -> Stat | None:
        """The summary's figure under ``keys`` over seeds; None where no seed has one."""
        values = [v for v in (lookup(r.summary, keys) for r in self.results) if v is not None]
        return stat(values) if values else None

    @property
    def gpu_hours(self) -> float:
        """Mean over seeds; inf where it is unknown (a load generator sees no GPU), so that known figures rank first."""
        figures = self.stat("gpu_hours")
        return inf if figures is None else figures.mean

    @property
    def over_bound(self) -> Stat | None:
        """GPU-hours over the lower bound for what the run delivered; None without a bound."""
        pairs = [(r.summary["gpu_hours"], r.summary["gpu_hours_bound"]) for r in self.results]
        values = [hours / bound for hours, bound in pairs if hours is not None and bound is not None and bound > 0]
        return stat(values) if values else None

    @property
    def worst(self) -> tuple[str, float]:
        """The class, and its attainment, that is lowest in any seed; ("", 0) if nothing was asked."""
        every = [(share, name) for r in self.results for name, share in r.summary["attainment"].items()]
        share, name = min(every, default=(0.0, ""))
        return name, share

    def attains(self, target: float) -> bool:
        """Every class, in every seed."""
        return self.worst[1] >= target


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer first, then what a careful reader would ask."""

    headline: str
    notes: tuple[str, ...]
    winner: str | None
    """None if no policy attains the target."""
    ranking: tuple[PolicyRuns, ...]
    """Those that attain the target by GPU-hours, then the others by their worst class."""


def verdict(results: Sequence[RunData], *, target: float = TARGET) -> Verdict:
    """Judge the runs of one scenario."""
    if not 0 < target <= 1:
        raise ReportError(f"target is {target}; it must lie in 0..1, for example 0.99")
    runs, notes = comparable(group(results))
    knowing = [p for p in runs if p.policy == CLAIRVOYANT and len(runs) > 1]
    runs = [p for p in runs if p not in knowing]
    attaining = sorted((p for p in runs if p.attains(target)), key=lambda p: p.gpu_hours)
    others = sorted((p for p in runs if not p.attains(target)), key=lambda p: (-p.worst[1], p.gpu_hours))
    if attaining:
        headline = praise(attaining, others, target)
        notes += cheaper_but_worse(attaining[0], others)
        notes += uncertain(attaining)
        notes += [beside_clairvoyant(attaining[0], each, target) for each in knowing]
    else:
        headline = closest(others, target)
    return Verdict(
        headline=headline,
        notes=tuple(notes),
        winner=attaining[0].policy if attaining else None,
        ranking=(*attaining, *others, *knowing),
    )


def group(results: Sequence[RunData]) -> list[PolicyRuns]:
    """Runs by policy, in order of first appearance; one scenario, each seed once."""
    if not results:
        raise ReportError("there is no result to report")
    scenarios = sorted({r.scenario for r in results})
    if len(scenarios) > 1:
        raise ReportError(f"results of different scenarios cannot be compared: {', '.join(scenarios)}")
    if len({tuple(c.name for c in r.classes) for r in results}) > 1:
        raise ReportError("results with different request classes cannot be compared")
    by_policy: dict[str, list[RunData]] = {}
    for result in results:
        runs = by_policy.setdefault(result.policy, [])
        if any(result.seed == other.seed for other in runs):
            seed = "" if result.seed is None else f" for seed {result.seed}"
            raise ReportError(f"policy {result.policy!r} has two results{seed}")
        runs.append(result)
    return [
        PolicyRuns(policy=policy, results=tuple(sorted(runs, key=lambda r: seed_order(r.seed))))
        for policy, runs in by_policy.items()
    ]


def seed_order(seed: int | None) -> int:
    """For sorting: a live run, which has none, comes first."""
    return -1 if seed is None else seed


def seed_of(result: RunData) -> str:
    """What stands behind a policy's name; nothing for a live run."""
    return "" if result.seed is None else f", seed {result.seed}"


def comparable(runs: list[PolicyRuns]) -> tuple[list[PolicyRuns], list[str]]:
    """The runs over the seeds that all policies have, and what was left out."""
    seeds = [{r.seed for r in p.results} for p in runs]
    common = set.intersection(*seeds)
    if all(mine == common for mine in seeds):
        return runs, []
    if not common:
        return runs, ["The policies ran different seeds, so differences may be due to the seed."]
    kept = [
        PolicyRuns(policy=p.policy, results=tuple(r for r in p.results if r.seed in common))
        for p in runs
    ]  # fmt: skip
    listed = ", ".join(str(seed) for seed in sorted(common, key=seed_order))
    return kept, [f"Only seeds that every policy ran are compared: {listed}."]


def praise(attaining: list[PolicyRuns], others: list[PolicyRuns], target: float) -> str:
    """The headline when some policy attains the target."""
    best = attaining[0]
    sure = f"attains at least {percent(target)} in every class"
    if best.gpu_hours == inf:
        who = listed([p.policy for p in attaining])
        return f"{who} {sure}." if len(attaining) == 1 else f"{who} attain {sure.removeprefix('attains ')}."
    spent = hours(best)
    if not others and len(attaining) == 1:
        return f"{best.policy} {sure} with {spent}{bound_phrase(best)}. No other policy ran, so nothing is compared."
    if len(attaining) == 1:
        near = others[0]
        return (
            f"{best.policy} is the only one of {1 + len(others)} policies that {sure}: it takes {spent}"
            f"{bound_phrase(best)}. Next closest is {near.policy}: {shortfall(near)}."
        )
    runner_up = attaining[1]
    return (
        f"{best.policy} {sure} with the fewest GPU-hours: {hours(best, unit='')}, "
        f"{saving(best, runner_up)}{bound_phrase(best)}."
    )


def saving(best: PolicyRuns, runner_up: PolicyRuns) -> str:
    """How much less than the next that attains the target."""
    if runner_up.gpu_hours == inf:
        return f"{runner_up.policy} also attains it, with GPU-hours that are not known"
    less = 1 - best.gpu_hours / runner_up.gpu_hours if runner_up.gpu_hours > 0 else 0.0
    name = f"{runner_up.policy} ({amount(runner_up.gpu_hours)})"
    if less < 0.0005:
        return f"the same as {name}, which also attains it"
    return f"{percent_at(less, 1)} fewer than {name}, the next that attains it"


def closest(others: list[PolicyRuns], target: float) -> str:
    """The headline when none attains the target."""
    best = others[0]
    if not best.worst[0]:
        return "No request was made, so there is nothing to attain."
    text = f"attains {percent(target)} in every class"
    what = f"{shortfall(best)}{bound_phrase(best)}"
    if len(others) == 1:
        return f"{best.policy}, the only policy that ran, falls short of {percent(target)}: {what}."
    return f"No policy {text}. {best.policy} comes closest: {what}."


def cheaper_but_worse(best: PolicyRuns, others: list[PolicyRuns]) -> list[str]:
    """Policies that spent less and missed the target: say so before the reader wonders."""
    if best.gpu_hours == inf:
        return []
    cheaper = sorted((p for p in others if p.gpu_hours < best.gpu_hours), key=lambda p: p.gpu_hours)
    return [f"{p.policy} takes fewer GPU-hours but misses the target: {shortfall(p)}." for p in cheaper]


def beside_clairvoyant(best: PolicyRuns, knowing: PolicyRuns, target: float) -> str:
    """How far the best is from a schedule that knew the future, and how much of its distance to the bound that is."""
    if not knowing.attains(target):
        return f"No schedule was found that attains {percent(target)} with the future known: {shortfall(knowing)}."
    if best.gpu_hours == inf or knowing.gpu_hours <= 0.0:
        return "What a schedule that knows the future would save is not known: there are no GPU-hours."
    text = (
        f"{best.policy} takes {best.gpu_hours / knowing.gpu_hours:.2f} times the GPU-hours of a schedule that knows "
        f"the future ({amount(knowing.gpu_hours)})"
    )
    bound = best.stat("gpu_hours_bound")
    if bound is None or not 0.0 < bound.mean < knowing.gpu_hours < best.gpu_hours:
        return f"{text}."
    knowledge = (best.gpu_hours - knowing.gpu_hours) / (best.gpu_hours - bound.mean)
    return f"{text}: of its distance to the lower bound, {percent(knowledge)} is knowledge."


def uncertain(attaining: list[PolicyRuns]) -> list[str]:
    """What the seeds say about the order of the first two."""
    if len(attaining) < 2:
        return []
    best, runner_up = attaining[:2]
    theirs = {r.seed: r.summary["gpu_hours"] for r in runner_up.results}
    pairs = [(r.summary["gpu_hours"], theirs[r.seed]) for r in best.results if r.seed in theirs]
    if any(figure is None for pair in pairs for figure in pair):
        return []
    if len(pairs) < 2:
        return [] if pairs and len(best.results) > 1 else [_alone(best.results[0])]
    wins = sum(mine < other for mine, other in pairs)
    return [f"{best.policy} takes fewer GPU-hours than {runner_up.policy} in {wins} of {len(pairs)} seeds."]


def _alone(result: RunData) -> str:
    """That one run says nothing of others."""
    if result.seed is None:
        return "One run each: the spread between runs is not known."
    return "One seed: the spread between seeds is not known."


def shortfall(runs: PolicyRuns) -> str:
    """The worst class and the price, as a phrase."""
    name, share = runs.worst
    spent = "" if runs.gpu_hours == inf else f" with {amount(runs.gpu_hours)} GPU-hours"
    return f"{percent(share)} in its worst class ({name}){spent}"


def hours(runs: PolicyRuns, unit: str = " GPU-hours") -> str:
    """Mean GPU-hours, with the range if there are several seeds."""
    figures = runs.stat("gpu_hours")
    assert figures is not None
    text = f"{amount(figures.mean)}{unit}"
    if figures.n == 1:
        return text
    low, high = amount(figures.low), amount(figures.high)
    spread = f"all {low}" if low == high else f"{low} to {high}"
    return f"{text} (mean of {figures.n} seeds, {spread})"


def bound_phrase(runs: PolicyRuns) -> str:
    """How far above the lower bound; nothing without one."""
    over = runs.over_bound
    return "" if over is None else f"; {runs.policy} takes {over.mean:.2f} times the lower bound for what it delivered"


def program_kinds(runs: Sequence[PolicyRuns]) -> list[str]:
    """Kinds of programs that ran."""
    return list(dict.fromkeys(kind for p in runs for r in p.results for kind in r.summary.get("programs") or {}))


def staged(runs: Sequence[PolicyRuns]) -> bool:
    """Whether some policy ran its models as pipelines of stages."""
    return any("stages" in result.settings for policy in runs for result in policy.results)


def stat(values: Sequence[float]) -> Stat:
    """Mean and range of at least one value."""
    return Stat(mean=sum(values) / len(values), low=min(values), high=max(values), n=len(values))


def lookup(summary: dict[str, Any], keys: Sequence[str]) -> float | None:
    """A figure in nested objects; None if it is not there or null."""
    value: Any = summary
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return None if value is None else float(value)
