"""The figures of one run, as the JSON object that ``--json`` writes (``data/result.schema.json``).

Attainment counts every request of a class that could be served: one that failed, was shed, was cancelled or had not
finished when the run stopped is a miss. A rejected one is neither attained nor missed: something was wrong with the
request itself. Calls that a program never came to make because one before them was missed are missed with it, though
they are no requests. A running service is judged differently (``judged_at_s``): a client that left in time is no miss,
and a request that still waits may yet be served in time; one that left after an SLO was missed is a miss. What cannot
be computed (a quantile of nothing, a ratio over no GPU time) is null, never nan.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from chiron.core.types import RequestClass
from chiron.telemetry.errors import SummaryError
from chiron.telemetry.run_data import OUTCOMES, ProgramPoint, RequestTable

SCHEMA_VERSION = 1

PlanChange = tuple[float, str, int, int]
"""Seconds, model, planned instances before and after."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LostCalls:
    """Calls of programs that never came, as columns (``telemetry.programs.lost_calls``)."""

    model: npt.NDArray[np.integer]
    cls: npt.NDArray[np.integer]


NO_LOST_CALLS = LostCalls(model=np.zeros(0, dtype=np.int64), cls=np.zeros(0, dtype=np.int64))


def summarise(
    *,
    policy: str,
    seed: int | None,
    classes: Sequence[RequestClass],
    models: Sequence[str],
    requests: RequestTable,
    gpu_seconds: float | None,
    cost: float | None,
    gpus_peak: int | None,
    instances_peak: int | None,
    plan_changes: Sequence[PlanChange] | None,
    reversal_window_s: float,
    gpu_hours_bound: float | None,
    gpu_hours_bound_full: float | None,
    cost_bound: float | None,
    wall_s: float,
    sim_s: float,
    evictions: int | None,
    preemptions: int | None,
    judged_at_s: float | None = None,
    cold_starts: int | None = None,
    warm_starts: int | None = None,
    wakes: int | None = None,
    sleeper_gb_seconds: float | None = None,
    programs: Sequence[ProgramPoint] = (),
    lost: LostCalls | None = None,
) -> dict[str, Any]:
    """The summary object. ``gpu_hours_bound`` is for what this run delivered, ``gpu_hours_bound_full`` for every
    request at its SLO. None stands for what cannot be measured: a client sees no GPU. With ``judged_at_s``
    requests that were cancelled, or are open then, count only if an SLO was missed. ``lost``: calls of programs that
    never came. Pure, O(requests)."""
    check_requests(requests, classes, models)
    attained = requests.attained(tuple(classes))
    judged = requests.judged(tuple(classes), judged_at_s)
    counts = np.bincount(requests.outcome, minlength=len(OUTCOMES))
    outcomes = {name: int(count) for name, count in zip(OUTCOMES, counts, strict=True)}
    finished = requests.outcome == 0
    ttft_s, itl_s = requests.ttft_s(), requests.itl_s()
    members = {c.name: requests.cls == index for index, c in enumerate(classes)}
    lost = lost or NO_LOST_CALLS
    asked = np.bincount(requests.cls[judged], minlength=len(classes)) + np.bincount(lost.cls, minlength=len(classes))
    met = np.bincount(requests.cls[attained & judged], minlength=len(classes))
    summary = {
        "schema_version": SCHEMA_VERSION,
        "policy": policy,
        "seed": whole(seed),
        "requests": len(requests.arrival_s),
        **outcomes,
        "evictions": whole(evictions),
        "preemptions": whole(preemptions),
        "attainment": {c.name: float(met[i] / asked[i]) for i, c in enumerate(classes) if asked[i]},
        "attainment_all": ratio(met.sum(), asked.sum()),
        "ttft_s": {name: spread(ttft_s[mine]) for name, mine in members.items() if mine.any()},
        "itl_s": {name: spread(itl_s[mine]) for name, mine in members.items() if mine.any()},
        "gpu_hours": None if gpu_seconds is None else float(gpu_seconds) / 3600,
        "gpu_hours_bound": real(gpu_hours_bound),
        "gpu_hours_bound_full": real(gpu_hours_bound_full),
        "cost": real(cost),
        "cost_bound": real(cost_bound),
        "gpus_peak": whole(gpus_peak),
        "instances_peak": whole(instances_peak),
        "cold_starts": whole(cold_starts),
        "warm_starts": whole(warm_starts),
        "wakes": whole(wakes),
        "sleepers_gb": None if sleeper_gb_seconds is None else ratio(sleeper_gb_seconds, sim_s),
        "throughput_rps": ratio(outcomes["finished"], sim_s),
        "throughput_tokens_per_s": ratio(requests.output_tokens[finished].sum(), sim_s),
        "tokens_per_gpu_s": ratio(requests.output_tokens[finished].sum(), gpu_seconds),
        "slo_tokens_per_gpu_s": ratio(requests.output_tokens[attained].sum(), gpu_seconds),
        "scaling_actions": None if plan_changes is None else sum(a != b for _, _, a, b in plan_changes),
        "reversals": None if plan_changes is None else reversals(plan_changes, reversal_window_s),
        "batch_late": batch_late(requests, classes, judged),
        "programs": by_kind(programs) if programs else None,
        "models": by_model(requests, models, attained, judged, lost),
        "wall_s": float(wall_s),
        "sim_s": float(sim_s),
    }
    check_summary(summary)
    return summary


