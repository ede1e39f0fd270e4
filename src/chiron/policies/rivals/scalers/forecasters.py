"""What comes next in a series, from its past alone: for rivals that scale on forecasts.

``constant`` and ``kalman`` are a few lines; ``arima`` and ``holt-winters`` are statsmodels' (extra ``forecast``). A
forecaster sees the values so far and what it kept from the last time, and nothing else; what cannot be fitted is the
last value. Matrices of a fit have a few rows, and BLAS gets one thread for them: threads that meet after each of
thousands of them wait for each other, on busy cores nearly all the time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from math import expm1, isfinite, log1p
from typing import Any, Literal

Method = Literal["constant", "kalman", "arima", "holt-winters"]
LIBRARIES = {
    "arima": ("statsmodels", "threadpoolctl"),
    "holt-winters": ("statsmodels", "threadpoolctl"),
    "lstm": ("torch",),
}
FEWEST = 5
"""Values that a model needs (Dynamo's); before that the last one is the forecast."""
_ORDERS = [(p, q) for p in range(3) for q in range(3)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What ARIMA keeps: its order, chosen once, and the parameters from which the next fit starts."""

    order: tuple[int, int, int]
    parameters: tuple[float, ...]
    logarithm: bool = False
    """Of log(1 + value)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KalmanNoise:
    """Of a local linear trend: variances of level, trend and observation."""

    level: float = 1.0
    trend: float = 0.1
    observation: float = 10.0


def needs(method: str, find: Callable[[str], object] = find_spec) -> None:
    """Raises ImportError where a method needs a library that is not installed."""
    extra = "lstm" if method == "lstm" else "forecast"
    for library in LIBRARIES.get(method, ()):
        if find(library) is None:
            raise ImportError(f"forecasts by {method} need {library}: pip install 'chiron-serving[{extra}]'")


def one_thread() -> AbstractContextManager[object]:
    """Within it, BLAS works in the thread that calls it."""
    context: AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return context


@cache
def _libraries() -> Any:
    """Those with threads that are loaded. Made once: it looks through all that the process has loaded."""
    import scipy.linalg  # noqa: F401  Its BLAS is another than numpy's.
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def kalman(series: Sequence[float], noise: KalmanNoise) -> float:
    """One step ahead of a local linear trend; never below 0."""
    if not series:
        return 0.0
    level, trend = series[0], 0.0
    # Covariance of (level, trend); nothing is known of either at first.
    ll, lt, tt = 1000.0, 0.0, 1000.0
    for value in series[1:]:
        level += trend
        ll, lt, tt = ll + 2.0 * lt + tt + noise.level, lt + tt, tt + noise.trend
        gain_level, gain_trend = ll / (ll + noise.observation), lt / (ll + noise.observation)
        error = value - level
        level, trend = level + gain_level * error, trend + gain_trend * error
        ll, lt, tt = ll * (1.0 - gain_level), lt * (1.0 - gain_level), tt - gain_trend * lt
    return max(0.0, level + trend)


def arima(series: Sequence[float], steps: int, kept: Fitted | None) -> tuple[tuple[float, ...], Fitted | None]:
    """So many steps ahead. The order is chosen once, when there are enough values: differenced once where the KPSS
    test, as pmdarima has it, sees no fixed level, then p and q up to 2 of least AIC; where that leaves neither, again
    on log(1 + value), as Dynamo does. Later the parameters are fitted anew from where they were."""
    last = series[-1] if series else 0.0
    if len(series) < FEWEST or len(set(series)) == 1:
        return (last,) * steps, kept
    with one_thread():
        return _arima(series, steps, kept)


def _arima(series: Sequence[float], steps: int, kept: Fitted | None) -> tuple[tuple[float, ...], Fitted | None]:
    last = series[-1]
    if kept is None:
        kept = _chosen(series, logarithm=False)
        if kept is None or (kept.order[0] == 0 and kept.order[2] == 0):
            kept = _chosen(series, logarithm=True) or kept
        if kept is None:
            return (last,) * steps, None
    try:
        model = _model(_scaled(series, kept.logarithm), kept.order)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = model.fit(start_params=list(kept.parameters), disp=0, maxiter=10)
        values = tuple(float(value) for value in result.forecast(steps))
        kept = replace(kept, parameters=tuple(float(each) for each in result.params))
    except (ValueError, ArithmeticError, _linalg_error()):
        return (last,) * steps, kept
    if kept.logarithm:
        # Beyond this the exponential is no forecast.
        most = 10.0 * max(series)
        values = tuple(min(most, expm1(min(value, 700.0))) for value in values)
    return _usable(values, last), kept


def _chosen(series: Sequence[float], *, logarithm: bool) -> Fitted | None:
    values = _scaled(series, logarithm)
    differences = _differences(values)
    fits = [(*_aic(values, (p, differences, q)), (p, differences, q)) for p, q in _ORDERS]
    aic, parameters, order = min(fits, key=lambda fit: fit[0])
    return Fitted(order=order, parameters=parameters, logarithm=logarithm) if isfinite(aic) else None


def _scaled(series: Sequence[float], logarithm: bool) -> list[float]:
    return [log1p(value) for value in series] if logarithm else list(series)


def _differences(values: Sequence[float]) -> int:
    """1 where the series is not stationary around a level, by the KPSS test at 5 %."""
    from statsmodels.tsa.stattools import kpss

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            share = float(kpss(list(values), regression="c", nlags="auto")[1])
    except (ValueError, ArithmeticError, _linalg_error()):
        return 0
    return int(share < 0.05)


def _aic(series: Sequence[float], order: tuple[int, int, int]) -> tuple[float, tuple[float, ...]]:
    """Compared only among orders of one number of differences: each takes an observation of the likelihood."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = _model(series, order).fit(disp=0, maxiter=50)
    except (ValueError, ArithmeticError, _linalg_error()):
        return float("inf"), ()
    aic = float(result.aic)
    return (aic if isfinite(aic) else float("inf")), tuple(float(each) for each in result.params)


def _model(series: Sequence[float], order: tuple[int, int, int]) -> Any:
    from statsmodels.tsa.statespace.sarimax import SARIMAX

    return SARIMAX(list(series), order=order, trend="c" if order[1] == 0 else None)


def _linalg_error() -> type[Exception]:
    from numpy.linalg import LinAlgError

    return LinAlgError


def holt_winters(series: Sequence[float], steps: int, season: int) -> tuple[float, ...]:
    """So many steps ahead: damped trend and, with a season of that many values of which two were seen, that."""
    last = series[-1] if series else 0.0
    seasonal = season >= 2 and len(series) >= 2 * season
    if len(series) < max(FEWEST, 10) or len(set(series)) == 1:
        return (last,) * steps
    from statsmodels.tsa.holtwinters import ExponentialSmoothing

    try:
        with warnings.catch_warnings(), one_thread():
            warnings.simplefilter("ignore")
            model = ExponentialSmoothing(
                list(series),
                trend="add",
                damped_trend=True,
                seasonal="add" if seasonal else None,
                seasonal_periods=season if seasonal else None,
            )
            values = tuple(float(value) for value in model.fit().forecast(steps))
    except (ValueError, ArithmeticError, _linalg_error()):
        return (last,) * steps
    return _usable(values, last)


def _usable(values: tuple[float, ...], last: float) -> tuple[float, ...]:
    return tuple(max(0.0, value) if isfinite(value) else last for value in values)
