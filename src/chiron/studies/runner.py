"""Trials through an executor and a journal, with a word about how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from chiron.studies.executors import Executor
from chiron.studies.journal import Journal
from chiron.studies.trial import Outcome, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a study is."""

    done: int
    total: int
    """Trials, as far as they are known."""
    simulated: int
    """Requests of the trials that were simulated, not taken from the journal."""
    left: float
    """Requests of those that are not, as far as they are known; of the others as many as of a trial on average."""
    ended: str
    """The trial that ended last."""

    def left_s(self, elapsed_s: float) -> float | None:
        """Time to the end at the pace so far, by requests: a trial at three times the load takes three times as long.
        None before there is a pace."""
        return elapsed_s * self.left / self.simulated if self.simulated else None


class Runner:
    """Runs trials, each at most once."""

    def __init__(
        self, executor: Executor, journal: Journal, progress: Callable[[Progress], None] | None = None
    ) -> None:
        self._executor = executor
        self._journal = journal
        self._progress = progress
        self.total = 0
        """Trials that the study will have at least; ``run`` raises it."""
        self._done = 0
        self._simulated: list[int] = []
        """Requests of each trial that was simulated."""
        self._waiting: dict[int, int] = {}
        """Requests of each trial of the present call that has not ended, by its number."""

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """The outcome of each. What simulates them is ended if the caller is stopped meanwhile."""
        outcomes: dict[int, Outcome] = {}
        first: dict[str, int] = {}
        """By key: the trial that is simulated for all with that key."""
        for number, each in enumerate(trials):
            known = self._journal.get(each.key)
            if known is not None:
                outcomes[number] = Outcome(summary=known)
            else:
                first.setdefault(each.key, number)
        self.total = max(self.total, self._done + len(trials))
        numbers = list(first.values())
        self._waiting = {number: len(trials[number].setup.workload) for number in numbers}
        for number in sorted(outcomes):
            self._tell(trials[number])
        for number, outcome in self._simulate([trials[i] for i in numbers], numbers):
            for other, each in enumerate(trials):
                if each.key == trials[number].key:
                    outcomes[other] = outcome
                    self._tell(each)
        return [outcomes[number] for number in range(len(trials))]

    def _simulate(self, trials: Sequence[Trial], numbers: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
        with closing(self._executor.run(trials)) as ends:
            for place, outcome in ends:
                each = trials[place]
                if outcome.summary is not None:
                    self._journal.add(each.key, each.name, outcome.summary)
                self._simulated.append(self._waiting.pop(numbers[place]))
                yield numbers[place], outcome

    def _tell(self, each: Trial) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(
                Progress(
                    done=self._done,
                    total=self.total,
                    simulated=sum(self._simulated),
                    left=self._left(),
                    ended=each.name,
                )
            )

    def _left(self) -> float:
        """Requests of the trials that are to be simulated still."""
        later = max(0, self.total - self._done - len(self._waiting))
        mean = sum(self._simulated) / len(self._simulated) if self._simulated else 0.0
        return sum(self._waiting.values()) + later * mean
