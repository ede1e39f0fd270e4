"""A stream of requests as columns, and several streams labelled and merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from chiron.core.types import RequestClass

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that a reader could not use."""

    line: int
    """1-based line (or row) number in the source."""
    why: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """One unlabelled stream: arrivals in seconds from the start (sorted), prompt and output tokens (each >= 1)."""

    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    source: str
    """Where it came from, in words: file or name, licence, transformations."""
    bad_rows: tuple[BadRow, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Programs:
    """Which rows of a workload are calls of programs, and what each of them waits for.

    A program (an agent, a chat) makes a call once all calls that it waits for have ended and a while has passed: when
    it arrives is known only once they have. The columns are by program, then by row.
    """

    kinds: tuple[str, ...]
    kind: Ints
    """Index into ``kinds``."""
    start_s: Floats
    deadline_s: Floats
    """Absolute seconds by which the last call is due to end; inf: none."""
    of: Ints
    """Program of the row; -1: it is a request of its own."""
    think_s: Floats
    """From the last end that it waits for, or from the program's start, to its arrival."""
    earliest_s: Floats
    """When it would arrive if calls took no time; that of a request of its own is its arrival."""
    parents: Ints
    """Rows that are waited for, one row after the other; each is before those that wait for it."""
    parents_from: Ints
    """Where those of a row begin in ``parents``; one more entry at the end."""

    def __len__(self) -> int:
        return len(self.start_s)

    @property
    def extends(self) -> npt.NDArray[np.bool_]:
        """Rows whose answer the next prompt of their program begins with, after their own prompt: those that are the
        only one that others wait for. Of several at once, one answer follows another."""
        counts = np.diff(self.parents_from)
        found = np.zeros(len(self.of), dtype=np.bool_)
        found[self.parents[np.repeat(counts == 1, counts)]] = True
        return found

    def cuts(self, input_tokens: Sequence[int], output_tokens: Sequence[int]) -> list[int]:
        """By row, how often its program's conversation has been cut by then: a prompt does not hold all of the one
        before and its answers, so that it begins otherwise."""
        parents, begins = self.parents.tolist(), self.parents_from.tolist()
        found = [0] * len(self.of)
        for row in range(len(found)):
            before = parents[begins[row] : begins[row + 1]]
            if before:
                whole = input_tokens[before[0]] + sum(output_tokens[each] for each in before)
                found[row] = found[before[0]] + (input_tokens[row] < whole)
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cascades:
    """Which rows of a workload are calls for a cascade (``workload.cascades``)."""

    then: Ints
    """Row of the call that comes when this one has ended, because it was not sure; it is after it. -1: none does."""
    start_s: Floats
    """When the client's request comes; of a row that is none of a cascade, its arrival."""
    shown_tokens: Ints
    """Tokens after which the client can read an answer of the first model; 0: from the first one on."""
    other: Ints
    """Of a first call, index of the model that is asked if it gets no answer; -1: it is none."""
    wait_s: Floats
    """For so long a first call waits for an instance, before that model is asked; inf: for ever."""

    @property
    def answers(self) -> Ints:
        """Rows whose answers clients see, one for each request, in order of arrival."""
        seen = np.flatnonzero(self.then < 0)
        ordered: Ints = seen[np.argsort(self.start_s[seen], kind="stable")]
        return ordered

    def waited_tokens(self, output_tokens: Ints) -> Ints:
        """By row, gaps between tokens of an answer that are over when its client begins to read it."""
        gaps: Ints = np.maximum(np.minimum(self.shown_tokens, output_tokens) - 1, 0)
        return gaps

    @property
    def waits(self) -> npt.NDArray[np.bool_]:
        """Rows that come only after another."""
        found = np.zeros(len(self.then), dtype=np.bool_)
        found[self.then[self.then >= 0]] = True
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """What a simulation runs: requests of several models and classes, sorted by arrival."""

    arrival_s: Floats
    """Of a call that waits for others: about when, if they take as long as was assumed (``workload.programs``)."""
    input_tokens: Ints
    output_tokens: Ints
    """True output lengths: for the engine only. No policy reads them."""
    model: Ints
    """Index into ``models``."""
    cls: Ints
    """Index into ``classes``."""
    deadline_s: Floats
    """Absolute seconds by which the last token is due; inf without a deadline."""
    models: tuple[str, ...]
    classes: tuple[RequestClass, ...]
    tenant: Ints | None = None
    """Index into ``tenants``; None: all are the first."""
    tenants: tuple[str, ...] = ("",)
    """API keys, by name."""
    predicted_tokens: Ints | None = None
    """Output lengths by a predictor, for policies that have one (``workload.predicted``)."""
    programs: Programs | None = None
    """None: every row is a request of its own."""
    cascades: Cascades | None = None
    """None: no request is asked of two models. A workload has these or programs, not both."""

    def __len__(self) -> int:
        return len(self.arrival_s)
