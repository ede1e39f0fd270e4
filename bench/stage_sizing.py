"""``stage-balance`` on loads to choose by, in bench/calibration/stages: docs/staged.md has none of them.

    python bench/stage_sizing.py                    # the policy as it is
    mkdir other; git show COMMIT:src/chiron/policies/stages/balance.py > other/balance.py
    python bench/stage_sizing.py other              # another version beside it, on the same requests

Replicas that fail, slow links, backlogs after an outage and bursts on uneven stages; two seeds each, seconds for each
run. One line a load: the share of requests whose SLOs were met and the GPU-hours, for each version.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

LOADS = Path(__file__).parent / "calibration" / "stages"
STAGES = "chiron.policies.stages"


def run(path: Path, seed: int, version: str) -> tuple[float, float]:
    """SLOs met and GPU-hours, in a process of its own: modules of ``version`` take the place of the policy's."""
    for name in ("queue_model", "balance"):
        file = Path(version, f"{name}.py")
        if version and file.is_file():
            spec = importlib.util.spec_from_file_location(f"{STAGES}.{name}", file)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    from chiron.config.build import setups
    from chiron.config.scenario import load_scenario
    from chiron.sim.run import simulate

    (setup,) = setups(load_scenario(str(path)), ["stage-balance"], [seed])
    summary = simulate(setup, with_bound=False).summary
    return summary["attainment_all"], summary["gpu_hours"]


def table(versions: Sequence[str], seeds: Sequence[int], only: str, jobs: int) -> str:
    loads = sorted(path for path in LOADS.glob("*.toml") if only in path.stem)
    lines = [
        "| load | " + " | ".join(version or "as it is" for version in versions) + " |",
        "|---|" + "---:|" * len(versions),
    ]
    sums = [(0.0, 0.0)] * len(versions)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        asked = {(p, v): [pool.submit(run, p, seed, v) for seed in seeds] for p in loads for v in versions}
        for path in loads:
            cells = []
            for at, version in enumerate(versions):
                found = [each.result() for each in asked[path, version]]
                met, hours = (sum(values) / len(seeds) for values in zip(*found, strict=True))
                sums[at] = sums[at][0] + met / len(loads), sums[at][1] + hours
                cells.append(f"{met:.1%}, {hours:.2f}")
            lines.append(f"| {path.stem} | " + " | ".join(cells) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    lines.append("| mean, sum | " + " | ".join(f"{met:.1%}, {hours:.2f}" for met, hours in sums) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="directories with modules in place of the policy's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12])
    parser.add_argument("--only", default="", help="loads whose names contain this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    print(table(["", *args.versions], args.seeds, args.only, args.jobs))
