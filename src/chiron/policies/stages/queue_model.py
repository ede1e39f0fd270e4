"""What a pipeline of stages does under a load: time between tokens, time to the first one, and where it is short.

Sequences go through the stages in micro-batches, of which M are on their way at once; in one *round* every running
sequence gets a token. A round takes as long as one micro-batch needs for its whole way, or as the busiest replica
needs for all that pass through it, whichever is longer::

    round = max(sum of passes + hops, M / replicas * pass at the busiest stage)

A load of ``rate`` requests per second with P prompt and O output tokens keeps ``rate * O * round`` sequences running
and brings ``rate * P * round`` prompt tokens a round: a fixed point. Splitting costs, because every pass reads the
weights again, so M is what makes the round shortest, in multiples of the largest number of replicas: a micro-batch
goes one way. Waits are those of M/M/R stations (Sakasegawa's approximation) whose servers are the places for a
sequence's KV; the bottleneck's own work on prompts is added as that of M/M/1. OpScale (arXiv 2608.13499) predicts
with M/M/R per operator and the critical path; rounds and KV are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, sqrt

from chiron.core.types import PipelineKind, StageKind

TOKENS_PER_PASS = 2048
"""Most tokens of one pass: vLLM's default budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoad:
    """What a pipeline has to serve."""

    rate: float
    """Requests per second."""
    input_tokens: float
    output_tokens: float
    itl_s: float
    """What ITL and TTFT may be; inf: any."""
    ttft_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of all running sequences."""

    seconds: float
    path_s: float
    """One micro-batch's way, with hops."""
    busy_s: tuple[float, ...]
    """Work of each stage's busiest replica."""
    micro_batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A load on a pipeline with certain replicas."""

    itl_s: float
    ttft_s: float
    excess: float
    """The larger of two shares, finite where ``itl_s`` is not: of the allowed time that a round takes under all that
    would come in it, and of the places for sequences that are needed."""
    pressure: float
    """The same two, of all stages added up: it falls too where several stages are equally short."""
    kv: tuple[float, ...]
    """Share of each stage's KV that the running sequences need, more than 1 where they do not fit."""
    fits: bool


def pass_s(stage: StageKind, tokens: float, context: float = 0.0) -> float:
    """Seconds of one pass: between planned step times on a line, beyond the last as the last two go on."""
    times = stage.step_times
    assert times, "planned step times"
    extra = stage.context_token_s * context
    if len(times) == 1 or tokens <= times[0][0]:
        return times[0][1] + extra
    for at in range(1, len(times)):
        if tokens <= times[at][0] or at == len(times) - 1:
            (low, low_s), (high, high_s) = times[at - 1], times[at]
            return low_s + (high_s - low_s) * (tokens - low) / (high - low) + extra
    raise AssertionError("one of them is the last")


def round_of(
    pipeline: PipelineKind, replicas: Sequence[int], tokens: float, context: float, factors: Sequence[float]
) -> Round:
    """The shortest round for these tokens (of running sequences and prompts together), spread evenly. ``factors``:
    measured over planned time of each stage."""
    widest = max(replicas)
    most = max(widest, pipeline.micro_batches_max or 2 * len(pipeline.stages) * widest)
    best: Round | None = None
    for micro_batches in range(widest, most + 1, widest):
        if micro_batches > max(widest, tokens):
            break
        candidate = _round(pipeline, replicas, tokens, context, factors, micro_batches)
        if best is None or candidate.seconds < best.seconds:
            best = candidate
    assert best is not None
    return best


