"""A scaled trace keeps the shape of the day and the texture of its arrivals."""

from __future__ import annotations

import numpy as np
import pytest

from chiron.workload.errors import WorkloadSettingError
from chiron.workload.generate import Arrivals, Diurnal, Gamma, Poisson, Spikes, generate
from chiron.workload.lengths import ConstantTokens, IndependentLengths
from chiron.workload.load import load_trace
from chiron.workload.stats import counts, gap_cv, window_stats
from chiron.workload.transform import concat, scale_rate, slice_trace
from chiron.workload.types import Trace

SHORT = IndependentLengths(input=ConstantTokens(tokens=100), output=ConstantTokens(tokens=10))
FACTORS = [0.5, 2, 2.5, 6]


def made(arrivals: Arrivals, duration_s: float) -> Trace:
    return generate(arrivals, duration_s=duration_s, lengths=SHORT, seed=3)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    "arrivals", [Poisson(rate=8), Gamma(rate=8, cv=3), Gamma(rate=8, cv=0.3)], ids=["poisson", "bursty", "regular"]
)
def test_short_term_burstiness_stays(arrivals: Arrivals, factor: float) -> None:
    trace = made(arrivals, 7200)
    scaled = scale_rate(trace, factor)
    assert len(scaled) / len(trace) == pytest.approx(factor, rel=0.03)
    assert gap_cv(scaled.arrival_s) == pytest.approx(gap_cv(trace.arrival_s), rel=0.08)
    # Operational time: as many arrivals per window before as after.
    before = window_stats(trace.arrival_s, 0.5).dispersion
    after = window_stats(scaled.arrival_s, 0.5 / factor).dispersion
    assert after == pytest.approx(before, rel=0.12)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("azure-2023-conv", factor) for factor in FACTORS] + [("azure-2023-code", factor) for factor in FACTORS[1:]],
)
def test_real_traces_keep_their_gaps_and_their_profile(name: str, factor: float) -> None:
    trace = load_trace(name)
    scaled = scale_rate(trace, factor)
    # A part turn of the wheel catches more or fewer of a window's bursts; whole turns catch all.
    assert len(scaled) / len(trace) == pytest.approx(factor, rel=0.06 if factor % 1 else 1e-12)
    # Texture: gaps inside windows keep their distribution, at the new pace. (The CV of all gaps would mix in the
    # silences of the profile, which stay as long as they were.)
    share = [0.25, 0.5, 0.75, 0.9, 0.95]
    gaps_before, gaps_after = (np.quantile(np.diff(t.arrival_s), share) for t in (trace, scaled))
    assert gaps_after * factor == pytest.approx(gaps_before, rel=0.1)
    before, after = counts(trace.arrival_s, 60), counts(scaled.arrival_s, 60)
    shared = min(len(before), len(after))
    correlation = np.corrcoef(before[:shared], after[:shared])[0, 1]
    assert correlation > 0.93
    # Relative swing of the minutes: what sizes a fleet.
    swing_before, swing_after = before.std() / before.mean(), after.std() / after.mean()
    assert swing_after == pytest.approx(swing_before, rel=0.1)


def test_a_fraction_of_a_bursty_trace_is_right_on_average() -> None:
    trace = load_trace("azure-2023-code")
    halves = [scale_rate(trace, 0.5, seed=seed) for seed in range(40)]
    assert np.mean([len(half) for half in halves]) == pytest.approx(len(trace) / 2, rel=0.03)
    assert np.std([len(half) for half in halves]) < 0.08 * len(trace) / 2
    busiest = counts(trace.arrival_s, 60)[14]
    assert np.mean([counts(half.arrival_s, 60)[14] for half in halves]) == pytest.approx(busiest / 2, rel=0.15)


@pytest.mark.parametrize("factor", [0.3, 4])
def test_spikes_stay_as_tall_in_proportion(factor: float) -> None:
    trace = made(Spikes(rate=10, factor=4, length_s=60, period_s=600), 6000)
    scaled = scale_rate(trace, factor)
    inside = (scaled.arrival_s % 600 >= 300) & (scaled.arrival_s % 600 < 360)
    rate_in, rate_out = inside.sum() / (10 * 60), (~inside).sum() / (10 * 540)
    assert rate_in / rate_out == pytest.approx(4, rel=0.1)


