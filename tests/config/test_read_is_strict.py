"""Plain values into dataclasses: what passes, and what an error says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, nan
from typing import Literal

import pytest

from chiron.config.read import ConfigError, read_record, read_value, suggest


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    depth: int = 1

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth}; it must be 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    theta: float
    hold_s: float = 60.0
    horizon_s: float = inf
    speed_gb_per_s: float = 1.0
    at: tuple[float, ...] = ()
    mode: Literal["fast", "slow"] = "fast"
    size: int | Literal["auto"] = "auto"
    evict: bool = True
    name: str = ""
    class_: str = ""
    inner: Inner = field(default_factory=Inner)
    rooms: Mapping[str, int] = field(default_factory=dict)
    maybe: float | None = None


def test_values_of_every_type_are_read() -> None:
    table = {
        "theta": 1,
        "hold": "1m30s",
        "horizon": inf,
        "speed_gb_per_s": 25,
        "at": ["10m", 5],
        "mode": "slow",
        "size": 3,
        "evict": False,
        "name": "x",
        "class": "chat",
        "inner": {"depth": 2},
        "rooms": {"a": 4},
        "maybe": 0.5,
    }
    assert read_record(Outer, table, "p") == Outer(
        theta=1.0,
        hold_s=90.0,
        horizon_s=inf,
        speed_gb_per_s=25.0,
        at=(600.0, 5.0),
        mode="slow",
        size=3,
        evict=False,
        name="x",
        class_="chat",
        inner=Inner(depth=2),
        rooms={"a": 4},
        maybe=0.5,
    )


def test_a_whole_number_becomes_a_float_where_one_is_meant() -> None:
    assert type(read_record(Outer, {"theta": 1}, "p").theta) is float


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"theta": 1, "thetta": 2},
            r"p\.thetta: unknown key \(value 2\); did you mean 'theta'\? allowed: theta, hold,",
        ),
        ({"theta": 1, "hold_s": 2}, r"p\.hold_s: unknown key .*did you mean 'hold'"),
        ({}, r"p: missing theta"),
        ({"theta": "0.5"}, r"p\.theta: '0\.5' must be a finite number"),
        ({"theta": True}, r"p\.theta: True must be a finite number"),
        ({"theta": inf}, r"p\.theta: inf must be a finite number"),
        ({"theta": nan}, r"p\.theta: nan must be a finite number"),
        ({"theta": 1, "hold": "5 minutes"}, r"p\.hold: duration '5 minutes': expected .*45s, 10m"),
        ({"theta": 1, "hold": inf}, r"p\.hold: duration inf must be finite"),
        ({"theta": 1, "horizon": -1}, r"p\.horizon: duration -1 must be finite and not negative"),
        ({"theta": 1, "speed_gb_per_s": "1s"}, r"p\.speed_gb_per_s: '1s' must be a finite number"),
        ({"theta": 1, "at": "10m"}, r"p\.at: '10m' must be a list"),
        ({"theta": 1, "at": ["10m", "x"]}, r"p\.at\[1\]: duration 'x'"),
        ({"theta": 1, "mode": "fsat"}, r"p\.mode: 'fsat'; did you mean 'fast'\? allowed: fast, slow"),
        ({"theta": 1, "size": "all"}, r"p\.size: 'all' must be a whole number or 'auto'"),
        ({"theta": 1, "size": 1.5}, r"p\.size: 1\.5 must be a whole number or 'auto'"),
        ({"theta": 1, "evict": 1}, r"p\.evict: 1 must be true or false"),
        ({"theta": 1, "name": 1}, r"p\.name: 1 must be text in quotes"),
        ({"theta": 1, "inner": 3}, r"p\.inner: 3 must be a table with the keys depth"),
        ({"theta": 1, "inner": {"depth": 0}}, r"p\.inner: depth is 0; it must be 1 or more"),
        ({"theta": 1, "rooms": {"a": 1.5}}, r"p\.rooms\.a: 1\.5 must be a whole number"),
        ({"theta": 1, "maybe": "x"}, r"p\.maybe: 'x' must be a finite number"),
    ],
)
def test_an_error_names_path_value_and_what_is_allowed(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_record(Outer, table, "p")


def test_a_field_that_the_caller_gives_is_no_key() -> None:
    with pytest.raises(ConfigError, match=r"p\.name: unknown key"):
        read_record(Outer, {"theta": 1, "name": "mine"}, "p", name="theirs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Noisy:
    noise: float = 0.0
    noise_s: float = 60.0


def test_a_duration_beside_a_field_of_its_short_name_keeps_its_suffix() -> None:
    assert read_record(Noisy, {"noise": 0.5, "noise_s": "1m"}, "p") == Noisy(noise=0.5, noise_s=60.0)


def test_true_is_not_the_choice_one() -> None:
    with pytest.raises(ConfigError):
        read_value(Literal[1, 2], True, "p")


def test_an_unknown_word_is_answered_with_those_that_share_a_part_of_it() -> None:
    words = ["chiron", "hpa-queue", "keda-hpa", "llm-d-slo"]
    assert suggest("kubernetes-hpa", words).startswith("did you mean 'hpa-queue' or 'keda-hpa'? allowed: chiron, ")
    assert suggest("chirn", words).startswith("did you mean 'chiron'? ")
    assert suggest("vllm", words).startswith("allowed: ")
