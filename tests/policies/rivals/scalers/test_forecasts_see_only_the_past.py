"""Forecasters against series whose next value is known, and the fleet that follows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from chiron.policies.rivals.scalers.forecast import ForecastHoltWintersSettings, ForecastSettings, decide_fleet
from chiron.policies.rivals.scalers.forecasters import Fitted, KalmanNoise, arima, holt_winters, kalman, needs
from policy_factory import arrival, fleet, fleet_of, model


def test_kalman_follows_a_line_and_smooths_what_jumps() -> None:
    line = [10.0 + 3.0 * step for step in range(40)]
    assert kalman(line, KalmanNoise()) == pytest.approx(10.0 + 3.0 * 40, rel=1e-3)
    jumps = [100.0, 0.0] * 20
    assert 20.0 < kalman(jumps, KalmanNoise(observation=1000.0)) < 80.0
    assert kalman([], KalmanNoise()) == 0.0
    assert kalman([9.0, 6.0, 3.0, 0.0], KalmanNoise()) >= 0.0


def test_few_or_equal_values_are_the_forecast_without_any_library() -> None:
    assert arima([1.0, 2.0, 3.0], 2, None) == ((3.0, 3.0), None)
    assert arima([4.0] * 20, 1, None) == ((4.0,), None)
    assert holt_winters([4.0] * 20, 3, 0) == (4.0, 4.0, 4.0)
    assert holt_winters([], 1, 0) == (0.0,)


def test_a_missing_library_is_named() -> None:
    with pytest.raises(ImportError, match=r"arima need statsmodels: pip install .chiron-serving\[forecast"):
        needs("arima", find=lambda name: None)
    with pytest.raises(ImportError, match="holt-winters need threadpoolctl"):
        needs("holt-winters", find=lambda name: None if name == "threadpoolctl" else name)
    needs("kalman", find=lambda name: None)


class Watched(list[float]):
    """A series that notes how many threads BLAS has while it is read."""

    def __init__(self, values: Iterable[float]) -> None:
        super().__init__(values)
        self.threads: set[int] = set()

    def __iter__(self) -> Iterator[float]:
        self.threads |= blas_threads()
        return super().__iter__()


def blas_threads() -> set[int]:
    return {each["num_threads"] for each in pytest.importorskip("threadpoolctl").threadpool_info()}


@pytest.mark.slow
def test_a_fit_has_one_thread_and_gives_the_others_back() -> None:
    """Matrices of three rows are multiplied thousands of times; threads that wait for each other took minutes."""
    pytest.importorskip("statsmodels")
    wave = Watched(50.0 + 20.0 * math.sin(step) for step in range(12))
    kept = Fitted(order=(1, 0, 0), parameters=(25.0, 0.5, 100.0))
    import scipy.linalg  # noqa: F401

    before = blas_threads()
    arima(wave, 1, kept)
    assert wave.threads == before | {1}
    assert blas_threads() == before


@pytest.mark.slow
def test_arima_knows_a_wave_and_keeps_its_order() -> None:
    pytest.importorskip("statsmodels")
    wave = [50.0 + 20.0 * math.sin(step / 3.0) for step in range(61)]
    (following,), kept = arima(wave[:60], 1, None)
    assert following == pytest.approx(wave[60], abs=1.5)
    assert kept is not None
    (_, again), later = arima(wave, 2, kept)
    assert again == pytest.approx(50.0 + 20.0 * math.sin(62 / 3.0), abs=3.0)
    assert later is not None
    assert later.order == kept.order


@pytest.mark.slow
def test_the_unit_of_a_series_changes_no_order() -> None:
    """Orders that are differenced and those that are not are not compared by their AIC: each difference takes an
    observation of the likelihood, which weighs more the larger the numbers are."""
    pytest.importorskip("statsmodels")
    noise = [
        1.0,
        -2.0,
        0.5,
        1.5,
        -1.0,
        0.0,
        2.0,
        -0.5,
        -1.5,
        1.0,
        0.5,
        -1.0,
        1.2,
        -0.8,
        0.3,
        -1.1,
        0.9,
        -0.2,
        1.4,
        -1.3,
    ]
    orders = set()
    for unit in (1.0, 1000.0):
        level = [unit * (20.0 + each) for each in noise]
        _, kept = arima(level, 1, None)
        assert kept is not None
        orders.add((kept.order[1], kept.logarithm))
    assert {differences for differences, _ in orders} == {0}


@pytest.mark.slow
def test_holt_winters_knows_a_season_once_it_has_seen_two() -> None:
    pytest.importorskip("statsmodels")
    season = [10.0, 10.0, 10.0, 50.0, 10.0, 10.0]
    assert holt_winters(season * 4 + season[:3], 1, 6)[0] == pytest.approx(50.0, abs=5.0)
    assert holt_winters(season * 4 + season[:3], 1, 0)[0] < 30.0


def counts(settings: ForecastSettings, rates: list[int]) -> list[int]:
    """Plans of decisions a minute apart with so many requests a second each."""
    state, made, current = None, [], 2
    for number, rate in enumerate([0, *rates]):
        now_s = 1000.0 + 60.0 * number
        seconds: Any = range(int(now_s) - 60, int(now_s)) if number else ()
        one = model(fleet_of(current), arrivals=tuple(arrival(second, rate) for second in seconds if rate))
        decided, state = decide_fleet(settings, state, fleet(one, now_s=now_s))
        current = decided["llama"].counts["mixed"]
        made.append(current)
    return made[1:]


@pytest.mark.parametrize("settings", [ForecastSettings(), ForecastHoltWintersSettings()], ids=["arima", "holt-winters"])
def test_a_steady_load_gets_what_it_needs_and_none_the_least(settings: ForecastSettings) -> None:
    low, high = counts(settings, [20] * 4), counts(settings, [60] * 4)
    assert len(set(low)) == len(set(high)) == 1
    assert high[0] == pytest.approx(3 * low[0], abs=2)
    assert counts(settings, [0] * 3) == [1, 1, 1]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"season_s is 60\.0; it must be 0 or at least two periods"):
        ForecastSettings(season_s=60.0)
