"""``chiron`` on traffic that nothing in it was chosen for, beside who knows the future::

    python bench/unseen.py [NAME ...] [--policies chiron ...] [--set PATH=VALUE ...] [--seeds 11 12] [--after 0]
    python bench/unseen.py --drawn 200-205 --policies chiron clairvoyant --write docs/unseen.md

Eleven workloads on small fleets, each under a minute to run: bursts, spikes that come once, a surge that comes back,
swings, long prompts beside short answers, tight SLOs, a large model that starts slowly, and batch jobs of several
kinds. They are ours, so they show what a rule does to kinds of traffic; they are no sample of what anybody sends.
Their parameters were written down before any rule was tried on them, but for two: ``rush`` and ``due`` came later, to
see what a limit on growth for batch work does.

``--drawn`` has scenarios drawn at random (``drawn_traffic``), each after an hour of history that is not counted. Those
below number 100 are for looking at; the others judge, and are used up by it.

A line a run: attainment of the worst class, of each class, GPU-hours, these over the lower bound for what was
delivered, and, with ``clairvoyant`` among the policies, over its.

Where there is no batch work the page splits the distance from the bound (``split``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

import chiron
from chiron.config.build import setups, workload_of
from chiron.config.scenario import Scenario, parse_scenario
from chiron.policies.chiron.scheduled import CLAIRVOYANT
from chiron.sim.clairvoyant import best_schedule, problem_of
from chiron.sim.run import simulate
from chiron.sim.setup import Setup
from drawn_traffic import drawn

HEAD = """
[classes.chat]
kind = "interactive"
ttft = "{ttft}"
itl = "{itl}"

[classes.batch]
kind = "batch"
deadline = "30m"

