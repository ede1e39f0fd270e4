"""``dynamo-planner``: NVIDIA Dynamo's SLA planner, with replicas that prefill and decode (its mode ``agg``).

Every 180 s, by throughput::

    forecast of the next interval: requests, prompt and answer tokens
    replicas = max(ceil(requests / interval / requests a second of one engine within the SLA), min_endpoint)

With ``load`` also every 5 s, and never below what throughput asked for::

    all engines' estimated TTFT, or all engines' estimated ITL, above the SLA  : one more
    with the load of N on N - 1, every engine has a queue's part of TTFT below (SLA - own) * 0.8, ITL below SLA * 0.8
    and room in its KV                                                         : one less
    while what was planned is not ready                                        : nothing

Sources: ai-dynamo/dynamo, components/src/dynamo/planner (config/defaults.py, core/throughput_scaling.py,
core/load_scaling.py, core/load/predictors.py). What an engine does within the SLA, and what a step costs, Dynamo takes
from a profile or fits by regression; here both come from the learned step times. Its SLA is one pair, 500 ms and 50 ms
unless it is configured; here it is the tightest of the classes that are used. The GPU budget is the model's bound.
Requests go to the instance with the fewest, where Dynamo's router looks at KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Annotated, Any

from chiron.core.kept import Kept
from chiron.core.types import RequestClass
from chiron.policies.capacity import capacity, prefill_s, work_s
from chiron.policies.checks import above, at_least
from chiron.policies.policy import Policy
from chiron.policies.ranges import AnyOf, Between
from chiron.policies.rivals.scalers.each_model import each_model, mixed_plan, within_bounds
from chiron.policies.rivals.scalers.forecasters import Fitted, KalmanNoise, Method, arima, holt_winters, kalman, needs
from chiron.policies.rivals.scalers.past import MOST, fitted_of, of_fitted, of_period, read_by, series, told_by
from chiron.policies.views import ClassMix, FleetPlan, FleetView, InstanceView, ModelPlan, ModelView

MOST_VALUES = 500
"""Of a series that is remembered. Ours; Dynamo keeps all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamoSettings:
    predictor: Method = "arima"
    """Forecaster of each series (Dynamo's default, as all but the last two; it has no holt-winters)."""
    interval_s: Annotated[float, Between(30.0, 300.0, log=True)] = 180.0
    """Between decisions by throughput."""
    kalman_level: float = 1.0
    kalman_trend: float = 0.1
    kalman_observation: float = 10.0
    min_endpoint: int = 1
    load: Annotated[bool, AnyOf((True, False))] = False
    """Decides by load, too."""
    load_interval_s: float = 5.0
    load_sensitivity: Annotated[float, Between(0.4, 1.0)] = 0.8
    """Share of the SLA that is left to a fleet of one less."""
    stale_s: float = 30.0
    """With ``load``, nothing is decided by a scrape older than this. Our choice."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "interval_s", "load_interval_s", "stale_s")
        above(0, self, "kalman_level", "kalman_trend", "kalman_observation")
        at_least(1, self, "min_endpoint", "max_num_seqs")
        if not 0 < self.load_sensitivity <= 1:
            raise ValueError(f"load_sensitivity is {self.load_sensitivity}; it must be above 0 and at most 1")
        if self.load_interval_s > self.interval_s:
            raise ValueError(
                f"load_interval_s is {self.load_interval_s}; it must be at most interval_s ({self.interval_s})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """What has come since the last decision by throughput."""

    requests: float = 0.0
    input_tokens: float = 0.0
    input_square: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the planner remembers of one model."""

    since: Interval = Interval()
    next_s: float = -inf
    """When the next decision by throughput is due."""
    requests: tuple[float, ...] = ()
    """By interval, from the first that had any; as the next two."""
    inputs: tuple[float, ...] = ()
    outputs: tuple[float, ...] = ()
    fitted: tuple[Fitted | None, ...] = (None, None, None)
    floor: int = 0
    """What throughput asked for."""


State = dict[str, Memory]


def replicas(settings: DynamoSettings, demand_per_s: float, engine_per_s: float) -> int:
    return max(ceil(demand_per_s / engine_per_s), settings.min_endpoint)


