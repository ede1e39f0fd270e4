"""The page of published figures: arithmetic by hand, and the real JSON of a real comparison."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import results_table
from chiron.cli import app
from scenario_text import SMALL


def page(*arguments: str | Path) -> str:
    """What the tool prints."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(sys, "argv", [results_table.__file__, *map(str, arguments)])
        results_table.main()
    return printed.getvalue()


def run(policy: str, seed: int, chat: float, gpu_hours: float, bound: float = 2.0) -> dict[str, Any]:
    figures = {"mean": 0.5, "p50": 0.5, "p90": 0.5, "p99": 1.25}
    return {
        "policy": policy,
        "seed": seed,
        "requests": 1000,
        "attainment": {"chat": chat, "batch": 1.0},
        "ttft_s": {"chat": figures, "batch": figures},
        "itl_s": {"chat": figures, "batch": {**figures, "p99": None}},
        "gpu_hours": gpu_hours,
        "gpu_hours_bound": bound,
        "cost": 2 * gpu_hours,
        "batch_late": 0,
        "scaling_actions": 7,
        "reversals": 1,
        "gpus_peak": 12,
    }


def rows(text: str) -> dict[str, list[str]]:
    """Table rows by first cell, the last table that has it winning."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {line[0]: line[1:] for line in cells}


def write(path: Path, runs: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(runs))
    return path


def test_figures_are_means_over_seeds_with_their_range(tmp_path: Path) -> None:
    file = write(tmp_path / "azure.json", [run("chiron", 1, 0.995, 4.0), run("chiron", 2, 1.0, 5.0, bound=4.0)])
    row = rows(page(file))["`chiron`"]
    assert row[0] == "99.75% (99.50%-100.00%)"
    assert row[2] == "4.50 (4.00-5.00)"
    assert row[3] == "1.62x"  # (4/2 + 5/4) / 2
    assert row[5] == "1.25 / 1.25"
    assert row[6] == "1250 / -"


def test_those_that_attain_come_first_and_cheapest_first(tmp_path: Path) -> None:
    runs = [
        run("cheap-but-late", 1, 0.5, 1.0),
        run("dear", 1, 1.0, 9.0),
        run("nearly", 1, 0.98999, 2.0),
        run("best", 1, 0.99, 5.0),
    ]
    text = page(write(tmp_path / "azure.json", runs))
    order = [name for name in rows(text) if name.startswith("`")]
    assert order == ["`best`", "`dear`", "`nearly`", "`cheap-but-late`"]
    assert rows(text)["`nearly`"][0] == "98.99%"


def test_one_bad_seed_is_enough_to_miss_the_target(tmp_path: Path) -> None:
    runs = [
        run("uneven", 1, 1.0, 1.0),
        run("uneven", 2, 0.985, 1.0),
        run("even", 1, 0.99, 3.0),
        run("even", 2, 0.99, 3.0),
    ]
    text = page(write(tmp_path / "a.json", runs), write(tmp_path / "b.json", runs))
    glance = rows(text.split("## a")[0])
    assert glance["`even`"] == ["**3.00**", "**3.00**"]
    assert glance["`uneven`"] == ["1.00 (98.50%)", "1.00 (98.50%)"]


def test_each_scenario_shows_its_figure_only_if_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "azure.json", [run("chiron", 1, 1.0, 4.0)])
    assert "](figures/azure.svg)" in page("--figures", "figures", file)
    assert ".svg" not in page(file)


def test_an_ablation_is_compared_with_the_whole(tmp_path: Path) -> None:
    runs = [run("no-batch-plan", 1, 1.0, 5.0), run("chiron", 1, 1.0, 4.0)]
    text = page(write(tmp_path / "azure.ablation.json", runs))
    assert rows(text)["no batch plan"][-1] == "+25.0%"
    assert rows(text)["all of it"][-1] == ""


@pytest.mark.parametrize("content", ["", "{}", "[]", '[{"seed": 1}]'])
def test_a_file_of_something_else_is_named(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "odd.json"
    file.write_text(content)
    with pytest.raises(SystemExit) as ended:
        page(file)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "odd.json" in said


def test_it_reads_what_compare_writes(tmp_path: Path) -> None:
    scenario, out = tmp_path / "small.toml", tmp_path / "small.json"
    scenario.write_text(SMALL)
    words = ["-p", "static", "-s", "1", "-s", "2", "--json", str(out), "--jobs", "1"]
    done = CliRunner().invoke(app, ["compare", str(scenario), *words])
    assert done.exit_code == 0, done.output
    row = rows(page(out))["`static`"]
    hours = [r["gpu_hours"] for r in json.loads(out.read_text())]
    assert row[2].startswith(f"{sum(hours) / 2:.2f}")
    assert len(row) == 11


def test_a_grid_is_read_like_a_list_of_runs(tmp_path: Path) -> None:
    runs = [run("chiron", 1, 0.995, 4.0), run("chiron", 2, 1.0, 5.0, bound=4.0), run("static", 1, 0.9, 9.0)]
    cells = [
        {"policy": name, "load": 1.0, "runs": {str(each["seed"]): each for each in runs if each["policy"] == name}}
        for name in ("chiron", "static")
    ]
    for number, text in enumerate((runs, {"cells": cells})):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "azure.json").write_text(json.dumps(text))
    assert page(tmp_path / "1" / "azure.json") == page(tmp_path / "0" / "azure.json")
