"""The figures on the README's first screen are those of the pages that it links to."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def row(page: str, first_cell: str, after: str = "") -> list[str]:
    """The cells of the first row of a page that begins so, after some heading."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(after or "\n")[2]
    line = next(line for line in text.splitlines() if line.startswith(f"| {first_cell} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def azure(policy: str) -> tuple[float, float]:
    """GPU-hours on azure, and the worst class in any seed in percent: 99 where the page gives none."""
    cell = row("results.md", f"`{policy}`", "## GPU-hours at a glance")[1]
    hours, worst = re.fullmatch(r"\**([\d.]+)\**(?: \(([\d.]+)%\))?", cell).groups()  # type: ignore[union-attr]
    return float(hours), float(worst or 99.0)


def test_gpu_hours_are_those_of_the_results() -> None:
    hours, worst = azure("chiron")
    rival_hours, rival_worst = azure("ray-serve-tuned")
    assert worst == 99.0
    assert f"{hours:.1f} GPU-hours with every class above 99 % in SLO" in README
    assert f"tuned, needs {rival_hours:.1f} and leaves its worst class at {rival_worst:.1f} %" in README


def test_what_protection_gains_and_costs_is_what_was_measured() -> None:
    chiron = row("protection.md", "chiron")
    straight = row("protection.md", "both straight to the engine")

    def seconds(cells: list[str]) -> float:
        return float(cells[2].split(" ms")[0].replace(",", "")) / 1000.0

    assert f"p99 of {seconds(chiron):.2g} s instead of {seconds(straight):.1f} s" in README
    assert f"keeps {chiron[7].split(' %')[0]} % of its throughput" in README
