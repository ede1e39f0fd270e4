"""``forecast-arima``, ``forecast-holt-winters``: a fleet for the load that a textbook forecaster expects.

Every minute, on the work that has arrived in each minute so far (seconds that it takes a fleet, prompts and answers at
their learned lengths)::

    instances = ceil(most of the forecast from now until one planned now is up, and a period more
                     / (what one instance does in a period within its SLOs * utilisation))

What people build from ARIMA or Holt-Winters in front of a Deployment; the parts are statsmodels' (extra ``forecast``).
It is fitted on the past only. Papers that forecast load for serving publish forecasters without a rule for the fleet
(LSTM and SARIMA for clusters, 2020) or one of their own (SageServe), so the rule is ours, with the step times that
``chiron`` learns, too: it is told more than such scalers usually are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Annotated, Any, Literal, Protocol

from chiron.core.kept import Kept
from chiron.core.types import RequestClass
from chiron.policies.capacity import arrivals_s, capacity
from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model, mixed_plan, within_bounds
from chiron.policies.rivals.scalers.forecasters import arima, holt_winters, needs
from chiron.policies.rivals.scalers.past import fitted_of, of_fitted, of_period, read_by, series, told_by
from chiron.policies.views import FleetPlan, FleetView, ModelPlan, ModelView

MOST_VALUES = 1440
"""Of the series that is remembered: a day of minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastSettings:
    method: Literal["arima", "holt-winters"] = "arima"
    period_s: Annotated[float, Between(15.0, 300.0, log=True)] = 60.0
    """Of a value of the series, and between decisions. Ours, as all that follow but the last."""
    season_s: float = 0.0
    """Of Holt-Winters; 0: none. It counts once two of them have been seen."""
    utilisation: Annotated[float, Between(0.2, 1.0)] = 0.8
    """Share of an instance's capacity that the forecast may take."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        if not self.period_s > 0:
            raise ValueError(f"period_s is {self.period_s}; it must be above 0")
        if not (self.season_s == 0 or self.season_s >= 2 * self.period_s):
            raise ValueError(f"season_s is {self.season_s}; it must be 0 or at least two periods")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation is {self.utilisation}; it must be above 0 and at most 1")
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs is {self.max_num_seqs}; it must be 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastHoltWintersSettings(ForecastSettings):
    """By Holt-Winters."""

    method: Literal["arima", "holt-winters"] = "holt-winters"


class FleetRule(Protocol):
    """What the plan takes from the settings of a forecaster."""

    @property
    def period_s(self) -> float: ...
    @property
    def utilisation(self) -> float: ...
    @property
    def max_num_seqs(self) -> int: ...


Forecaster = Callable[[Sequence[float], int, Any], tuple[tuple[float, ...], Any]]
"""(values so far, steps, what was kept) to (so many values, what is kept)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one model."""

    series: tuple[float, ...] = ()
    """Seconds of work that arrived, by period."""
    fitted: Any = None
    """What the forecaster keeps."""


State = dict[str, Memory | None]


def decide_fleet(settings: ForecastSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself."""
    return each_model(_decide_model, lambda: None, settings, state, view)


def _decide_model(
    settings: ForecastSettings, memory: Memory | None, model: ModelView, now_s: float
) -> tuple[ModelPlan, Memory | None]:
    def forecast(series: Sequence[float], steps: int, fitted: Any) -> tuple[tuple[float, ...], Any]:
        if settings.method == "arima":
            return arima(series, steps, fitted)
        return holt_winters(series, steps, round(settings.season_s / settings.period_s)), fitted

    return follow(settings, forecast, memory, model)


def follow(
    settings: FleetRule, forecaster: Forecaster, memory: Memory | None, model: ModelView
) -> tuple[ModelPlan, Memory | None]:
    """The plan for what this forecaster expects."""
    current = sum(model.planned.values())
    if memory is None:  # The first period begins.
        return mixed_plan(within_bounds(model, current), "first_period"), Memory()
    outputs = {mix.cls.name: mix.output_tokens for mix in model.mixes}
    new = [arrival for arrival in model.arrivals if arrival.requests > 0]
    work = sum(arrivals_s(model.step_times, arrival, outputs[arrival.cls.name]) for arrival in new)
    series = (*memory.series, work)[-MOST_VALUES:]
    forecast, fitted = forecaster(series, 1 + ceil(model.cold_start_s / settings.period_s), memory.fitted)
    each = _work_in_a_period(settings, model)
    count = within_bounds(model, ceil(max(forecast) / each))
    reason = "forecast_above" if count > current else "forecast_below" if count < current else "steady"
    numbers = {"work": work, "forecast": max(forecast), "each": each}
    return mixed_plan(count, reason, numbers), replace(memory, series=series, fitted=fitted)


def _work_in_a_period(settings: FleetRule, model: ModelView) -> float:
    used = [mix for mix in model.mixes if mix.finished] or list(model.mixes)
    carried = capacity(
        model.step_times,
        [(float(max(1, mix.finished)), mix) for mix in used],
        itl_target_s=min((mix.cls.itl_s for mix in used if mix.cls.interactive), default=inf),
        kv_capacity_tokens=model.kv_capacity_tokens,
        max_num_seqs=min(model.max_num_seqs, settings.max_num_seqs),
    )
    return max(1e-9, carried.work_rate * settings.period_s * settings.utilisation)


def told_series(settings: FleetRule, memory: Memory, fitted: Mapping[str, Any]) -> dict[str, Any]:
    """The series, and what was fitted to it, for the next run."""
    return {"period_s": settings.period_s, "series": list(memory.series), "fitted": fitted}


def read_series(settings: FleetRule, kept: Kept, fitted: Callable[[Kept], Any]) -> Memory | None:
    """None: there is none of this period, and a first period begins."""
    if not of_period(kept, "period_s", settings.period_s):
        return None
    return Memory(series=series(kept, "series", MOST_VALUES), fitted=fitted(kept.part("fitted")))


def _told(settings: ForecastSettings, memory: Memory, now_s: float) -> dict[str, Any]:
    return told_series(settings, memory, of_fitted(memory.fitted))


def _read(settings: ForecastSettings, kept: Kept, classes: Sequence[RequestClass], now_s: float) -> Memory | None:
    return read_series(settings, kept, fitted_of)


def make_forecast(settings: ForecastSettings) -> Policy:
    """Raises ImportError where the forecaster's library is not installed."""
    needs(settings.method)
    return Policy(
        name=f"forecast-{settings.method}",
        settings=settings,
        fleet=decide_fleet,
        learned=told_by(_told),
        restore=read_by(_read),
        fleet_period_s=settings.period_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
