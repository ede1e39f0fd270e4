"""``chiron tune``: the settings of a policy that serve a calibration best, by the same budget for every policy.

The search (``studies.search``) proposes candidates, each runs on every workload of the calibration, and the objective
(``studies.objective``) orders them. The result is a pure function of the seed, the budget, the calibration and the
settings that are known before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chiron.config.build import setups
from chiron.config.policies import PolicyChoice
from chiron.config.read import ConfigError
from chiron.config.scenario import Scenario
from chiron.policies.ranges import Tunable, tunables, value_of, with_values
from chiron.policies.registry import POLICIES
from chiron.policies.starts import STARTS
from chiron.sim.bound import bound
from chiron.sim.setup import Setup
from chiron.studies.calibration import Calibration
from chiron.studies.objective import FAILED, score
from chiron.studies.runner import Runner
from chiron.studies.search import Candidate, Values, best_of, explored, propose
from chiron.studies.trial import Trial, trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    trials: int = 32
    """Candidates of each policy, its present settings included."""
    seed: int = 1
    """Of the search."""
    target: float = 0.99

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"--trials is {self.trials}; it must be 1 or more")
        if not 0 < self.target <= 1:
            raise ConfigError(f"--target is {self.target:g}; it must be above 0 and at most 1, such as 0.99")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workloads:
    """What candidates run on: one setup per workload, in which settings are exchanged, and its lower bound."""

    setups: tuple[Setup, ...]
    bounds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What a search has found for one policy."""

    label: str
    choice: PolicyChoice
    """As it was."""
    space: tuple[Tunable, ...]
    starts: tuple[Values, ...]
    """Settings that were tried first, the policy as it was before all."""
    candidates: tuple[Candidate, ...]
    errors: tuple[str, ...] = ()
    """Of candidates that failed."""

    @property
    def best(self) -> Candidate:
        return best_of(self.candidates)

    @property
    def values(self) -> Values:
        return self.best.values


def workloads(calibration: Sequence[Calibration], seeds: Sequence[int] | None) -> Workloads:
    """Of every calibration and seed (default: the scenarios')."""
    made = [
        setup
        for each in calibration
        for setup in setups(each.scenario, policies=["static"], seeds=seeds, part=each.part)
    ]
    return Workloads(setups=tuple(made), bounds=tuple(bound(setup).gpu_hours for setup in made))


def tunable_choice(scenario: Scenario, label: str) -> tuple[PolicyChoice, tuple[Tunable, ...]]:
    """The policy of a label, and what of it can be tuned. Raises ConfigError if that is nothing."""
    choice = scenario.choice(label, "--policy")
    space = tunables(type(choice.settings))
    if not space:
        raise ConfigError(f"--policy {label}: no setting of {choice.policy} has a range, so there is nothing to tune")
    if choice.stages:
        raise ConfigError(f"--policy {label}: has a stage policy; only policies for whole instances can be tuned")
    return choice, space


def tune(label: str, choice: PolicyChoice, on: Workloads, budget: Budget, runner: Runner) -> Tuned:
    """Search the settings of one policy."""
    space = tunables(type(choice.settings))

    def sound(values: Values) -> bool:
        try:
            with_values(choice.settings, values)
        except ValueError:
            return False
        return True

    starts = [values for values in starts_of(choice, space) if sound(values)][: explored(budget.trials)]
    done: list[Candidate] = []
    errors: dict[str, None] = {}
    while wave := propose(space, done, budget.trials, seed=budget.seed, starts=starts, sound=sound):
        trials = [each for candidate in wave for each in _trials(label, choice, candidate, on)]
        ended = iter(runner.run(trials))
        for candidate in wave:
            outcomes = [next(ended) for _ in on.setups]
            errors |= dict.fromkeys(outcome.error for outcome in outcomes if outcome.error)
            found = score([outcome.summary for outcome in outcomes], on.bounds, budget.target)
            done.append(replace(candidate, score=found))
        done = _against_published(done, _published(choice, space))
    return Tuned(
        label=label,
        choice=choice,
        space=space,
        starts=tuple(starts),
        candidates=tuple(done),
        errors=tuple(errors),
    )


def _against_published(done: Sequence[Candidate], published: Values) -> list[Candidate]:
    """What gives up in some run what the published settings have there is never chosen. They are among the first that
    are tried; in a search of a single trial, the settings as they are stand for them."""
    base = next((each for each in done if each.values == published), done[0])
    return [
        replace(each, score=each.score.against(base.score))
        if each.score is not None and each.score is not FAILED and base.score is not None
        else each
        for each in done
    ]


def _published(choice: PolicyChoice, space: Sequence[Tunable]) -> Values:
    settings = POLICIES[choice.policy.removesuffix("-tuned")].settings()
    return {each.name: value_of(settings, each.name) for each in space}


def starts_of(choice: PolicyChoice, space: Sequence[Tunable]) -> list[Values]:
    """Each once: the policy as it is, as it was published, and with what earlier searches found."""
    name = choice.policy.removesuffix("-tuned")
    published = POLICIES[name].settings()
    known = [choice.settings, published, *(with_values(published, found) for found in STARTS.get(name, ()))]
    starts: list[Values] = []
    for settings in known:
        values = {each.name: value_of(settings, each.name) for each in space}
        if values not in starts:
            starts.append(values)
    return starts


def expected_trials(on: Workloads, policies: int, budget: Budget) -> int:
    """Simulations of a study: what its progress is measured by."""
    return policies * max(budget.trials, explored(budget.trials)) * len(on.setups)


def _trials(label: str, choice: PolicyChoice, candidate: Candidate, on: Workloads) -> list[Trial]:
    settings = with_values(choice.settings, candidate.values)
    return [
        trial(
            replace(setup, policy=choice.policy, settings=settings, label=label),
            name=f"{label}, candidate {candidate.number + 1}, {setup.scenario}, seed {setup.seed}",
        )
        for setup in on.setups
    ]
