"""Requests to a cascade: each is asked of a small model, and of a large one where that is not sure.

Which requests are passed on is drawn before a run, the same for every policy: with one probability for all, or with one
that grows with the prompt. A request that is passed on is two calls. The first makes as many tokens as are judged
(``policies.cascade``), the second, which comes when that has ended, the whole answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chiron.policies.cascade import CascadeRule
from chiron.workload.errors import require
from chiron.workload.types import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class ByLength:
    """A share that grows with the prompt: 1 / (1 + (half_tokens / tokens)^power)."""

    half_tokens: float
    """Of prompts of so many tokens half are passed on."""
    power: float = 1.0
    """How sharply the share grows there."""

    def __post_init__(self) -> None:
        require(0 < self.half_tokens <= 1e9, "half_tokens", self.half_tokens, "above 0 and at most 1e9")
        require(0 <= self.power <= 100, "power", self.power, "0 to 100")

    def share(self, input_tokens: Ints) -> Floats:
        found: Floats = 1.0 / (1.0 + (self.half_tokens / input_tokens) ** self.power)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeShape:
    """Of requests to one cascade."""

    first: str
    """Name of the small model."""
    then: str
    """Name of the large one."""
    escalated: float | ByLength
    """Share of the requests for which the large one is asked."""
    rule: CascadeRule
    first_wait_s: float | None = None
    """For so long a request waits for an instance of the small one; then the large one is asked. None: half of the
    TTFT SLO, as a gateway has it."""

    def __post_init__(self) -> None:
        wait_s = self.first_wait_s
        require(wait_s is None or wait_s > 0, "first_wait", wait_s, "above 0")

    def passed_on(self, input_tokens: Ints, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which requests are. With one seed, those of a smaller share are among those of a larger one."""
        drawn = rng.random(len(input_tokens))
        share = self.escalated.share(input_tokens) if isinstance(self.escalated, ByLength) else self.escalated
        return drawn < share

    def judged_tokens(self, output_tokens: Ints) -> Ints:
        """What the small model makes of answers until it is known whether they will do."""
        return np.array([self.rule.judged_tokens(tokens) for tokens in output_tokens.tolist()], dtype=np.int64)
