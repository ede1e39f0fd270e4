"""The figures of published runs as a Markdown page::

    python tools/results_table.py [--figures FOLDER] FILE.json ... > docs/results.md

Each file is what ``chiron compare SCENARIO --json`` wrote, for a grid or not, named ``SCENARIO.json``; one named
``SCENARIO.ablation.json`` holds chiron beside itself with one part off. With ``--figures``, each scenario
shows FOLDER/SCENARIO.svg. ``make figures`` makes them all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

TARGET = 0.99
"""Attainment that every class must reach for a policy to count as one that meets its SLOs."""
ABLATION = ".ablation.json"
WHOLE = "chiron"
"""The row of an ablation that has every part."""

INTRODUCTION = (
    "# Results",
    "Whole packaged traces (`chiron scenarios`), for ours and the best of each kind of rival. Every policy, on parts "
    "of these traces at three loads, is in [loads.md](loads.md). Every figure here was written by `make figures`.",
)
LEGEND = (
    "## How to read it",
    "- **in SLO**: share of all requests of a class that finished with TTFT, mean ITL and deadline met. Rejected and "
    "unfinished ones count as missed.\n"
    "- **GPU-hours**: billed from the start of each model load until the instance is gone.\n"
    "- **over bound**: GPU-hours over the least that any scheduler would have needed for what this run delivered "
    "([bound.md](bound.md)).\n"
    "- **p99**: by class, in the order of the columns before.\n"
    "- **reversed**: changes of the plan against the direction of the one before, within 60 s of it.\n"
    "- Several seeds: the mean, and the range in brackets where it shows.\n"
    "- `-tuned`: with settings that a search found on other traffic ([fair tuning](policies.md#fair-tuning)). Where "
    "they do worse than the published ones, the choice did not carry over to this traffic; the better of the two rows "
    "is the rival.\n"
    f"- Policies with at least {TARGET:.0%} of every class in SLO in every seed come first, the cheapest on top. "
    "The others follow, nearest to it first.",
)


class ResultsError(ValueError):
    """A file that is not the JSON of a comparison."""


Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One policy's runs over all seeds."""

    name: str
    runs: tuple[Row, ...]

    def stat(self, key: str, of: str | None = None) -> tuple[float, float, float] | None:
        """(mean, least, most) over seeds; None where no run has the figure."""
        values = [run[key] if of is None else run[key].get(of) for run in self.runs]
        known = [float(value) for value in values if value is not None]
        return (fmean(known), min(known), max(known)) if known else None

    @property
    def worst(self) -> float:
        """Least attainment of any class in any seed."""
        return min((share for run in self.runs for share in run["attainment"].values()), default=0.0)

    @property
    def attains(self) -> bool:
        return self.worst >= TARGET

    @property
    def gpu_hours(self) -> float:
        return fmean(run["gpu_hours"] for run in self.runs)

    @property
    def over_bound(self) -> float | None:
        ratios = [run["gpu_hours"] / run["gpu_hours_bound"] for run in self.runs if run["gpu_hours_bound"] > 0]
        return fmean(ratios) if ratios else None


def read(path: Path) -> list[Policy]:
    """The policies of one comparison, best first."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read: {error}") from error
    if isinstance(rows, dict) and isinstance(rows.get("cells"), list):  # Of a grid.
        rows = [run | {"policy": cell["policy"]} for cell in rows["cells"] for run in cell["runs"].values()]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "policy" in row for row in rows):
        raise ResultsError(f"{path}: must be what `chiron compare --json` writes: an array of objects with a 'policy'")
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["policy"], []).append(row)
    policies = [Policy(name=name, runs=tuple(runs)) for name, runs in by_name.items()]
    return sorted(policies, key=lambda p: (not p.attains, p.gpu_hours if p.attains else -p.worst, p.gpu_hours))


def classes_of(policies: Sequence[Policy]) -> list[str]:
    return list(dict.fromkeys(name for p in policies for run in p.runs for name in run["attainment"]))


def page(paths: Sequence[Path], pictures: str | None) -> str:
    """The whole document. ``pictures``: folder of the scenarios' figures, as seen from the page."""
    comparisons = {p.name.removesuffix(".json"): read(p) for p in paths if not p.name.endswith(ABLATION)}
    ablations = {p.name.removesuffix(ABLATION): read(p) for p in paths if p.name.endswith(ABLATION)}
    parts = [*INTRODUCTION]
    if len(comparisons) > 1:
        parts += ["## GPU-hours at a glance", glance(comparisons)]
    parts += LEGEND
    for scenario, policies in comparisons.items():
        seeds = sorted({run["seed"] for p in policies for run in p.runs})
        requests = fmean(run["requests"] for p in policies for run in p.runs)
        parts += [
            f"## {scenario}",
            f"{requests:,.0f} requests; seeds {', '.join(map(str, seeds))}. `chiron compare {scenario}"
            + "".join(f" -s {seed}" for seed in seeds)
            + "`",
            comparison(policies),
        ]
        if pictures is not None:
            parts.append(f"![{scenario}: attainment against GPU-hours, fleets, latencies]({pictures}/{scenario}.svg)")
    if ablations:
        parts += [
            "## What each part of chiron buys",
            "The same policy with one part off; settings as in [policies.md](policies.md). "
            "The last column is GPU-hours against the whole.",
        ]
        for scenario, policies in ablations.items():
            parts += [f"### {scenario}", ablation(policies)]
    return "\n\n".join(parts) + "\n"


