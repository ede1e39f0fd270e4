"""What the gateway's journal keeps of a run: the log, the tallies, and a result like the simulator's."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron.core.types import Decision, Request, RequestClass
from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter
from chiron.gateway.reporting.journal import COUNTED_TOGETHER, DECISIONS_KEPT, REASONS_MAX, ROWS, TOGETHER, LiveJournal
from chiron.gateway.reporting.lines import RequestLine
from chiron.gateway.reporting.live_result import LiveRecorder, RecorderSettings
from chiron.gateway.reporting.tally import (
    HISTORY,
    SLOT_S,
    TTFT_BOUNDS_S,
    Histogram,
    Rolling,
    rolling_buckets,
)
from chiron.telemetry.event_log import read_event_log
from chiron.telemetry.html import write_report
from chiron.telemetry.store import load_result, save_result
from live_plane_factory import CHAT, MODEL, NIGHT, LivePlane


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[LivePlane, Path]:
    """A rush to its end, with its log."""
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    live = LivePlane(path)
    live.rush(15.0, per_s=25.0)
    live.clock.run_until(200.0)
    live.journal.close()
    return live, path


def test_every_event_is_in_the_log_once_and_in_order(ran: tuple[LivePlane, Path]) -> None:
    live, path = ran
    events = list(read_event_log(path))
    times = [event["t"] for event in events[1:]]
    assert times == sorted(times)
    count = Counter(event["event"] for event in events)
    total = len(live.requests)
    assert (count["arrival"], count["ended"]) == (total, total)
    assert count["dispatch"] == total + count["evicted"]
    assert count["evicted"] == live.plane.evictions > 0
    assert count["first_token"] == total
    assert count["created"] == count["ready"] >= 2
    assert {e["reason"] for e in events if e["event"] == "decision"} >= {"interactive_load"}


def test_all_lines_that_wait_are_written_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(EventLogSettings(path=path, flush_s=3600.0), wall_origin_s=0.0)
    for group in range(100):
        writer.write_lines([RequestLine(float(group), "dispatch", "r", 1) for _ in range(64)])
    writer.close()
    assert (writer.dropped, writer.lost) == (0, 0)
    assert len(list(read_event_log(path))) == 1 + 100 * 64


def test_the_end_of_a_request_says_how_it_went(ran: tuple[LivePlane, Path]) -> None:
    live, path = ran
    ends = {event["request"]: event for event in read_event_log(path) if event["event"] == "ended"}
    for request in live.requests:
        end = ends[str(request.id)]
        assert (end["model"], end["class"], end["outcome"]) == (MODEL, request.cls.name, "finished")
        assert (end["input_tokens"], end["output_tokens"]) == (request.input_tokens, request.payload)
        assert end["ttft_s"] == request.first_token_s - request.arrival_s
        assert end["queue_s"] == request.dispatch_s - request.arrival_s
        assert end["itl_s"] == pytest.approx((request.finish_s - request.first_token_s) / (request.payload - 1))
        assert (end["evictions"], end["retries"]) == (request.evictions, 0)


def test_requests_are_called_as_clients_know_them_and_keys_by_name(tmp_path: Path) -> None:
    writer = EventWriter(EventLogSettings(path=tmp_path / "log"), wall_origin_s=0.0)
    journal = LiveJournal(writer=writer)
    payload = SimpleNamespace(request_id="chatcmpl-7", key_name="team a")
    request = Request(7, MODEL, CHAT, 1.0, 10, payload)
    journal.event(1.0, "arrival", request, None)
    request.outcome, request.finish_s = "cancelled", 1.5
    journal.event(1.5, "ended", request, None)
    journal.ended(request)
    journal.note(2.0, "drain", {"by": "admin"})
    journal.close()
    _, arrival, ended, drain = read_event_log(tmp_path / "log")
    assert arrival == {
        "t": 1.0,
        "event": "arrival",
        "request": "chatcmpl-7",
        "model": MODEL,
        "class": "chat",
        "input_tokens": 10,
        "key": "team a",
    }
    assert (ended["request"], ended["key"], ended["outcome"]) == ("chatcmpl-7", "team a", "cancelled")
    assert [ended[name] for name in ("instance", "queue_s", "ttft_s", "itl_s")] == [None] * 4
    assert drain == {"t": 2.0, "event": "drain", "by": "admin"}


def test_what_is_noted_down_is_written_in_order_and_as_it_was_then(tmp_path: Path) -> None:
    writer = EventWriter(EventLogSettings(path=tmp_path / "log"), wall_origin_s=0.0)
    journal = LiveJournal(writer=writer)
    requests = [
        Request(id, MODEL, CHAT, 1.0, 10, SimpleNamespace(request_id=str(id), prompt_tokens=0)) for id in (1, 2)
    ]
    for request in requests:
        journal.event(1.0, "arrival", request, None)
    journal.decided(2.0, Decision(kind="fleet", subject=MODEL, before=1, after=2, reason="x"))
    first = requests[0]
    first.outcome, first.finish_s, first.tokens_done = "cancelled", 3.0, 5
    journal.ended(first)
    first.tokens_done, first.payload.prompt_tokens = 7, 99  # Its engine goes on for a step.
    journal.note(4.0, "drain", {})
    journal.close()
    _, *events = read_event_log(tmp_path / "log")
    assert [(e["t"], e["event"]) for e in events] == [
        (1.0, "arrival"),
        (1.0, "arrival"),
        (2.0, "decision"),
        (3.0, "ended"),
        (4.0, "drain"),
    ]
    assert (events[3]["output_tokens"], events[3]["input_tokens"]) == (5, 10)


def test_a_request_that_no_line_can_hold_costs_no_other_line(tmp_path: Path) -> None:
    writer = EventWriter(EventLogSettings(path=tmp_path / "log"), wall_origin_s=0.0)
    journal = LiveJournal(writer=writer)
    for name in ("a", "\ud800", "b"):
        journal.event(1.0, "arrival", Request(1, MODEL, CHAT, 1.0, 10, SimpleNamespace(request_id=name)), None)
    journal.close()
    assert [e["request"] for e in read_event_log(tmp_path / "log") if e["event"] == "arrival"] == ["a", "b"]
    assert journal.dropped_lines == 1


def test_lines_that_come_together_and_find_the_queue_full_are_counted(tmp_path: Path) -> None:
    settings = EventLogSettings(path=tmp_path / "log", queue_max=100, flush_s=3600)
    journal = LiveJournal(writer=EventWriter(settings, wall_origin_s=0.0))
    for id in range(3 * TOGETHER):
        journal.event(float(id), "arrival", Request(id, MODEL, CHAT, 1.0, 10), None)
    assert journal.dropped_lines == 3 * TOGETHER - 100
    journal.close()
    seen = [e["request"] for e in read_event_log(tmp_path / "log") if e["event"] == "arrival"]
    assert seen == [str(id) for id in range(100)]


def test_tallies_count_what_happened(ran: tuple[LivePlane, Path]) -> None:
    live, _ = ran
    for cls in (CHAT, NIGHT):
        mine = [r for r in live.requests if r.cls is cls]
        tally = live.journal.tallies[MODEL, cls.name]
        assert (tally.arrived, tally.ended, tally.outcomes["finished"]) == (len(mine),) * 3
        assert tally.generation_tokens == sum(r.payload for r in mine)
        assert tally.prompt_tokens == sum(r.input_tokens for r in mine)
        assert tally.evictions == sum(r.evictions for r in mine)
        assert sum(tally.ttft.counts) == sum(tally.e2e.counts) == len(mine)
        assert tally.ttft.sum == pytest.approx(sum(r.first_token_s - r.arrival_s for r in mine))
    assert live.journal.tallies[MODEL, "night"].evictions > 0


def test_the_prompt_of_an_answer_in_one_piece_counts_although_no_first_token_was_seen() -> None:
    journal = LiveJournal()
    request = Request(7, MODEL, CHAT, 1.0, 10, 5)
    journal.event(1.0, "arrival", request, None)
    request.first_token_s, request.finish_s, request.tokens_done, request.outcome = 1.2, 1.6, 5, "finished"
    journal.ended(request)
    tally = journal.tallies[MODEL, CHAT.name]
    assert (tally.prompt_tokens, tally.generation_tokens) == (10, 5)


def test_the_tallies_agree_with_the_result_about_who_was_served_in_time(ran: tuple[LivePlane, Path]) -> None:
    live, _ = ran
    result = live.recorder.result(live.clock.now_s, policy=live.policy)
    for cls in (CHAT, NIGHT):
        tally = live.journal.tallies[MODEL, cls.name]
        assert tally.attained / tally.ended == pytest.approx(result.summary["attainment"][cls.name])


MOMENTS = st.integers(0, 40).map(float)
ENDS = st.tuples(
    st.sampled_from([CHAT, NIGHT]),
    st.sampled_from(["finished", "rejected", "failed", "cancelled", "shed"]),
    MOMENTS,
    MOMENTS,
    st.integers(1, 9),
)


@given(st.lists(ENDS, min_size=1, max_size=30))
def test_status_and_report_judge_each_end_alike(ends: list[tuple[RequestClass, Any, float, float, int]]) -> None:
    live = LivePlane()
    for id, (cls, outcome, waited_s, ran_s, tokens) in enumerate(ends):
        request = Request(id, MODEL, cls, 100.0, 10, deadline_s=130.0 if cls is NIGHT else None)
        request.outcome, request.tokens_done = outcome, tokens
        if outcome != "rejected" and (outcome == "finished" or ran_s):
            request.first_token_s = 100.0 + waited_s
        request.finish_s = 100.0 + waited_s + ran_s
        live.journal.ended(request)
    summary = live.recorder.result(1000.0, policy=live.policy).summary
    for (_, name), tally in live.journal.tallies.items():
        judged = tally.attained + tally.missed
        assert summary["attainment"].get(name) == (pytest.approx(tally.attained / judged) if judged else None)
    late = [tally.slos_missed["deadline"] for (_, name), tally in live.journal.tallies.items() if name == "night"]
    assert summary["batch_late"] == sum(late)


def test_a_running_service_is_not_blamed_for_clients_that_left_nor_for_work_that_has_time() -> None:
    live = LivePlane()
    ends = [(50.0, None), (150.0, None), (150.0, "cancelled"), (150.0, "finished")]
    unfinished: list[Request] = []
    live.recorder.open_requests = lambda: unfinished
    for id, (deadline_s, outcome) in enumerate(ends):
        request = Request(id, MODEL, NIGHT, 10.0, 10, deadline_s=deadline_s)
        if not outcome:
            unfinished.append(request)
        else:
            request.outcome, request.first_token_s, request.finish_s = outcome, 11.0, 20.0  # type: ignore[assignment]
            live.journal.ended(request)
    summary = live.recorder.result(100.0, policy=live.policy).summary
    assert (summary["attainment"], summary["attainment_all"], summary["batch_late"]) == ({"night": 0.5}, 0.5, 1)
    assert summary["models"][MODEL] == {"requests": 4, "finished": 1, "attainment": 0.5}


def test_a_live_run_gives_the_simulators_report_file_and_figures(ran: tuple[LivePlane, Path], tmp_path: Path) -> None:
    live, _ = ran
    result = live.recorder.result(
        live.clock.now_s, policy=live.policy, scenario="rush", scenario_text="policy = 'chiron'", evictions=3
    )
    summary = result.summary
    assert (summary["requests"], summary["finished"], summary["evictions"]) == (len(live.requests),) * 2 + (3,)
    assert summary["gpu_hours_bound"] is None
    alive_s = sum(min(live.clock.now_s, 1e9) - i.created_s for i in live.plane.instances.values())
    gone_s = summary["gpu_hours"] * 3600 - alive_s
    assert gone_s >= -1e-6
    assert summary["cost"] == pytest.approx(2.0 * summary["gpu_hours"])
    assert summary["instances_peak"] >= 2
    assert result.fleet
    assert result.decisions
    assert (np.diff(result.requests.arrival_s) >= 0).all()
    again = load_result(save_result(result, tmp_path / "live.chiron"))
    assert again.summary == summary
    assert (again.requests.first_token_s == result.requests.first_token_s).all()
    page = write_report([result], tmp_path / "live.html").read_text(encoding="utf-8")
    assert "rush" in page
    assert "only if they had missed an SLO by then" in page
    assert (result.seed, summary["seed"], again.seed) == (None, None, None)
    shown = re.sub(r"<script.*?</script>|<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert "seed" not in shown
    assert "no command repeats it" in shown


def test_a_result_holds_each_instances_batch_size_from_its_start_to_its_end() -> None:
    live = LivePlane()
    first, *_ = live.plane.instances.values()
    live.clock.call_at(20.0, live.fleet.fail_one)
    live.clock.run_until(60.0)
    second, *_ = live.plane.instances.values()
    assert second is not first
    points = live.recorder.result(live.clock.now_s, policy=live.policy).batch_sizes
    sizes = {i.id: [(p.t_s, p.max_batch_size) for p in points if p.instance_id == i.id] for i in (first, second)}
    assert sizes == {first.id: [(0.0, 16), (20.0, 0)], second.id: [(second.ready_s, 16)]}


def test_what_has_not_ended_is_unfinished_in_the_result() -> None:
    live = LivePlane()
    live.rush(1.0, night=50)
    result = live.recorder.result(live.clock.now_s, policy=live.policy)
    assert result.summary["unfinished"] == live.plane.open_requests > 0
    assert result.summary["requests"] == len(live.requests)


def test_the_recorder_keeps_the_newest_requests_and_bills_their_time_only() -> None:
    live = LivePlane(rows_max=40)
    live.rush(6.0, per_s=20.0, night=0)
    live.clock.run_until(60.0)
    result = live.recorder.result(live.clock.now_s, policy=live.policy)
    assert live.recorder.forgotten == 120 - 40
    assert len(result.requests.arrival_s) == 40
    assert result.requests.arrival_s[0] > live.requests[70].arrival_s
    assert result.summary["sim_s"] < 60.0 - live.requests[70].arrival_s
    assert result.summary["gpu_hours"] * 3600 == pytest.approx(result.summary["sim_s"] * len(live.plane.instances))


def test_points_are_bounded() -> None:
    live = LivePlane()
    recorder = LiveRecorder(models=(), classes=(), settings=RecorderSettings(points_max=10))
    journal = LiveJournal(recorder=recorder)
    for number in range(1000):
        size = Decision(kind="batch_size", subject=f"{MODEL}#1", before=1, after=2, reason=f"r{number}")
        journal.decided(float(number), size)
        journal.decided(float(number), Decision(kind="fleet", subject=MODEL, before=1, after=2, reason="x"))
    assert len(recorder.timeline.decisions) == len(recorder.timeline.batch_sizes) == 10
    assert len(journal.decisions) == len(journal.batch_sizes) == DECISIONS_KEPT
    assert len(journal.decision_counts) <= REASONS_MAX + 2
    assert sum(journal.decision_counts.values()) == 2000
    assert live.journal.dropped_lines == 0


def ended(cls: RequestClass, *, outcome: str, ttft_s: float = -1.0, took_s: float, tokens: int = 0) -> Request:
    request = Request(0, MODEL, cls, 100.0, 10, None)
    request.first_token_s = 100.0 + ttft_s if ttft_s >= 0 else -1.0
    request.outcome, request.finish_s, request.tokens_done = outcome, 100.0 + took_s, tokens  # type: ignore[assignment]
    return request


NONE = RequestClass(name="none", kind="batch")
ALL = RequestClass(name="all", kind="interactive", ttft_s=1.0, itl_s=0.1, deadline_s=10.0)


@pytest.mark.parametrize(
    ("request_", "kept", "missed", "verdict"),
    [
        (ended(ALL, outcome="finished", ttft_s=0.5, took_s=2.0, tokens=20), "ttft itl deadline", "", "attained"),
        (ended(ALL, outcome="finished", ttft_s=1.5, took_s=2.0, tokens=20), "itl deadline", "ttft", "missed"),
        (ended(ALL, outcome="finished", ttft_s=0.5, took_s=5.0, tokens=20), "ttft deadline", "itl", "missed"),
        (ended(ALL, outcome="finished", ttft_s=0.5, took_s=11.0, tokens=1000), "ttft itl", "deadline", "missed"),
        (ended(ALL, outcome="finished", ttft_s=0.5, took_s=0.5, tokens=1), "ttft itl deadline", "", "attained"),
        (ended(ALL, outcome="failed", ttft_s=0.5, took_s=2.0, tokens=3), "", "ttft itl deadline", "missed"),
        (ended(ALL, outcome="shed", took_s=0.5), "", "ttft itl deadline", "missed"),
        (ended(ALL, outcome="rejected", took_s=0.0), "", "", ""),
        (ended(ALL, outcome="rejected", took_s=60.0), "", "", ""),
        (ended(ALL, outcome="cancelled", took_s=0.2), "", "", ""),
        (ended(ALL, outcome="cancelled", took_s=2.0), "", "ttft", "missed"),
        (ended(ALL, outcome="cancelled", ttft_s=0.5, took_s=2.0, tokens=3), "ttft", "", ""),
        (ended(NONE, outcome="failed", took_s=1.0), "", "", "missed"),
        (ended(NONE, outcome="cancelled", took_s=1.0), "", "", ""),
        (ended(NONE, outcome="finished", ttft_s=0.5, took_s=1.0), "", "", "attained"),
        (ended(NIGHT, outcome="finished", ttft_s=300.0, took_s=400.0, tokens=3), "deadline", "", "attained"),
    ],
)
def test_each_promise_is_judged_by_what_was_seen(request_: Request, kept: str, missed: str, verdict: str) -> None:
    journal = LiveJournal()
    journal.ended(request_)
    (tally,) = journal.tallies.values()
    assert [name for name, count in tally.slos_met.items() if count] == kept.split()
    assert [name for name, count in tally.slos_missed.items() if count] == missed.split()
    assert (tally.attained, tally.missed) == (int(verdict == "attained"), int(verdict == "missed"))


def _roll(rolling: Rolling, t_s: Any, values: Any) -> None:
    slots = (t_s / SLOT_S).astype(int)
    distinct, which = np.unique(slots, return_inverse=True)
    for slot, place, bucket, count in rolling_buckets(distinct.tolist(), which, 3 + 0 * slots, values):
        assert place == 3
        rolling.add(slot, bucket, count)


def test_rolling_quantiles_are_right_to_a_few_percent_and_forget_after_a_minute() -> None:
    rolling = Rolling()
    assert np.isnan(rolling.quantiles(0.0, (0.5,))).all()
    values = np.exp(np.random.default_rng(1).normal(-2.0, 1.0, 5000))
    _roll(rolling, 0.01 * np.arange(5000), values)
    assert rolling.quantiles(50.0, (0.5, 0.99)) == pytest.approx(np.quantile(values, (0.5, 0.99)), rel=0.06)
    _roll(rolling, np.array([100.0]), np.array([7.0]))
    assert rolling.quantiles(105.0, (0.01,))[0] < 1.0, "the newest of the first ones are 55 s old"
    assert rolling.quantiles(111.0, (0.01, 1.0)) == pytest.approx([7.0, 7.0], rel=0.05)
    assert np.isnan(rolling.quantiles(1000.0, (0.5,))).all()
    _roll(rolling, np.array([1000.0]), np.array([0.0]))
    assert rolling.quantiles(1000.0, (0.5,))[0] < 1e-5


def test_a_histogram_has_all_that_was_seen_whenever_it_is_read() -> None:
    histogram = Histogram(TTFT_BOUNDS_S)
    values = np.array([*TTFT_BOUNDS_S, *np.random.default_rng(1).lognormal(0.0, 2.0, 1000).tolist()])
    for seen in (1, 100, len(values)):
        histogram.add(values[sum(histogram.counts) : seen])
        bounds = [-inf, *TTFT_BOUNDS_S, inf]
        within = [sum(low < value <= high for value in values[:seen]) for low, high in pairwise(bounds)]
        assert histogram.counts == within
        assert histogram.sum == pytest.approx(sum(values[:seen]))


OUTCOMES = ("finished", "rejected", "failed", "cancelled", "shed")


@pytest.mark.parametrize("count", [1, ROWS - 1, ROWS, COUNTED_TOGETHER + 3])
def test_tallies_are_up_to_date_whenever_they_are_read(count: int) -> None:
    """However many rows wait to be counted, by several models, classes and keys."""
    journal = LiveJournal()
    for id in range(count):
        payload = SimpleNamespace(key_name=f"k{id % 3}", prompt_tokens=id)
        request = Request(id, f"m{id % 2}", (CHAT, NIGHT)[id % 5 > 2], 0.01 * id, 10, payload)
        journal.event(0.01 * id, "arrival", request, None)
        request.outcome, request.tokens_done, request.finish_s = OUTCOMES[id % 5], 2 * id, 0.01 * id + 1.0  # type: ignore[assignment]
        request.first_token_s, request.retries = 0.01 * id + 0.5, id % 2
        journal.event(0.01 * id + 0.5, "first_token", request, None)
        journal.event(0.01 * id + 0.5, "evicted", request, None)
        journal.ended(request)
    ids = range(count)
    for (model, name), tally in journal.tallies.items():
        mine = [id for id in ids if model == f"m{id % 2}" and name == (CHAT, NIGHT)[id % 5 > 2].name]
        assert (tally.arrived, tally.evictions, tally.ended) == (len(mine),) * 3
        assert tally.outcomes == {each: sum(OUTCOMES[id % 5] == each for id in mine) for each in OUTCOMES}
        assert tally.prompt_tokens == sum(id or 10 for id in mine)
        assert tally.generation_tokens == sum(2 * id for id in mine)
        assert tally.retries == sum(id % 2 for id in mine)
        assert sum(tally.ttft.counts) == len(mine)
    for key, kept in journal.keys.items():
        mine = [id for id in ids if key == f"k{id % 3}"]
        assert kept.requests == {name: n for name, n in Counter(OUTCOMES[id % 5] for id in mine).items() if n}
        assert kept.generation_tokens == sum(2 * id for id in mine)
        assert kept.prompt_tokens == sum(id or 10 for id in mine)
    assert len(journal.keys) == min(3, count)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("decisions_every", [15, 10**6])
def test_rows_are_counted_some_thousand_at_a_time_whatever_cuts_the_log_short(
    grouped: bool, decisions_every: int, tmp_path: Path
) -> None:
    settings = EventLogSettings(path=tmp_path / "log", grouped=grouped, flush_s=3600.0)
    recorder = LivePlane(rows_max=1).recorder
    journal = LiveJournal(writer=EventWriter(settings, wall_origin_s=0.0), recorder=recorder)
    counted = [0]
    for id in range(3 * COUNTED_TOGETHER // 2):
        request = Request(id, MODEL, CHAT, 1.0, 10)
        journal.event(1.0, "arrival", request, None)
        request.outcome, request.finish_s = "cancelled", 2.0
        journal.ended(request)
        if id % decisions_every == 0:
            journal.decided(2.0, Decision(kind="fleet", subject=MODEL, before=1, after=2, reason="x"))
        if recorder.forgotten and recorder.forgotten + 1 != counted[-1]:  # It keeps one.
            counted.append(recorder.forgotten + 1)
            assert 2 * (id + 1 - counted[-1]) > TOGETHER, "it is counted in steps, while others come"
    rows = [2 * (after - before) for before, after in pairwise(counted)]
    assert len(rows) >= 2
    assert all(COUNTED_TOGETHER <= count <= COUNTED_TOGETHER + ROWS for count in rows)
    journal.close()


def test_what_comes_between_two_looks_is_counted_in_steps_with_others_between() -> None:
    recorder = LivePlane(rows_max=1).recorder
    journal = LiveJournal(recorder=recorder)
    for id in range(2000):
        request = Request(id, MODEL, CHAT, 1.0, 10)
        journal.event(1.0, "arrival", request, None)
        request.outcome, request.finish_s = "cancelled", 2.0
        journal.ended(request)
    journal.begin_to_count()
    assert recorder.forgotten == 0, "nothing is counted yet"
    steps = 0
    while journal.count_on():
        steps += 1
        assert steps < 1000
    assert steps > 5
    assert recorder.forgotten == 1999
    assert not journal.count_on(), "nothing is left"


def test_history_is_two_minutes_of_full_slots() -> None:
    journal = LiveJournal()
    for number in range(10):
        journal.event(number * SLOT_S + 0.5, "arrival", Request(number, MODEL, CHAT, 0.0, 10), None)
        if number == 2:
            journal.event(4.5, "first_token", Request(99, MODEL, CHAT, 3.0, 10), None)
    tally = journal.tallies[MODEL, CHAT.name]
    arrivals, ttft_s = tally.history(10 * SLOT_S)
    assert len(arrivals) == len(ttft_s) == HISTORY
    assert arrivals[-10:] == [1] * 10
    assert sum(arrivals) == 10
    assert (max(ttft_s), ttft_s[-10 + 2]) == (1.5, 1.5)
    assert sum(tally.history(1000.0)[0]) == 0


@pytest.mark.parametrize(("name", "value"), [("rows_max", 0), ("points_max", 0)])
def test_recorder_settings_are_checked(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        RecorderSettings(**{name: value})


def test_numbers_that_json_lacks_do_not_stop_the_log(tmp_path: Path) -> None:
    journal = LiveJournal(writer=EventWriter(EventLogSettings(path=tmp_path / "log"), wall_origin_s=0.0))
    numbers = {"a": nan, "b": inf, "c": np.float64(2.0)}
    journal.decided(1.0, Decision(kind="fleet", subject=MODEL, before=1, after=2, reason="x", numbers=numbers))
    journal.close()
    *_, decision = read_event_log(tmp_path / "log")
    assert decision["numbers"] == {"a": None, "b": None, "c": 2.0}
