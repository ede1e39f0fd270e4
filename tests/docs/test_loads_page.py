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
        "runs": {"1": {"attainment": attainment, "gpu_hours": hours}},
        "failed": {},
        "attainment_worst": min(attainment.values()),
        "gpu_hours": {"mean": hours},
        "gpu_hours_bound_full": 2.0,
    } | more


def runs(*seeds: tuple[float, float, float]) -> dict[str, dict[str, Any]]:
    """By seed: attainment of chat, of batch, GPU-hours."""
    return {
        str(seed): {"attainment": {"chat": chat, "batch": batch}, "gpu_hours": hours}
        for seed, (chat, batch, hours) in enumerate(seeds, 1)
    }


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
    text = tool.page(grids(), "figures/loads.svg", {})
    row = next(line for line in text.splitlines() if line.startswith("| `costly`"))
    assert row.strip("| ").split(" | ")[1:5] == ["95.0%", "75.0%", "3.50x", "1 of 2"]
    assert text.index("| `cheap`") < text.index("| `costly`"), "who keeps more traces at load 1 comes first"
    assert "Load 1: at most 2 of 2 traces are kept, at the least cost by `cheap` (2.25x the bound)" in text
    assert "`make loads`: 2 policies, as published" in text
    assert "on 2 cut traces (`a`, `b`;" in text
    assert row.endswith(" 6 |"), "runs"
    assert text.index("### Load 0.4") < text.index("| `cheap` | **2.00x** | **2.50x** |") < text.index("### Load 1")
    assert "| `costly` | 4.00x | 3.00x (50.0%) |" in text


def test_a_policy_that_failed_somewhere_has_no_figures_there(tool: ModuleType) -> None:
    made = grids()
    made[1]["cells"][0]["failed"] = {"1": "broke"}
    row = next(line for line in tool.page(made, "x.svg", {}).splitlines() if line.startswith("| `costly`"))
    assert row.strip("| ").split(" | ")[1:6] == ["-", "-", "-", "-", "95.0%"]


def test_the_clairvoyant_row_wins_nothing(tool: ModuleType) -> None:
    made = grids()
    for one in made:
        one["policies"].append("clairvoyant")
        one["cells"] += [cell("clairvoyant", load, 1.0, 1.0, 2.0) for load in one["loads"]]
    text = tool.page(made, "x.svg", {})
    assert "| `clairvoyant` | 100.0% | 100.0% | 1.00x |" in text
    assert "by `clairvoyant`" not in text


def test_where_nobody_keeps_a_trace_nobody_is_said_to_at_the_least_cost(tool: ModuleType) -> None:
    made = [
        grid("a", *(cell(p, load, 0.5, 0.5, h) for p, h in (("one", 8.0), ("two", 4.0)) for load in (0.4, 1.0, 2.0)))
    ]
    text = tool.page(made, "x.svg", {})
    assert "- Load 1: at most 0 of 1 traces are kept; most interactive requests" in text
    assert "at the least cost" not in text


def pair(ours: dict[str, Any], rival: dict[str, Any], *, name: str = "rival") -> list[dict[str, Any]]:
    def worst(by_seed: dict[str, Any]) -> float:
        return min(share for run in by_seed.values() for share in run["attainment"].values())

    both = {"chiron": ours, name: rival}
    cells = [cell(p, 1.0, 1.0, 1.0, 4.0, runs=r, attainment_worst=worst(r)) for p, r in both.items()]
    return [grid("a", *cells) | {"loads": [1.0]}]


@pytest.mark.parametrize(
    ("ours", "rival", "better"),
    [
        ([(0.995, 1.0, 4.0)], [(0.99, 1.0, 3.9)], True),
        ([(0.995, 1.0, 4.0)], [(1.0, 1.0, 3.97)], False),  # The same GPU-hours.
        ([(0.995, 1.0, 4.0)], [(0.98, 1.0, 1.0)], False),
        ([(0.98, 1.0, 4.0)], [(0.99, 1.0, 9.0)], True),
        ([(0.98, 1.0, 4.0)], [(0.986, 1.0, 4.0)], True),
        ([(0.98, 1.0, 4.0)], [(0.986, 0.99, 4.0)], False),  # Behind with the batch.
        ([(0.98, 0.9, 4.0)], [(0.98, 0.9, 3.0)], True),
        ([(0.98, 0.9, 4.0)], [(1.0, 0.9, 5.0)], False),  # Ahead for more GPU-hours.
        ([(0.9, 1.0, 4.0), (0.9, 1.0, 4.0), (0.9, 1.0, 1.0)], [(0.9, 1.0, 4.0), (0.9, 1.0, 4.0)], False),  # Same seeds.
    ],
)
def test_a_rival_is_better_where_it_says_so(ours: Any, rival: Any, better: bool, tool: ModuleType) -> None:
    (made,) = pair(runs(*ours), runs(*rival))
    assert [each.policy for each in tool.beaten(made)] == ["rival"] * better
    (known,) = pair(runs(*ours), runs(*rival), name="clairvoyant")
    assert tool.beaten(known) == []


