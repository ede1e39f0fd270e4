"""Sequences that decode in one engine: what composers that take places back remember of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import NamedTuple

from chiron.core.types import Request
from chiron.policies.policy import Estimates

LENGTH_STEP_TOKENS = 50
"""An answer that is as long as expected goes on for so many tokens more, as far as anybody knows."""


class Decodes(NamedTuple):
    """One of them."""

    request: Request
    generated: int
    """Tokens of its answer when it began to decode."""
    step: int
    """The engine's, at that time."""
    first_s: float
    """When its first token was there."""

    def made(self, step: int) -> int:
        """Tokens of its answer by that step."""
        return self.generated + step - self.step

    def next_due_s(self, step: int) -> float:
        """When the next one is due: token n comes n - 1 ITL SLOs after the first."""
        return self.first_s + self.request.itl_slo_s * self.made(step)

    def held_tokens(self, step: int) -> int:
        """Its KV."""
        return self.request.input_tokens + self.made(step)


class Decoding:
    """All of them, in the order in which they began."""

    def __init__(self) -> None:
        self._by_id: dict[int, Decodes] = {}
        self._paces: dict[float, int] = {}
        """How many there are of each ITL SLO."""

    def __iter__(self) -> Iterator[Decodes]:
        return iter(self._by_id.values())

    def __reversed__(self) -> Iterator[Decodes]:
        return reversed(self._by_id.values())

    def __contains__(self, request: Request) -> bool:
        return request.id in self._by_id

    def began(self, request: Request, generated: int, step: int, now_s: float) -> None:
        first_s = request.first_token_s if request.first_token_s >= 0.0 else now_s
        self._by_id[request.id] = Decodes(request, generated, step, first_s)
        self._paces[request.itl_slo_s] = self._paces.get(request.itl_slo_s, 0) + 1

    def left(self, request: Request) -> None:
        del self._by_id[request.id]
        self._paces[request.itl_slo_s] -= 1
        if not self._paces[request.itl_slo_s]:
            del self._paces[request.itl_slo_s]

    def count(self) -> int:
        return len(self._by_id)

    def paces(self) -> Mapping[float, int]:
        """How many there are of each ITL SLO."""
        return self._paces

    def tightest_s(self) -> float:
        """The least ITL SLO among them; inf: none has one."""
        return min(self._paces, default=inf)


def tokens_left(estimates: Estimates, request: Request, made: int, factor: float = 1.0) -> float:
    """Tokens that its answer is still expected to have, at ``factor`` times what was predicted, or the mean of its
    class where nobody predicted it."""
    most = request.max_output_tokens
    expected = factor * (request.predicted_tokens or estimates.expected_output[request.class_name])
    if most is not None:
        expected = min(expected, most)
    return max(expected - made, 1.0 if most is not None and made >= most else LENGTH_STEP_TOKENS)