def reversals(plan_changes: Sequence[PlanChange], window_s: float) -> int:
    """Changes of a model's plan against the direction of its previous change, less than ``window_s`` after it."""
    previous: dict[str, tuple[float, bool]] = {}
    count = 0
    for t_s, model, before, after in plan_changes:
        if before == after:
            continue
        grows = after > before
        last_s, grew = previous.get(model, (t_s, grows))
        count += grows != grew and t_s - last_s < window_s
        previous[model] = (t_s, grows)
    return count


def batch_late(requests: RequestTable, classes: Sequence[RequestClass], judged: npt.NDArray[np.bool_]) -> int:
    """Batch requests with a deadline that did not finish by it."""
    is_batch = np.array([c.kind == "batch" for c in classes], dtype=np.bool_)[requests.cls]
    late = (requests.outcome != 0) | (requests.finish_s > requests.deadline_s)
    return int(np.count_nonzero(is_batch & np.isfinite(requests.deadline_s) & late & judged))


def by_model(
    requests: RequestTable,
    models: Sequence[str],
    attained: npt.NDArray[np.bool_],
    judged: npt.NDArray[np.bool_],
    lost: LostCalls,
) -> dict[str, dict[str, float | int | None]]:
    """Requests, finished requests and attainment of each model; every model is listed."""
    total = np.bincount(requests.model, minlength=len(models))
    finished = np.bincount(requests.model, weights=requests.outcome == 0, minlength=len(models))
    met = np.bincount(requests.model, weights=attained, minlength=len(models))
    known = np.bincount(requests.model, weights=judged, minlength=len(models))
    known = known + np.bincount(lost.model, minlength=len(models))
    return {
        name: {"requests": int(total[i]), "finished": int(finished[i]), "attainment": ratio(met[i], known[i])}
        for i, name in enumerate(models)
    }


def by_kind(programs: Sequence[ProgramPoint]) -> dict[str, dict[str, Any]]:
    """Programs by their kind: how many, and how long they took from arrival to the end of the last call. One of which
    not all calls finished has missed its deadline, and has no latency."""
    made: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(program.kind for program in programs):
        mine = [program for program in programs if program.kind == kind]
        done = [program for program in mine if program.finish_s >= 0]
        due = [program for program in mine if isfinite(program.deadline_s)]
        latency_s = np.array([program.finish_s - program.start_s for program in done], dtype=np.float64)
        tokens = np.array([program.output_tokens for program in done], dtype=np.float64)
        met = sum(0 <= program.finish_s <= program.deadline_s for program in due)
        made[kind] = {
            "programs": len(mine),
            "finished": len(done),
            "calls_finished": sum(program.calls_finished for program in mine),
            "attainment": ratio(met, len(due)),
            "latency_s": spread(latency_s),
            "token_latency_s": spread(latency_s / tokens),
        }
    return made


def spread(values: npt.NDArray[np.float64]) -> dict[str, float | None]:
    """Mean and quantiles of the values that are not nan; null where there are none."""
    seen = values[~np.isnan(values)]
    if not len(seen):
        return {"mean": None, "p50": None, "p90": None, "p99": None}
    p50, p90, p99 = np.quantile(seen, (0.5, 0.9, 0.99))
    return {"mean": float(seen.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def ratio(part: float, whole: float | None) -> float | None:
    """``part / whole``; null over nothing and over what is not known."""
    return float(part) / float(whole) if whole is not None and whole > 0 else None


def real(value: float | None) -> float | None:
    """A plain float, also of a NumPy one; null if unknown."""
    return None if value is None else float(value)


def whole(value: int | None) -> int | None:
    """A plain int, also of a NumPy one; null if unknown."""
    return None if value is None else int(value)


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a summary, as shipped."""
    text = resources.files("chiron").joinpath("data/result.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def check_summary(summary: dict[str, Any]) -> None:
    """Raise ``SummaryError`` unless the keys are the schema's, the version is ours and each figure is in range.

    The nested objects are checked by the schema in the tests; here a mistake of a caller is what matters.
    """
    expected = schema()["properties"]
    missing, unknown = sorted(expected.keys() - summary.keys()), sorted(summary.keys() - expected.keys())
    if missing or unknown:
        raise SummaryError(f"summary: missing keys {missing}, unknown keys {unknown}")
    if summary["schema_version"] != SCHEMA_VERSION:
        raise SummaryError(f"summary: schema_version is {summary['schema_version']!r}; this is for {SCHEMA_VERSION}")
    for key, rule in expected.items():
        value = summary[key]
        if isinstance(value, int | float) and not (isfinite(value) and value >= rule.get("minimum", value)):
            raise SummaryError(f"summary: {key} is {value}; it must be finite and at least {rule.get('minimum')}")


def check_requests(requests: RequestTable, classes: Sequence[RequestClass], models: Sequence[str]) -> None:
    """Raise ``SummaryError`` if columns differ in length or an index points nowhere."""
    lengths = {field.name: len(getattr(requests, field.name)) for field in fields(requests)}
    if len(set(lengths.values())) > 1:
        raise SummaryError(f"requests: columns differ in length: {lengths}")
    for column, names in (("cls", len(classes)), ("model", len(models)), ("outcome", len(OUTCOMES))):
        values = getattr(requests, column)
        if len(values) and not (values.min() >= 0 and values.max() < names):
            raise SummaryError(f"requests: {column} spans {values.min()}..{values.max()}; allowed is 0..{names - 1}")
