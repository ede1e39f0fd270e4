"""How many micro-batches the sequences of a pipeline go in.

M is what makes a round, in which each sequence gets a token, shortest: with b sequences in each micro-batch, a step of
stage k takes ``a_k + c_k b``, by a line through what was measured, and a round ::

    max(sum over stages of (a_k + c_k b + hop), max over stages of ceil(M / replicas_k) (a_k + c_k b))

More micro-batches keep more stages busy; fewer pay the fixed part of a step less often. Where sequences are more than
a stage takes in one step, M is at least what that needs.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Of one stage, for choosing M."""

    fixed_s: float
    sequence_s: float
    hop_s: float
    replicas: int


def micro_batches(stages: SequenceOf[StageTimes], sequences: int, step_max: int) -> int:
    """How many make a round shortest; of equals the fewest."""
    if sequences < 1 or not stages:
        return 1
    widest = max(stage.replicas for stage in stages)
    least = ceil(sequences / max(1, step_max))
    best, best_s = least, None
    most = max(least, min(sequences, 2 * len(stages) + 2 * widest))
    # A micro-batch goes one way through the stage with most replicas: in multiples of those all of them have work.
    counts = [count for count in range(least, most + 1) if count % widest == 0] or range(least, most + 1)
    for count in counts:
        each = ceil(sequences / count)
        steps = [stage.fixed_s + stage.sequence_s * each for stage in stages]
        way_s = sum(steps) + sum(stage.hop_s for stage in stages)
        busy_s = max(step * ceil(count / stage.replicas) for step, stage in zip(steps, stages, strict=True))
        round_s = max(way_s, busy_s)
        # Noise in what is measured must not change it all the time.
        if best_s is None or round_s < 0.98 * best_s:
            best, best_s = count, round_s
    return best
