"""Where the GPU-hours of a policy go, beyond the lower bound: a Markdown table.

    python tools/where_it_goes.py azure mooncake > docs/where_it_goes.md

Billed time splits into loading (model loads, before ready), idle (ready, nothing to run) and busy (engine steps).
Busy time beyond the bound is work done in smaller batches, or longer steps, than a clairvoyant packing would need.
"""

from __future__ import annotations

import argparse
import sys

from chiron.config.build import setups
from chiron.config.scenario import load_scenario
from chiron.sim.run import Simulation


def row(name: str, policy: str) -> str:
    """One scenario, its first seed."""
    setup = setups(load_scenario(name), policies=[policy])[0]
    simulation = Simulation(setup)
    simulation.run()
    summary = simulation.result(wall_s=0.0).summary
    billed, bound = summary["gpu_hours"], summary["gpu_hours_bound"]
    busy = sum(e.busy_s * e.instance.kind.gpus for e in simulation.engines) / 3600.0
    loading = simulation.fleet.bill.loading_gpu_seconds / 3600.0
    idle = billed - busy - loading
    worst = 100.0 * min(summary["attainment"].values())
    parts = [bound, busy - bound, idle, loading]
    cells = " | ".join(f"{part:.2f} ({100.0 * part / billed:.0f} %)" for part in parts)
    return f"| {name} | {worst:.2f} % | {billed:.2f} | {billed / bound:.2f}x | {cells} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="+")
    parser.add_argument("--policy", default="chiron")
    options = parser.parse_args()
    print(
        f"# Where the GPU-hours of `{options.policy}` go\n\n"
        f"Made by `python tools/where_it_goes.py {' '.join(options.scenarios)}`: the first seed of each scenario.\n\n"
        "- **bound**: what no scheduler could do without ([bound.md](bound.md)).\n"
        "- **smaller batches**: engine time beyond it. An instance that waits for the next burst runs few requests a\n"
        "  step, and each step has a fixed cost; a clairvoyant would have packed them, or switched the GPU off.\n"
        "- **idle**: ready with nothing to run. Headroom for bursts that come faster than a start, and whole GPUs.\n"
        "- **loading**: billed before the instance was ready.\n\n"
        "| scenario | worst class in SLO | GPU-hours | over bound | bound | smaller batches | idle | loading |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for name in options.scenarios:
        print(row(name, options.policy), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
