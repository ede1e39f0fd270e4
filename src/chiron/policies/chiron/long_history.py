"""Interactive load of the last two weeks, at falling resolution: what ``LoadHistory`` forgets after an hour.

Seconds that leave it become minutes; minutes older than two days become quarter hours; those end after two weeks. Of
each is kept its mean load, and its need: the instances with which no request of a minute would have waited longer than
it can bear, had they begun it with an empty queue. In a fluid that is the largest work of any stretch of it, over the
length of the stretch and that wait; of longer stretches over their length alone, because what goes on for so long may
go on beyond the minute. Of a quarter hour it is that of its neediest minute.

From it comes what a period of more than half an hour foretells: the need about the same moment one period ago. That
says nothing of what is best: ``policies.chiron.recurrence`` does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor

import numpy as np

from chiron.policies.fluid_queue import Floats

MINUTE_S = 60
QUARTER = 15
"""Minutes."""
MINUTES_MAX = 2 * 24 * 60
QUARTERS_MAX = 14 * 24 * 4
_STRETCHES_S = (1, 2, 4, 8, 15, 30, 60)
_LONG_S = 15
LEAST_S = 31 * MINUTE_S
"""Shorter periods are seen in the hour that is known by the second."""
_PERIODS = 3
"""Tried at most, besides days and weeks."""
_APART = 0.05
"""Of a period: another that is tried differs by more."""
_ALIKE = 0.2
"""Least autocorrelation of a period that is tried."""
_SMOOTH_MIN = 120
"""What changes more slowly than that can be followed without knowing when."""
CALENDAR_S = (86_400, 7 * 86_400)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LongHistory:
    """Oldest first; each part ends where the next one begins, and ``seconds`` where the load of ``LoadHistory`` does
    that has not been added yet."""

    quarters: Floats
    """(mean load, need), shape (2, quarters)."""
    minutes: Floats
    """Likewise."""
    seconds: Floats
    """Less than a minute of load."""
    known_s: int
    """Seconds that leave ``LoadHistory`` next and are not to be added: presumed, or here already."""

    def after(self, left: Floats, slack_s: float) -> LongHistory:
        """With the seconds that left ``LoadHistory``."""
        new = left[self.known_s :]
        known_s = self.known_s - (len(left) - len(new))
        load = np.concatenate((self.seconds, new))
        whole = len(load) // MINUTE_S
        if not whole:
            return replace(self, seconds=load, known_s=known_s)
        added = by_minute(load[: whole * MINUTE_S], slack_s)
        minutes = np.concatenate((self.minutes, added), axis=1)
        quarters = self.quarters
        over = max(0, -(-(minutes.shape[1] - MINUTES_MAX) // QUARTER))
        if over:
            old = minutes[:, : over * QUARTER].reshape(2, over, QUARTER)
            made = np.stack((old[0].mean(axis=1), old[1].max(axis=1)))
            quarters = np.concatenate((quarters, made), axis=1)[:, -QUARTERS_MAX:]
            minutes = minutes[:, over * QUARTER :]
        return LongHistory(
            quarters=quarters, minutes=minutes, seconds=load[whole * MINUTE_S :], known_s=max(0, known_s)
        )


def nothing_before(known_s: int) -> LongHistory:
    """``known_s`` of load are presumed."""
    none = np.zeros((2, 0))
    return LongHistory(quarters=none, minutes=none, seconds=np.zeros(0), known_s=known_s)


def resumed(long: LongHistory, load: Floats, away_s: float, slack_s: float) -> LongHistory:
    """After a restart. ``load`` was that of the last hour, and stays in ``LoadHistory`` as if it had just been: so it
    is added now, at its own time, and after it the time in which nobody looked."""
    if round(away_s) <= 0:
        return long
    away = np.zeros(round(min(max(0.0, away_s), MINUTE_S * QUARTER * QUARTERS_MAX)))
    return replace(long.after(np.concatenate((load, away)), slack_s), known_s=len(load))


def by_minute(load: Floats, slack_s: float) -> Floats:
    """(mean, need) of each minute of whole minutes, shape (2, minutes)."""
    rows = load.reshape(-1, MINUTE_S)
    sums = np.concatenate((np.zeros((len(rows), 1)), np.cumsum(rows, axis=1)), axis=1)
    needs = [(sums[:, n:] - sums[:, :-n]).max(axis=1) / (n + (slack_s if n < _LONG_S else 0.0)) for n in _STRETCHES_S]
    return np.stack((rows.mean(axis=1), np.max(needs, axis=0)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Minutes:
    """All of it minute by minute, to now."""

    means: Floats
    needs: Floats
    over_s: int
    """Seconds that the last minute lacks."""

    def ago(self, second: float) -> int:
        """Number of the minute in which that second before now lies (of one to come, if it is below 0)."""
        return len(self.means) - 2 - floor((second + self.over_s) / MINUTE_S - 1)


def all_minutes(long: LongHistory, load: Floats, slack_s: float) -> Minutes:
    """``load`` is that of ``LoadHistory``."""
    recent = np.concatenate((long.seconds, load[long.known_s :]))
    over_s = -len(recent) % MINUTE_S
    last = by_minute(np.concatenate((recent, np.zeros(over_s))), slack_s)
    old = np.repeat(long.quarters, QUARTER, axis=1)
    means, needs = np.concatenate((old, long.minutes, last), axis=1)
    return Minutes(means=means, needs=needs, over_s=over_s)


def foretold(minutes: Minutes, period_s: int, lead_s: float, seconds: int) -> Floats:
    """What the period would have had ready in each of the last ``seconds``: the largest need from ``lead_s`` and a
    minute before the same moment one period ago, because what is wanted then is asked for so much earlier, to a minute
    after it. 0 where nothing is known of that time."""
    first, last = minutes.ago(seconds - 1), len(minutes.needs) - 1
    back = period_s // MINUTE_S
    before = ceil((lead_s + MINUTE_S) / MINUTE_S)
    padded = np.concatenate((np.zeros(back + before + max(0, -first)), minutes.needs))
    # The window of minute m begins at m - back - before, which is m in ``padded``.
    begin = first + max(0, -first)
    part = padded[begin : begin + last - first + 1 + before + 1]
    each = np.lib.stride_tricks.sliding_window_view(part, before + 2).max(axis=1)
    ready: Floats = np.repeat(each, MINUTE_S)[: len(each) * MINUTE_S - minutes.over_s][-seconds:]
    return ready


def foretold_now(long: LongHistory, load: Floats, slack_s: float, period_s: int, lead_s: float) -> float:
    """What is to be asked for now: the largest need from a minute before this moment one period ago to ``lead_s`` and
    a minute after it. Each tick asks, so only these minutes are looked at."""
    recent_s = len(long.seconds) + max(0, len(load) - long.known_s)
    quarters, minutes = QUARTER * long.quarters.shape[1], long.minutes.shape[1]
    known = quarters + minutes + -(-recent_s // MINUTE_S)
    first, last = (
        known - 2 - floor((second + -recent_s % MINUTE_S) / MINUTE_S - 1)
        for second in (period_s + MINUTE_S, period_s - lead_s - MINUTE_S)
    )
    first, last = max(0, first), min(last, known - 1)
    found = [0.0]
    if first <= last and first < quarters:
        found.append(float(long.quarters[1, first // QUARTER : last // QUARTER + 1].max()))
    if first < quarters + minutes and last >= quarters:
        found.append(float(long.minutes[1, max(0, first - quarters) : last - quarters + 1].max()))
    if last >= quarters + minutes:
        recent = np.concatenate((long.seconds, load[long.known_s :], np.zeros(-recent_s % MINUTE_S)))
        begin = max(0, first - quarters - minutes)
        part = recent[MINUTE_S * begin : MINUTE_S * (last - quarters - minutes + 1)]
        found.append(float(by_minute(part, slack_s)[1].max()))
    return max(found)


def recurrences(minutes: Minutes, exact: int) -> tuple[int, ...]:
    """Periods that are worth a try, seconds: tops of the autocorrelation of what is known by the minute (``exact`` of
    them), the likest first, of which one and a half have passed; then the day and the week, once one of them and an
    hour has."""
    seen_s = MINUTE_S * len(minutes.means)
    calendar = tuple(period for period in CALENDAR_S if seen_s >= period + 3600)
    x = minutes.means[-exact:] if exact else minutes.means[:0]
    if len(x) < 2 * LEAST_S // MINUTE_S:
        return calendar
    x = x - _smooth(x)
    power = np.abs(np.fft.rfft(x, 2 * len(x))) ** 2
    alike = np.fft.irfft(power)[: len(x)]
    if alike[0] <= 1e-12 * len(x):
        return calendar
    # Of fewer pairs there is less: the mean over those that there are.
    alike = alike / alike[0] * len(x) / np.arange(len(x), 0, -1)
    lags = range(LEAST_S // MINUTE_S, 2 * len(x) // 3)
    tops = [k for k in lags if alike[k] > _ALIKE and alike[k - 1] < alike[k] >= alike[k + 1]]
    found: list[int] = []
    for k in sorted(tops, key=lambda k: -alike[k]):
        if len(found) < _PERIODS and all(abs(k - other) > _APART * other for other in found):
            found.append(k)
    fitting = [MINUTE_S * k for k in found]
    return (*(p for p in fitting if all(abs(p - c) > _APART * c for c in calendar)), *calendar)


def _smooth(x: Floats) -> Floats:
    """Means over two hours about each minute."""
    half = _SMOOTH_MIN // 2
    sums = np.concatenate(([0.0], np.cumsum(x)))
    at = np.arange(len(x))
    low, high = np.maximum(0, at - half), np.minimum(len(x), at + half + 1)
    smooth: Floats = (sums[high] - sums[low]) / (high - low)
    return smooth
