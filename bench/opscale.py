"""A published table repeated in shape: several scalers on one engine, OpScale's (arXiv 2608.13499, by notes)::

    python bench/opscale.py [--minutes 60] [--scale 5] [--seeds 1]

The paper ports the scaling of DynamoLLM, of vLLM's production stack and of AIBrix onto one engine, on 40 A100 with
929,000 requests, and gives the GPUs that each uses on the mean beside its own, which scales operators and not models.
Here the same three scale whole instances of an 8B model on at most 40 A100, on Azure's two traces, by the same step
times, cold starts and router; as published, tuned where that was done, and ``chiron`` beside them. There is no row for
OpScale itself: the simulator has no operators, and its stages are a model's layers. Trace, model and SLOs are not the
paper's, so the order and the ratios are what can be compared, and only among those that keep the SLO. DynamoLLM's
first decisions come after 6 and 36 minutes; what is run for less shows the fleet that it was given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import chiron
from chiron.config.scenario import Scenario, parse_scenario
from chiron.studies.objective import worst_class

TARGET = 0.99
MINUTES_LEAST = 60
SCENARIO = """
name = "opscale"
[classes.chat]
kind = "interactive"
ttft = "5s"
itl = "200ms"
[classes.code]
kind = "interactive"
ttft = "5s"
itl = "200ms"
[models.m]
instances = [{{ profile = "llama-3.1-8b/a100/tp1" }}]
max_instances = 40
[gpus]
a100 = 40
[[workload]]
trace = "azure-2023-conv"
model = "m"
class = "chat"
duration = "{minutes}m"
rate_scale = {scale}
[[workload]]
trace = "azure-2023-code"
model = "m"
class = "code"
duration = "{minutes}m"
rate_scale = {scale}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A row of the paper's: a dense model."""

    gpus: float
    attained: str


OPSCALE = Published(gpus=7.1, attained="98.4 %")
OTHERS = "88 to 95 %"
PUBLISHED = {
    "dynamollm": Published(gpus=11.2, attained=OTHERS),
    "hpa-queue": Published(gpus=13.0, attained=OTHERS),
    "aibrix-apa": Published(gpus=14.3, attained=OTHERS),
}
"""The production stack's chart scales by an HPA on waiting requests."""
POLICIES = (
    "chiron",
    "dynamollm",
    "hpa-queue",
    "hpa-queue-tuned",
    "aibrix-apa",
    "aibrix-apa-tuned",
    "aibrix-optimizer",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    policy: str
    gpus: float
    """Used on the mean, over the time that requests come; as the attainment, over the seeds."""
    attained: float
    """Of the worst class."""


def scenario(minutes: int, scale: float) -> Scenario:
    return parse_scenario(SCENARIO.format(minutes=minutes, scale=scale), directory=Path(), name="opscale")


def rows(minutes: int, scale: float, seeds: Sequence[int], policies: Sequence[str] = POLICIES) -> list[Row]:
    made = []
    for policy in policies:
        results = chiron.compare(scenario(minutes, scale), [policy], seeds)
        gpus = [result.summary["gpu_hours"] * 60.0 / minutes for result in results]
        attained = [worst_class(result.summary) for result in results]
        made.append(Row(policy=policy, gpus=fmean(gpus), attained=fmean(attained)))
        print(made[-1], file=sys.stderr)
    return made


def table(found: Sequence[Row]) -> str:
    """Beside the paper's; the last column is over the fewest GPUs of those that keep the SLO."""
    able = [row.gpus for row in found if row.attained >= TARGET]
    lines = [
        "| policy | published GPUs | over OpScale | published in SLO | GPUs | worst class in SLO | over the fewest |",
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| OpScale | {OPSCALE.gpus} | 1.00x | {OPSCALE.attained} | | | |",
    ]
    for row in found:
        paper = PUBLISHED.get(row.policy)
        said = f"{paper.gpus} | {paper.gpus / OPSCALE.gpus:.2f}x | {paper.attained}" if paper else " |  | "
        over = f"{row.gpus / min(able):.2f}x" if able and row.attained >= TARGET else "misses 99 %"
        lines.append(f"| `{row.policy}` | {said} | {row.gpus:.1f} | {100 * row.attained:.1f} % | {over} |")
    return "\n".join(lines)


def minutes(text: str) -> int:
    if int(text) < MINUTES_LEAST:
        raise argparse.ArgumentTypeError(
            f"{text} are too few: DynamoLLM decides after 6 and 36; at least {MINUTES_LEAST}"
        )
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("::")[0])
    parser.add_argument("--minutes", type=minutes, default=MINUTES_LEAST)
    parser.add_argument("--scale", type=float, default=5.0, help="of the traces' rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    given = parser.parse_args()
    print(table(rows(given.minutes, given.scale, given.seeds)))


if __name__ == "__main__":
    main()
