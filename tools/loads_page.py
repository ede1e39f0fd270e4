"""Policies at three loads, as a Markdown page with one table and one figure::

    python tools/loads_page.py --figure FILE.svg FILE.json ... > docs/loads.md

Each file is what ``chiron compare bench/loads/SCENARIO.toml --loads ... --json`` wrote. ``make loads`` makes them all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

TARGET = 0.99
BATCH = "batch"
"""The class of batch work in these scenarios; the others are interactive."""
CLAIRVOYANT = "clairvoyant"
SHOWN = ("chiron", "clairvoyant", "chiron-paper", "chiron-paper-tuned", "llumnix-tuned", "ray-serve-tuned", "static")
"""Named in the figure, if they ran: more cannot be told apart. The others are grey."""
INTRODUCTION = """# Three loads

Every figure on this page was written by `make loads`: {policies} policies (the best of each kind, as published and
tuned; all of them are in [results.md](results.md)) on {scenarios} cut traces ({names}; files in
[bench/loads](../bench/loads)) at {loads} times their rate, seeds {seeds}, {runs:,} runs.

Each file is a window of a packaged scenario with a batch job in proportion, on one and a half times the instances that
its interactive requests need as a fixed fleet (what `initial = "auto"` counts, by no policy). So at load 1 work and
GPUs match, at {least:g} most of the fleet can rest, and at {most:g} there are not enough GPUs for everything: what
counts there is who is still served.

- **interactive**, **batch**: share within its SLO, of the worst class of that kind, the mean over traces and seeds.
- **over bound**: GPU-hours over the least with which any scheduler could keep every SLO ([bound.md](bound.md)), the
  mean over traces.
  The bound is for all SLOs: who misses them can come below it, and below `clairvoyant`. So ratios compare only among
  rows that keep the traces.
- **kept**: traces in which every class has at least 99 % in every seed.
- `clairvoyant` knows the future and pays cold starts and whole instances: an estimate from above of what is possible,
  somebody might find a better schedule. Where it keeps the traces, the least that keeps them lies between the bound
  and it.
