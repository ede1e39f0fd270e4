"""A run's figures: as a telemetry ``Result`` for the report, and as plain JSON.

A client sees neither GPUs nor decisions: those figures are null. TTFT counts from the moment a request was due, so
that a generator that fell behind makes the server look worse, never better.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from chiron.load.run import LoadRun
from chiron.telemetry.programs import lost_calls, program_points
from chiron.telemetry.result import Result
from chiron.telemetry.run_data import OUTCOMES, ProgramPoint, RequestTable
from chiron.telemetry.summary import NO_LOST_CALLS, LostCalls, by_kind, ratio, spread, summarise
from chiron.workload.types import Floats, Ints

LATE_S = 0.05
"""A send this much after its time is late."""
LATE_SHARE_MAX = 0.01
"""With more late sends than this the generator did not keep up, and its figures are in doubt."""
JOB_FIGURES = ["id", "status", "submitted_s", "ended_s", "done", "failed", "results", "doubled", "missing", "error"]
CPU_SHARE_MAX = 0.9
"""Of one core. Above it, answers waited for this process before they were timed."""


def result_of(run: LoadRun, label: str) -> Result:
    """The run under a name, in the form that reports, ``--save`` and notebooks take."""
    table = table_of(run)
    work, points = run.plan.workload, points_of(run)
    summary = summarise(
        policy=label,
        seed=run.plan.seed,
        classes=work.classes,
        models=work.models,
        requests=table,
        programs=points,
        lost=lost_of(run),
        gpu_seconds=None,
        cost=None,
        gpus_peak=None,
        instances_peak=None,
        plan_changes=None,
        reversal_window_s=0.0,
        gpu_hours_bound=None,
        gpu_hours_bound_full=None,
        cost_bound=None,
        wall_s=run.wall_s,
        sim_s=run.wall_s,
        evictions=None,
        preemptions=None,
    )
    return Result(
        policy=label,
        seed=run.plan.seed,
        scenario=run.plan.name,
        scenario_text=run.plan.text,
        settings=figures(run),
        models=work.models,
        classes=work.classes,
        summary=summary,
        requests=table,
        programs=points,
        fleet=(),
        batch_sizes=(),
        decisions=(),
    )


def table_of(run: LoadRun) -> RequestTable:
    """Every request whose time came, in order of arrival."""
    record, work = run.record, run.plan.workload
    rows = rows_of(run)
    finished = record.outcome[rows] == OUTCOMES.index("finished")
    return RequestTable(
        model=work.model[rows].astype(np.int16),
        cls=work.cls[rows].astype(np.int16),
        arrival_s=record.due_s[rows],
        dispatch_s=record.sent_s[rows],
        first_token_s=record.first_s[rows],
        finish_s=np.where(finished, record.last_s[rows], -1.0),
        deadline_s=work.deadline_s[rows] + (record.due_s[rows] - work.arrival_s[rows]),
        input_tokens=record.input_tokens[rows],
        output_tokens=record.output_tokens[rows],
        outcome=record.outcome[rows],
        evictions=np.zeros(len(rows), dtype=np.int16),
    )


def rows_of(run: LoadRun) -> Ints:
    """Those whose time came, in order of arrival."""
    rows = np.flatnonzero(run.record.attempted)
    return rows[np.argsort(run.record.due_s[rows], kind="stable")]


def points_of(run: LoadRun) -> tuple[ProgramPoint, ...]:
    """Every program that began."""
    record, programs = run.record, run.plan.workload.programs
    if programs is None:
        return ()
    return program_points(
        kinds=programs.kinds,
        kind=programs.kind,
        start_s=programs.start_s,
        deadline_s=programs.deadline_s,
        of=programs.of,
        came=record.attempted,
        finished=record.outcome == OUTCOMES.index("finished"),
        finish_s=record.last_s,
        output_tokens=record.output_tokens,
    )


def lost_of(run: LoadRun) -> LostCalls:
    """Calls that programs never came to make, because one before them failed."""
    record, work = run.record, run.plan.workload
    if work.programs is None:
        return NO_LOST_CALLS
    rows = lost_calls(work.programs.of, record.attempted, record.outcome)
    return LostCalls(model=work.model[rows], cls=work.cls[rows])


def figures(run: LoadRun) -> dict[str, Any]:
    """Everything that was measured, as plain JSON."""
    record, work = run.record, run.plan.workload
    late_s = record.late_s()
    table = table_of(run)
    attained, judged = table.attained(work.classes), table.judged(work.classes)
    lost = lost_of(run)
    rows = rows_of(run)
    ttft_s, itl_s = table.ttft_s(), table.itl_s()
    classes = {}
    for index, cls in enumerate(work.classes):
        mine = table.cls == index
        if mine.any():
            counts = np.bincount(table.outcome[mine], minlength=len(OUTCOMES))
            done = mine & (table.outcome == 0)
            classes[cls.name] = {
                "requests": int(mine.sum()),
                **{name: int(count) for name, count in zip(OUTCOMES, counts, strict=True)},
                "attainment": ratio(int(attained[mine].sum()), int((mine & judged).sum() + (lost.cls == index).sum())),
                "ttft_s": spread(ttft_s[mine]),
                "itl_s": spread(itl_s[mine]),
                "gap_p99_s": spread(record.gap_p99_s[rows][mine]),
                "gap_max_s": spread(record.gap_max_s[rows][mine]),
                "input_tokens": int(table.input_tokens[done].sum()),
                "output_tokens": int(table.output_tokens[done].sum()),
                "tokens_per_s": ratio(float(table.output_tokens[done].sum()), run.wall_s),
            }
    finished = rows[record.outcome[rows] == 0]
    counted = finished[record.counted[finished]]
    return {
        "digest": run.plan.digest,
        "url": run.settings.url,
        "api": run.settings.body.api,
        "prompt": run.settings.body.prompt,
        "ignore_eos": run.ignore_eos,
        "planned": len(work),
        "attempted": len(rows),
        "sent": record.sent,
        "not_sent": record.not_sent,
        "stopped": run.stopped,
        "wall_s": run.wall_s,
        "cpu_share": run.cpu_share,
        "late_s": spread(late_s) | {"max": float(late_s.max()) if len(late_s) else None},
        "late_share": float((late_s > LATE_S).mean()) if len(late_s) else 0.0,
        "statuses": {str(k): int(n) for k, n in zip(*np.unique(record.status[rows], return_counts=True), strict=True)},
        "errors": dict(sorted(record.errors.items())),
        "examples": dict(sorted(record.examples.items())),
        "classes": classes,
        "programs": by_kind(points_of(run)),
        "tokens": {
            "counted_by_server": len(counted),
            "finished": len(finished),
            "input_wanted": int(work.input_tokens[counted].sum()),
            "input": int(record.input_tokens[counted].sum()),
            "output_wanted": int(work.output_tokens[counted].sum()),
            "output": int(record.output_tokens[counted].sum()),
        },
        "jobs": [
            {"model": job.job.model, "requests": len(job.job.rows), "window_s": job.job.window_s}
            | {name: getattr(job, name) for name in JOB_FIGURES}
            for job in run.jobs
        ],
        "warnings": warnings(run, late_s),
    }


def warnings(run: LoadRun, late_s: Floats) -> list[str]:
    """What a reader must know before believing the figures, worst first."""
    record = run.record
    said = []
    if record.not_sent:
        said.append(
            f"{record.not_sent:,} requests were NOT SENT: {run.settings.in_flight_max:,} were in flight already "
            "(--in-flight-max); they count as failed"
        )
    late = late_s > LATE_S
    if len(late_s) and late.mean() > LATE_SHARE_MAX:
        said.append(
            f"the generator did not keep up: {late.mean():.1%} of requests were sent more than {LATE_S * 1000:.0f} ms "
            f"after their time (the latest {late_s.max():.2f} s); {remedy(run.cpu_share)}"
        )
    if run.cpu_share > CPU_SHARE_MAX:
        said.append(
            f"the generator used {run.cpu_share:.0%} of a core: answers may have waited for it before being timed"
        )
    for job in run.jobs:
        if job.missing or job.doubled:
            said.append(f"{job.name}: {job.missing:,} items have no result line, {job.doubled:,} have more than one")
        if job.error:
            said.append(f"{job.name}: {job.error}")
    rejected = int((record.outcome == OUTCOMES.index("rejected")).sum())
    if rejected:
        said.append(
            f"{rejected:,} requests were REJECTED by the server as wrong (4xx): they count neither as attained nor as "
            "missed"
        )
    finished = record.outcome == 0
    uncounted = int((finished & ~record.counted).sum())
    if uncounted:
        said.append(f"{uncounted:,} answers had no usage: events with text were counted instead of tokens")
    said += run.notes
    if run.stopped:
        left = len(run.plan.workload) - int(record.attempted.sum())
        cut = int((record.outcome == OUTCOMES.index("cancelled")).sum())
        undue = f"{left:,} of {len(run.plan.workload):,} requests were never due and are left out"
        missed = f"{cut:,} that we cancelled count as missed"
        said.append("; ".join(["stopped early", *([undue] if left else []), *([missed] if cut else [])]))
    return said


def remedy(cpu_share: float) -> str:
    """What helps a generator that is late: it had too much to do, or too little of the machine."""
    if cpu_share > CPU_SHARE_MAX / 2:
        return "send less, or from several machines"
    return f"it used only {cpu_share:.0%} of a core, so other work on this machine held it up: send from another one"
