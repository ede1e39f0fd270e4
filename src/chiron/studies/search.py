"""Which settings to try next: a quasi-random half over the whole space, then steps around the best one, which shrink.

The first candidates are the settings that are known: the policy as it is, and what is said to be good. What is
proposed depends on them, on the seed and on what the earlier candidates scored, never on who simulated them, how many
at a time, or when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from chiron.policies.ranges import Tunable, Value
from chiron.studies.objective import FAILED, Rank, Score

Values = Mapping[str, Value]
Sound = Callable[[Values], bool]
"""Whether settings do not contradict each other."""

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
"""Bases of the Halton sequence, one per setting."""
EXPLORED = 0.5
"""Share of the trials that look everywhere."""
ROUND = 4
"""Candidates around the best one that are proposed at a time."""
RADIUS = 0.25
RADIUS_LEAST = 0.03
"""Of those steps, as a share of the range: at first, and at the end."""
TRIES = 200
"""For a candidate that is new and whose settings do not contradict each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    number: int
    values: Values
    score: Score | None = None

    @property
    def rank(self) -> Rank:
        """The least is the best; one that has not run is the last."""
        return (self.score or FAILED).rank


def explored(trials: int) -> int:
    """How many of the trials look everywhere, the first included."""
    return min(trials, max(1, round(EXPLORED * trials)))


def propose(
    space: Sequence[Tunable],
    done: Sequence[Candidate],
    trials: int,
    *,
    seed: int,
    starts: Sequence[Values],
    sound: Sound,
) -> list[Candidate]:
    """The next candidates after those that are done; empty when the trials are used up, or nothing new is found.

    ``starts``: settings to try first, the present ones before all; as many as there are trials that look everywhere.
    """
    if not done:
        return _everywhere(space, explored(trials), seed=seed, starts=starts, sound=sound)
    left = min(ROUND, trials - len(done))
    return _around(space, done, left, trials, seed=seed, sound=sound) if left > 0 and space else []


def _everywhere(
    space: Sequence[Tunable], count: int, *, seed: int, starts: Sequence[Values], sound: Sound
) -> list[Candidate]:
    random = Random(f"{seed}:halton")
    shift = [random.random() for _ in space]
    found = list(starts[:count])
    for number in range(1, TRIES * count):
        if len(found) >= count or not space:
            break
        places = [(halton(number, PRIMES[i]) + shift[i]) % 1.0 for i in range(len(space))]
        values = {each.name: each.value(place) for each, place in zip(space, places, strict=True)}
        if values not in found and sound(values):
            found.append(values)
    return [Candidate(number=number, values=values) for number, values in enumerate(found)]


def _around(
    space: Sequence[Tunable], done: Sequence[Candidate], count: int, trials: int, *, seed: int, sound: Sound
) -> list[Candidate]:
    random = Random(f"{seed}:around:{len(done)}")
    best = best_of(done)
    first = explored(trials)
    gone = (len(done) - first) / max(1, trials - first)
    radius = RADIUS * (RADIUS_LEAST / RADIUS) ** max(0.0, gone)
    tried = [dict(each.values) for each in done]
    found: list[Candidate] = []
    for _ in range(TRIES * count):
        if len(found) >= count:
            break
        values = _step(space, best.values, radius, random)
        if values not in tried and sound(values):
            tried.append(values)
            found.append(Candidate(number=len(done) + len(found), values=values))
    return found


def _step(space: Sequence[Tunable], values: Values, radius: float, random: Random) -> dict[str, Value]:
    """About half of the settings moved, one at least."""
    moved = [random.random() < 0.5 for _ in space]
    moved[random.randrange(len(space))] = True
    return {
        each.name: each.value(each.place(values[each.name]) + random.uniform(-radius, radius)) if moves
        else values[each.name]
        for each, moves in zip(space, moved, strict=True)
    }  # fmt: skip


def best_of(done: Sequence[Candidate]) -> Candidate:
    """The first of those that nobody beats."""
    return min(done, key=lambda each: each.rank)


def halton(number: int, base: int) -> float:
    """The ``number``-th value of the van der Corput sequence: its digits mirrored at the point."""
    value, share = 0.0, 1.0
    while number:
        share /= base
        number, digit = divmod(number, base)
        value += digit * share
    return value
