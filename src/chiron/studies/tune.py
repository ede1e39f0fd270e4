"""``chiron tune``: the settings of a policy that serve a calibration best, by the same budget for every policy.

The search (``studies.search``) proposes candidates, each runs on the workloads of the calibration for as long as it can
still become the best, and the objective (``studies.objective``) orders them. The result is a pure function of the seed,
the budget, the calibration and the settings that are known before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from chiron.studies.objective import FAILED, Rank, Score, score
from chiron.studies.runner import Runner
from chiron.studies.search import ROUND, Candidate, Values, best_of, explored, propose
from chiron.studies.trial import Outcome, Trial, trial

KNOWN = 2
"""Candidates that run on every workload, before others have to beat them."""
AT_ONCE = ROUND
"""Simulations that a race asks for at a time at least, so that cores have work when few candidates are left."""


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

    @property
    def stopped(self) -> int:
        """Candidates that could not become the best any more before they had run everywhere."""
        return sum(each.score is not None and each.score.stopped for each in self.candidates)


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
    race = _Race(label, choice, on, budget.target, runner, published=_published(choice, space))
    while wave := propose(space, race.done, budget.trials, seed=budget.seed, starts=starts, sound=sound):
        race.run(wave)
    return Tuned(
        label=label,
        choice=choice,
        space=space,
        starts=tuple(starts),
        candidates=tuple(race.done),
        errors=tuple(race.errors),
    )


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


class _Race:
    """Runs candidates on the workloads, those first on which the published settings lack most. A candidate that can no
    longer become the best, whatever comes of the workloads that are left, is stopped. So what is found is what would
    have been found without."""

    def __init__(
        self,
        label: str,
        choice: PolicyChoice,
        on: Workloads,
        target: float,
        runner: Runner,
        *,
        published: Values,
    ) -> None:
        self._label = label
        self._choice = choice
        self._on = on
        self._target = target
        self._runner = runner
        self._published = published
        self._base: Sequence[float] = ()
        """What the published settings lack on each workload; empty: they failed, or have not run."""
        self.done: list[Candidate] = []
        self.errors: dict[str, None] = {}

    def run(self, wave: Sequence[Candidate]) -> None:
        """The candidates, with their scores, come to ``done``."""
        if not self.done:
            self._run_all(wave[:KNOWN])
            wave = wave[KNOWN:]
        for first in range(0, len(wave), ROUND):
            self._run_raced(wave[first : first + ROUND])

    def _run_all(self, wave: Sequence[Candidate]) -> None:
        """The policy as it is, and as it was published: nobody is to be beaten yet."""
        found = self._outcomes(wave, range(len(self._on.setups)))
        scored = [replace(each, score=self._score(found[each.number])) for each in wave]
        # In a search of a single trial the settings as they are stand for the published ones.
        base = next((each for each in scored if each.values == self._published), scored[0])
        assert base.score is not None
        self._base = base.score.shortfalls
        self.done += [replace(each, score=self._score(found[each.number])) for each in wave]

    def _run_raced(self, wave: Sequence[Candidate]) -> None:
        places = list(range(len(self._on.setups)))
        left = sorted(places, key=lambda place: -self._base[place]) if self._base else places
        best = best_of(self.done).rank
        outcomes: dict[int, dict[int, Outcome]] = {each.number: {} for each in wave}
        running = list(wave)
        while left and running:
            count = -(-AT_ONCE // len(running))
            now, left = left[:count], left[count:]
            for number, ended in self._outcomes(running, now).items():
                outcomes[number] |= ended
            still = [each for each in running if self._can_win(outcomes[each.number], best)]
            self._runner.total -= (len(running) - len(still)) * len(left)
            running = still
        self.done += [replace(each, score=self._score(outcomes[each.number])) for each in wave]

    def _can_win(self, outcomes: Mapping[int, Outcome], best: Rank) -> bool:
        found = self._score(outcomes)
        return found is not FAILED and found.best_possible(len(self._on.setups)) < best

    def _score(self, outcomes: Mapping[int, Outcome]) -> Score:
        """Of the workloads that ran."""
        places = sorted(outcomes)
        bounds = [self._on.bounds[place] for place in places]
        found = score([outcomes[place].summary for place in places], bounds, self._target)
        if found is FAILED:
            return found
        stopped = len(places) < len(self._on.setups)
        return replace(found, stopped=stopped).against([self._base[place] for place in places] if self._base else ())

    def _outcomes(self, wave: Sequence[Candidate], places: Sequence[int]) -> dict[int, dict[int, Outcome]]:
        """By candidate and workload."""
        asked = [(each, place) for each in wave for place in places]
        ended = self._runner.run([self._trial(each, place) for each, place in asked])
        self.errors |= dict.fromkeys(outcome.error for outcome in ended if outcome.error)
        found: dict[int, dict[int, Outcome]] = {}
        for (each, place), outcome in zip(asked, ended, strict=True):
            found.setdefault(each.number, {})[place] = outcome
        return found

    def _trial(self, candidate: Candidate, place: int) -> Trial:
        setup = self._on.setups[place]
        settings = with_values(self._choice.settings, candidate.values)
        return trial(
            replace(setup, policy=self._choice.policy, settings=settings, label=self._label),
            name=f"{self._label}, candidate {candidate.number + 1}, {setup.scenario}, seed {setup.seed}",
        )
