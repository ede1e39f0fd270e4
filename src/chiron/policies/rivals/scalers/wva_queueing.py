"""``wva-queueing``: llm-d's Workload Variant Autoscaler by its analyzer of queueing, which knows SLOs.

Every 15 s. A replica is a queue whose service depends on how many are in it. With n sequences, mean prompt I and mean
answer O::

    T(n)       = a + n ((p I + b O) / (O + 1) + c (I + O / 2))          seconds of a step
    prefill(n) = T(n) + (p + c) I;   decode(n) = T(n) + b + c (I + O / 2)
    mu(n)      = n / (prefill(n) + O decode(n))                         requests a second; mu(N) beyond N
    TTFT       = wait + prefill + decode, ITL = decode, at the mean n in service
    replicas   = ceil(rate / largest rate at which mean TTFT and mean ITL meet the SLO)

An HPA follows, as with the other analyzers.

Sources: llm-d/llm-d-workload-variant-autoscaler, internal/engines/analyzers (queueing model), charts. There the
parameters of a step are learned by a Kalman filter with one cost per token; here they are the learned step times, where
a prompt's token (p) and a sequence (b) differ. It was experimental, and deprecated with the rest in September 2026.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, inf
from typing import Annotated

import numpy as np

from chiron.policies.checks import above, at_least
from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model, held, mixed_plan, recent, scraped
from chiron.policies.rivals.scalers.llmd import Followed, follow
from chiron.policies.views import ClassMix, FleetPlan, FleetView, ModelPlan, ModelView, StepTimes

QUEUE_OVER_BATCH = 10
"""Places in the queue over the batch size (the code's default)."""
STEPS = 40
"""Of the bisection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WvaQueueingSettings:
    rate_window_s: Annotated[float, Between(15.0, 300.0, log=True)] = 60.0
    """Of the arrival rate (the code's default, as all but the last two)."""
    sync_s: float = 15.0
    stabilise_up_s: Annotated[float, Between(15.0, 240.0, log=True)] = 240.0
    """The HPA of the chart, as the next six."""
    stabilise_down_s: Annotated[float, Between(60.0, 900.0, log=True)] = 240.0
    up_pods: int = 10
    up_percent: float = 0.0
    up_period_s: float = 150.0
    down_pods: int = 10
    down_period_s: float = 150.0
    stale_s: float = 30.0
    """A scrape older than this is missing. Our choice."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "rate_window_s", "sync_s", "up_period_s", "down_period_s", "stale_s")
        at_least(0, self, "stabilise_up_s", "stabilise_down_s", "up_percent")
        at_least(1, self, "up_pods", "down_pods", "max_num_seqs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one model."""

    arrivals: tuple[tuple[int, int], ...] = ()
    """(second, requests) in the window."""
    followed: Followed = field(default_factory=Followed)


State = dict[str, Memory]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A queue: its step times, the mean request, and how many run at once."""

    times: StepTimes
    inputs: float
    outputs: float
    most: int

    def step_s(self, sequences: np.ndarray) -> np.ndarray:
        times = self.times
        tokens = times.per_prefill_token_s * self.inputs + times.per_sequence_s * self.outputs
        each = tokens / (self.outputs + 1.0) + times.per_context_token_s * (self.inputs + 0.5 * self.outputs)
        return times.fixed_s + each * sequences

    def prefill_s(self, sequences: np.ndarray) -> np.ndarray:
        return self.step_s(sequences) + (self.times.per_prefill_token_s + self.times.per_context_token_s) * self.inputs

    def decode_s(self, sequences: np.ndarray) -> np.ndarray:
        context = self.times.per_context_token_s * (self.inputs + 0.5 * self.outputs)
        return self.step_s(sequences) + self.times.per_sequence_s + context

    def service_per_s(self) -> np.ndarray:
        """With 1 to ``most`` sequences."""
        sequences = np.arange(1.0, self.most + 1.0)
        return sequences / (self.prefill_s(sequences) + self.outputs * self.decode_s(sequences))


def latencies(replica: Replica, rate_per_s: float) -> tuple[float, float]:
    """(mean TTFT, mean ITL) in the steady state of the M/M/1/K queue whose service depends on its state."""
    serves = replica.service_per_s()
    places = replica.most * (1 + QUEUE_OVER_BATCH)
    serves = np.concatenate([serves, np.full(places - replica.most, serves[-1])])
    logs = np.concatenate([[0.0], np.cumsum(np.log(rate_per_s) - np.log(serves))])
    shares = np.exp(logs - logs.max())
    shares /= shares.sum()
    inside = np.arange(places + 1.0)
    served = np.minimum(inside, replica.most)
    through = rate_per_s * (1.0 - shares[-1])
    wait_s = float((inside - served) @ shares / through)
    mean = np.array([max(1.0, float(served @ shares))])
    decode_s = float(replica.decode_s(mean)[0])
    return wait_s + float(replica.prefill_s(mean)[0]) + decode_s, decode_s


def largest_rate(replica: Replica, ttft_slo_s: float, itl_slo_s: float) -> float:
    """Requests a second at which both means still meet their SLO; that of one request at a time if none does."""
    serves = replica.service_per_s()
    low, high = float(serves[0]) * 1e-3, float(serves.max())
    ttft_s, itl_s = latencies(replica, low)
    if ttft_s > ttft_slo_s or itl_s > itl_slo_s:
        return float(serves[0])
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        ttft_s, itl_s = latencies(replica, middle)
        if ttft_s <= ttft_slo_s and itl_s <= itl_slo_s:
            low = middle
        else:
            high = middle
    return low


def decide_fleet(settings: WvaQueueingSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself."""
    return each_model(_decide_model, Memory, settings, state, view)


def _decide_model(
    settings: WvaQueueingSettings, memory: Memory, model: ModelView, now_s: float
) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    arrivals = recent(memory.arrivals, model, now_s - settings.rate_window_s)
    if scraped(model, settings.stale_s) is None:
        return held(model), Memory(arrivals=arrivals, followed=memory.followed)
    rate = sum(count for _, count in arrivals) / settings.rate_window_s
    used = [mix for mix in model.mixes if mix.finished] or list(model.mixes)
    most_per_s = _largest_rate(settings, model, used)
    bounds = (max(model.min_instances, 1), model.max_instances)
    wanted = min(max(ceil(rate / most_per_s), bounds[0]), bounds[1])
    count, followed = follow(settings, memory.followed, current, wanted, bounds, now_s)
    if count != current:
        reason = "rate_above_capacity" if count > current else "rate_below_capacity"
    else:
        reason = "steady" if wanted == current else "stabilise"
    numbers = {"requests_per_s": rate, "replica_per_s": most_per_s, "wanted": float(wanted)}
    return mixed_plan(count, reason, numbers), Memory(arrivals=arrivals, followed=followed)


def _largest_rate(settings: WvaQueueingSettings, model: ModelView, used: list[ClassMix]) -> float:
    weights = [float(max(1, mix.finished)) for mix in used]
    inputs, outputs = (
        max(1.0, sum(w * getattr(mix, name) for w, mix in zip(weights, used, strict=True)) / sum(weights))
        for name in ("input_tokens", "output_tokens")
    )
    by_kv = int(model.kv_capacity_tokens / (inputs + outputs))
    replica = Replica(
        times=model.step_times,
        inputs=inputs,
        outputs=outputs,
        most=max(1, min(settings.max_num_seqs, model.max_num_seqs, by_kv)),
    )
    interactive = [mix.cls for mix in used if mix.cls.interactive]
    return largest_rate(
        replica,
        min((cls.ttft_s for cls in interactive), default=inf),
        min((cls.itl_s for cls in interactive), default=inf),
    )


def make_wva_queueing(settings: WvaQueueingSettings) -> Policy:
    return Policy(
        name="wva-queueing",
        settings=settings,
        fleet=decide_fleet,
        fleet_period_s=settings.sync_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