def glance(comparisons: Mapping[str, Sequence[Policy]]) -> str:
    """Policies by scenarios: GPU-hours where every class meets its SLO, else the worst class in brackets."""
    names = list(dict.fromkeys(p.name for policies in comparisons.values() for p in policies))
    by_scenario = {scenario: {p.name: p for p in policies} for scenario, policies in comparisons.items()}
    rows = []
    for name in names:
        cells = [brief(found.get(name), cheapest(found.values())) for found in by_scenario.values()]
        rows.append([f"`{name}`", *cells])
    legend = (
        f"Where a class falls below {TARGET:.0%}, its attainment follows in brackets. "
        "Bold: the cheapest that meets the SLOs of every class."
    )
    return table(["policy", *comparisons], rows) + "\n\n" + legend


def cheapest(policies: Any) -> Policy | None:
    return min((p for p in policies if p.attains), key=lambda p: p.gpu_hours, default=None)


def brief(policy: Policy | None, best: Policy | None) -> str:
    if policy is None:
        return ""
    hours = f"{policy.gpu_hours:.2f}"
    if not policy.attains:
        return f"{hours} ({down(policy.worst)})"
    return f"**{hours}**" if policy is best else hours


def comparison(policies: Sequence[Policy]) -> str:
    classes = classes_of(policies)
    head = ["policy", *(f"{name} in SLO" for name in classes)]
    head += ["GPU-hours", "over bound", "cost", "p99 TTFT s", "p99 ITL ms", "late batch", "plan changes", "reversed"]
    head += ["peak GPUs"]
    rows = [[f"`{p.name}`", *figures(p, classes), cell(p.stat("gpus_peak"), "{:.0f}".format)] for p in policies]
    return table(head, rows)


def ablation(policies: Sequence[Policy]) -> str:
    whole = next((p for p in policies if p.name == WHOLE), None)
    if whole is None:
        raise ResultsError(f"an ablation needs a policy named {WHOLE!r}; it has {', '.join(p.name for p in policies)}")
    classes = classes_of(policies)
    head = ["part", *(f"{name} in SLO" for name in classes), "GPU-hours", "over bound", "late batch", "reversed"]
    rows = []
    for policy in [whole, *(p for p in policies if p is not whole)]:
        share = policy.gpu_hours / whole.gpu_hours - 1.0
        rows.append(
            [
                "all of it" if policy is whole else policy.name.replace("-", " "),
                *(cell(policy.stat("attainment", name), down) for name in classes),
                cell(policy.stat("gpu_hours"), "{:.2f}".format),
                ratio(policy.over_bound),
                cell(policy.stat("batch_late"), "{:,.0f}".format),
                cell(policy.stat("reversals"), "{:.0f}".format),
                "" if policy is whole else f"{share:+.1%}",
            ]
        )
    return table([*head, "against all"], rows)


def figures(policy: Policy, classes: Sequence[str]) -> list[str]:
    return [
        *(cell(policy.stat("attainment", name), down) for name in classes),
        cell(policy.stat("gpu_hours"), "{:.2f}".format),
        ratio(policy.over_bound),
        cell(policy.stat("cost"), "{:.2f}".format),
        by_class(policy, "ttft_s", classes, "{:.2f}".format, 1.0),
        by_class(policy, "itl_s", classes, "{:.0f}".format, 1000.0),
        cell(policy.stat("batch_late"), "{:,.0f}".format),
        cell(policy.stat("scaling_actions"), "{:.0f}".format),
        cell(policy.stat("reversals"), "{:.0f}".format),
    ]


def by_class(policy: Policy, key: str, classes: Sequence[str], show: Callable[[float], str], unit: float) -> str:
    """p99 of each class, in their order, the mean over seeds."""
    shown = []
    for name in classes:
        known = [run[key][name]["p99"] for run in policy.runs if name in run[key]]
        known = [value for value in known if value is not None]
        shown.append(show(unit * fmean(known)) if known else "-")
    return " / ".join(shown)


def cell(stat: tuple[float, float, float] | None, show: Callable[[float], str]) -> str:
    if stat is None:
        return "-"
    mean, least, most = (show(value) for value in stat)
    return mean if least == most else f"{mean} ({least}-{most})"


def down(share: float) -> str:
    """Per cent, rounded down: what is below the target never reads as the target."""
    return f"{int(share * 1e4 + 1e-6) / 100:.2f}%"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; all columns but the first to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Published results as a Markdown page, on stdout.")
    parser.add_argument("files", metavar="FILE.json", nargs="+", type=Path)
    parser.add_argument("--figures", metavar="FOLDER", help="where the page finds SCENARIO.svg")
    options = parser.parse_args()
    try:
        sys.stdout.write(page(options.files, options.figures))
    except ResultsError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
