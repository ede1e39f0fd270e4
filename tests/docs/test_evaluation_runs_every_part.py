"""tools/evaluation.py: a part that fails costs itself only, and what is left follows the pace of what ran."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "evaluation.py"
    spec = importlib.util.spec_from_file_location("evaluation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Made:
    """Makes targets in virtual time: each takes so many minutes and ends with a status."""

    def __init__(self, minutes: dict[str, float], status: dict[str, int] | None = None) -> None:
        self.minutes = minutes
        self.status = status or {}
        self.now_s = 0.0
        self.said: list[str] = []

    def __call__(self, target: str) -> int:
        self.now_s += 60.0 * self.minutes[target]
        return self.status.get(target, 0)


def run(tool: ModuleType, made: Made, *parts: str) -> str:
    done = tool.run_all([tool.part_of(part) for part in parts], made, lambda: made.now_s, made.said.append)
    return str(tool.summary(done, len(parts)))


def test_what_is_left_follows_the_pace_of_what_has_run(tool: ModuleType) -> None:
    made = Made({"a": 20.0, "known": 0.1, "c": 10.0})
    words = run(tool, made, "a=10", "known=10", "c=5")
    assert made.said == [
        "part 1 of 3: a; about 25 min left",
        "part 2 of 3: known; about 30 min left",
        "part 3 of 3: c; about 10 min left",
    ]
    assert words.splitlines()[-1] == "3 of 3 parts in 30.1 min"


def test_a_part_that_fails_costs_itself_only_and_is_told_at_the_end(tool: ModuleType) -> None:
    made = Made({"a": 1.0, "b": 1.0}, {"a": 2})
    words = run(tool, made, "a=1", "b=1")
    assert words.splitlines()[-1].startswith("1 of 2 parts in 2.0 min; failed: a. The same command goes on")
    assert words.startswith("failed (2)")


def test_one_that_is_stopped_ends_all(tool: ModuleType) -> None:
    made = Made({"a": 1.0, "b": 1.0}, {"a": tool.INTERRUPTED})
    run(tool, made, "a=1", "b=1")
    assert len(made.said) == 1


@pytest.mark.parametrize("text", ["a", "a=", "=1", "a=-1", "a=x", "a=nan"])
def test_a_part_without_an_estimate_is_refused(text: str, tool: ModuleType) -> None:
    with pytest.raises(ValueError, match="must be TARGET=MINUTES"):
        tool.part_of(text)
