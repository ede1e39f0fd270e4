"""When a cascade trusts its small model: the small one is asked first, the large one where its answer is unsure.

The confidence of an answer is that of its tokens, averaged over those that are judged. Three measures:

- ``logprob``: log-probability of the token that was chosen. Every engine that has log-probabilities has it.
- ``margin``: probability of the likeliest token less that of the next one. "BT" of Cache & Distil (arXiv 2310.13561),
  which judges one token; with ``after_tokens = 1`` it is theirs, on probabilities in place of scores.
- ``entropy``: that of the next token in nats, negated, so that more is surer. "EN" of Cache & Distil. Engines tell the
  likeliest tokens only; what is left counts as one more token, which makes it a lower bound.

The large model is asked where the mean is below the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite, log
from types import MappingProxyType
from typing import Final, Literal

Test = Literal["logprob", "margin", "entropy"]
THRESHOLDS: Final[Mapping[str, float]] = MappingProxyType({"logprob": -0.5, "margin": 0.3, "entropy": -1.0})
"""Our choices, as no public figure gives one: a typical token of 60 % probability; 0.3 apart; a nat of entropy. To be
set by the share of requests that is to be passed on, and by own answers (docs/policies/cascades.md)."""
TOP: Final[Mapping[str, int]] = MappingProxyType({"logprob": 0, "margin": 3, "entropy": 20})
"""Likeliest tokens that engines are asked for; 20 is the most that OpenAI's API has, and vLLM's usual limit. One more
than the margin needs: vLLM's chat has the chosen token first, in place of the last of the likeliest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeRule:
    """Whether an answer of the small model will do."""

    test: Test = "logprob"
    threshold: float | None = None
    """The least mean confidence of an answer that is given; default: ``THRESHOLDS``."""
    after_tokens: int = 16
    """Tokens after which is decided, or at the end of a shorter answer; 0: the whole answer. Few begin a stream early
    and save work that would be thrown away; many know more. Our choice."""

    def __post_init__(self) -> None:
        if self.test not in THRESHOLDS:
            raise ValueError(f"test is {self.test!r}; it must be one of {', '.join(THRESHOLDS)}")
        if self.threshold is not None:
            least, most = (0.0, 1.0) if self.test == "margin" else (-1000.0, 0.0)
            if not (isfinite(self.threshold) and least <= self.threshold <= most):
                raise ValueError(f"threshold is {self.threshold}; for {self.test!r} it must be {least:g} to {most:g}")
        if not 0 <= self.after_tokens <= 1_000_000:
            raise ValueError(f"after_tokens is {self.after_tokens}; it must be 0 (the whole answer) to 1000000")

    @property
    def least(self) -> float:
        return THRESHOLDS[self.test] if self.threshold is None else self.threshold

    @property
    def top(self) -> int:
        """How many of the likeliest tokens it must know of each place."""
        return TOP[self.test]

    def confidence(self, chosen: float, likeliest: Sequence[float]) -> float | None:
        """Of one token, from log-probabilities: its own and those of the likeliest. None: they do not tell."""
        if self.test == "logprob":
            return min(0.0, chosen) if isfinite(chosen) else None
        found = sorted((each for each in likeliest if isfinite(each)), reverse=True)
        if len(found) < 2:
            return None
        return margin(found) if self.test == "margin" else -entropy(found)

    def judged_tokens(self, output_tokens: int) -> int:
        """Of an answer of so many tokens, those that are judged: what an unsure one costs the small model."""
        return output_tokens if self.after_tokens == 0 else min(self.after_tokens, output_tokens)

    def sure(self, mean: float) -> bool:
        return mean >= self.least


def margin(likeliest: Sequence[float]) -> float:
    """Between the first two of descending log-probabilities."""
    return min(1.0, exp(min(0.0, likeliest[0]))) - min(1.0, exp(min(0.0, likeliest[1])))


def entropy(likeliest: Sequence[float]) -> float:
    """In nats, at least: what is left beside these counts as one token."""
    probabilities = [exp(min(0.0, each)) for each in likeliest]
    total = sum(probabilities)
    if total > 1.0:  # As rounded, or as an engine says that cannot be believed.
        probabilities = [each / total for each in probabilities]
    else:
        probabilities.append(1.0 - total)
    return -sum(each * log(each) for each in probabilities if each > 0.0)