def _round(
    pipeline: PipelineKind,
    replicas: Sequence[int],
    tokens: float,
    context: float,
    factors: Sequence[float],
    micro_batches: int,
) -> Round:
    each, share = max(1.0, tokens / micro_batches), context / micro_batches
    transfer_s = each * pipeline.token_bytes / pipeline.hop_bytes_per_s
    path_s = len(pipeline.stages) * pipeline.hop_s + (len(pipeline.stages) - 1) * transfer_s
    if len(pipeline.stages) == 1:
        path_s = 0.0
    busy = []
    for stage, count, factor in zip(pipeline.stages, replicas, factors, strict=True):
        one_s = factor * pass_s(stage, each, share)
        path_s += one_s
        busy.append(max(one_s, transfer_s) * ceil(micro_batches / count))
    return Round(seconds=max(path_s, max(busy)), path_s=path_s, busy_s=tuple(busy), micro_batches=micro_batches)


def forecast(
    pipeline: PipelineKind, replicas: Sequence[int], load: StageLoad, factors: Sequence[float] | None = None
) -> Forecast:
    """What this load meets there."""
    factors = factors or [1.0] * len(pipeline.stages)
    allowed_s = min(load.itl_s, 10.0)
    idle = round_of(pipeline, replicas, 1.0, load.input_tokens, factors)
    full = _loaded(pipeline, replicas, load, factors, allowed_s)
    # What the load adds to a round grows with the round: it must not do so as fast as the round itself.
    slope = max(0.0, full.seconds - idle.seconds) / allowed_s
    room = max(1e-9, 1.0 - idle.seconds / allowed_s)
    used = slope / room
    itl_s = idle.seconds / (1.0 - slope) if slope < 1.0 else inf
    at_s = min(itl_s, allowed_s)
    running = load.rate * load.output_tokens * at_s
    need = load.input_tokens + load.output_tokens
    held = running * (load.input_tokens + 0.5 * load.output_tokens)
    kv = tuple(held / (n * s.kv_capacity_tokens) for s, n in zip(pipeline.stages, replicas, strict=True))
    places = [n * s.kv_capacity_tokens / need for s, n in zip(pipeline.stages, replicas, strict=True)]
    places = [min(p, float(n * s.max_num_seqs)) for p, s, n in zip(places, pipeline.stages, replicas, strict=True)]
    service_s = load.output_tokens * at_s
    wait_s = max(_wait_s(running, p, service_s) for p in places)
    ttft_s = at_s * (0.5 + ceil(load.input_tokens / (TOKENS_PER_PASS * full.micro_batches))) + wait_s
    ttft_s += _prompt_wait_s(pipeline, load, factors, min(used, 1.0))
    needed = [running / (0.9 * p) for p in places]
    return Forecast(
        itl_s=itl_s,
        ttft_s=ttft_s,
        excess=max(full.seconds / allowed_s, *needed),
        pressure=sum(full.busy_s) / allowed_s + full.path_s / allowed_s + sum(needed),
        kv=kv,
        fits=itl_s <= load.itl_s and ttft_s <= load.ttft_s and max(needed) <= 1.0,
    )


def _loaded(
    pipeline: PipelineKind, replicas: Sequence[int], load: StageLoad, factors: Sequence[float], round_s: float
) -> Round:
    """The round that the sequences and prompts of rounds of ``round_s`` would need."""
    running = load.rate * load.output_tokens * round_s
    tokens = running + load.rate * load.input_tokens * round_s
    context = running * (load.input_tokens + 0.5 * load.output_tokens)
    return round_of(pipeline, replicas, tokens, context, factors)


def _wait_s(offered: float, servers: float, service_s: float) -> float:
    """Mean wait of M/M/R by Sakasegawa; ``offered`` is the mean number of busy servers."""
    used = offered / servers
    if used >= 1.0:
        return inf
    return float(used ** (sqrt(2.0 * (servers + 1.0)) - 1.0)) / (servers * (1.0 - used)) * service_s


def _prompt_wait_s(pipeline: PipelineKind, load: StageLoad, factors: Sequence[float], used: float) -> float:
    """Wait of a prompt for those that came before it, at the stage that takes longest for one."""
    if used >= 1.0:
        return inf
    own_s = max(f * pass_s(s, load.input_tokens) for s, f in zip(pipeline.stages, factors, strict=True))
    return used / (1.0 - used) * own_s