[models.m]
instances = [{{ profile = "{profile}" }}]
max_instances = {most}
"""
STREAM = """
[[workload]]
model = "m"
class = "chat"
{more}
generate = {{ {arrivals}, lengths = {{ {lengths} }} }}
"""
JOB = """
[[batch_job]]
model = "m"
class = "batch"
at = "{at}"
requests = {requests}
lengths = {{ {lengths} }}
deadline = "{deadline}"
"""
CHAT = "input = { p50 = 700, p99 = 5000 }, output = { p50 = 220, p99 = 1000 }"
TERSE = "input = { p50 = 1200, p99 = 9000 }, output = { p50 = 25, p99 = 250 }"
LONG = "input = { mean = 28000, cv = 0.3 }, output = { p50 = 60, p99 = 400 }"
ITEMS = "input = { p50 = 600, p99 = 4000 }, output = { p50 = 180, p99 = 800 }"
ESSAYS = "input = { p50 = 300, p99 = 2000 }, output = { p50 = 400, p99 = 4000 }"
CODE = "input = { p50 = 2500, p99 = 12000 }, output = { p50 = 40, p99 = 300 }"


def head(*, ttft: str = "5s", itl: str = "200ms", profile: str = "llama-3.1-8b/a100/tp1", most: int = 30) -> str:
    return HEAD.format(ttft=ttft, itl=itl, profile=profile, most=most)


def stream(arrivals: str, lengths: str = CHAT, *, more: str = "") -> str:
    return STREAM.format(arrivals=arrivals, lengths=lengths, more=more)


def job(*, at: str, requests: int, deadline: str, lengths: str = ITEMS) -> str:
    return JOB.format(at=at, requests=requests, deadline=deadline, lengths=lengths)


UNSEEN = {
    # Bursts of a few seconds without any memory.
    "bursty": head() + stream('kind = "gamma", rate = 25, cv = 7, duration = "60m"'),
    # One spike of five times the load, after 40 quiet minutes, and a smaller one later.
    "once": head()
    + stream('kind = "poisson", rate = 12, duration = "80m"')
    + stream('kind = "poisson", rate = 50, duration = "90s"', more='offset = "42m"')
    + stream('kind = "poisson", rate = 30, duration = "120s"', more='offset = "63m"'),
    # Comes back every 17 minutes.
    "recurring": head()
    + stream('kind = "spikes", rate = 10, factor = 3.5, length = "150s", period = "17m", cv = 1.5, duration = "150m"'),
    # Swings within minutes, with noise.
    "swings": head()
    + stream(
        'kind = "diurnal", rate = 22, peak_to_trough = 5, period = "25m", noise = 0.25, noise_s = 45, cv = 2,'
        ' duration = "75m"'
    ),
    # Two prompts in a hundred beyond 20,000 tokens, most answers under 30.
    "long": head(itl="100ms")
    + stream('kind = "gamma", rate = 25, cv = 2, duration = "50m"', TERSE)
    + stream('kind = "gamma", rate = 0.4, cv = 1.5, duration = "50m"', LONG),
    # Interactive in the narrow sense.
    "tight": head(ttft="1s", itl="50ms", most=50)
    + stream('kind = "diurnal", rate = 40, peak_to_trough = 2, period = "40m", cv = 1.5, duration = "60m"'),
    # Fills every valley, and its last minutes decide.
    "tail": head(most=50)
    + stream('kind = "gamma", rate = 12, cv = 2, duration = "60m"')
    + job(at="5m", requests=24000, deadline="35m"),
    # Long answers, more of them than spare capacity does, due soon.
    "rush": head(most=50)
    + stream('kind = "gamma", rate = 10, cv = 3, duration = "45m"')
    + job(at="10m", requests=14000, deadline="20m", lengths=ESSAYS),
    # Small jobs that are due within minutes, beside little else.
    "due": head(most=50)
    + stream('kind = "poisson", rate = 6, duration = "40m"')
    + "".join(job(at=f"{4 + 6 * n}m", requests=900, deadline=f"{150 + 30 * n}s") for n in range(6)),
    # A large model: four GPUs an instance, three minutes to start.
    "large": head(itl="150ms", profile="llama-3.1-70b/h100/tp4", most=20)
    + '[cold_start]\nnode_start = "60s"\nmodel_load = "120s"\n'
    + stream(
        'kind = "diurnal", rate = 9, peak_to_trough = 3, period = "60m", noise = 0.2, cv = 2, duration = "90m"', CODE
    ),
    # Batch work beside bursts that evict it.
    "beside": head(itl="120ms")
    + stream('kind = "spikes", rate = 15, factor = 2.5, length = "45s", period = "7m", cv = 2, duration = "60m"', CODE)
    + job(at="10m", requests=9000, deadline="25m"),
}


TARGET = 99.0
"""Per cent of every class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One policy on one workload and seed."""

    name: str
    policy: str
    seed: int
    shares: dict[str, float]
    """Per cent within the SLOs, by class."""
    gpu_hours: float
    over_bound: float
    itl_missed: float
    peak: int
    wall_s: float
    fluid_gpu_hours: float | None = None
    """Of the cheapest whole instances with their starts for this load as a fluid; None: not known."""

    @property
    def bound_gpu_hours(self) -> float:
        return self.gpu_hours / self.over_bound

    @property
    def worst(self) -> float:
        return min(self.shares.values())

    def line(self, clairvoyant: Ran | None) -> str:
        each = " ".join(f"{key} {share:.2f}" for key, share in self.shares.items())
        over = f" {self.gpu_hours / clairvoyant.gpu_hours:5.2f}x clairvoyant" if clairvoyant is not None else ""
        return (
            f"{self.name:10} {self.policy:22} {self.seed:3} {self.worst:7.2f} {self.gpu_hours:7.2f}"
            f" {self.over_bound:6.2f}x{over} peak {self.peak:3} itl missed {self.itl_missed:.2f} | {each}"
            f" | {self.wall_s:.1f} s"
        )


def runs(scenario: Scenario, policies: Sequence[str], seeds: Sequence[int], after_s: float) -> Iterator[Ran]:
    """What comes before ``calibration.first`` is a past that each policy has lived through."""
    for seed in seeds:
        past = workload_of(scenario, seed, part="calibration") if scenario.calibration is not None else None
        for setup in setups(scenario, policies, [seed]):
            setup = setup if past is None else replace(setup, history=past)
            result = simulate(setup)
            table, classes = result.requests, result.classes
            counted = (table.arrival_s >= after_s) & table.judged(classes)
            attained = table.attained(classes)
            itl = np.nan_to_num(table.itl_s(), nan=0.0) > np.array([c.itl_s for c in classes])[table.cls]
            yield Ran(
                name=scenario.name,
                policy=result.policy,
                seed=seed,
                shares={
                    cls.name: 100 * float(attained[counted & (table.cls == index)].mean())
                    for index, cls in enumerate(classes)
                    if (counted & (table.cls == index)).any()
                },
                gpu_hours=gpu_hours(result, after_s),
                over_bound=result.summary["gpu_hours"] / result.summary["gpu_hours_bound"],
                itl_missed=100 * float(itl[counted].mean()),
                peak=result.summary["gpus_peak"],
                wall_s=result.summary["wall_s"],
                fluid_gpu_hours=fluid_gpu_hours(setup) if result.policy == CLAIRVOYANT else None,
            )


def fluid_gpu_hours(setup: Setup) -> float | None:
    """For who knows the future of a fluid; None where there is batch work, which it says nothing of."""
    if not all(setup.workload.classes[index].interactive for index in np.unique(setup.workload.cls)):
        return None
    problems = [(spec, problem_of(setup, spec, 1.0)) for spec in setup.models]
    return sum(
        best_schedule(problem).cost_s * spec.kinds[0].gpus / 3600 for spec, problem in problems if problem is not None
    )


def gpu_hours(result: chiron.Result, after_s: float) -> float:
    if after_s <= 0:
        return float(result.summary["gpu_hours"])
    times = np.array([point.t_s for point in result.fleet])
    gpus = np.array([point.gpus for point in result.fleet], dtype=float)
    lasts_s = np.diff(times, append=times[-1])
    return float((gpus * lasts_s)[times >= after_s].sum() / 3600)


def verdict(found: Sequence[tuple[Ran, Ran]]) -> str:
    """Of pairs of a policy's run and the clairvoyant one."""
    able = [(ran, best) for ran, best in found if best.worst >= TARGET]
    kept = [(ran, best) for ran, best in able if ran.worst >= TARGET]
    if not able:
        return "the clairvoyant row keeps 99 % of every class in none of them"
    over = [ran.gpu_hours / best.gpu_hours for ran, best in able]
    return (
        f"99 % of every class in {len(kept)} of the {len(able)} in which the clairvoyant row keeps it"
        f" (of {len(found)} in all); GPU-hours over its in those {len(able)}:"
        f" median {median(over):.2f}x, worst {max(over):.2f}x"
    )


