"""Results made by hand for the tests of reports: real objects, small, the same for the same arguments."""

from __future__ import annotations

from dataclasses import replace
from math import cos, inf, nan, pi
from typing import Any

import numpy as np

from chiron.core.types import RequestClass
from chiron.telemetry.result import Result
from chiron.telemetry.run_data import OUTCOMES, BatchSizePoint, DecisionPoint, FleetPoint, RequestTable
from chiron.telemetry.summary import summarise

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=10.0, itl_s=0.2)
JOBS = RequestClass(name="jobs", kind="batch", ttft_s=inf, itl_s=2.0, deadline_s=1800.0)
CLASSES = (CHAT, JOBS)

EVIL = """</script><script>alert(1)</script><img src=x onerror=alert(1)>'"><b>&amp;${x}$style{{7*7}}"""


def requests(rows: list[dict[str, Any]]) -> RequestTable:
    """A table from rows; what a row leaves out is a finished chat request of 100 tokens that met everything."""
    default = {
        "model": 0, "cls": 0, "arrival_s": 0.0, "dispatch_s": 0.0, "first_token_s": 1.0, "finish_s": 10.9,
        "deadline_s": inf, "input_tokens": 50, "output_tokens": 100, "outcome": 0, "evictions": 0,
    }  # fmt: skip
    types = {
        "model": "i2",
        "cls": "i2",
        "input_tokens": "i8",
        "output_tokens": "i8",
        "outcome": "i1",
        "evictions": "i2",
    }
    return RequestTable(
        **{key: np.array([(default | row)[key] for row in rows], dtype=types.get(key, "f8")) for key in default}
    )


def summary_of(table: RequestTable, **changes: Any) -> dict[str, Any]:
    """``summarise`` with plain figures, except ``changes``."""
    given: dict[str, Any] = {
        "policy": "chiron", "seed": 0, "classes": CLASSES, "models": ("llama",), "requests": table,
        "gpu_seconds": 36_000.0, "cost": 20.0, "gpus_peak": 4, "instances_peak": 4, "plan_changes": (),
        "reversal_window_s": 60.0, "gpu_hours_bound": 5.0, "gpu_hours_bound_full": 6.0, "cost_bound": 10.0,
        "wall_s": 0.5, "sim_s": 3600.0, "evictions": 0, "preemptions": 0,
    }  # fmt: skip
    return summarise(**(given | changes))


def small(
    policy: str = "chiron", *, seed: int | None = 0, gpu_hours: float = 10.0, met: float = 1.0, **changes: Any
) -> Result:
    """200 chat requests of which ``met`` are in time, one batch request, one tick, one decision of each sort."""
    n = 200
    rows = [{"first_token_s": 1.0 if i < round(met * n) else 10.5, "finish_s": 20.4} for i in range(n)]
    rows.append({"cls": 1, "finish_s": 900.0, "deadline_s": 1800.0, "first_token_s": 880.0})
    table = requests(rows)
    return Result(
        policy=policy,
        seed=seed,
        scenario="lunch",
        scenario_text='name = "lunch"\n',
        settings={"theta": 0.33, "hold_s": inf, "steps": [1, 2]},
        models=("llama",),
        classes=CLASSES,
        summary=summary_of(table, policy=policy, seed=seed, gpu_seconds=gpu_hours * 3600) | changes,
        requests=table,
        fleet=(tick(0.0, mixed=2), tick(10.0, mixed=3, groups=((1800.0, 5), (inf, 1)), waiting_batch=6)),
        batch_sizes=(
            BatchSizePoint(
                t_s=3.0, instance_id=1, model="llama", max_batch_size=8, running=8, itl_s=0.1, itl_slo_s=0.2
            ),
        ),
        decisions=(
            DecisionPoint(
                t_s=3.0, kind="batch_size", subject="1", before=4.0, after=8.0, reason="below_slo", numbers={"bp": 0.5}
            ),
            DecisionPoint(
                t_s=10.0, kind="fleet", subject="llama", before=2.0, after=3.0, reason="ibp_high", numbers={"ibp": nan}
            ),
        ),
    )


