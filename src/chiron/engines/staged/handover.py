"""KV of a sequence that goes from one replica of a stage to another, by way of the head.

It is handed over in parts, so that steps and pings come between. The other way to empty a replica is to compute the KV
again on another one, which takes the stages before it as well: they have to make its input. Which of the two is quicker
is estimated for each sequence from what was measured: bytes of KV and the wires' speed against seconds of each token of
a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from chiron.engines.staged.messages import MOVE_BYTES

if TYPE_CHECKING:
    from chiron.engines.staged.replica import Replica, ReplicaFigures
    from chiron.engines.staged.sequence import Sequence

BYTES_PER_S = 500e6
"""Of KV on a wire, until some was timed."""
_TIMED_MIN_BYTES = 1 << 16
"""Of less it is the messages that are timed."""
_SMOOTH = 0.2


@dataclass(slots=True, kw_only=True, eq=False)
class Handover:
    """Of one sequence."""

    sequence: Sequence
    source: Replica
    target: Replica
    length: int
    """Tokens."""
    part: int
    """Tokens in one message."""
    token_bytes: int
    until_s: float
    """It is given up then."""
    at: int = 0
    """So many tokens are kept by the target."""
    asked_s: float = 0.0
    over: bool = False

    @property
    def stage(self) -> int:
        return self.source.stage

    @property
    def end(self) -> int:
        """Of the part that is under way."""
        return min(self.length, self.at + self.part)

    @property
    def part_bytes(self) -> int:
        return (self.end - self.at) * self.token_bytes

    @property
    def steps_s(self) -> float:
        """It waits for a step of either replica."""
        return self.source.figures.step_s + self.target.figures.step_s

    def seconds(self, bytes_per_s: float) -> float:
        """What it is estimated to take."""
        return 2 * self.length * self.token_bytes / bytes_per_s + ceil(self.length / self.part) * self.steps_s

    def measured(self, bytes_per_s: float, took_s: float) -> float:
        """The wires' speed, after a part took so long there and back."""
        if self.part_bytes < _TIMED_MIN_BYTES:
            return bytes_per_s
        moving_s = max(1e-6, took_s - self.steps_s, took_s / 4)
        return bytes_per_s + _SMOOTH * (2 * self.part_bytes / moving_s - bytes_per_s)


def part_tokens(token_bytes: int) -> int:
    """In one message."""
    return max(1, MOVE_BYTES // token_bytes)


def replay_s(stages: SequenceOf[SequenceOf[ReplicaFigures]], tokens: int, chunk: int) -> float:
    """What computing the KV of so many tokens again is estimated to take: all these stages compute them."""
    total_s = 0.0
    for figures in stages:
        known = [each for each in figures if each.calls]
        for each in known:
            one_s = tokens * (each.token_s or each.step_s) + ceil(tokens / chunk) * (each.hop_s + each.waited_s)
            total_s += one_s / len(known)
    return total_s
