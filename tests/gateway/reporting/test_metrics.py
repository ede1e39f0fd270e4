"""Prometheus and the status: what a scraper and ``chiron top`` see of a run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from chiron.core.types import Request
from chiron.fleet.port import FleetReport, InstanceUsage, KindReport, SleepStatus
from chiron.gateway.reporting.journal import LiveJournal
from chiron.gateway.reporting.metrics import LoopLag, Metrics
from chiron.gateway.reporting.status import BATCHES_SHOWN, LeaderReport, StatusSources, status
from chiron.gateway.reporting.tally import HISTORY
from chiron.store.port import Batch
from live_plane_factory import CHAT, MODEL, NIGHT, WALL_S, LivePlane


def batch(number: int, **changes: Any) -> Batch:
    values: dict[str, Any] = {
        "id": f"batch_{number}",
        "owner": "",
        "input_file_id": "file-1",
        "endpoint": "/v1/chat/completions",
        "completion_window": "1h",
        "status": "in_progress",
        "metadata": {},
        "created_s": WALL_S - 100.0,
        "in_progress_s": WALL_S - 100.0,
        "expires_s": WALL_S + 3500.0,
        "total": 1000,
        "completed": 300,
        "failed": 10,
        "model": MODEL,
    }
    return Batch(**{**values, **changes})


@pytest.fixture(scope="module")
def live() -> LivePlane:
    """In the middle of a rush."""
    live = LivePlane()
    live.rush(15.0, per_s=25.0)
    live.journal.responded(200)
    live.journal.responded(429)
    return live


LEADER = LeaderReport(
    gateway="gw-1",
    address="10.0.0.5:9443",
    term=7,
    leads_s=3.0,
    settling=True,
    relays_missing=2,
    fallback_placements=5,
    expired_requests=1,
)


@pytest.fixture(scope="module")
def around(live: LivePlane) -> StatusSources:
    return StatusSources(
        url="http://127.0.0.1:8000",
        version="0.1.0",
        wall_origin_s=WALL_S,
        instance_urls={1: "http://127.0.0.1:9001"},
        fleet=FleetReport(usage={1: InstanceUsage(cpu_share=0.5, rss_bytes=1 << 30, pid=42, restarts=0)}),
        batches=(batch(1), batch(2, status="completed", completed=1000, failed=0)),
        batch_in_flight={"batch_1": 50},
        loop_lag_s=0.001,
        connections=3,
        leader=LEADER,
    )


@pytest.fixture(scope="module")
def samples(live: LivePlane, around: StatusSources) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """By name and labels, as Prometheus' own parser reads them."""
    text = Metrics(live.plane, live.journal, lambda: around).render().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, "every series once"
            found[key] = sample.value
    return found


Value = Callable[..., float]


@pytest.fixture
def value(samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]) -> Value:
    def look_up(name: str, **labels: str) -> float:
        return samples[f"chiron_{name}", tuple(sorted((key.rstrip("_"), text) for key, text in labels.items()))]

    return look_up


def test_every_request_is_running_waiting_or_ended(live: LivePlane, value: Value) -> None:
    for cls in (CHAT, NIGHT):
        here = {"model": MODEL, "class_": cls.name}
        arrived = value("requests_arrived_total", **here)
        running, waiting = value("num_requests_running", **here), value("num_requests_waiting", **here)
        ended = sum(
            value("requests_total", outcome=outcome, **here)
            for outcome in ("finished", "rejected", "failed", "cancelled")
        )
        assert arrived == running + waiting + ended == sum(r.cls is cls for r in live.requests)
    assert value("num_requests_waiting", model=MODEL, class_="night") == live.plane.models[MODEL].batch.count > 0


