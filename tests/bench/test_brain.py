"""The bench of the brain: its waits by hand, and a small run of it. Its figures are for an idle machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

from brain import LOOPS, waits_us  # noqa: E402


def test_a_placement_waits_for_what_came_before_it() -> None:
    # Four inputs of 100 us in 0.3 s: squeezed to 400 us at full load, they come every 133 us.
    order = [(0.0, 100_000, True), (0.1, 100_000, True), (0.1, 100_000, False), (0.3, 100_000, True)]
    assert waits_us(order, load=1.0) == pytest.approx([100.0, 100.0, 100.0])
    # As long as one takes 500 us, those that come meanwhile wait.
    order[0] = (0.0, 500_000, True)
    assert waits_us(order, load=1.0) == pytest.approx([100.0, 500.0 + 100.0 - 800.0 / 3, 500.0])


@pytest.mark.slow
def test_a_small_run_places_every_request(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "brain.py"), "--instances", "5", "--rate", "20", "--seconds", "10"]
    subprocess.run([*command, "--json", str(tmp_path / "brain.json")], check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "brain.json").read_text())
    assert found["placed"] > 100
    assert {cost["what"] for cost in found["costs"]} >= {"arrival", "first token", "end", "round of samples"}
    placement = [c["per_placement_us"] for c in found["costs"] if c["what"] not in LOOPS]
    assert found["us_per_placement"] == pytest.approx(sum(placement))
    loops_s = sum(c["count"] * c["mean_us"] for c in found["costs"] if c["what"] in LOOPS) / 1e6
    assert found["loops_share"] == pytest.approx(loops_s / 10.0)
    assert found["placements_per_s"] == pytest.approx((1.0 - found["loops_share"]) * 1e6 / sum(placement))


def test_what_comes_together_is_taken_together_and_all_of_it(tmp_path: Path) -> None:
    found = {}
    for together in (1, 8):
        command = [sys.executable, str(BENCH / "brain.py"), "--instances", "5", "--rate", "20", "--seconds", "3"]
        command += ["--together", str(together), "--json", str(tmp_path / "brain.json")]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        found[together] = json.loads((tmp_path / "brain.json").read_text())
    assert found[8]["placed"] == found[1]["placed"] > 20
    counts = {each["what"]: each["count"] for each in found[8]["costs"]}
    assert counts["inputs, several at a time"] > 0