def test_who_is_better_is_said_with_the_figures_and_with_the_reason_where_there_is_one(tool: ModuleType) -> None:
    made = pair(runs((0.98, 1.0, 4.0)), runs((0.995, 1.0, 6.0)))
    row = "| a | 1 | `rival` | chat 99.5%, 98.0%; batch 100.0%, 100.0% | +50.0 % |"
    assert f"{row}  |" in tool.page(made, "x.svg", {})
    reasons = tool.reasons_of('[[reason]]\ntrace = "a"\nload = 1\nwhy = "It waits."', made)
    text = tool.page(made, "x.svg", reasons)
    assert f"{row} It waits. |" in text
    assert "On 0 of 1 pairs of trace and load nobody." in text
    assert tool.stale(made, reasons) == []
    better = pair(runs((1.0, 1.0, 4.0)), runs((0.995, 1.0, 6.0)))
    assert tool.stale(better, reasons) == [("a", 1.0, "")]
    assert "On 1 of 1 pairs of trace and load nobody." in tool.page(better, "x.svg", reasons)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('trace = "z"\nload = 1\nwhy = ""', r"reason\[0\]\.trace: 'z'; must be one of a"),
        ('trace = "a"\nload = 7\nwhy = ""', r"reason\[0\]\.load: 7; must be one of 1\.0"),
        ('trace = "a"\nwhy = ""', r"reason\[0\]\.load: missing"),
        (
            'trace = "a"\nload = 1\nbecause = ""',
            r"reason\[0\]\.because: unknown; allowed are trace, load, policy and why",
        ),
    ],
)
def test_a_reason_that_belongs_nowhere_is_refused(text: str, message: str, tool: ModuleType) -> None:
    made = pair(runs((1.0, 1.0, 4.0)), runs((1.0, 1.0, 6.0)))
    with pytest.raises(tool.PageError, match=message):
        tool.reasons_of(f"[[reason]]\n{text}", made)


def test_runs_that_failed_are_listed(tool: ModuleType) -> None:
    made = grids()
    assert "Runs that failed" not in tool.page(made, "x.svg", {})
    made[1]["cells"][0]["failed"] = {"1": "broke"}
    assert "- `costly` on b at load 0.4, seed 1: broke" in tool.page(made, "x.svg", {})


def test_one_load_makes_a_page_and_a_figure(tool: ModuleType, tmp_path: Path) -> None:
    made = [grid("a", cell("chiron", 1.0, 1.0, 1.0, 4.0)) | {"loads": [1.0]}]
    text = tool.page(made, "x.svg", {})
    assert "at 1 times their rate" in text
    assert "more GPUs than there are" not in text, "there are enough"
    tool.draw(tool.points(made), [1.0], tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")


def test_a_load_at_which_every_run_failed_is_told(tool: ModuleType) -> None:
    failed = [cell("chiron", load, 1.0, 1.0, 4.0, runs={}, failed={"1": "no"}) for load in (1.0, 2.0)]
    text = tool.page([grid("a", cell("chiron", 0.4, 1.0, 1.0, 4.0), *failed)], "x.svg", {})
    assert "- Load 1: no policy has all its runs." in text
    assert "- `chiron` on a at load 2, seed 1: no" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reason = 5", r"reason: 5; must be tables, \[\[reason\]\]"),
        ("reason = [3]", r"reason\[0\]: 3; must be a table, \[\[reason\]\]"),
        ("reasons = []", "reasons: unknown; allowed is reason"),
        ('[[reason]]\ntrace = "a"\nload = 1\nwhy = 5', r"reason\[0\].why: 5; must be a sentence"),
        ('[[reason]]\ntrace = "a"\nload = 1\nwhy = " "', r"reason\[0\].why: ' '; must be a sentence"),
        ('[[reason]]\ntrace = "a"\nload = true\nwhy = "x"', r"reason\[0\].load: True; must be one of 0.4, 1.0, 2.0"),
        (
            '[[reason]]\ntrace = "a"\nload = 1\nwhy = "x"\n[[reason]]\ntrace = "a"\nload = 1.0\nwhy = "y"',
            r"reason\[1\]: a second one of a, load 1",
        ),
    ],
)
def test_a_reason_that_is_none_is_refused_by_its_place(tool: ModuleType, text: str, message: str) -> None:
    with pytest.raises(tool.PageError, match=message):
        tool.reasons_of(text, grids())
