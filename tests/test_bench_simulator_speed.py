"""The simulator's speed, well on the safe side of what docs/speed.md publishes, so that a busy machine passes too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "simulator.py"


def bench(tmp_path: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path / "speed.json"
    subprocess.run([sys.executable, str(BENCH), *options, "--json", str(out)], check=True, capture_output=True)
    figures: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    return figures


@pytest.mark.slow
def test_the_bench_finishes_every_request_and_meets_its_floors(tmp_path: Path) -> None:
    figures = bench(tmp_path, "--repeat", "2")
    for timing in [timing for group in figures.values() for timing in group]:
        assert timing["finished"] == timing["requests"]
    chiron = figures["fleet"][0]
    assert (chiron["instances"], chiron["requests"]) == (50, 50_000)
    assert chiron["requests"] / chiron["cpu_s"] > 20_000
    (million,) = figures["million"]
    assert million["requests"] == 1_000_000
    assert million["cpu_s"] < 60
    assert million["rss_mib"] < 2048
    small, large = figures["scaling"][0], figures["scaling"][-1]
    assert (small["instances"], large["instances"]) == (10, 5_000)
    assert large["cpu_s"] / large["requests"] < 3 * small["cpu_s"] / small["requests"]


@pytest.mark.parametrize(
    ("options", "why"),
    [(["--repeat", "0"], "at least 1"), (["--json", "/no/such/place.json"], "no directory")],
)
def test_bad_options_are_refused_before_anything_runs(options: list[str], why: str) -> None:
    done = subprocess.run([sys.executable, str(BENCH), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert why in done.stderr
    assert done.stdout == ""
