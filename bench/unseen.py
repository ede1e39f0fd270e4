"""``chiron`` on traffic that nothing in it was chosen for::

    python bench/unseen.py [NAME ...] [--policies chiron ...] [--set PATH=VALUE ...] [--seeds 11 12] [--after 0]

Eleven generated workloads on small fleets, each under a minute to run: bursts, spikes that come once, a surge that
comes back, swings, long prompts beside short answers, tight SLOs, a large model that starts slowly, and batch jobs of
several kinds. They are ours, so they show what a rule does to kinds of traffic; they are no sample of what anybody
sends. Their parameters were written down before any rule was tried on them, but for two: ``rush`` and ``due`` came
later, to see what a limit on growth for batch work does.

A line a run: attainment of the worst class, of each class, GPU-hours, and these over the lower bound for what was
delivered.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import chiron
from chiron.config.scenario import parse_scenario

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


def run(name: str, policy: str, seeds: list[int], overrides: list[str], after_s: float) -> str:
    scenario = parse_scenario(f'name = "{name}"\n' + UNSEEN[name], directory=Path(), name=name).with_overrides(
        *overrides
    )
    cells = []
    for result in chiron.compare(scenario, [policy], seeds, jobs=1):
        table, classes = result.requests, result.classes
        counted = (table.arrival_s >= after_s) & table.judged(classes)
        attained = table.attained(classes)
        shares = {
            cls.name: 100 * float(attained[counted & (table.cls == index)].mean())
            for index, cls in enumerate(classes)
            if (counted & (table.cls == index)).any()
        }
        itl = np.nan_to_num(table.itl_s(), nan=0.0) > np.array([c.itl_s for c in classes])[table.cls]
        hours = gpu_hours(result, after_s)
        summary = result.summary
        over = summary["gpu_hours"] / summary["gpu_hours_bound"]
        each = " ".join(f"{key} {share:.2f}" for key, share in shares.items())
        cells.append(
            f"{name:10} {policy:22} {result.seed:3} {min(shares.values()):7.2f} {hours:7.2f} {over:6.2f}x"
            f" peak {summary['gpus_peak']:3} itl missed {100 * float(itl[counted].mean()):.2f} | {each}"
            f" | {summary['wall_s']:.1f} s"
        )
    return "\n".join(cells)


def gpu_hours(result: chiron.Result, after_s: float) -> float:
    if after_s <= 0:
        return float(result.summary["gpu_hours"])
    times = np.array([point.t_s for point in result.fleet])
    gpus = np.array([point.gpus for point in result.fleet], dtype=float)
    lasts_s = np.diff(times, append=times[-1])
    return float((gpus * lasts_s)[times >= after_s].sum() / 3600)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("::")[0])
    parser.add_argument("names", nargs="*", default=list(UNSEEN), metavar="NAME", help=", ".join(UNSEEN))
    parser.add_argument("--policies", nargs="+", default=["chiron"])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[11])
    parser.add_argument("--after", type=float, default=0.0, help="count from this second on")
    given = parser.parse_args()
    for name in given.names:
        for policy in given.policies:
            print(run(name, policy, given.seeds, given.overrides, given.after))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