def test_histograms_are_cumulative_and_complete(live: LivePlane, samples: dict[Any, float], value: Value) -> None:
    finished = value("requests_total", model=MODEL, class_="chat", outcome="finished")
    for stem in ("inter_token_latency", "e2e_request_latency", "request_queue_time"):
        assert value(f"{stem}_seconds_count", model=MODEL, class_="chat") == finished
    name = "chiron_time_to_first_token_seconds_bucket"
    rows = [
        (float(dict(labels)["le"]), count)
        for (family, labels), count in samples.items()
        if family == name and ("class", "chat") in labels
    ]
    counts = [count for _, count in sorted(rows)]
    assert counts == sorted(counts)
    seen = [r.first_token_s - r.arrival_s for r in live.requests if r.cls is CHAT and r.first_token_s >= 0]
    assert counts[-1] == len(seen)
    assert value("time_to_first_token_seconds_sum", model=MODEL, class_="chat") == pytest.approx(sum(seen))
    assert dict(sorted(rows))[0.25] == sum(ttft_s <= 0.25 for ttft_s in seen)


def test_gauges_are_what_the_control_plane_holds_now(live: LivePlane, value: Value) -> None:
    states = live.plane.instances.values()
    assert value("instances", model=MODEL, role="mixed", state="ready") == sum(i.state == "ready" for i in states)
    for instance in states:
        here = {"model": MODEL, "instance_id": str(instance.id)}
        assert value("max_batch_size", **here) == instance.max_batch_size
        assert value("instance_requests_running", kind="batch", **here) == len(instance.batch)
        assert 0.0 <= value("kv_cache_usage_perc", **here) <= 1.0
    assert value("itl_slo_seconds", model=MODEL, instance_id="1") == CHAT.itl_s
    assert value("ibp", model=MODEL) > 0
    assert value("instances_planned", model=MODEL, role="mixed") >= 2
    assert value("decisions_total", kind="fleet", reason="interactive_load") == 1
    assert value("evictions_total", model=MODEL, class_="night") == live.plane.evictions > 0
    assert value("slo_attained_total", model=MODEL, class_="chat", slo="ttft") > 0
    assert value("slo_missed_total", model=MODEL, class_="chat", slo="itl") == 0
    assert value("http_responses_total", code="429") == 1
    assert value("build_info", version="0.1.0", policy="chiron", advise="false", python=_python()) == 1


def _python() -> str:
    import platform

    return platform.python_version()


def test_batch_items_are_those_of_open_batches(value: Value) -> None:
    parts = {"pending": 1000 - 310 - 50, "running": 50, "done": 300, "failed": 10}
    assert {state: value("batch_items", model=MODEL, state=state) for state in parts} == parts
    assert value("batches", model=MODEL, status="in_progress") == 1


def test_a_gateway_without_any_traffic_renders_too_and_nothing_is_global() -> None:
    live = LivePlane()
    before = {metric.name for metric in REGISTRY.collect()}
    one, other = (Metrics(live.plane, live.journal, StatusSources) for _ in range(2))
    assert b"chiron_build_info" in one.render()
    assert b"process_resident_memory_bytes" in other.render()
    assert {metric.name for metric in REGISTRY.collect()} == before
    json.dumps(status(live.plane.snapshot(), live.journal, StatusSources()), allow_nan=False)


def test_odd_label_values_are_escaped() -> None:
    live = LivePlane()
    live.journal.decision_counts["reject", 'it said "no"\nand \\ left'] += 1
    text = Metrics(live.plane, live.journal, StatusSources).render().decode()
    found = [s.labels for f in text_string_to_metric_families(text) for s in f.samples if "decisions" in s.name]
    assert found == [{"kind": "reject", "reason": 'it said "no"\nand \\ left'}]


def test_the_status_is_json_and_tells_the_same(live: LivePlane, around: StatusSources, value: Value) -> None:
    told = json.loads(json.dumps(status(live.plane.snapshot(), live.journal, around), allow_nan=False))
    (model,) = told["models"]
    assert (told["policy"], told["advise"], told["open_requests"]) == ("chiron", False, live.plane.open_requests)
    assert told["at"].startswith("2027-01-15T08:00:1")
    chat = next(cls for cls in model["classes"] if cls["name"] == "chat")
    assert chat["arrived"] == value("requests_arrived_total", model=MODEL, class_="chat")
    assert chat["running"] + chat["waiting"] == chat["arrived"] - chat["finished"]
    assert 0 < chat["last_minute"]["ttft_p50_s"] <= chat["last_minute"]["ttft_p99_s"]
    assert len(chat["history"]["arrivals"]) == HISTORY
    assert sum(chat["history"]["arrivals"]) > 0
    assert (chat["ttft_slo_s"], chat["deadline_s"]) == (CHAT.ttft_s, None)
    first = next(i for i in model["instances"] if i["id"] == 1)
    assert (first["url"], first["pid"], first["rss_bytes"]) == ("http://127.0.0.1:9001", 42, 1 << 30)
    assert sum(i["running_interactive"] + i["running_batch"] for i in model["instances"]) == sum(
        cls["running"] for cls in model["classes"]
    )
    assert model["queue"]["batch"] == sum(group["requests"] for group in model["queue"]["groups"])
    assert 0 < model["queue"]["groups"][0]["deadline_in_s"] < 600
    assert {d["reason"] for d in told["decisions"]} >= {"interactive_load"}


