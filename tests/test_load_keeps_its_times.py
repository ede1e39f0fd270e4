"""Open loop: requests leave at their times whatever the server does, and nothing is hidden when they cannot."""

from __future__ import annotations

import asyncio
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest

from chiron.load.errors import TargetError
from chiron.load.record import Progress
from chiron.load.result import figures, result_of
from chiron.load.run import LoadRun, run_load
from load_factory import plan_of, settings_of
from load_server import Endpoint, running


def run(endpoint: Endpoint, arrival_s: Any, *, stop_when: tuple[int, int] | None = None, **changes: Any) -> LoadRun:
    """One run against a running endpoint; it is stopped once ``stop_when`` requests are sent and done."""
    split = {key: changes.pop(key) for key in ("model", "tokens", "cls", "jobs") if key in changes}

    async def main() -> LoadRun:
        stop = asyncio.Event()

        def look(progress: Progress) -> None:
            if stop_when is not None and progress.sent >= stop_when[0] and progress.done >= stop_when[1]:
                stop.set()

        plan, settings = plan_of(arrival_s, **split), settings_of(endpoint.url, **changes)
        return await run_load(plan, settings, stop=stop, progress=look, progress_period_s=0.02)

    return asyncio.run(main())


def test_requests_leave_on_time_while_every_answer_is_still_awaited() -> None:
    arrivals = np.arange(20) * 0.01
    with running(Endpoint(ttft_s=0.5)) as endpoint:
        done = run(endpoint, arrivals)
    assert done.record.sent == 20
    # A closed loop of any small size would still be sending when the first answer comes.
    assert done.record.sent_s.max() < done.record.first_s.min()
    assert (done.record.sent_s >= arrivals).all()
    table = result_of(done, "load").requests
    assert (table.ttft_s() >= 0.49).all()
    assert (table.outcome == 0).all()


def test_latency_counts_from_when_a_request_was_due_and_lateness_is_reported() -> None:
    with running(Endpoint()) as endpoint:
        done = run(endpoint, [0.0] * 40)
    # The generator cannot send forty at once: whatever it was late by is in the TTFT and in the figures.
    table = result_of(done, "load").requests
    assert (table.ttft_s() >= done.record.sent_s).all()
    assert figures(done)["late_s"]["max"] == pytest.approx(done.record.sent_s.max())


def test_what_is_due_beyond_the_limit_in_flight_is_not_sent_and_said_loudly() -> None:
    with running(Endpoint(ttft_s=0.4)) as endpoint:
        done = run(endpoint, np.arange(10) * 0.01, in_flight_max=3)
        assert len(endpoint.bodies) == 3 + 2  # two probes
    said = figures(done)
    assert (said["sent"], said["not_sent"], said["errors"]) == (3, 7, {"not sent": 7})
    assert "7 requests were NOT SENT" in said["warnings"][0]
    assert said["classes"]["chat"]["failed"] == 7
    assert result_of(done, "load").summary["attainment"]["chat"] == pytest.approx(0.3)


def test_a_request_without_an_end_times_out_and_its_connection_is_closed() -> None:
    with running(Endpoint(gap_s=60.0)) as endpoint:
        done = run(endpoint, [0.0, 0.1], request_timeout_s=0.3)
        until_s = monotonic() + 5
        while endpoint.left < 2 and monotonic() < until_s:
            sleep(0.01)
        assert endpoint.left == 2
    assert figures(done)["errors"] == {"timeout": 2}
    assert (done.record.first_s >= 0).all()  # The first token was seen.


def test_a_stop_sends_nothing_more_waits_for_the_grace_and_reports_what_was_done() -> None:
    with running(Endpoint(gap_s=0.4)) as endpoint:
        # Each takes 0.8 s. Stopped at 1.0 s: the first is over, the second ends in the grace, the third does not.
        done = run(endpoint, [0.0, 0.6, 1.0, 9.0, 9.0], tokens=3, stop_when=(3, 1), grace_s=0.6)
        assert len(endpoint.bodies) == 3 + 2
    said = figures(done)
    assert done.stopped
    assert said["classes"]["chat"]["finished"] == 2
    assert said["classes"]["chat"]["cancelled"] == 1
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
    ("429", "http 429: busy", "rejected"),
    ("503", "http 503: busy", "rejected"),
    ("400", "http 400: busy", "failed"),
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
