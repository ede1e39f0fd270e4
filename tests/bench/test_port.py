"""The bench of the port: a small run of it. Its figures are for an idle machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.slow
def test_a_small_run_places_and_ends_every_request(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "port.py"), "--instances", "5", "--requests", "200", "--open", "100"]
    subprocess.run([*command, "--json", str(tmp_path / "port.json")], check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "port.json").read_text())
    assert (found["open_requests"], found["late"]) == (100, 0)
    assert found["us_per_request"] > 0.0