def decide_fleet(settings: DynamoSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself."""
    return each_model(decide_model, Memory, settings, state, view)


def decide_model(settings: DynamoSettings, memory: Memory, model: ModelView, now_s: float) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    memory = replace(memory, since=_counted(memory.since, model))
    if memory.next_s == -inf:
        begun = replace(memory, since=Interval(), next_s=now_s + settings.interval_s)
        return mixed_plan(within_bounds(model, current), "first_interval"), begun
    numbers: dict[str, float] = {}
    wanted, reason = current, "between_decisions"
    if now_s >= memory.next_s - 1e-6:
        memory, numbers = _by_throughput(settings, memory, model, now_s)
        if not settings.load and memory.floor:
            wanted, reason = memory.floor, "forecast"
    if settings.load:
        change, seen = _by_load(settings, model, current)
        wanted, reason = current + change, "latency" if change else "steady"
        if wanted < memory.floor:
            wanted, reason = memory.floor, "forecast"
        numbers = {**numbers, **seen}
    count = within_bounds(model, max(wanted, settings.min_endpoint))
    return mixed_plan(count, reason, {**numbers, "floor": float(memory.floor)}), memory


def _counted(since: Interval, model: ModelView) -> Interval:
    """Requests as they came: what was refused or taken back later is negative, and was demand all the same."""
    new = [arrival for arrival in model.arrivals if arrival.requests > 0]
    return Interval(
        requests=since.requests + sum(arrival.requests for arrival in new),
        input_tokens=since.input_tokens + sum(arrival.input_tokens for arrival in new),
        input_square=since.input_square + sum(arrival.input_square for arrival in new),
    )


def _by_throughput(
    settings: DynamoSettings, memory: Memory, model: ModelView, now_s: float
) -> tuple[Memory, dict[str, float]]:
    since = memory.since
    memory = replace(memory, since=Interval(), next_s=now_s + settings.interval_s)
    if not memory.requests and not since.requests:
        return memory, {}  # The idle beginning is no part of the series.
    inputs = since.input_tokens / since.requests if since.requests else memory.inputs[-1]
    outputs = _mean_output(model)
    series = [
        (*memory.requests, since.requests)[-MOST_VALUES:],
        (*memory.inputs, inputs)[-MOST_VALUES:],
        (*memory.outputs, outputs)[-MOST_VALUES:],
    ]
    forecasts, fitted = [], []
    for values, kept in zip(series, memory.fitted, strict=True):
        forecast, keeps = _next(settings, values, kept)
        forecasts.append(forecast)
        fitted.append(keeps)
    spread = since.input_square * since.requests / since.input_tokens**2 if since.input_tokens else 1.0
    rate = _engine_per_s(model, max(1.0, forecasts[1]), spread, max(1.0, forecasts[2]))
    demand = forecasts[0] / settings.interval_s
    numbers = {"requests_per_s": demand, "engine_per_s": rate, "input": forecasts[1], "output": forecasts[2]}
    memory = replace(memory, requests=series[0], inputs=series[1], outputs=series[2], fitted=tuple(fitted))
    return replace(memory, floor=replicas(settings, demand, rate)), numbers


def _next(settings: DynamoSettings, series: Sequence[float], kept: Fitted | None) -> tuple[float, Fitted | None]:
    if settings.predictor == "arima":
        values, kept = arima(series, 1, kept)
        return values[0], kept
    if settings.predictor == "holt-winters":
        return holt_winters(series, 1, 0)[0], None
    if settings.predictor == "kalman":
        noise = KalmanNoise(
            level=settings.kalman_level, trend=settings.kalman_trend, observation=settings.kalman_observation
        )
        return kalman(series, noise), None
    return series[-1], None


def _engine_per_s(model: ModelView, inputs: float, spread: float, outputs: float) -> float:
    """Requests of these lengths that one engine serves in a second within the SLA."""
    used = _used(model)
    mix = replace(used[0], input_tokens=inputs, input_square=spread * inputs * inputs, output_tokens=outputs)
    carried = capacity(
        model.step_times,
        [(1.0, mix)],
        itl_target_s=min((each.cls.itl_s for each in used if each.cls.interactive), default=inf),
        kv_capacity_tokens=model.kv_capacity_tokens,
        max_num_seqs=model.max_num_seqs,
    )
    return carried.work_rate / max(work_s(model.step_times, mix), 1e-9)


def _used(model: ModelView) -> list[ClassMix]:
    return [mix for mix in model.mixes if mix.finished] or list(model.mixes)


def _mean_output(model: ModelView) -> float:
    used = _used(model)
    weights = [max(1, mix.finished) for mix in used]
    return sum(w * mix.output_tokens for w, mix in zip(weights, used, strict=True)) / sum(weights)


def _by_load(settings: DynamoSettings, model: ModelView, current: int) -> tuple[int, dict[str, float]]:
    ready = [i for i in model.instances if i.state == "ready" and i.sample_age_s <= settings.stale_s]
    interactive = [mix for mix in _used(model) if mix.cls.interactive]
    if len(ready) != current or not ready or not interactive:
        return 0, {}
    ttft_slo_s = min(mix.cls.ttft_s for mix in interactive)
    itl_slo_s = min(mix.cls.itl_s for mix in interactive)
    mix = min(interactive, key=lambda each: each.cls.ttft_s)
    ttfts = [_ttft_s(model, mix, one, 1.0) for one in ready]
    itls = [_itl_s(model, one, 1.0) for one in ready]
    numbers = {"ttft_s": max(ttfts), "itl_s": max(itls)}
    if min(ttfts) > ttft_slo_s or min(itls) > itl_slo_s:
        return 1, numbers
    if len(ready) == 1:
        return 0, numbers
    factor = len(ready) / (len(ready) - 1)
    own_s = prefill_s(model.step_times, mix.input_tokens, mix.input_square)
    room_s = (ttft_slo_s - own_s) * settings.load_sensitivity
    safe = all(
        _ttft_s(model, mix, one, factor) - own_s < room_s
        and _itl_s(model, one, factor) < itl_slo_s * settings.load_sensitivity
        and (one.kv_used_tokens + one.waiting_tokens) * factor < one.kv_capacity_tokens
        for one in ready
    )
    return (-1 if safe and room_s > 0 else 0), numbers


def _ttft_s(model: ModelView, mix: ClassMix, one: InstanceView, factor: float) -> float:
    """Of the next request, with so many times the load."""
    waiting = factor * one.waiting_tokens
    return prefill_s(model.step_times, waiting, 0.0) + prefill_s(model.step_times, mix.input_tokens, mix.input_square)


def _itl_s(model: ModelView, one: InstanceView, factor: float) -> float:
    times = model.step_times
    sequences = factor * (one.running + one.waiting)
    context = factor * (one.kv_used_tokens + one.waiting_tokens)
    return times.fixed_s + times.per_sequence_s * sequences + times.per_context_token_s * context


def told(settings: DynamoSettings, memory: Memory, now_s: float) -> dict[str, Any]:
    """The series, what was fitted to them, the interval under way, and what the last decision asked for."""
    since = memory.since
    return {
        "interval_s": settings.interval_s,
        "requests": list(memory.requests),
        "inputs": list(memory.inputs),
        "outputs": list(memory.outputs),
        "fitted": {str(place): of_fitted(fitted) for place, fitted in enumerate(memory.fitted)},
        "since": [since.requests, since.input_tokens, since.input_square],
        "next_in_s": max(0.0, memory.next_s - now_s),
        "floor": memory.floor,
    }


def read(settings: DynamoSettings, kept: Kept, classes: Sequence[RequestClass], now_s: float) -> Memory | None:
    """None: there is nothing of this interval, and a first one begins."""
    if not of_period(kept, "interval_s", settings.interval_s):
        return None
    requests, inputs, outputs = (series(kept, name, MOST_VALUES) for name in ("requests", "inputs", "outputs"))
    if not len(requests) == len(inputs) == len(outputs):
        kept.drop("its three series are not of one length", "requests")
        return None
    next_in_s = kept.number("next_in_s", 0.0, settings.interval_s)
    since = kept.numbers("since", 0.0, MOST, least=3, most=3)
    if next_in_s is None or since is None:
        next_in_s, since = settings.interval_s, [0.0, 0.0, 0.0]
    fitted = kept.part("fitted")
    return Memory(
        since=Interval(requests=since[0], input_tokens=since[1], input_square=since[2]),
        next_s=now_s + next_in_s,
        requests=requests,
        inputs=inputs,
        outputs=outputs,
        fitted=tuple(fitted_of(fitted.part(str(place))) for place in range(3)),
        floor=kept.whole("floor", 0, 10**6) or 0,
    )


def make_dynamo(settings: DynamoSettings) -> Policy:
    """Raises ImportError where the forecaster's library is not installed."""
    needs(settings.predictor)
    return Policy(
        name="dynamo-planner",
        settings=settings,
        fleet=decide_fleet,
        learned=told_by(told),
        restore=read_by(read),
        fleet_period_s=settings.load_interval_s if settings.load else settings.interval_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
