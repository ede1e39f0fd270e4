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
    """Of those done: not taken from the journal."""
    ended: str
    """The trial that ended last."""

    def left_s(self, elapsed_s: float) -> float | None:
        """Time to the end at the pace so far; None before there is one."""
        return elapsed_s / self.simulated * (self.total - self.done) if self.simulated else None


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
        self._simulated = 0

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
        for number in sorted(outcomes):
            self._tell(trials[number])
        numbers = list(first.values())
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
                self._simulated += 1
                yield numbers[place], outcome

    def _tell(self, each: Trial) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(
                Progress(
                    done=self._done,
                    total=self.total,
                    simulated=self._simulated,
                    ended=each.name,
                )
            )
