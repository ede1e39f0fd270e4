"""Which token is next, from the likeliest ones. Pure: each draw has a generator of its own, by seed and position, so an
answer that is resumed elsewhere goes on as it would have.

The last stage tells the ``CANDIDATES`` likeliest tokens; the others together are never drawn. A request with penalties
gets all, because a penalty may change which are the likeliest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CANDIDATES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    temperature: float
    top_p: float
    top_k: int
    """0: all."""
    frequency_penalty: float
    presence_penalty: float
    seed: int
    number: int = 0
    """Of the choice: those of one request differ."""
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_p == 0.0 or self.top_k == 1

    @property
    def penalised(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty)

    def candidates(self, vocabulary: int) -> int:
        """How many of the likeliest tokens a draw needs."""
        if self.penalised:
            return vocabulary
        return min(vocabulary, max(self.logprobs or 0, 1 if self.greedy else CANDIDATES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    token: int
    logprob: float
    """Of the model, before temperature and penalties."""
    top: tuple[tuple[int, float], ...]


def draw(sampling: Sampling, logits: memoryview, ids: memoryview, mass: float, generated: Sequence[int]) -> Drawn:
    """The next token after ``generated``. ``logits`` are float32, falling; ``ids`` int32; ``mass`` the logarithm of the
    sum of all exponentials."""
    import numpy as np

    values = np.frombuffer(logits, np.float32)
    tokens = np.frombuffer(ids, np.int32)
    if sampling.penalised:
        chances = _penalised(sampling, values, tokens, generated)
    else:
        chances = values
    at = _greedy(chances) if sampling.greedy else _drawn(sampling, chances, len(generated))
    top = sampling.logprobs or 0
    return Drawn(
        token=int(tokens[at]),
        logprob=float(values[at]) - mass,
        top=tuple((int(tokens[i]), float(values[i]) - mass) for i in range(min(top, len(values)))),
    )


def _greedy(chances: NDArray[np.float32]) -> int:
    return int(chances.argmax())


def _drawn(sampling: Sampling, chances: NDArray[np.float32], position: int) -> int:
    import numpy as np

    order: Any = np.argsort(-chances, kind="stable") if sampling.penalised else np.arange(len(chances))
    below = chances[order].astype(np.float64)
    below -= below[0]
    with np.errstate(over="ignore"):  # Of what is hardly any temperature at all.
        scaled = below / sampling.temperature
    if sampling.top_k > 0:
        scaled = scaled[: sampling.top_k]
    weights = np.exp(scaled)
    sums = np.cumsum(weights)
    if sampling.top_p < 1.0:
        kept = int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1
        sums = sums[:kept]
    random = np.random.default_rng([sampling.seed, sampling.number, position])
    return int(order[min(int(np.searchsorted(sums, random.random() * sums[-1], side="right")), len(sums) - 1)])


def _penalised(
    sampling: Sampling, values: NDArray[np.float32], tokens: NDArray[np.int32], generated: Sequence[int]
) -> NDArray[np.float32]:
    """As OpenAI's API has them: by how often a token was generated, and whether."""
    import numpy as np

    result = values.copy()
    counts = Counter(generated)
    if counts:
        places = np.nonzero(np.isin(tokens, list(counts)))[0]
        for place in places:
            times = counts[int(tokens[place])]
            result[place] -= sampling.frequency_penalty * times + sampling.presence_penalty
    return result
