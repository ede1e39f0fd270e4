"""Durations on the command line and in scenario files."""

from __future__ import annotations

import pytest

from chiron.core.units import DurationError, parse_duration, show_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45s", 45.0),
        ("10m", 600.0),
        ("1h", 3600.0),
        ("2d", 172_800.0),
        ("250ms", 0.25),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        (" 1.5h ", 5400.0),
        ("0", 0.0),
        (".5s", 0.5),
        ("90", 90.0),
        ("1e3", 1000.0),
        (90, 90.0),
        (0.25, 0.25),
    ],
)
def test_a_duration_is_read_in_seconds(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", " ", "s", "10x", "10 minutes", "10m1h", "5s5s", "-5s", "-1", "nan", "inf", "1e999", "1:30", "5s,", -1.0],
)
def test_a_bad_duration_is_refused_with_what_is_allowed(text: str | float) -> None:
    with pytest.raises(DurationError, match="45s, 10m, 1h30m") as error:
        parse_duration(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("value", [True, None, float("nan"), float("inf")])
def test_a_value_that_is_no_length_of_time_is_refused(value: object) -> None:
    with pytest.raises(DurationError):
        parse_duration(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(60.0, "1m"), (2_592_000.0, "30d"), (5400.0, "90m"), (0.5, "0.5s"), (0.0, "0s"), (61.0, "61s")],
)
def test_a_duration_is_shown_as_it_is_written(seconds: float, text: str) -> None:
    assert show_duration(seconds) == text
    assert parse_duration(text) == seconds