def unseen(policy: str, *, met: float = 1.0) -> Result:
    """``small`` as a client measures it, who sees no GPU."""
    known = small(policy, met=met)
    hidden = (
        "gpu_hours", "gpu_hours_bound", "gpu_hours_bound_full", "cost", "cost_bound", "gpus_peak", "instances_peak",
        "tokens_per_gpu_s", "slo_tokens_per_gpu_s", "scaling_actions", "reversals", "evictions", "preemptions",
    )  # fmt: skip
    return replace(known, summary=known.summary | dict.fromkeys(hidden), fleet=(), batch_sizes=(), decisions=())


def tick(t_s: float, *, mixed: int = 1, model: str = "llama", **changes: Any) -> FleetPoint:
    """One row of the fleet with ``mixed`` mixed instances of one GPU."""
    plain = FleetPoint(
        t_s=t_s,
        model=model,
        ready={"interactive": 0, "mixed": mixed, "batch": 0},
        starting=0,
        draining=0,
        gpus=mixed,
        planned=mixed,
        running_interactive=1,
        running_batch=0,
        waiting_interactive=0,
        waiting_batch=0,
        ibp=0.5,
        ibp_target=0.33,
        bbp=nan,
        groups=(),
    )
    return replace(plain, **changes)


def hour(policy: str, *, seed: int = 0, slack: float = 1.3, lag_s: float = 60.0, pressure: bool = True) -> Result:
    """An hour that looks real: a wave of chats, a batch job at 20 min; a fleet of ``slack`` times the demand that
    follows ``lag_s`` late. Less slack and more lag miss more SLOs."""
    rng = np.random.default_rng([seed, len(policy), int(slack * 100)])
    rate = lambda t: 9 + 5 * cos(2 * pi * (t - 1500) / 3000) + (8 if 2400 < t < 2520 else 0)  # noqa: E731
    arrivals = np.sort(np.concatenate([rng.uniform(t, t + 10, rng.poisson(rate(t) * 10)) for t in range(0, 3600, 10)]))
    jobs = 4000
    n = len(arrivals) + jobs
    is_job = np.arange(n) >= len(arrivals)
    arrival = np.concatenate([arrivals, np.full(jobs, 1200.0)])
    deadline = np.where(is_job, np.where(np.arange(n) % 2 == 0, 3000.0, 3500.0), inf)
    demand = lambda t: rate(t) * 0.9  # noqa: E731
    have = lambda t: max(2.0, slack * demand(max(0.0, t - lag_s)) + (3 if 1200 < t < 3200 else 0))  # noqa: E731
    load = np.array([demand(t) / have(t) for t in arrival])
    ttft = np.where(
        is_job, rng.uniform(5, 1900, n) / slack, rng.lognormal(-1.2, 0.6, n) * np.exp(np.maximum(0, load - 0.85) * 14)
    )
    itl = np.where(is_job, 0.35, 0.05 + 0.11 * np.minimum(load, 1.4) ** 2) * rng.lognormal(0, 0.12, n)
    output = np.maximum(1, rng.lognormal(5, 0.7, n)).astype(np.int64)
    order = np.argsort(arrival, kind="stable")
    columns = {
        "model": np.zeros(n, dtype=np.int16),
        "cls": is_job.astype(np.int16),
        "arrival_s": arrival,
        "dispatch_s": arrival + 0.2 * ttft,
        "first_token_s": arrival + ttft,
        "finish_s": arrival + ttft + itl * (output - 1),
        "deadline_s": deadline,
        "input_tokens": rng.integers(20, 900, n),
        "output_tokens": output,
        "outcome": np.zeros(n, dtype=np.int8),
        "evictions": np.zeros(n, dtype=np.int16),
    }
    table = RequestTable(**{key: column[order] for key, column in columns.items()})
    fleet, changes, decisions, previous = [], [], [], 0
    for t in range(0, 3600, 10):
        planned, ready = round(have(t)), round(have(max(0, t - 40)))
        batch = 3 if 1200 < t < 3200 and slack < 3 else 0
        left = max(0, 4000 - 2 * max(0, t - 1200)) if t >= 1200 else 0
        load_now = demand(t) / have(t)
        fleet.append(
            tick(
                float(t),
                model="llama",
                starting=max(0, planned - ready),
                gpus=max(ready, planned),
                planned=planned,
                ready={"interactive": 2, "mixed": max(0, ready - 2 - batch), "batch": batch},
                waiting_interactive=int(max(0, load_now - 0.9) * 40),
                waiting_batch=left,
                ibp=load_now if pressure else nan,
                ibp_target=0.77 if pressure else nan,
                bbp=float(left > 3000) if pressure else nan,
                groups=((3000.0, left // 2), (3500.0, left - left // 2)) if left else (),
            )
        )
        if planned != previous:
            changes.append((float(t), "llama", previous, planned))
            numbers = {"ibp": load_now, "ibp_target": 0.77, "busy": demand(t), "spike": 1.3}
            reason = "ibp_high" if planned > previous else "ibp_low"
            decisions.append(
                DecisionPoint(
                    t_s=float(t),
                    kind="fleet",
                    subject="llama",
                    before=float(previous),
                    after=float(planned),
                    reason=reason,
                    numbers=numbers,
                )
            )
            previous = planned
    sizes = []
    for instance in range(12):
        cap = 16.0
        for k in range(200):
            itl_s = 0.02 + cap * 0.0016 * float(rng.lognormal(0, 0.06))
            ratio = itl_s / 0.2
            cap = 0.5 * cap / ratio + 0.5 * cap if ratio < 1 else cap / 2
            t_s = 20.0 * instance + (4 + 0.06 * k) * k
            sizes.append(
                BatchSizePoint(
                    t_s=t_s,
                    instance_id=instance,
                    model="llama",
                    max_batch_size=int(cap),
                    running=int(cap),
                    itl_s=itl_s,
                    itl_slo_s=0.2,
                )
            )
            decisions.append(
                DecisionPoint(
                    t_s=t_s,
                    kind="batch_size",
                    subject=str(instance),
                    before=cap,
                    after=cap,
                    reason="below_slo",
                    numbers={"bp": ratio},
                )
            )
    gpu_seconds = sum(10.0 * p.gpus for p in fleet)
    return Result(
        policy=policy,
        seed=seed,
        scenario="lunch wave",
        scenario_text='name = "lunch wave"\nseeds = [0, 1, 2]\n',
        settings={"theta": 0.77, "slack": slack, "lag_s": lag_s},
        models=("llama",),
        classes=CLASSES,
        summary=summary_of(
            table,
            policy=policy,
            seed=seed,
            gpu_seconds=gpu_seconds,
            cost=gpu_seconds / 3600 * 2.5,
            plan_changes=changes,
            gpus_peak=max(p.gpus for p in fleet),
            instances_peak=max(p.gpus for p in fleet),
            gpu_hours_bound=8.2,
            gpu_hours_bound_full=8.4 + 0.1 * seed,
            cost_bound=20.0,
        ),
        requests=table,
        fleet=tuple(fleet),
        batch_sizes=tuple(sorted(sizes, key=lambda p: p.t_s)),
        decisions=tuple(sorted(decisions, key=lambda d: d.t_s)),
    )


def client_run(policy: str = "load") -> Result:
    """As ``chiron load`` sees an hour of which some requests fail."""
    seen = hour(policy, slack=1.2)
    outcome = seen.requests.outcome.copy()
    outcome[::50], outcome[::80] = OUTCOMES.index("failed"), OUTCOMES.index("rejected")
    table = replace(seen.requests, outcome=outcome, finish_s=np.where(outcome == 0, seen.requests.finish_s, -1.0))
    blind = unseen(policy)
    known = {key: value for key, value in summary_of(table, policy=policy).items() if blind.summary[key] is not None}
    return replace(blind, requests=table, summary=blind.summary | known, settings={"url": "http://127.0.0.1:8000"})
