"""The fleet that runs at time 0 when a scenario says ``initial = "auto"``: the same for every policy.

It stands for a service that has been running before: the least number of instances that, held for the first ten
minutes, would keep 99.5 % of each interactive class within half its TTFT (as a fluid queue), and no less
than the mean work needs at 70 % utilisation. Batch work is left out: it can wait.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from chiron.core.types import ModelSpec
from chiron.engines.profile import Profile
from chiron.policies.fluid_queue import meets_slos
from chiron.sim.bound_work import request_work_s
from chiron.workload.types import Workload

WINDOW_S = 600.0
UTILISATION = 0.7
BURST_UTILISATION = 0.9
MISS_MAX = 0.005
SLACK_SHARE = 0.5


def initial_instances(workload: Workload, spec: ModelSpec, profile: Profile) -> int:
    """Ready instances of ``spec`` at time 0, within its bounds."""
    window_s = max(1.0, min(WINDOW_S, float(workload.arrival_s[-1])))
    interactive = np.array([cls.interactive for cls in workload.classes])
    mine = np.array([name == spec.name for name in workload.models])[workload.model]
    chosen = mine & interactive[workload.cls] & (workload.arrival_s < window_s)
    if not chosen.any():
        return spec.min_instances
    cls = workload.cls[chosen]
    itl_s = np.array([c.itl_s for c in workload.classes])[cls]
    work_s = request_work_s(profile, workload.input_tokens[chosen], workload.output_tokens[chosen], itl_s)
    seconds = ceil(window_s)
    second = np.minimum(workload.arrival_s[chosen].astype(int), seconds - 1)
    load = np.bincount(second, weights=work_s, minlength=seconds) / BURST_UTILISATION
    present = np.unique(cls).tolist()
    counts = np.array([np.bincount(second[cls == index], minlength=seconds) for index in present], dtype=float)
    slack_s = [SLACK_SHARE * workload.classes[index].ttft_s for index in present]
    count = max(ceil(float(work_s.sum()) / (window_s * UTILISATION)), spec.min_instances, 1)
    while count < spec.max_instances and not meets_slos(
        load, counts, slack_s, np.full(seconds, float(count)), MISS_MAX
    ):
        count += 1
    return min(count, spec.max_instances)
