"""Ranges of settings: declared with them, checked, and the same for every policy that has any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from chiron.config.read import read_record
from chiron.policies.ranges import AnyOf, Between, tunables, value_of, with_defaults, with_values
from chiron.policies.registry import POLICIES
from chiron.policies.rivals.tuned_settings import TUNABLE
from chiron.policies.routers.packing_settings import PackingSettings
from chiron.studies.search import PRIMES, halton


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    share: Annotated[float, Between(0.0, 0.5)] = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    target: Annotated[float, Between(0.1, 10.0, log=True)] = 1.0
    count: Annotated[int, Between(1, 64, log=True)] = 8
    evict: Annotated[bool, AnyOf((True, False))] = True
    tick_s: float = 5.0
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        if self.count == 13:
            raise ValueError("count is 13; that is unlucky")


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    count: Annotated[int, Between(0.5, 2.0)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    name: Annotated[str, Between(0.5, 2.0)] = ""


def test_settings_with_a_range_are_found_those_of_nested_tables_too() -> None:
    assert [each.name for each in tunables(Settings)] == ["target", "count", "evict", "inner.share"]


@pytest.mark.parametrize(
    ("place", "values"),
    [
        (0.0, (0.1, 1, True, 0.0)),
        (0.5, (1.0, 8, False, 0.25)),
        (1.0, (10.0, 64, False, 0.5)),
        (7.0, (10.0, 64, False, 0.5)),
    ],
)
def test_a_place_in_the_range_is_a_value_of_the_setting_s_type(place: float, values: tuple[Any, ...]) -> None:
    found = tuple(each.value(place) for each in tunables(Settings))
    assert found == values
    assert [type(value) for value in found] == [float, int, bool, float]


def test_values_are_set_by_dotted_name_and_checked_by_the_settings_themselves() -> None:
    made = with_values(Settings(), {"target": 2.0, "inner.share": 0.1})
    assert (made.target, value_of(made, "inner.share"), made.count) == (2.0, 0.1, 8)
    with pytest.raises(ValueError, match="count is 13"):
        with_values(Settings(), {"count": 13})


def test_a_range_changes_nothing_about_how_settings_are_read() -> None:
    assert read_record(Settings, {"target": 3, "tick": "1m"}, "policies.x") == Settings(target=3.0, tick_s=60.0)


@pytest.mark.parametrize("wrong", [Halves, Words])
def test_a_range_that_does_not_fit_its_setting_is_an_error(wrong: type[Any]) -> None:
    with pytest.raises(TypeError, match=r"count: a whole number needs whole ends|name: a range of numbers"):
        tunables(wrong)


@pytest.mark.parametrize("arguments", [(1.0, 1.0), (2.0, 1.0), (0.0, float("inf"))])
def test_a_range_without_room_is_an_error(arguments: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="least must be below most"):
        Between(*arguments)


def sound(settings: Any, values: dict[str, Any]) -> bool:
    try:
        with_values(settings, values)
    except ValueError:
        return False
    return True


def test_every_policy_that_is_not_tuned_already_can_be_tuned_to_the_ends_of_its_ranges() -> None:
    places = [[halton(n, PRIMES[i]) for i in range(16)] for n in range(40)]
    for name, entry in POLICIES.items():
        space = tunables(entry.settings)
        assert 2 <= len(space) <= 16 or name.endswith("-tuned"), name
        drawn = [{each.name: each.value(at) for each, at in zip(space, row, strict=False)} for row in places]
        for each in space:
            for end in (0.0, 1.0):
                tried = [{**values, each.name: each.value(end)} for values in drawn]
                assert any(sound(entry.settings(), values) for values in tried), (name, each.name, end)


def test_tuned_defaults_are_those_given_also_in_nested_tables() -> None:
    tuned: Any = with_defaults(Settings, "Tuned", __name__, {"target": 4.0, "inner.share": 0.5})
    assert tuned() == tuned(target=4.0, inner=Inner(share=0.5))
    assert (tuned().count, tuned().target, tuned().inner.share) == (8, 4.0, 0.5)
    assert read_record(tuned, {"count": 2}, "x").target == 4.0
    assert not tunables(PackingSettings)


def test_what_a_tuning_finds_for_a_rival_is_never_left_out() -> None:
    """``chiron`` keeps its defaults; ``static`` is what a fixed fleet is without any choice."""
    with_ranges = {name for name, entry in POLICIES.items() if tunables(entry.settings) and not name.endswith("-tuned")}
    assert set(TUNABLE) == with_ranges - {"chiron", "static"}