def split(ran: Ran, best: Ran) -> str:
    """Cells of a table: the bound, and what comes on top of it."""
    if best.fluid_gpu_hours is None:
        return f"{best.bound_gpu_hours:.2f} | | | {ran.gpu_hours - best.gpu_hours:+.2f}"
    steps = [best.bound_gpu_hours, best.fluid_gpu_hours, best.gpu_hours, ran.gpu_hours]
    return " | ".join(
        [f"{steps[0]:.2f}", *(f"{round(after - before, 2) + 0.0:+.2f}" for before, after in pairwise(steps))]
    )


def page(command: str, rows: Sequence[tuple[str, Ran, Ran]]) -> str:
    lines = [
        "# Traffic that was never seen before",
        "",
        f"Made by `{command}`. Scenarios drawn at random, each from its number ([drawn_traffic.py]"
        "(../bench/drawn_traffic.py)): an hour that every policy has lived through, and half an hour that counts.",
        "",
        "Numbers below 100 are looked at while rules are changed; one from there on judges, once.",
        "",
        "**clairvoyant** knows the future and pays whole instances and cold starts ([policies/chiron.md]"
        "(policies/chiron.md#clairvoyant)): an estimate from above, so somebody might find a better schedule, also "
        "where it keeps no 99 % of a class.",
        "",
        "Without batch work, GPU-hours above the lower bound are split: **starts** is what whole instances and their"
        " starts cost for a fluid whose future is known; **rest** what the clairvoyant row takes more, because routers,"
        " batches and steps are no fluid (less than nothing where engines spread over time what a fluid does at once);"
        " **knowledge** what the policy takes more than that row.",
        "",
        "| number | traffic | policy | worst class in SLO | GPU-hours | over clairvoyant | clairvoyant's worst class |"
        " bound | starts | rest | knowledge |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for about, ran, best in rows:
        over = f"{ran.gpu_hours / best.gpu_hours:.2f}x"
        lines.append(
            f"| {ran.name} | {about} | `{ran.policy}` | {ran.worst:.2f} % | {ran.gpu_hours:.2f} | {over} |"
            f" {best.worst:.2f} % | {split(ran, best)} |"
        )
    policies = dict.fromkeys(ran.policy for _, ran, _ in rows)
    verdicts = [f"* `{p}`: {verdict([(r, b) for _, r, b in rows if r.policy == p])}." for p in policies]
    return "\n".join([*lines, "", *verdicts, ""])


def numbers(text: str) -> list[int]:
    """``100-103`` or ``100``."""
    first, _, last = text.partition("-")
    return [*range(int(first), int(last or first) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("::")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(UNSEEN))
    parser.add_argument("--drawn", type=numbers, default=[], metavar="FROM-TO", help="scenarios drawn at random")
    parser.add_argument("--policies", nargs="+", default=["chiron"])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[11])
    parser.add_argument("--after", type=float, default=0.0, help="count from this second on")
    parser.add_argument("--write", type=Path, help="a page of the drawn ones beside the clairvoyant row")
    given = parser.parse_args()
    found = {number: drawn(number) for number in given.drawn}
    texts = {name: UNSEEN[name] for name in given.names or ([] if found else UNSEEN)}
    texts |= {str(number): each.text for number, each in found.items()}
    # First, so that the others can be compared with it.
    policies = sorted(given.policies, key=lambda policy: policy != CLAIRVOYANT)
    rows: list[tuple[str, Ran, Ran]] = []
    for name, text in texts.items():
        scenario = parse_scenario(f'name = "{name}"\n{text}', directory=Path(), name=name)
        best: Ran | None = None
        for ran in runs(scenario.with_overrides(*given.overrides), policies, given.seeds, given.after):
            best = ran if ran.policy == CLAIRVOYANT else best
            print(ran.line(best))
            sys.stdout.flush()
            if best is not None and ran is not best:
                rows.append((found[int(name)].about if name.isdigit() else name, ran, best))
    for policy in dict.fromkeys(ran.policy for _, ran, _ in rows):
        print(f"{policy}: {verdict([(ran, best) for _, ran, best in rows if ran.policy == policy])}")
    if given.write is not None:
        given.write.write_text(page("python bench/unseen.py " + " ".join(sys.argv[1:]), rows))


if __name__ == "__main__":
    main()
