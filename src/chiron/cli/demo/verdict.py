"""What the demo showed, in a few lines: from what the client measured and what the gateway recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from chiron.telemetry.format import amount, known, milliseconds, percent
from chiron.telemetry.result import Result


def verdict_lines(load: Mapping[str, Any], gateway: Result, instances_max: int) -> list[str]:
    """``load``: figures of the load generator; ``gateway``: the gateway's own record of the same run."""
    lines = [_latency(name, load["classes"][name], gateway) for name in load["classes"] if _has_slos(name, gateway)]
    lines += [_job(job) for job in load["jobs"]]
    return [*lines, _evictions(gateway), _fleet(gateway, instances_max), _batch_sizes(gateway)]


def _has_slos(name: str, result: Result) -> bool:
    return any(cls.name == name and cls.interactive for cls in result.classes)


def _latency(name: str, figures: Mapping[str, Any], result: Result) -> str:
    cls = next(cls for cls in result.classes if cls.name == name)
    ttft_s, itl_s = figures["ttft_s"], figures["itl_s"]
    return (
        f"{name}: {figures['finished']:,} of {figures['requests']:,} requests answered, "
        f"{percent(figures['attainment'])} within both SLOs; at the client TTFT p50 {known(amount, ttft_s['p50'])} p99 "
        f"{known(amount, ttft_s['p99'])} s (SLO {cls.ttft_s:g}), ITL p50 {known(milliseconds, itl_s['p50'])} p99 "
        f"{known(milliseconds, itl_s['p99'])} ms (SLO {cls.itl_s * 1000:g})"
    )


def _job(job: Mapping[str, Any]) -> str:
    what = f"batch: {job['results']:,} result lines for {job['requests']:,} items, {job['doubled']:,} doubled"
    if job["status"] != "completed":
        return f"{what}; the job is {job['status']}" + (f" ({job['error']})" if job["error"] else "")
    took_s = job["ended_s"] - job["submitted_s"]
    left_s = job["window_s"] - took_s
    when = f"{left_s:.0f} s before its deadline" if left_s >= 0 else f"{-left_s:.0f} s late"
    return f"{what}; done in {took_s:.0f} s, {when}"


def _evictions(result: Result) -> str:
    table = result.requests
    evicted = table.evictions > 0
    resumed = int((evicted & (table.outcome == 0)).sum())
    return (
        f"evictions: {int(evicted.sum()):,} batch items made room for chat, {int(table.evictions.sum()):,} times; "
        f"{resumed:,} of them resumed and finished"
    )


def _fleet(result: Result, instances_max: int) -> str:
    """An instance counts from the start of its process to its end."""
    run_s = result.summary["sim_s"]
    used_s = (result.summary["gpu_hours"] or 0.0) * 3600.0
    steps = [d for d in result.decisions if d.kind == "fleet" and d.before != d.after]
    sizes = [f"{steps[0].before:g}", *(f"{d.after:g}" for d in steps)] if steps else ["never changed"]
    fixed_s = instances_max * run_s
    share = f", {used_s / fixed_s:.0%} of a fixed fleet of {instances_max} ({fixed_s:,.0f})" if fixed_s > 0 else ""
    return f"instances: {' → '.join(sizes)}; {used_s:,.0f} instance-seconds{share}"


def _batch_sizes(result: Result) -> str:
    sizes = [int(d.after) for d in result.decisions if d.kind == "batch_size"]
    if not sizes:
        return "max batch size: never changed"
    middle = f", median {int(np.median(sizes))}"
    return f"max batch size: {min(sizes)} to {max(sizes)}{middle}, changed {len(sizes):,} times"
