"""CPU and memory of engines, each with all its processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import psutil

CpuTimes = dict[tuple[int, float], float]
"""CPU seconds by process, named by id and start time because ids come back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSample:
    cpu_s: CpuTimes
    rss_bytes: int


def sample_below(roots: Mapping[int, int]) -> dict[int, TreeSample]:
    """For each key the processes below its root process, without the root (the supervisor). One pass over /proc."""
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        try:
            children.setdefault(process.ppid(), []).append(process)
        except psutil.Error:
            continue
    return {key: _sample(_below(root, children)) for key, root in roots.items()}


def cpu_share(before: CpuTimes, after: CpuTimes, seconds: float) -> float:
    """Cores used in between. A process that began in between counts in full, one that ended does not count."""
    used_s = sum(total_s - before.get(process, 0.0) for process, total_s in after.items())
    return max(0.0, used_s / seconds) if seconds > 0.0 else 0.0


def _below(root: int, children: Mapping[int, list[psutil.Process]]) -> list[psutil.Process]:
    found = list(children.get(root, ()))
    for process in found:
        found += children.get(process.pid, ())
    return found


def _sample(processes: list[psutil.Process]) -> TreeSample:
    cpu_s: CpuTimes = {}
    rss_bytes = 0
    for process in processes:
        try:
            with process.oneshot():
                times = process.cpu_times()
                memory = process.memory_info().rss
        except psutil.Error:
            continue
        cpu_s[process.pid, process.create_time()] = times.user + times.system
        rss_bytes += memory
    return TreeSample(cpu_s=cpu_s, rss_bytes=rss_bytes)