def test_promises_that_a_client_asked_for_are_not_shown_as_its_class() -> None:
    live = LivePlane()
    live.submit(replace(CHAT, ttft_s=0.1, itl_s=0.001), 1.0)
    (model,) = status(live.plane.snapshot(), live.journal, StatusSources())["models"]
    (chat,) = model["classes"]
    assert (chat["ttft_slo_s"], chat["itl_slo_s"]) == (CHAT.ttft_s, CHAT.itl_s)


def test_a_start_that_nobody_has_timed_is_not_told() -> None:
    live = LivePlane()

    def told() -> tuple[float | None, bool]:
        (model,) = status(live.plane.snapshot(), live.journal, StatusSources())["models"]
        page = Metrics(live.plane, live.journal, StatusSources).render()
        return model["cold_start_s"], b"chiron_cold_start_seconds{" in page

    assert told() == (None, False)
    live.rush(15.0, per_s=25.0)
    took_s, rendered = told()
    assert took_s == pytest.approx(live.plane.models[MODEL].cold_start_s)
    assert rendered


def test_the_policy_is_called_as_the_config_calls_it() -> None:
    live = LivePlane(policy="hpa-kv-tuned")
    around = StatusSources(policy="hpa-kv-tuned")
    assert status(live.plane.snapshot(), live.journal, around)["policy"] == "hpa-kv-tuned"
    assert b'policy="hpa-kv-tuned"' in Metrics(live.plane, live.journal, lambda: around).render()


def test_batches_that_run_come_first_by_deadline_and_the_list_is_bounded(live: LivePlane) -> None:
    many = [batch(n, expires_s=WALL_S + 1000.0 - n) for n in range(60)] + [batch(99, status="completed")]
    shown = status(live.plane.snapshot(), live.journal, StatusSources(wall_origin_s=WALL_S, batches=many))["batches"]
    assert len(shown) == BATCHES_SHOWN
    assert shown[0]["id"] == "batch_59"
    (ended,) = status(live.plane.snapshot(), live.journal, StatusSources(batches=many[-1:]))["batches"]
    assert (ended["status"], ended["eta_s"]) == ("completed", None)


def test_making_either_takes_milliseconds(live: LivePlane, around: StatusSources) -> None:
    """Both are made on the loop's thread; the best of three."""
    metrics = Metrics(live.plane, live.journal, lambda: around)
    for make in (metrics.render, lambda: json.dumps(status(live.plane.snapshot(), live.journal, around))):
        took = []
        for _ in range(3):
            started_s = time.thread_time()
            make()
            took.append(time.thread_time() - started_s)
        assert min(took) < 0.02


def test_a_blocked_loop_shows_as_lag() -> None:
    async def measure() -> tuple[float, float, float]:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        lag = LoopLag(loop)
        before_s = lag.worst_s
        loop.call_later(0.2, time.sleep, 0.15)
        done = loop.create_future()
        loop.call_later(0.45, done.set_result, None)
        await done
        lag.close()
        return before_s, lag.worst_s, loop.time() - began_s

    before_s, worst_s, whole_s = asyncio.run(measure())
    assert before_s == 0.0
    assert 0.05 < worst_s < whole_s


def test_requests_of_a_model_that_is_queried_before_it_has_instances_count_as_waiting() -> None:
    live = LivePlane()
    for instance in list(live.plane.instances.values()):
        live.plane.instance_failed(instance)
    live.plane.submit(Request(10_000, MODEL, CHAT, 0.0, 10, 5))
    (model,) = status(live.plane.snapshot(), live.journal, StatusSources())["models"]
    assert model["classes"][0]["waiting"] == model["queue"]["interactive"] == 1


