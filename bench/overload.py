"""Goodput against offered load, for every policy, on a fleet that may not grow::

    python bench/overload.py [--json FILE] [--figure FILE.svg] [--policies chiron ...] > section.md

Runs the packaged scenario ``overload`` at 0.5 to 4 times its rate. Goodput is requests per second of arrivals that were
served with TTFT and ITL met. The law: it does not fall as the load grows beyond what the fleet carries.
``make figures`` puts it into docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import chiron
from chiron.policies.registry import POLICIES

SCENARIO = "overload"
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
SHOWN = ("chiron", "chiron, refusing", "chiron-paper-tuned", "llumnix-tuned", "niyama", "static")
"""In the figure: more lines cannot be told apart."""
REFUSING = "policies.chiron.overload.refuse=true"


HEADING = """
## Overload

Four A100 that may not become more, with 0.5 to 4 times the load that they carry (scenario `overload`, `--scale`).
Requests per second that were served with TTFT and ITL met, of those offered. `python bench/overload.py`
"""


def goodput(result: chiron.Result) -> tuple[float, float]:
    """(offered, served in time), requests per second of arrivals."""
    table = result.requests
    span_s = float(table.arrival_s[-1])
    return len(table.arrival_s) / span_s, float(table.attained(result.classes).sum()) / span_s


def measure(policies: list[str], seeds: list[int]) -> dict[str, list[tuple[float, float]]]:
    """By policy: (offered, goodput) for each scale, means over seeds."""
    found: dict[str, list[tuple[float, float]]] = {}
    for scale in SCALES:
        print(f"{scale:g}x", file=sys.stderr)
        runs = [(policies, {name: name for name in policies}, [])]
        if "chiron" in policies:
            runs.append((["chiron"], {"chiron": "chiron, refusing"}, [REFUSING]))
        for names, labels, extra in runs:
            results = chiron.compare(SCENARIO, names, seeds, overrides=[f"scale={scale}", *extra])
            for number, name in enumerate(names):
                points = [goodput(result) for result in results[number * len(seeds) :][: len(seeds)]]
                mean = tuple(sum(values) / len(points) for values in zip(*points, strict=True))
                found.setdefault(labels[name], []).append(mean)  # type: ignore[arg-type]
    return found


def table(found: dict[str, list[tuple[float, float]]]) -> str:
    """Markdown: goodput, and its share of the best that the same policy reaches."""
    lines = ["| policy | " + " | ".join(f"{scale:g}x" for scale in SCALES) + " | 4x of its best |"]
    lines.append("| --- |" + " ---: |" * (len(SCALES) + 1))
    offered = next(iter(found.values()))
    lines.append("| offered | " + " | ".join(f"{load:.1f}" for load, _ in offered) + " | |")
    for name, points in sorted(found.items(), key=lambda item: -item[1][-1][1]):
        best = max(served for _, served in points)
        cells = " | ".join(f"{served:.1f}" for _, served in points)
        lines.append(f"| `{name}` | {cells} | {points[-1][1] / best:.0%} |")
    return "\n".join(lines)


def draw(found: dict[str, list[tuple[float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "chiron"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name in [name for name in SHOWN if name in found]:
        axes.plot(*zip(*found[name], strict=True), marker="o", markersize=4, label=name)
    top = max(served for points in found.values() for _, served in points)
    axes.plot([0, top], [0, top], color="0.6", linestyle=":", label="all that is offered")
    axes.set(xlabel="offered, requests/s", ylabel="served within their SLO, requests/s", xlim=0, ylim=0)
    axes.set_title("Four A100 that may not become more")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    arguments = parser.parse_args()
    found = measure(arguments.policies, arguments.seeds)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if arguments.figure:
        draw(found, arguments.figure)
    print(HEADING)
    if arguments.figure:
        print(f"![Requests per second served in time against those offered](figures/{arguments.figure.name})\n")
    print(table(found))


if __name__ == "__main__":
    main()
