"""Autoscaling live: real processes that take their time to start, real requests, none of which is cut."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from fault_site import Answer, Api, FaultSite, chat, config
from serve_trial import check_ends, check_log, emulated, events, ready, send, until, verdicts

START_DELAY_S = 1.0
HOLD_S = 2.0
EXTRA = f"""
[policies.quick]
policy = "chiron"
tick = "500ms"
hold = "{HOLD_S:g}s"
keep_last = "5s"
windows = [5]
settles = [5]
prior = 1
prior_load = 0.1
learning = 3
backtest = 1
floor_over_load = 0
"""


def serve_config(model: str, *, extra: str = "", policy: str = "quick") -> str:
    return f'policy = "{policy}"\n' + config(model, extra=EXTRA + extra)


def plans(lines: list[dict[str, Any]], model: str = "m") -> list[tuple[float, int, int]]:
    return [
        (line["t"], int(line["before"]), int(line["after"]))
        for line in lines
        if line["event"] == "decision" and line["kind"] == "fleet" and line["subject"] == model
    ]


@pytest.mark.slow
def test_a_burst_grows_the_fleet_and_quiet_shrinks_it_without_cutting_a_request(tmp_path: Path) -> None:
    async def story(site: FaultSite) -> float:
        async with Api(site.url) as api:
            answers = await send(api, per_s=2.0, for_s=2.0)
            answers += await send(api, per_s=40.0, for_s=6.0, tokens=60)
            grown = await until(lambda status: ready(status) if ready(status) > 1 else 0, api, "instances", 60.0)
            answers += await send(api, per_s=2.0, for_s=8.0, tokens=150)
            assert set(await verdicts(answers)) == {"complete"}
            await until(lambda status: ready(status) < grown, api, "the fleet has shrunk")
            status = await api.get("/chiron/status")
            return float(status["models"][0]["cold_start_s"])

    model = emulated(min_instances=1, max_instances=4, max_num_seqs=8, args=["--start-delay", str(START_DELAY_S)])
    # Time for the burst's requests to wait for instances: else only a fleet that never shrinks keeps such a promise.
    patient = '[classes.chat]\nkind = "interactive"\nttft = "20s"\nitl = "100ms"\n'
    with FaultSite(tmp_path, serve_config(model, extra=patient)) as site:
        cold_start_s = asyncio.run(story(site))
    check_log(site)
    lines = events(site)
    assert set(check_ends(lines)) == {"finished"}
    created_s = {line["instance"]: line["t"] for line in lines if line["event"] == "created"}
    took_s = [line["t"] - created_s[line["instance"]] for line in lines if line["event"] == "ready"]
    assert START_DELAY_S < cold_start_s <= max(took_s) + 0.01, "learned from starts, without what they waited before"
    planned = plans(lines)
    assert max(after for _, _, after in planned) >= 3
    assert any(after < before for _, before, after in planned)
    for (one_s, *one), (other_s, *other) in pairwise(planned):
        turned = (one[1] > one[0]) != (other[1] > other[0])
        assert not turned or other_s - one_s >= HOLD_S - 0.01, "a plan is not reversed within the hold"
    names = Counter(line["event"] for line in lines)
    assert names["draining"] >= 1
    assert names["evicted"] == names["failed"] == 0
    for line in (line for line in lines if line["event"] == "gone"):
        running = running_on(lines, line["instance"], line["t"])
        assert not running, f"instance {line['instance']} was removed with {running}"


def running_on(lines: list[dict[str, Any]], instance: int, until_s: float) -> set[str]:
    """Requests dispatched to an instance and not ended before a time."""
    running: set[str] = set()
    for line in lines:
        if line["t"] <= until_s and line.get("instance") == instance:
            if line["event"] == "dispatch":
                running.add(line["request"])
            elif line["event"] in ("ended", "evicted"):
                running.discard(line["request"])
    return running


@pytest.mark.slow
def test_two_models_of_different_promises_share_the_gpus_that_there_are(tmp_path: Path) -> None:
    async def story(site: FaultSite) -> int:
        most = 0

        async def watch(api: Api) -> None:
            nonlocal most
            while True:
                status = await api.get("/chiron/status")
                most = max(most, sum(len(model["instances"]) for model in status["models"]))
                await asyncio.sleep(0.05)

        async with Api(site.url) as api:
            watching = asyncio.create_task(watch(api))
            both = await asyncio.gather(send(api, 30.0, 6.0, tokens=60), send(api, 30.0, 6.0, model="fast", tokens=60))
            assert set(await verdicts([*both[0], *both[1]])) == {"complete"}
            watching.cancel()
            status = await api.get("/chiron/status")
            promises = {m["name"]: [c["name"] for c in m["classes"] if c["arrived"]] for m in status["models"]}
            assert promises == {"m": ["chat"], "fast": ["voice"]}
            return most

    keys = {"max_instances": 4, "max_num_seqs": 8}
    extra = f"""