- By traces kept at load 1, then by GPU-hours. Each class of each trace, with confidence intervals, is in the pages that
  `make loads` leaves in `out/loads`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A policy at a load, over traces and seeds."""

    interactive: float
    batch: float
    over_bound: float
    kept: int
    traces: int


def point(cells: Sequence[Mapping[str, Any]]) -> Point | None:
    """None: a run failed."""
    if any(cell["failed"] or not cell["runs"] for cell in cells):
        return None
    runs = [run for cell in cells for run in cell["runs"].values()]
    return Point(
        interactive=fmean(_worst(run, batch=False) for run in runs),
        batch=fmean(_worst(run, batch=True) for run in runs),
        over_bound=fmean(cell["gpu_hours"]["mean"] / cell["gpu_hours_bound_full"] for cell in cells),
        kept=sum(cell["attainment_worst"] >= TARGET for cell in cells),
        traces=len(cells),
    )


def _worst(run: Mapping[str, Any], *, batch: bool) -> float:
    return min((share for name, share in run["attainment"].items() if (name == BATCH) == batch), default=1.0)


def points(grids: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, Point]]:
    """By policy and load, of policies that ran in every grid; those that keep most at load 1 first."""
    found: dict[str, dict[float, Point]] = {}
    for policy in grids[0]["policies"]:
        for load in grids[0]["loads"]:
            cells = [
                cell for grid in grids for cell in grid["cells"] if (cell["policy"], cell["load"]) == (policy, load)
            ]
            made = point(cells) if len(cells) == len(grids) else None
            if made is not None:
                found.setdefault(policy, {})[load] = made
    middle = sorted(grids[0]["loads"])[len(grids[0]["loads"]) // 2]

    def rank(policy: str) -> tuple[int, float]:
        at = found[policy].get(middle)
        return (-at.kept, at.over_bound) if at is not None else (1, 0.0)

    return {policy: found[policy] for policy in sorted(found, key=rank)}


def table(found: Mapping[str, Mapping[float, Point]], loads: Sequence[float]) -> str:
    head = [f"{load:g}: {what}" for load in loads for what in ("interactive", "batch", "over bound", "kept")]
    lines = ["| policy | " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(head)]
    for policy, at in found.items():
        cells = [cell for load in loads for cell in _cells(at.get(load))]
        lines.append(f"| `{policy}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(at: Point | None) -> list[str]:
    if at is None:
        return ["-"] * 4
    return [_down(at.interactive), _down(at.batch), f"{at.over_bound:.2f}x", f"{at.kept} of {at.traces}"]


def _down(share: float) -> str:
    """Per cent, rounded down: what is below the target never reads as the target."""
    return f"{int(share * 1e3 + 1e-6) / 10:.1f}%"


def verdict(found: Mapping[str, Mapping[float, Point]], loads: Sequence[float]) -> str:
    """Who keeps most at each load, and for how much less than the next."""
    lines = []
    for load in loads:
        at = {name: each[load] for name, each in found.items() if load in each and name != CLAIRVOYANT}
        most = max(one.kept for one in at.values())
        ranked = sorted((name for name in at if at[name].kept == most), key=lambda name: at[name].over_bound)
        served = max(at, key=lambda name: (at[name].interactive, at[name].batch))
        words = f"- Load {load:g}: at most {most} of {at[ranked[0]].traces} traces are kept"
        if most:
            words += f", at the least cost by `{ranked[0]}` ({at[ranked[0]].over_bound:.2f}x the bound)"
        if most and len(ranked) > 1:
            words += f", then `{ranked[1]}` ({at[ranked[1]].over_bound:.2f}x)"
        lines.append(f"{words}; most interactive requests are served in time by `{served}`.")
    return "\n".join(lines)


def draw(found: Mapping[str, Mapping[float, Point]], loads: Sequence[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "chiron"
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, len(loads), figsize=(4 * len(loads), 6), sharey="row", layout="constrained")
    colours = {name: f"C{place}" for place, name in enumerate(SHOWN)}
    for column, load in enumerate(loads):
        for row, what in enumerate(("interactive", "batch")):
            axes = grid[row][column]
            for name, at in found.items():
                if load in at:
                    axes.plot(
                        at[load].over_bound, 100 * getattr(at[load], what), "o" if name in colours else ".",
                        color=colours.get(name, "0.7"), label=name if name in colours else None,
                        zorder=3 if name in colours else 2,
                    )  # fmt: skip
            axes.axvline(1.0, color="0.6", linestyle=":")
            axes.axhline(100 * TARGET, color="0.85")
            axes.grid(alpha=0.3)
            axes.set(xlabel="GPU-hours over the bound", title=f"load {load:g}" if row == 0 else None, xlim=(0, None))
            if column == 0:
                axes.set(ylabel=f"{what} within SLO, %")
    grid[0][-1].legend(frameon=False, fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def page(grids: Sequence[Mapping[str, Any]], figure: str) -> str:
    loads, seeds = grids[0]["loads"], grids[0]["seeds"]
    found = points(grids)
    runs = sum(len(cell["runs"]) for grid in grids for cell in grid["cells"])
    introduction = INTRODUCTION.format(
        policies=len(found),
        scenarios=len(grids),
        names=", ".join(f"`{grid['scenario']}`" for grid in grids),
        loads=", ".join(f"{load:g}" for load in loads[:-1]) + f" and {loads[-1]:g}",
        seeds=", ".join(map(str, seeds)),
        runs=runs,
        least=min(loads),
        most=max(loads),
    )
    picture = f"![Attainment against GPU-hours at each load, interactive above and batch below]({figure})"
    return "\n\n".join([introduction.rstrip(), verdict(found, loads), table(found, loads), picture]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Every policy at three loads as a Markdown page, on stdout.")
    parser.add_argument("files", metavar="FILE.json", nargs="+", type=Path)
    parser.add_argument("--figure", type=Path, required=True)
    given = parser.parse_args()
    grids = [json.loads(path.read_text(encoding="utf-8")) for path in given.files]
    if len({(tuple(grid["loads"]), tuple(grid["seeds"])) for grid in grids}) > 1:
        parser.error("the files are of different loads or seeds")
    draw(points(grids), grids[0]["loads"], given.figure)
    sys.stdout.write(page(grids, f"figures/{given.figure.name}"))


if __name__ == "__main__":
    main()
