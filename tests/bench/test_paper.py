"""The page on the paper's claims: what its figures mean, and what it is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "paper.py"
sys.path.insert(0, str(BENCH.parent))

from paper import CLAIMS, Section, page, settles_s, spread  # noqa: E402


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param([(0.0, 64)], 0.0, id="it never moved"),
        pytest.param([(0.0, 64), (20.0, 500)], 20.0, id="one step"),
        pytest.param([(0.0, 64), (20.0, 500), (40.0, 440), (60.0, 560)], 20.0, id="within a quarter"),
        pytest.param([(0.0, 64), (20.0, 500), (400.0, 200), (410.0, 500)], 410.0, id="a halving late"),
    ],
)
def test_settled_is_when_it_last_was_far_from_its_median(sizes: list[tuple[float, int]], expected: float) -> None:
    assert settles_s(sizes) == expected


def test_a_spread_is_shown_where_there_is_one() -> None:
    assert spread([0.5, 0.5], lambda value: f"{value:.1f}") == "0.5"
    assert spread([0.25, 0.75], lambda value: f"{value:.2f}") == "0.50 (0.25 to 0.75)"


def test_the_page_has_each_verdict_in_its_first_table() -> None:
    section = Section(
        title="A claim, checked",
        claim="c",
        source="s",
        setting="t",
        head=("a", "b"),
        rows=[("1", "2")],
        verdict="partly: because",
    )
    text = page([section], seeds=2, runs=4)
    assert "| [A claim, checked](#a-claim-checked) | partly |" in text
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |" in text
    assert "means over 2 seeds" in text


def test_an_unknown_claim_is_refused_with_those_that_there_are() -> None:
    done = subprocess.run(
        [sys.executable, BENCH, "--only", "attainment,speed"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert f"--only names 'speed'; there are: {', '.join(CLAIMS)}" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_a_claim_runs(tmp_path: Path) -> None:
    out = tmp_path / "paper.md"
    subprocess.run(
        [sys.executable, BENCH, "--only", "convergence", "--seeds", "1", "--jobs", "1", "--out", out],
        check=True,
        capture_output=True,
        timeout=1200,
    )
    assert "| 8B | chiron-paper |" in out.read_text(encoding="utf-8")