def test_gpu_seconds_and_cost_are_those_of_the_run(live: LivePlane, value: Value) -> None:
    summary = live.recorder.result(live.clock.now_s, policy=live.policy).summary
    assert value("gpu_seconds_total", model=MODEL, gpu="g") == pytest.approx(3600.0 * summary["gpu_hours"])
    assert value("gpu_cost_total", model=MODEL, gpu="g") == pytest.approx(2.0 * summary["gpu_hours"])


def test_instances_that_are_gone_stay_on_the_bill() -> None:
    live = LivePlane()
    live.rush(15.0, per_s=25.0)
    live.clock.run_until(4000.0)
    assert len(live.plane.instances) < len(live.engines)
    ((_, bill),) = live.recorder.billed(4000.0).items()
    result = live.recorder.result(4000.0, policy=live.policy)
    assert bill.gpu_seconds == pytest.approx(3600.0 * result.summary["gpu_hours"])
    assert live.recorder.billed(5000.0)[MODEL, "g"].gpu_seconds > bill.gpu_seconds


def test_no_label_is_one_of_prometheus_own(samples: dict[Any, float]) -> None:
    """It would rename ours to ``exported_instance``."""
    assert not [name for name, labels in samples if {"instance", "job"} & {label for label, _ in labels}]


def test_what_each_key_used_is_told_by_its_name(live: LivePlane, around: StatusSources) -> None:
    journal = LiveJournal()
    for number in range(6):
        payload = SimpleNamespace(key_name=("", "team-a", "team-b")[number % 3])
        request = Request(number, MODEL, CHAT, 1.0, 100, payload)
        request.outcome, request.finish_s, request.first_token_s, request.tokens_done = "finished", 9.0, 8.0, 20
        journal.ended(request)
    page = Metrics(live.plane, journal, lambda: around).render().decode()
    assert 'chiron_key_requests_total{key="team-a",outcome="finished"} 2.0' in page
    assert 'chiron_key_generation_tokens_total{key="team-b"} 40.0' in page
    assert 'chiron_key_prompt_tokens_total{key=""} 200.0' in page


def test_which_gateway_leads_is_shown_with_what_relays_did_without_it(
    value: Value, live: LivePlane, around: StatusSources
) -> None:
    assert value("leader_info", gateway="gw-1", address="10.0.0.5:9443") == 1
    assert (value("leader_term"), value("leader_settling"), value("relays_missing")) == (7, 1, 2)
    assert value("relay_fallback_placements_total") == 5
    assert value("relay_expired_requests_total") == 1
    assert status(live.plane.snapshot(), live.journal, around)["leader"] == asdict(LEADER)
    assert status(live.plane.snapshot(), live.journal, StatusSources())["leader"] is None


def test_sleepers_are_counted_by_kind(live: LivePlane, around: StatusSources) -> None:
    (kind,) = live.plane.models[MODEL].spec.kinds
    sleep = SleepStatus(
        asleep=2, memory_gb=40.0, wakes=7, failed_sleeps=1, failed_wakes=3, lost=4, reason="it did not wake within 30 s"
    )
    told = replace(around, fleet=FleetReport(kinds={kind.name: KindReport(sleep=sleep)}))
    page = Metrics(live.plane, live.journal, lambda: told).render().decode()
    labels = f'kind="{kind.name}",model="{MODEL}"'
    assert f"chiron_instances_asleep{{{labels}}} 2.0" in page
    assert f"chiron_sleepers_memory_bytes{{{labels}}} 4e+10" in page
    assert f"chiron_instance_wakes_total{{{labels}}} 7.0" in page
    for what, count in (("sleep", 1), ("wake", 3), ("lost", 4)):
        assert f'chiron_sleep_failures_total{{{labels},what="{what}"}} {count}.0' in page
    (model,) = [each for each in status(live.plane.snapshot(), live.journal, told)["models"] if each["name"] == MODEL]
    assert model["sleepers"] == [{"kind": kind.name, **asdict(sleep)}]
