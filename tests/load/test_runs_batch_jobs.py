"""Batch jobs of a plan go through the batch API, and every result line is counted."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from chiron.load.batch import JobState, window
from chiron.load.errors import PlanError
from chiron.load.plan import JobKey
from chiron.load.record import Progress
from chiron.load.result import figures, result_of
from chiron.load.run import LoadRun, run_load
from chiron.load.settings import BatchSettings
from load_factory import plan_of, settings_of
from load_server import Endpoint, running

JOB = JobKey(model="m", cls="flex", at_s=0.1, deadline_s=60.0)
ARRIVALS = [0.0, *[0.1] * 9, 0.2]
CLASSES = [0, *[1] * 9, 0]


def run(endpoint: Endpoint, *, stop: bool = False, window_s: float = 60.0, **changes: Any) -> LoadRun:
    plan = plan_of(ARRIVALS, cls=CLASSES, jobs=[JOB])
    plan = replace(plan, jobs=(replace(plan.jobs[0], window_s=window_s),))

    async def main() -> LoadRun:
        event = asyncio.Event()

        def look(progress: Progress) -> None:
            if stop and "validating" in progress.jobs[0]:
                event.set()

        settings = settings_of(endpoint.url, **changes)
        return await run_load(plan, settings, progress=look, progress_period_s=0.02, stop=event)

    return asyncio.run(main())


def test_a_job_is_uploaded_submitted_watched_and_its_results_counted() -> None:
    with running(Endpoint()) as endpoint:
        done = run(endpoint)
        (batch,) = endpoint.batches.values()
        lines = [json.loads(line) for line in endpoint.files[batch["input_file_id"]].splitlines()]
    assert (batch["endpoint"], batch["completion_window"]) == ("/v1/chat/completions", "1m")
    assert [line["custom_id"] for line in lines] == [f"row-{row}" for row in range(1, 10)]
    assert all("stream" not in line["body"] and line["body"]["max_tokens"] == 4 for line in lines)
    (job,) = figures(done)["jobs"]
    assert (job["status"], job["results"], job["failed"], job["missing"], job["doubled"]) == ("completed", 9, 1, 0, 0)
    assert figures(done)["errors"] == {"batch item: poisoned": 1}
    flex = figures(done)["classes"]["flex"]
    assert (flex["finished"], flex["failed"], flex["output_tokens"]) == (8, 1, 32)
    assert flex["attainment"] == pytest.approx(8 / 9)
    assert flex["ttft_s"]["p50"] is None  # Nobody saw it.
    assert flex["itl_s"]["p50"] is None
    summary = result_of(done, "load").summary
    assert summary["batch_late"] == 1
    assert summary["gpu_hours"] is None


@pytest.mark.parametrize(("spoil", "warning"), [
    ("doubled", "job 0: 0 items have no result line, 1 have more than one"),
    ("missing", "job 0: 1 items have no result line, 0 have more than one"),
    ("failed", "job 0: line 3: no such model"),
    ("stuck", "job 0: still validating, 0.2 s after its deadline"),
])  # fmt: skip
def test_a_job_that_goes_wrong_is_said(spoil: str, warning: str) -> None:
    with running(Endpoint(spoil=spoil)) as endpoint:
        if spoil == "stuck":
            done = run(endpoint, window_s=0.3, batch=BatchSettings(poll_s=0.05, wait_s=0.2))
        else:
            done = run(endpoint)
    assert warning in figures(done)["warnings"]


def test_a_stop_cancels_the_job() -> None:
    with running(Endpoint(spoil="stuck")) as endpoint:
        done = run(endpoint, stop=True)
        (batch,) = endpoint.batches.values()
    assert batch["status"] == "cancelled"
    (job,) = figures(done)["jobs"]
    assert (job["status"], job["missing"]) == ("cancelled", 0)
    assert figures(done)["classes"]["flex"]["cancelled"] == 9


def test_an_endpoint_without_a_batch_api_fails_the_job_and_only_the_job() -> None:
    with running(Endpoint(spoil="absent")) as endpoint:
        done = run(endpoint)
    said = figures(done)
    assert said["classes"]["chat"]["finished"] == 2
    assert said["classes"]["flex"]["unfinished"] == 9
    assert "job 0: upload: status 404: no such path" in said["warnings"]
    assert said["errors"] == {"batch job": 1}


def test_an_input_file_beyond_the_limit_is_refused_before_anything_is_sent() -> None:
    with running(Endpoint()) as endpoint:
        with pytest.raises(PlanError, match=r"batch job 0: its input file would exceed input_max_bytes \(1000\)"):
            run(endpoint, batch=BatchSettings(input_max_bytes=1000))
        assert not endpoint.files


def test_items_are_done_when_the_count_first_reached_them() -> None:
    plan = plan_of(ARRIVALS, cls=CLASSES, jobs=[JOB])
    state = JobState(job=plan.jobs[0], name="job", upload=b"", counts=[(2, 1.0), (5, 2.0)], ended_s=9.0)
    assert [state.finish_s(n) for n in (1, 2, 3, 5, 6)] == [1.0, 1.0, 2.0, 2.0, 9.0]


def test_windows_read_well() -> None:
    assert [window(s) for s in (86_400, 1500, 90, 0.4)] == ["24h", "25m", "90s", "1s"]
