"""The page of three loads: its arithmetic by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "loads_page.py"
    spec = importlib.util.spec_from_file_location("loads_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cell(policy: str, load: float, chat: float, batch: float, hours: float, **more: Any) -> dict[str, Any]:
    attainment = {"chat": chat, "api": 1.0, "batch": batch}
    return {
        "policy": policy,
        "load": load,
        "runs": {"1": {"attainment": attainment}},
        "failed": {},
        "attainment_worst": min(attainment.values()),
        "gpu_hours": {"mean": hours},
        "gpu_hours_bound_full": 2.0,
    } | more


def grid(name: str, *cells: dict[str, Any]) -> dict[str, Any]:
    policies = list(dict.fromkeys(one["policy"] for one in cells))
    return {"scenario": name, "loads": [0.4, 1.0, 2.0], "seeds": [1], "policies": policies, "cells": list(cells)}


def grids() -> list[dict[str, Any]]:
    loads = (0.4, 1.0, 2.0)
    return [
        grid("a", *(cell(p, load, 1.0, 1.0, h) for p, h in (("costly", 8.0), ("cheap", 4.0)) for load in loads)),
        grid(
            "b",
            *(cell("costly", load, 0.9, 0.5, 6.0) for load in loads),
            *(cell("cheap", load, 0.995, 1.0, 5.0) for load in loads),
        ),
    ]


def test_a_row_has_the_mean_of_the_worst_classes_and_of_the_ratios_to_the_bound(tool: ModuleType) -> None:
    text = tool.page(grids(), "figures/loads.svg")
    row = next(line for line in text.splitlines() if line.startswith("| `costly`"))
    assert row.strip("| ").split(" | ")[1:5] == ["95.0%", "75.0%", "3.50x", "1 of 2"]
    assert text.index("| `cheap`") < text.index("| `costly`"), "who keeps more traces at load 1 comes first"
    assert "Load 1: at most 2 of 2 traces are kept, at the least cost by `cheap` (2.25x the bound)" in text
    assert "2 policies (the best of each kind" in text
    assert "on 2 cut traces (`a`, `b`;" in text


def test_a_policy_that_failed_somewhere_has_no_figures_there(tool: ModuleType) -> None:
    made = grids()
    made[1]["cells"][0]["failed"] = {"1": "broke"}
    row = next(line for line in tool.page(made, "x.svg").splitlines() if line.startswith("| `costly`"))
    assert row.strip("| ").split(" | ")[1:6] == ["-", "-", "-", "-", "95.0%"]


def test_the_clairvoyant_row_wins_nothing(tool: ModuleType) -> None:
    made = grids()
    for one in made:
        one["policies"].append("clairvoyant")
        one["cells"] += [cell("clairvoyant", load, 1.0, 1.0, 2.0) for load in one["loads"]]
    text = tool.page(made, "x.svg")
    assert "| `clairvoyant` | 100.0% | 100.0% | 1.00x |" in text
    assert "by `clairvoyant`" not in text


def test_where_nobody_keeps_a_trace_nobody_is_said_to_at_the_least_cost(tool: ModuleType) -> None:
    made = [
        grid("a", *(cell(p, load, 0.5, 0.5, h) for p, h in (("one", 8.0), ("two", 4.0)) for load in (0.4, 1.0, 2.0)))
    ]
    text = tool.page(made, "x.svg")
    assert "- Load 1: at most 0 of 1 traces are kept; most interactive requests" in text
    assert "at the least cost" not in text
