"""Generated traces have the rate, burstiness, shape and lengths that were asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from chiron.workload.errors import WorkloadSettingError
from chiron.workload.generate import Arrivals, ClosedLoop, Diurnal, Gamma, Poisson, Spikes, Weekly, generate
from chiron.workload.lengths import (
    ConstantTokens,
    EmpiricalLengths,
    IndependentLengths,
    LognormalTokens,
    parse_field_lengths,
    sample_lengths,
)
from chiron.workload.seeds import generator
from chiron.workload.stats import counts, gap_cv, trace_stats, window_stats
from chiron.workload.types import Trace

SHORT = IndependentLengths(input=ConstantTokens(tokens=100), output=ConstantTokens(tokens=10))
KINDS: list[Arrivals] = [
    Poisson(rate=5),
    Gamma(rate=5, cv=2),
    Spikes(rate=5),
    Diurnal(rate=5, period_s=3600, noise=0.3),
    Weekly(rate=5, day_s=3600, surges=2),
    ClosedLoop(users=50, think_s=8, response_s=2),
]


def made(arrivals: Arrivals, duration_s: float = 3600, seed: int = 1, name: str = "trace") -> Trace:
    return generate(arrivals, duration_s=duration_s, lengths=SHORT, seed=seed, name=name)


@pytest.mark.parametrize("arrivals", KINDS, ids=lambda kind: type(kind).__name__)
def test_draws_depend_on_seed_and_name_alone(arrivals: Arrivals) -> None:
    first, again = made(arrivals), made(arrivals)
    assert first.arrival_s.tolist() == again.arrival_s.tolist()
    assert first.arrival_s.tolist() != made(arrivals, seed=2).arrival_s.tolist()
    assert first.arrival_s.tolist() != made(arrivals, name="other").arrival_s.tolist()
    assert (np.diff(first.arrival_s) >= 0).all()
    assert first.arrival_s[0] >= 0
    assert first.arrival_s[-1] < 3600


def test_poisson_has_its_rate_and_no_memory() -> None:
    trace = made(Poisson(rate=5), 20_000)
    assert len(trace) == pytest.approx(100_000, rel=0.015)
    assert gap_cv(trace.arrival_s) == pytest.approx(1, rel=0.02)
    assert window_stats(trace.arrival_s, 10).dispersion == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("cv", [0.0, 0.5, 2.0, 5.0])
def test_gamma_gaps_have_their_cv(cv: float) -> None:
    trace = made(Gamma(rate=5, cv=cv), 40_000)
    assert len(trace) == pytest.approx(200_000, rel=0.05)
    assert gap_cv(trace.arrival_s) == pytest.approx(cv, rel=0.06, abs=1e-6)


def test_a_bursty_process_does_not_begin_with_an_arrival() -> None:
    # Seen from a random moment, the next arrival of gaps with CV 3 is (1 + 9) / 2 = 5 mean gaps away.
    waits = [made(Gamma(rate=1, cv=3), 200, seed=seed).arrival_s[0] for seed in range(400)]
    assert np.mean(waits) == pytest.approx(5, rel=0.25)


def test_spikes_are_where_and_as_tall_as_asked() -> None:
    trace = made(Spikes(rate=4, factor=5, length_s=20, period_s=100), 10_000)
    phase = trace.arrival_s % 100
    inside = (phase >= 50) & (phase < 70)
    assert inside.sum() / (100 * 20) == pytest.approx(20, rel=0.05)
    assert (~inside).sum() / (100 * 80) == pytest.approx(4, rel=0.05)


def test_a_day_rises_from_trough_to_peak() -> None:
    trace = made(Diurnal(rate=2, peak_to_trough=10), 86_400 * 3 + 3600)
    by_hour = counts(trace.arrival_s, 3600)[:72].reshape(3, 24).mean(axis=0)
    assert by_hour.mean() / 3600 == pytest.approx(2, rel=0.02)
    assert by_hour[[11, 12]].mean() / by_hour[[0, 23]].mean() == pytest.approx(10, rel=0.1)


def test_a_week_has_two_quiet_days_and_surges_at_the_same_times_of_the_others() -> None:
    weekly = Weekly(rate=0.5, peak_to_trough=4, weekend=0.4, surges=3, factor=8, length_s=200, day_s=7200, timetable=2)
    by_day = np.bincount((made(weekly, 14 * 7200).arrival_s // 7200).astype(int), minlength=14)
    surged = 0.5 * (7200 + 3 * 200 * 8)
    assert by_day[[0, 1, 2, 3, 4, 7, 8, 9, 10, 11]].mean() == pytest.approx(surged, rel=0.05)
    assert by_day[[5, 6, 12, 13]].mean() == pytest.approx(0.4 * 0.5 * 7200, rel=0.1)

    def busy(seed: int, timetable: int) -> list[int]:
        """Minutes of a working day in which at least four times the mean came, on all of five."""
        trace = made(replace(weekly, timetable=timetable), 5 * 7200, seed=seed)
        by_minute = np.bincount((trace.arrival_s // 60).astype(int), minlength=5 * 120).reshape(5, 120)
        return np.flatnonzero((by_minute >= 4 * 0.5 * 60).all(axis=0)).tolist()

    assert busy(1, 2) == busy(5, 2), "whatever the seed"
    assert busy(1, 2) != busy(1, 3)
    assert 6 <= len(busy(1, 2)) <= 12
    assert all(30 <= minute < 90 for minute in busy(1, 2)), "in the middle half"


def test_noise_moves_the_minutes_but_not_the_mean() -> None:
    steady, noisy = (made(Diurnal(rate=5, peak_to_trough=1, noise=noise), 36_000) for noise in (0.0, 0.5))
    assert len(noisy) == pytest.approx(len(steady), rel=0.08)
    per_minute = counts(noisy.arrival_s, 60)
    assert per_minute.std() / per_minute.mean() == pytest.approx(0.5, rel=0.2)


def test_users_in_a_loop_ask_once_per_think_and_answer() -> None:
    trace = made(ClosedLoop(users=100, think_s=15, response_s=5), 4000)
    assert len(trace) == pytest.approx(100 * 4000 / 20, rel=0.02)
    # A single user is never closer to itself than one answer.
    assert np.diff(made(ClosedLoop(users=1, think_s=15, response_s=5), 4000).arrival_s).min() >= 5
    first_minute = (trace.arrival_s < 60).sum()
    assert first_minute == pytest.approx(300, rel=0.25)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Poisson(rate=0), "rate is 0; it must be a finite number above 0"),
        (lambda: Poisson(rate=float("nan")), "rate is nan"),
        (lambda: Gamma(rate=1, cv=-1), "cv is -1; it must be a finite number, at least 0"),
        (lambda: Spikes(rate=1, length_s=300, period_s=300), "length_s is 300; it must be below period_s"),
        (lambda: Diurnal(rate=1, peak_to_trough=0.5), "peak_to_trough is 0.5; it must be at least 1"),
        (lambda: Weekly(rate=1, surges=2, length_s=30000), "length_s is 30000; it must be at most 21600"),
        (lambda: Weekly(rate=1, weekend=-1), "weekend is -1"),
        (lambda: ClosedLoop(users=0, think_s=1, response_s=1), "users is 0"),
        (lambda: ClosedLoop(users=1, think_s=0, response_s=0), "above 0"),
        (lambda: made(Poisson(rate=1e9)), "at most 50,000,000"),
        (lambda: made(Spikes(rate=1, length_s=1e-7, period_s=1e-6)), "period_s"),
        (lambda: made(Poisson(rate=1), 0), "duration is 0"),
        (lambda: LognormalTokens(mean=5), "either mean and cv, or p50 and p99"),
        (lambda: LognormalTokens(mean=5, cv=1, p50=3, p99=4), "either mean and cv, or p50 and p99"),
        (lambda: LognormalTokens(p50=5, p99=4), "p99 is 4; it must be at least p50"),
        (lambda: ConstantTokens(tokens=0), "tokens is 0"),
        (lambda: parse_field_lengths("meen=5,cv=1"), "unknown key 'meen'"),
        (lambda: parse_field_lengths("many"), "lengths 'many'"),
        (lambda: parse_field_lengths("p50"), "lengths 'p50'"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(WorkloadSettingError) as error:
        make()
    assert says in str(error.value)


def test_lognormal_lengths_by_moments_and_by_quantiles() -> None:
    lengths = IndependentLengths(
        input=LognormalTokens(mean=1000, cv=1.5, max_tokens=1_000_000), output=LognormalTokens(p50=40, p99=700)
    )
    prompt, output = sample_lengths(lengths, 200_000, generator(0, "test"))
    assert prompt.mean() == pytest.approx(1000, rel=0.02)
    assert prompt.std() / prompt.mean() == pytest.approx(1.5, rel=0.06)
    assert np.quantile(output, [0.5, 0.99]) == pytest.approx([40, 700], rel=0.04)
    assert min(prompt.min(), output.min()) >= 1
    assert prompt.dtype == np.int64


def test_lengths_are_clipped_at_their_limit() -> None:
    field = parse_field_lengths("mean=5000,cv=3,max=8192")
    drawn, _ = sample_lengths(IndependentLengths(input=field, output=field), 10_000, generator(0, "test"))
    assert drawn.max() == 8192


def test_empirical_lengths_stay_pairs() -> None:
    values = np.arange(1, 1001)
    lengths = EmpiricalLengths(input_tokens=values, output_tokens=values * 2, source="made")
    prompt, output = sample_lengths(lengths, 50_000, generator(0, "test"))
    assert (output == 2 * prompt).all()
    assert prompt.mean() == pytest.approx(500.5, rel=0.02)


def test_statistics_of_a_known_trace() -> None:
    ones = np.ones(100, dtype=np.int64)
    trace = Trace(arrival_s=np.arange(1, 101) * 1.0, input_tokens=ones * 30, output_tokens=ones, source="made")
    stats = trace_stats(trace)
    assert (stats.requests, stats.span_s, stats.rate, stats.gap_cv) == (100, 100, 1, 0)
    assert [window.window_s for window in stats.windows] == [1, 10]  # 60 s fits fewer than five times.
    assert stats.windows[1].rate_max == 1
    assert stats.input_tokens_per_s == 30
    assert stats.input_tokens.p99 == 30
