"""The bench of the simulator's speed works. What it measures is in docs/speed.md: no test is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench_files import bench_file

BENCH = Path(__file__).parents[2] / "bench" / "simulator.py"


def bench(tmp_path: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path / "speed.json"
    subprocess.run([sys.executable, str(BENCH), *options, "--json", str(out)], check=True, capture_output=True)
    figures: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    return figures


@pytest.mark.slow
def test_the_bench_finishes_every_request(tmp_path: Path) -> None:
    figures = bench(tmp_path, "--quick")
    assert set(figures) == {"fleet", "builds", "scaling", "million"}
    for timing in [timing for group in figures.values() for timing in group]:
        assert timing["finished"] == timing["requests"] > 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--repeat", "0"], "at least 1"),
        (["--json", "/no/such/place.json"], "no directory"),
        (["--compiled", "/no/such/place"], "no compiled build"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    options: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_file("simulator").main(options)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert why in said.err
    assert said.out == ""