[models.fast]
{emulated(**keys, classes=["voice", "batch"])}

[classes.chat]
kind = "interactive"
ttft = "2s"
itl = "100ms"

[classes.voice]
kind = "interactive"
ttft = "500ms"
itl = "30ms"

[classes.batch]
kind = "batch"
deadline = "1h"

[gpus]
a100 = 3
"""
    model = emulated(**keys, classes=["chat", "batch"])
    with FaultSite(tmp_path, serve_config(model, extra=extra)) as site:
        most = asyncio.run(story(site))
    check_log(site)
    lines = events(site)
    assert most == 3, "grown as far as the GPUs go, and no further"
    assert set(check_ends(lines)) == {"finished"}


@pytest.mark.slow
def test_an_engine_that_dies_under_load_is_replaced_and_said(tmp_path: Path) -> None:
    async def story(site: FaultSite) -> None:
        async with Api(site.url) as api:
            await until(lambda status: ready(status) == 2, api, "two are ready")
            answers = await send(api, per_s=20.0, for_s=2.0, tokens=60)
            busiest = max(
                (await api.get("/chiron/status"))["models"][0]["instances"], key=lambda i: i["running_interactive"]
            )
            # Its usage is sampled now and then; a young one has no pid yet.
            pid = await until(
                lambda s: next(i["pid"] for i in s["models"][0]["instances"] if i["id"] == busiest["id"]),
                api,
                "its pid is known",
            )
            psutil.Process(pid).kill()
            answers += await send(api, per_s=20.0, for_s=2.0, tokens=60)
            ends = await verdicts(answers)
            assert ends["complete"] >= 60
            assert set(ends) <= {"complete", "error event", "broken"}
            await until(lambda status: ready(status) == 2, api, "it has been replaced")
            starts = (await api.get("/chiron/status"))["models"][0]["starts"][0]
            assert (starts["failures_total"], starts["kind"]) == (1, "m/emulated")
            assert starts["reason"].startswith("it was killed by SIGKILL")

    with FaultSite(tmp_path, serve_config(emulated(min_instances=2, max_instances=2), policy="static")) as site:
        asyncio.run(story(site))
    check_log(site)
    lines = events(site)
    check_ends(lines)
    (failure,) = [line for line in lines if line["event"] == "failure"]
    assert failure["reason"].startswith("it was killed by SIGKILL")
    assert f"instance {failure['instance']} of m failed: it was killed by SIGKILL" in site.log.read_text()


@pytest.mark.slow
def test_engines_that_never_start_are_said_with_the_reason_and_requests_are_told_in_time(tmp_path: Path) -> None:
    async def story(site: FaultSite) -> None:
        async with Api(site.url) as api:
            answers = [Answer(api.origin, chat())]

            def looping(status: dict[str, Any]) -> Any:
                if answers[-1].over.is_set():  # Without a request that waits there is no start, and no second failure.
                    answers.append(Answer(api.origin, chat()))
                return next((k for k in status["models"][0]["starts"] if k["state"] == "crash-looping"), None)

            starts = await until(looping, api, "the crash loop is noticed")
            assert starts["failures"] >= 2
            assert "'nonsense' is neither packaged nor a file" in starts["reason"]
            for answer in answers:
                assert await answer.end() == "refused"
                assert answer.status == 503
                assert int(answer.retry_after) >= 1
            page = (await api.ask("GET", "/metrics")).body.decode()
            assert 'chiron_crash_looping{kind="m/emulated",model="m"} 1.0' in page

    text = serve_config(emulated(min_instances=0, max_instances=2, args=["--profile", "nonsense"]))
    text = text.replace("crash_loop_starts = 100", "crash_loop_starts = 2")
    with FaultSite(tmp_path, text + '\n[limits]\nqueue_wait_max = "3s"\n') as site:
        asyncio.run(story(site))
    log = site.log.read_text()
    assert "m/emulated is crash-looping" in log
    assert "Traceback" not in log
