"""Open loop: requests leave at their times whatever the server does, and nothing is hidden when they cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from math import inf
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest

from chiron.load.errors import TargetError
from chiron.load.record import Progress
from chiron.load.result import figures, result_of, warnings
from chiron.load.run import LoadRun, run_load
from load_factory import CHAT, plan_of, settings_of
from load_server import Endpoint, running


def run(
    endpoint: Endpoint, arrival_s: Any, *, look: Callable[[Progress, asyncio.Event], None] | None = None, **changes: Any
) -> LoadRun:
    """One run against a running endpoint; ``look`` sees its progress, and may set its stop."""
    split = {key: changes.pop(key) for key in ("model", "tokens", "cls", "jobs", "chat") if key in changes}

    async def main() -> LoadRun:
        stop = asyncio.Event()

        def progress(seen: Progress) -> None:
            if look is not None:
                look(seen, stop)

        plan, settings = plan_of(arrival_s, **split), settings_of(endpoint.url, **changes)
        return await run_load(plan, settings, stop=stop, progress=progress, progress_period_s=0.02)

    return asyncio.run(main())


def test_requests_leave_on_time_while_every_answer_is_still_awaited() -> None:
    arrivals = np.arange(20) * 0.01

    def look(progress: Progress, _: asyncio.Event) -> None:
        if progress.running == 20:
            endpoint.release(20)

    # A closed loop would wait for an answer before it has sent them all, and time out.
    with running(Endpoint(holds=True)) as endpoint:
        done = run(endpoint, arrivals, look=look, request_timeout_s=60.0)
    assert done.record.sent == 20
    assert (done.record.sent_s >= arrivals).all()
    table = result_of(done, "load").requests
    assert (table.ttft_s() >= done.record.sent_s.max() - arrivals).all()
    assert (table.outcome == 0).all()


def test_latency_counts_from_when_a_request_was_due_and_lateness_is_reported() -> None:
    with running(Endpoint()) as endpoint:
        done = run(endpoint, [0.0] * 40)
    # The generator cannot send forty at once: whatever it was late by is in the TTFT and in the figures.
    table = result_of(done, "load").requests
    assert (table.ttft_s() >= done.record.sent_s).all()
    assert figures(done)["late_s"]["max"] == pytest.approx(done.record.sent_s.max())


def test_a_generator_that_did_not_keep_up_says_so_and_what_helps() -> None:
    with running(Endpoint()) as endpoint:
        done = run(endpoint, [0.0])
    on_time, late = np.array([0.3] + 99 * [0.05]), np.array([0.06, 0.3] + 98 * [0.0])
    assert warnings(replace(done, cpu_share=0.9), on_time) == [], "one in a hundred is no news"
    (held_up,) = warnings(replace(done, cpu_share=0.45), late)
    assert "2.0% of requests were sent more than 50 ms after their time (the latest 0.30 s)" in held_up
    assert "it used only 45% of a core, so other work on this machine held it up" in held_up
    too_much, busy = warnings(replace(done, cpu_share=0.91), late)
    assert "send less, or from several machines" in too_much
    assert "used 91% of a core" in busy


def test_what_is_due_beyond_the_limit_in_flight_is_not_sent_and_said_loudly() -> None:
    def look(progress: Progress, _: asyncio.Event) -> None:
        if progress.not_sent == 7:
            endpoint.release(3)

    patient = replace(CHAT, ttft_s=60.0, itl_s=inf)
    with running(Endpoint(holds=True)) as endpoint:
        done = run(endpoint, np.arange(10) * 0.01, look=look, chat=patient, in_flight_max=3)
        assert len(endpoint.bodies) == 3 + 2  # two probes
    said = figures(done)
    assert (said["sent"], said["not_sent"], said["errors"]) == (3, 7, {"not sent": 7})
    assert "7 requests were NOT SENT" in said["warnings"][0]
    assert said["classes"]["chat"]["failed"] == 7
    assert result_of(done, "load").summary["attainment"]["chat"] == pytest.approx(0.3)


def test_a_request_without_an_end_times_out_and_its_connection_is_closed() -> None:
    for _ in range(5):  # Once is enough, but for a machine that stalls for the two seconds.
        with running(Endpoint(gap_s=60.0)) as endpoint:
            done = run(endpoint, [0.0, 0.1], request_timeout_s=2.0)
            until_s = monotonic() + 60
            while endpoint.left < 2 and monotonic() < until_s:
                sleep(0.01)
            assert endpoint.left == 2
        assert figures(done)["errors"] == {"timeout": 2}
        if (done.record.first_s >= 0).all():
            return
    pytest.fail("no first token was seen")


@pytest.mark.parametrize(("grace_s", "answered"), [(60.0, 3), (0.1, 1)])
def test_a_stop_sends_nothing_more_waits_for_the_grace_and_reports_what_was_done(grace_s: float, answered: int) -> None:
    """The first of three is over at the stop; the others end in the grace, or not at all."""

    def look(progress: Progress, stop: asyncio.Event) -> None:
        endpoint.release(answered if progress.stopping else 1)
        if (progress.sent, progress.done) == (3, 1):
            stop.set()

    with running(Endpoint(holds=True)) as endpoint:
        done = run(endpoint, [0.0, 0.1, 0.1, 3600.0, 3600.0], look=look, grace_s=grace_s, request_timeout_s=60.0)
        assert len(endpoint.bodies) == 3 + 2
    said = figures(done)
    assert done.stopped
    assert said["classes"]["chat"]["finished"] == answered
    assert said["classes"]["chat"]["cancelled"] == 3 - answered
    assert said["attempted"] == 3
    assert "stopped early; 2 of 5 requests were never due and are left out" in said["warnings"][-1]
    assert result_of(done, "load").summary["requests"] == 3


def test_a_server_that_is_not_there_is_one_clear_error() -> None:
    endpoint = Endpoint()
    with running(endpoint):
        pass
    with pytest.raises(TargetError, match=r"no answer to a probe: http://127.0.0.1:\d+: cannot connect"):
        run(endpoint, [0.0])
    endpoint.url = "ftp://x"
    with pytest.raises(TargetError, match="expected http://HOST"):
        run(endpoint, [0.0])


def test_a_server_that_goes_away_in_mid_run_fails_its_requests_and_nothing_is_retried() -> None:
    with running(Endpoint()) as endpoint:
        done = run(endpoint, [0.0, 0.1, 0.2], model="broken")
        assert len(endpoint.bodies) == 3 + 2
    assert figures(done)["errors"] == {"connection lost": 3}


@pytest.mark.parametrize(("model", "error", "outcome"), [
    ("429", "http 429: busy", "shed"),
    ("503", "http 503: busy", "shed"),
    ("400", "http 400: busy", "rejected"),
    ("cut", "cut short", "failed"),
    ("error", "stream error: engine_dead", "failed"),
])  # fmt: skip
def test_each_way_to_end_is_counted_by_its_kind(model: str, error: str, outcome: str) -> None:
    with running(Endpoint()) as endpoint:
        done = run(endpoint, [0.0, 0.01], model=model)
        assert len(endpoint.bodies) == 2 + 2  # nothing is retried
    said = figures(done)
    assert said["errors"] == {error: 2}
    assert said["classes"]["chat"][outcome] == 2


def test_a_fault_of_the_progress_view_ends_the_run_instead_of_being_lost() -> None:
    def broken(_: object) -> None:
        raise RuntimeError("no terminal")

    with running(Endpoint(ttft_s=0.3)) as endpoint:
        made = run_load(plan_of([0.0]), settings_of(endpoint.url), progress=broken, progress_period_s=0.05)
        with pytest.raises(RuntimeError, match="no terminal"):
            asyncio.run(made)