def test_a_day_keeps_its_peak_and_trough() -> None:
    trace = made(Diurnal(rate=1, peak_to_trough=6), 86_400)
    before = counts(trace.arrival_s, 3600)
    after = counts(scale_rate(trace, 3).arrival_s, 3600)
    assert after / 3 == pytest.approx(before, rel=0.05)


def test_lengths_of_copies_come_from_the_same_time() -> None:
    half = np.arange(10_000)
    trace = Trace(
        arrival_s=half * 0.1,
        input_tokens=np.where(half < 5000, 10, 1000),
        output_tokens=np.where(half < 5000, 10, 1000),
        source="made",
    )
    scaled = scale_rate(trace, 5)
    assert set(scaled.input_tokens[scaled.arrival_s < 400]) == {10}
    assert set(scaled.input_tokens[scaled.arrival_s > 600]) == {1000}
    assert (scaled.input_tokens == scaled.output_tokens).all()  # Pairs stay pairs.


def test_a_rare_huge_prompt_is_not_repeated_within_its_window() -> None:
    tokens = np.full(20_000, 10)
    tokens[10_000] = 100_000
    trace = Trace(arrival_s=np.arange(20_000) * 0.1, input_tokens=tokens, output_tokens=tokens, source="made")
    scaled = scale_rate(trace, 10)
    huge_s = scaled.arrival_s[scaled.input_tokens == 100_000]
    assert len(huge_s) >= 2
    assert np.ptp(huge_s) > 20
    assert ((huge_s > 949) & (huge_s < 1051)).all()


def test_same_seed_same_trace_and_another_seed_another() -> None:
    trace = load_trace("azure-2023-code")
    first, again, other = (scale_rate(trace, 2, seed=seed) for seed in (1, 1, 2))
    assert first.arrival_s.tolist() == again.arrival_s.tolist()
    assert first.arrival_s.tolist() != other.arrival_s.tolist()


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.2])
def test_arrivals_stay_sorted_and_inside_the_trace(factor: float) -> None:
    trace = load_trace("mooncake-conversation")
    scaled = scale_rate(trace, factor)
    assert (np.diff(scaled.arrival_s) >= 0).all()
    assert scaled.arrival_s[0] >= 0
    assert scaled.arrival_s[-1] <= trace.arrival_s[-1] + 1


@pytest.mark.parametrize("arrivals", [[0.0], [5.0], [0.0, 0.0, 0.0]])
def test_tiny_traces_scale(arrivals: list[float]) -> None:
    ones = np.ones(len(arrivals), dtype=np.int64)
    trace = Trace(arrival_s=np.array(arrivals), input_tokens=ones, output_tokens=ones, source="made")
    assert len(scale_rate(trace, 4)) == 4 * len(arrivals)


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_a_factor_that_is_no_scale_is_refused(factor: float) -> None:
    with pytest.raises(WorkloadSettingError, match="rate scale is"):
        scale_rate(load_trace("azure-2023-code"), factor)


def test_a_slice_starts_at_zero_and_holds_what_was_there() -> None:
    trace = load_trace("azure-2023-conv")
    cut = slice_trace(trace, start_s=100, duration_s=50)
    inside = (trace.arrival_s >= 100) & (trace.arrival_s < 150)
    assert cut.arrival_s == pytest.approx(trace.arrival_s[inside] - 100)
    assert cut.output_tokens.tolist() == trace.output_tokens[inside].tolist()
    with pytest.raises(WorkloadSettingError, match=r"start 7200 s: no request there; the trace covers 0 s to 3501"):
        slice_trace(trace, start_s=7200)
    with pytest.raises(WorkloadSettingError, match="duration is 0"):
        slice_trace(trace, duration_s=0)


def test_one_after_the_other() -> None:
    trace = slice_trace(load_trace("azure-2023-conv"), duration_s=100)
    both = concat([trace, trace], gap_s=5)
    assert len(both) == 2 * len(trace)
    assert both.arrival_s[len(trace)] == pytest.approx(trace.arrival_s[-1] + 5 + trace.arrival_s[0])
    assert (np.diff(both.arrival_s) >= 0).all()
