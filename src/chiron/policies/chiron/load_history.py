"""Interactive load of the last hour, second by second, from which arrivals can be taken back.

Load is counted in instances' worth: what an arrival is worth depends on what was known when its second was first seen
(step times, lengths, capacity), and is kept beside what arrived. An arrival that turns out not to have run is taken out
of its second at the worth that it was put in with, so that nothing of it is left: whole numbers are added up, and the
load is computed from their sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from chiron.policies.fluid_queue import Floats
from chiron.policies.views import ArrivalView, StepTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """Instances' worth of work that one request, one prompt token and one squared prompt length bring."""

    per_request: tuple[float, ...]
    """By class, as the next."""
    per_token: tuple[float, ...]
    per_square: float


def worth(times: StepTimes, outputs: Sequence[float], rate: float) -> Worth:
    """``outputs``: expected tokens by class; ``rate``: work that one instance does in a second."""
    decode = [output * (times.per_sequence_s + 0.5 * output * times.per_context_token_s) for output in outputs]
    token = [times.per_prefill_token_s + output * times.per_context_token_s for output in outputs]
    return Worth(
        per_request=tuple(each / rate for each in decode),
        per_token=tuple(each / rate for each in token),
        per_square=times.per_prefill_square_s / rate,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadHistory:
    """One column per second since ``began_s``; rows by class."""

    began_s: float
    """Time of the first second remembered; the prior lies before the first tick."""
    prior: Floats
    """Load that was presumed before anything was seen, shape (seconds,)."""
    counts: Floats
    """Requests, shape (classes, seconds), as the next three."""
    tokens: Floats
    per_request: Floats
    per_token: Floats
    square: Floats
    """Sum of squared prompt lengths, shape (seconds,), as the last two."""
    per_square: Floats
    load: Floats
    """Instances' worth of work that arrived."""

    @property
    def seconds(self) -> int:
        return len(self.load)

    def after(self, seconds: int, new: Worth, arrivals: Iterable[ArrivalView], rows: Sequence[str]) -> LoadHistory:
        """With ``seconds`` more, worth ``new``, and with what the arrivals say of any second that is remembered.
        ``rows`` names the classes."""
        seconds = max(0, seconds)
        wide = (len(rows), seconds)
        counts, tokens = (np.concatenate((each, np.zeros(wide)), axis=1) for each in (self.counts, self.tokens))
        square = np.concatenate((self.square, np.zeros(seconds)))
        for arrival in arrivals:
            place = arrival.second - round(self.began_s)
            if arrival.cls.name in rows and 0 <= place < len(square):
                row = rows.index(arrival.cls.name)
                counts[row, place] += arrival.requests
                tokens[row, place] += arrival.input_tokens
                square[place] += arrival.input_square
        per_request, per_token = (
            np.concatenate((old, np.broadcast_to(np.array(values).reshape(-1, 1), wide)), axis=1)
            for old, values in ((self.per_request, new.per_request), (self.per_token, new.per_token))
        )
        per_square = np.concatenate((self.per_square, np.full(seconds, new.per_square)))
        prior = np.concatenate((self.prior, np.zeros(seconds)))
        return replace(
            self,
            prior=prior,
            counts=counts,
            tokens=tokens,
            per_request=per_request,
            per_token=per_token,
            square=square,
            per_square=per_square,
            load=prior + (per_request * counts + per_token * tokens).sum(axis=0) + per_square * square,
        )

    def last(self, seconds: int) -> LoadHistory:
        """No more than so many."""
        drop = self.seconds - seconds
        if drop <= 0:
            return self
        return LoadHistory(
            began_s=self.began_s + drop,
            prior=self.prior[drop:],
            counts=self.counts[:, drop:],
            tokens=self.tokens[:, drop:],
            per_request=self.per_request[:, drop:],
            per_token=self.per_token[:, drop:],
            square=self.square[drop:],
            per_square=self.per_square[drop:],
            load=self.load[drop:],
        )


def remembered(began_s: float, load: Floats, counts: Floats) -> LoadHistory:
    """As an earlier run knew it: nothing of it is taken back any more."""
    return replace(presumed(began_s, load, len(counts)), counts=counts)


def presumed(began_s: float, load: Floats, classes: int) -> LoadHistory:
    """Before anything is seen: this load, and no requests."""
    seconds = load.shape[0]
    none, nobody = np.zeros(seconds), np.zeros((classes, seconds))
    return LoadHistory(
        began_s=began_s,
        prior=load,
        counts=nobody,
        tokens=nobody,
        per_request=nobody,
        per_token=nobody,
        square=none,
        per_square=none,
        load=load,
    )
