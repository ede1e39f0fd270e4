"""Arrivals made from a few numbers.

All open-loop kinds are one mechanism: a renewal process in operational time (Gamma gaps of mean 1 and a given CV;
CV 1 is Poisson, 0 is a metronome), mapped to seconds through the integral of a rate. So a spike or a day shape has
whatever short-time burstiness is requested. The process has run before time 0, so a trace does not begin with an
arrival.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import numpy as np

from chiron.workload.errors import WorkloadSettingError, require
from chiron.workload.lengths import Lengths, describe_lengths, sample_lengths
from chiron.workload.seeds import generator
from chiron.workload.types import Floats, Trace

REQUESTS_MAX = 50_000_000
_BURN_IN_GAPS = 1000
_GRID_STEPS_MAX = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Independent arrivals at a constant rate."""

    rate: float
    """Requests per second."""

    def __post_init__(self) -> None:
        _check(self, above=("rate",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma:
    """Gamma gaps at a constant rate: bursty above CV 1, regular below."""

    rate: float
    """Requests per second."""
    cv: float
    """Standard deviation / mean of the gaps."""

    def __post_init__(self) -> None:
        _check(self, above=("rate",), least=("cv",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spikes:
    """A base rate, and regular bursts at a multiple of it."""

    rate: float
    """Requests per second between bursts."""
    factor: float = 3.0
    """Rate in a burst / base rate. 3 is the spike for which the paper over-provisions."""
    length_s: float = 30.0
    period_s: float = 300.0
    """From the start of one burst to the start of the next. The first begins half a period in."""
    cv: float = 1.0
    """Of the gaps in operational time; 1 is Poisson."""

    def __post_init__(self) -> None:
        _check(self, above=("rate", "factor", "length_s", "period_s"), least=("cv",))
        require(self.length_s < self.period_s, "length_s", self.length_s, f"below period_s ({self.period_s:g})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Diurnal:
    """A sine between trough (at time 0) and peak (half a period later), with noise."""

    rate: float
    """Mean requests per second."""
    peak_to_trough: float = 2.0
    """2 is a published figure for conversation on weekdays, 10 for code."""
    period_s: float = 86_400.0
    noise: float = 0.0
    """CV of a lognormal factor of mean 1, drawn anew for each ``noise_s``."""
    noise_s: float = 60.0
    cv: float = 1.0
    """Of the gaps in operational time; 1 is Poisson."""

    def __post_init__(self) -> None:
        _check(self, above=("rate", "peak_to_trough", "period_s", "noise_s"), least=("noise", "cv"))
        require(self.peak_to_trough >= 1, "peak_to_trough", self.peak_to_trough, "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weekly:
    """Days and nights, five working days and two others, and jobs of others that come at the same times of every
    working day: a surge each."""

    rate: float
    """Mean requests per second of a working day, without surges. A day begins in its trough, as ``Diurnal`` does."""
    peak_to_trough: float = 4.0
    weekend: float = 0.4
    """Rate on the sixth and seventh day / on the others."""
    surges: int = 0
    """On each working day, in its middle half, one in each equal part of that."""
    timetable: int = 0
    """Number from which their times are drawn: whatever its seed, a stream has the same ones every day, and another
    stream with this number has them too."""
    factor: float = 5.0
    """Rate in a surge / ``rate``, besides what else arrives."""
    length_s: float = 240.0
    day_s: float = 86_400.0
    cv: float = 1.0
    """Of the gaps in operational time; 1 is Poisson."""

    def __post_init__(self) -> None:
        _check(self, above=("rate", "peak_to_trough", "length_s", "day_s"), least=("weekend", "factor", "cv"))
        require(self.peak_to_trough >= 1, "peak_to_trough", self.peak_to_trough, "at least 1")
        require(0 <= self.surges <= 1000, "surges", self.surges, "0 to 1000")
        longest_s = self.day_s / 2 / max(1, self.surges)
        require(self.length_s <= longest_s, "length_s", self.length_s, f"at most {longest_s:g} with so many surges")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """Users who wait for the answer, think, and ask again: an open-loop approximation.

    A trace fixes its arrivals before any answer is known, so every answer is assumed to take ``response_s``. A slow
    system would in reality get fewer requests, and a fast one more; neither shows here.
    """

    users: int
    think_s: float
    """Mean of the exponential thinking time."""
    response_s: float
    """Assumed time from request to full answer."""

    def __post_init__(self) -> None:
        require(self.users >= 1, "users", self.users, "at least 1")
        _check(self, least=("think_s", "response_s"))
        require(self.think_s + self.response_s > 0, "think_s + response_s", 0.0, "above 0")


Arrivals = Poisson | Gamma | Spikes | Diurnal | Weekly | ClosedLoop

KINDS: dict[str, type[Poisson] | type[Gamma] | type[Spikes] | type[Diurnal] | type[Weekly] | type[ClosedLoop]] = {
    "poisson": Poisson,
    "gamma": Gamma,
    "spikes": Spikes,
    "diurnal": Diurnal,
    "weekly": Weekly,
    "closed-loop": ClosedLoop,
}


def generate(arrivals: Arrivals, *, duration_s: float, lengths: Lengths, seed: int = 0, name: str = "trace") -> Trace:
    """Requests of ``[0, duration_s)``. ``seed`` and ``name`` together name the draws: two streams of one scenario
    with different names are independent. Raises WorkloadSettingError."""
    require(0 < duration_s < inf, "duration", duration_s, "above 0 s and finite")
    arrival_s = arrival_times(arrivals, duration_s, generator(seed, f"{name} arrivals"))
    prompt, output = sample_lengths(lengths, len(arrival_s), generator(seed, f"{name} lengths"))
    return Trace(
        arrival_s=arrival_s,
        input_tokens=prompt,
        output_tokens=output,
        source=f"generated: {arrivals}, {duration_s:g} s, seed {seed} ({name}); {describe_lengths(lengths)}",
    )


def arrival_times(arrivals: Arrivals, duration_s: float, rng: np.random.Generator) -> Floats:
    match arrivals:
        case Poisson(rate=rate):
            return _constant(rate, 1.0, duration_s, rng)
        case Gamma(rate=rate, cv=cv):
            return _constant(rate, cv, duration_s, rng)
        case Spikes():
            return _varying(*_spike_edges(arrivals, duration_s), arrivals.cv, rng)
        case Diurnal():
            return _varying(*_diurnal_grid(arrivals, duration_s, rng), arrivals.cv, rng)
        case Weekly():
            return _varying(*_weekly_edges(arrivals, duration_s), arrivals.cv, rng)
        case ClosedLoop():
            return _closed_loop(arrivals, duration_s, rng)


def _constant(rate: float, cv: float, duration_s: float, rng: np.random.Generator) -> Floats:
    return _varying(np.array([0.0, duration_s]), np.array([rate]), cv, rng)


def _varying(edges_s: Floats, rates: Floats, cv: float, rng: np.random.Generator) -> Floats:
    """A renewal process whose rate is ``rates[i]`` between ``edges_s[i]`` and ``edges_s[i + 1]``."""
    operational = np.concatenate([[0.0], np.cumsum(rates * np.diff(edges_s))])
    marks = _renewal(float(operational[-1]), cv, rng)
    return np.interp(marks, operational, edges_s)


def _renewal(end: float, cv: float, rng: np.random.Generator) -> Floats:
    """Arrivals in ``[0, end)`` at mean gap 1, as seen by one who looks in at a random moment."""
    _refuse_huge(end)
    gaps = _gap_source(cv, rng)
    before = np.cumsum(gaps(_BURN_IN_GAPS))
    moment = rng.uniform(0, before[-1])
    parts = [before[before > moment] - moment]
    while parts[-1][-1] < end:
        left = end - parts[-1][-1]
        parts.append(parts[-1][-1] + np.cumsum(gaps(int(1.05 * left) + 64)))
    marks = np.concatenate(parts)
    return marks[marks < end]


def _gap_source(cv: float, rng: np.random.Generator) -> Callable[[int], Floats]:
    if cv == 0:
        return np.ones
    shape = 1 / cv**2
    return lambda count: rng.gamma(shape, 1 / shape, count)


def _spike_edges(spikes: Spikes, duration_s: float) -> tuple[Floats, Floats]:
    _refuse_fine_grid(duration_s / spikes.period_s, "period_s", spikes.period_s)
    starts = np.arange(spikes.period_s / 2, duration_s, spikes.period_s)
    edges = np.concatenate([[0.0], np.column_stack([starts, starts + spikes.length_s]).ravel(), [duration_s]])
    edges = np.minimum(edges, duration_s)
    rates = np.full(len(edges) - 1, float(spikes.rate))
    rates[1::2] *= spikes.factor
    return edges, rates


def _diurnal_grid(diurnal: Diurnal, duration_s: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Steps fine enough for the sine, and never across a change of the noise factor."""
    pieces = -(-diurnal.noise_s // (diurnal.period_s / 500))
    step_s = diurnal.noise_s / pieces
    _refuse_fine_grid(duration_s / step_s, "period_s or noise_s", min(diurnal.period_s, diurnal.noise_s))
    edges = np.minimum(np.arange(int(-(-duration_s // step_s)) + 1) * step_s, duration_s)
    middle = (edges[:-1] + edges[1:]) / 2
    swing = (diurnal.peak_to_trough - 1) / (diurnal.peak_to_trough + 1)
    rates = diurnal.rate * (1 - swing * np.cos(2 * np.pi * middle / diurnal.period_s))
    if diurnal.noise > 0:
        variance = np.log1p(diurnal.noise**2)
        factors = rng.lognormal(-variance / 2, np.sqrt(variance), int(duration_s // diurnal.noise_s) + 1)
        rates = rates * factors[np.minimum((middle / diurnal.noise_s).astype(np.int64), len(factors) - 1)]
    return edges, rates


_DAY_STEPS = 144


def _weekly_edges(weekly: Weekly, duration_s: float) -> tuple[Floats, Floats]:
    """Ten minutes of a day long (of 24 hours), and cut where a surge begins or ends."""
    days = int(-(-duration_s // weekly.day_s))
    _refuse_fine_grid(days * (_DAY_STEPS + 2 * weekly.surges), "day_s", weekly.day_s)
    # One in each equal part of the middle of the day, so that none meets another.
    part_s = weekly.day_s / 2 / max(1, weekly.surges)
    at_s = weekly.day_s / 4 + part_s * np.arange(weekly.surges)
    at_s = at_s + generator(weekly.timetable, "timetable").uniform(0, part_s - weekly.length_s, weekly.surges)
    starts = (weekly.day_s * np.arange(days)[:, None] + at_s).ravel()
    steps = weekly.day_s / _DAY_STEPS * np.arange(days * _DAY_STEPS + 1)
    edges = np.unique(np.minimum(np.concatenate([steps, starts, starts + weekly.length_s]), duration_s))
    middle = (edges[:-1] + edges[1:]) / 2
    swing = (weekly.peak_to_trough - 1) / (weekly.peak_to_trough + 1)
    day, time_s = np.divmod(middle, weekly.day_s)
    works = day % 7 < 5
    rates = weekly.rate * (1 - swing * np.cos(2 * np.pi * time_s / weekly.day_s))
    since = time_s[:, None] - at_s[None, :]
    surging = ((since >= 0) & (since < weekly.length_s)).any(axis=1) & works
    return edges, rates * np.where(works, 1.0, weekly.weekend) + weekly.rate * weekly.factor * surging


def _closed_loop(loop: ClosedLoop, duration_s: float, rng: np.random.Generator) -> Floats:
    cycle_s = loop.think_s + loop.response_s
    _refuse_huge(loop.users * duration_s / cycle_s)
    # Each user is met at a random moment of a cycle that began up to a few cycles ago.
    at_s = -rng.uniform(4 * cycle_s, 5 * cycle_s, loop.users)
    parts = []
    while len(at_s):
        at_s = at_s + loop.response_s + rng.exponential(loop.think_s, len(at_s))
        at_s = at_s[at_s < duration_s]
        parts.append(at_s[at_s >= 0])
    return np.sort(np.concatenate(parts))


def _check(settings: Arrivals, *, above: tuple[str, ...] = (), least: tuple[str, ...] = ()) -> None:
    for name in (*above, *least):
        value = getattr(settings, name)
        require(0 < value < inf or (name in least and value == 0), name, value, _allowed(name in least))


def _allowed(zero: bool) -> str:
    return "a finite number, at least 0" if zero else "a finite number above 0"


def _refuse_huge(requests: float) -> None:
    if requests > REQUESTS_MAX:
        raise WorkloadSettingError(
            f"rate and duration make about {requests:,.0f} requests; at most {REQUESTS_MAX:,} are allowed"
        )


def _refuse_fine_grid(steps: float, name: str, value: float) -> None:
    if steps > _GRID_STEPS_MAX:
        raise WorkloadSettingError(
            f"{name} is {value:g} s: the duration holds {steps:,.0f} steps, at most {_GRID_STEPS_MAX:,} are allowed"
        )
