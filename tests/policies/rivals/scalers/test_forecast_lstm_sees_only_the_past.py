"""The LSTM's forecasts: of a known wave, the same each time, from the past alone, and of bounded cost."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from chiron.policies.rivals.scalers.forecast_lstm import LstmSettings, Network, decide_fleet, lstm
from chiron.policies.rivals.scalers.forecasters import needs
from policy_factory import arrival, fleet, fleet_of, model

SETTINGS = LstmSettings()
QUICK = replace(SETTINGS, steps=1)
WAVE = [50.0 + 20.0 * math.sin(step / 3.0) for step in range(240)]


def test_the_defaults_are_those_of_the_notebooks() -> None:
    assert (SETTINGS.values, SETTINGS.ahead, SETTINGS.hidden) == (6, 3, 10)
    assert (SETTINGS.epochs, SETTINGS.batch, SETTINGS.learning_rate) == (20, 100, 0.01)
    examples = 30 * 24 * 3 * 4 // 5 - SETTINGS.values - SETTINGS.ahead + 1  # Four fifths of 30 days of 20 minutes.
    assert SETTINGS.steps == SETTINGS.epochs * math.ceil(examples / SETTINGS.batch)


def test_few_or_equal_values_are_the_forecast_without_torch() -> None:
    assert lstm(SETTINGS, [], 2, None) == ((0.0, 0.0), None)
    assert lstm(SETTINGS, list(range(12)), 2, None) == ((11.0, 11.0), None)
    assert lstm(SETTINGS, [4.0] * 100, 3, None) == ((4.0, 4.0, 4.0), None)


def test_a_missing_torch_is_named_with_the_extra_that_has_it() -> None:
    with pytest.raises(ImportError, match=r"forecasts by lstm need torch: pip install .chiron-serving\[lstm"):
        needs("lstm", find=lambda name: None)


def test_the_first_minutes_follow_the_last_value() -> None:
    state, counts = None, []
    for number, rate in enumerate([0, 20, 60, 60]):
        now_s = 1000.0 + 60.0 * number
        seconds = range(int(now_s) - 60, int(now_s)) if rate else range(0)
        one = model(fleet_of(2), arrivals=tuple(arrival(second, rate) for second in seconds))
        decided, state = decide_fleet(SETTINGS, state, fleet(one, now_s=now_s))
        counts.append(decided["llama"].counts["mixed"])
    assert counts[0] == 2
    assert counts[2] == counts[3] == pytest.approx(3 * counts[1], abs=2)


@pytest.mark.slow
def test_it_knows_a_wave_by_its_past_alone_and_says_the_same_each_time() -> None:
    pytest.importorskip("torch")
    past, following = WAVE[:95], WAVE[95:100]
    values, network = lstm(SETTINGS, past, 5, None)
    assert values[:3] == pytest.approx(following[:3], abs=3.0)
    assert max(abs(value - past[-1]) for value in following[:3]) > 6.0  # The last value would not have done.
    assert len(values) == 5
    assert lstm(SETTINGS, past, 5, None) == (values, network)


@pytest.mark.slow
def test_it_is_fitted_anew_after_so_many_periods_and_not_before() -> None:
    pytest.importorskip("torch")
    kept: Network | None = None
    weights = []
    for count in range(40, 40 + 12):
        _, kept = lstm(QUICK, WAVE[:count], 1, kept)
        assert kept is not None
        weights.append(kept.weights)
    assert [a == b for a, b in pairwise(weights)] == [True] * 9 + [False] + [True]


@pytest.mark.slow
def test_what_else_draws_random_numbers_notices_nothing() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(5)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    lstm(QUICK, WAVE[:40], 1, None)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"refit is 0; it must be 1 or more"):
        LstmSettings(refit=0)
    with pytest.raises(ValueError, match=r"utilisation is 1\.5; it must be above 0 and at most 1"):
        LstmSettings(utilisation=1.5)
