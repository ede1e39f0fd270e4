"""Moments of a run: what ``--at`` may be, and how they are shown.

A run counts seconds from its start. People on call have a time of day, ``12:41``; a chart of a simulated hour has
minutes and seconds, ``12:41``. Both are read: as a time of day where it is known when the run began, as hours and
minutes of a run that is long enough, else as minutes and seconds. What could have meant something else is said, with
the way to write that. Moments are shown such that they are read back as what they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from chiron.config.read import ConfigError
from chiron.core.units import DurationError, parse_duration
from chiron.telemetry.decision_text import show_moment

HOUR_S = 3600.0
CLOCK = re.compile(r"(\d+):([0-5]\d)(?::([0-5]\d))?")
TIME_OF_DAY = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?\s*(Z|UTC|[+-]\d\d:[0-5]\d)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A moment that somebody asked for."""

    at_s: float
    """Since the start of the run."""
    note: str = ""
    """How it was read, where it could have been read otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunClock:
    """How one run's time is told."""

    ends_s: float
    began: datetime | None = None
    """None of a simulation, which has no date."""

    @property
    def _origin(self) -> datetime:
        """The second in which it began: moments are shown and asked for in whole seconds."""
        assert self.began is not None
        return self.began.astimezone(UTC).replace(microsecond=0)

    def show(self, t_s: float) -> str:
        """Since the start, and the time of day if that is known."""
        since = self._since_start(t_s)
        return since if self.began is None else f"{since} ({self._day_time(t_s)} UTC)"

    def option(self, t_s: float) -> str:
        """What ``--at`` takes for this moment and no other."""
        since = self._since_start(t_s)
        return since if self.began is None else f"+{since}"

    def read(self, text: str) -> Moment:
        """The moment that ``text`` names. Raises ConfigError, naming the option."""
        asked = text.strip()
        if re.match(r"\d{4}-\d\d-\d\d", asked):
            return Moment(at_s=self._of_date(text))
        if asked.startswith("+"):
            return Moment(at_s=self._of_start(asked[1:], text))
        day_time = TIME_OF_DAY.fullmatch(asked)
        if self.began is not None and day_time is not None:
            return self._of_day(day_time, text)
        clock = CLOCK.fullmatch(asked)
        if self.began is None and clock is not None and clock[3] is None:
            return self._of_hours(clock)
        return Moment(at_s=self._of_start(asked, text))

    # -- how each form is read ---------------------------------------------------------------------------------

    def _of_hours(self, clock: re.Match[str]) -> Moment:
        """Two numbers in a run without a date."""
        first, second = int(clock[1]), int(clock[2])
        as_hours, as_minutes = HOUR_S * first + 60.0 * second, 60.0 * first + second
        if first < 1 or as_hours > self.ends_s:
            return Moment(at_s=as_minutes)
        return Moment(
            at_s=as_hours,
            note=f"{clock[0]} is read as {first} h {second:02} min of this run, which lasts "
            f"{show_moment(self.ends_s)}; {first} min {second:02} s would be {show_moment(as_minutes, hours=True)}.",
        )

    def _of_day(self, asked: re.Match[str], text: str) -> Moment:
        """A time of day in a run with a date: the last time that it came."""
        since = CLOCK.fullmatch(text.strip())
        since_s = None if since is None else self._of_start(text.strip(), text)
        came = self._days_of(asked)
        name = text.strip()
        if not came and since_s is None:
            raise ConfigError(f"--at {text!r}: that time of day is not in this run, which lasted {self._lasted()}")
        if not came:
            assert since_s is not None
            inside = since_s <= self.ends_s
            note = "" if inside else f"{name} is no time of day of this run, which lasted {self._lasted()}."
            return Moment(at_s=since_s, note=note)
        at_s = came[-1]
        told = [f"{name} is read as the time of day: {self._date(at_s)} {self._day_time(at_s)} UTC"]
        if len(came) > 1:
            others = ", ".join(self._date(t_s) for t_s in came[:-1][-3:])
            told.append(
                f"the last of {len(came)} such times (also {others}; another: --at "
                f"{self._date(came[-2])}T{self._day_time(came[-2])}Z)"
            )
        if since_s is not None and since_s <= self.ends_s:
            told.append(f"as long after the start is --at {self.option(since_s)}")
        return Moment(at_s=at_s, note="; ".join(told) + ".")

    def _days_of(self, asked: re.Match[str]) -> list[float]:
        """Seconds since the start at which the clock showed that time, in order."""
        zone = (asked[4] or "Z").upper().replace("UTC", "Z").replace("Z", "+00:00")
        day_time = f"{int(asked[1]):02}:{asked[2]}:{asked[3] or '00'}"
        first = datetime.fromisoformat(f"{self._origin:%Y-%m-%d}T{day_time}{zone}")
        start_s = (first - self._origin).total_seconds()
        # A time without seconds is that whole minute: who began at 12:41:30 has a 12:41, too.
        whole_s = 60.0 if asked[3] is None else 1.0
        day_s = timedelta(days=1).total_seconds()
        days = range(-1, 2 + int(max(0.0, self.ends_s) // day_s))
        came = [start_s + day_s * day for day in days]
        return [max(0.0, t_s) for t_s in came if t_s + whole_s > 0.0 and t_s <= self.ends_s]

    def _of_start(self, asked: str, text: str) -> float:
        clock = CLOCK.fullmatch(asked)
        if clock is not None:
            parts = [int(part) for part in clock.groups() if part is not None]
            hours, minutes, seconds = (0, *parts) if len(parts) == 2 else parts
            return HOUR_S * hours + 60.0 * minutes + seconds
        try:
            return parse_duration(asked)
        except DurationError:
            known = "" if self.began is None else f", a time of day or a date such as {self.began:%Y-%m-%dT%H:%M:%SZ}"
            raise ConfigError(
                f"--at {text!r}: expected the time since the start, as 41:00, 1:02:03 or 41m{known}"
            ) from None

    def _of_date(self, text: str) -> float:
        if self.began is None:
            raise ConfigError(f"--at {text!r}: the start of this run is unknown; give the time since its start: 41:00")
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            raise ConfigError(f"--at {text!r}: not a date and time such as {self.began:%Y-%m-%dT%H:%M:%SZ}") from None
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - self._origin).total_seconds()
        if seconds < 0.0:
            raise ConfigError(f"--at {text!r}: the run began at {self.began:%Y-%m-%dT%H:%M:%SZ}")
        return seconds

    # -- how it is shown ---------------------------------------------------------------------------------------

    def _since_start(self, t_s: float) -> str:
        return show_moment(t_s, hours=self.ends_s >= HOUR_S)

    def _wall(self, t_s: float) -> datetime:
        return self._origin + timedelta(seconds=round(t_s))

    def _day_time(self, t_s: float) -> str:
        return f"{self._wall(t_s):%H:%M:%S}"

    def _date(self, t_s: float) -> str:
        return f"{self._wall(t_s):%Y-%m-%d}"

    def _lasted(self) -> str:
        start, end = self._wall(0.0), self._wall(self.ends_s)
        return f"from {start:%Y-%m-%d %H:%M:%S} to {end:%Y-%m-%d %H:%M:%S} UTC"
