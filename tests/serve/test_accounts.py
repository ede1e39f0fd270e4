"""What a gateway says of itself is what clients saw: metrics and event log after load, evictions and failures."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fault_site import Answer, Api, FaultSite, chat, config, item
from serve_trial import check_ends, check_log, emulated, events, ready, send, until, verdicts

EXTRA = """
[telemetry]
rotate_bytes = "32KiB"
rotate_keep = 50
"""
ITEMS = 120
LEAVERS = 5


def totals(page: str) -> dict[tuple[str, ...], float]:
    """Every sample of a page as Prometheus reads it, by its name and the values of its labels."""
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            key = (sample.name, *(value for _, value in sorted(sample.labels.items())))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


async def story(site: FaultSite) -> tuple[list[Answer], dict[tuple[str, ...], float]]:
    """Chat that evicts batch work, an engine killed in the middle, and clients that leave."""
    async with Api(site.url) as api:
        await until(lambda status: ready(status) == 2, api, "two are ready")
        await api.submit([item(f"c{i}", tokens=200) for i in range(ITEMS)])
        await until(lambda s: sum(i["running_batch"] for i in s["models"][0]["instances"]) > 8, api, "batch work runs")
        answers = await send(api, per_s=30.0, for_s=2.0, tokens=30)
        pid = await until(lambda s: s["models"][0]["instances"][0]["pid"], api, "an engine's pid is known")
        psutil.Process(pid).kill()
        answers += await send(api, per_s=30.0, for_s=2.0, tokens=30)
        # None of these ends by itself before its client has left.
        leavers = [Answer(api.origin, chat(f"bye {i}", 20_000)) for i in range(LEAVERS)]
        for answer in leavers:
            await answer.first.wait()
            answer.call.cancel()
        await verdicts(answers)
        await until(lambda s: s["batches"][0]["status"] == "completed" and not s["open_requests"], api, "all is over")
        return answers, totals((await api.ask("GET", "/metrics")).body.decode())


@pytest.mark.slow
def test_metrics_and_the_event_log_agree_with_what_clients_saw(tmp_path: Path) -> None:
    model = emulated(min_instances=2, max_instances=2, max_num_seqs=8)
    with FaultSite(tmp_path, config(model, extra=EXTRA)) as site:
        answers, page = asyncio.run(story(site))
    check_log(site)
    saw = Counter(answer.verdict for answer in answers)
    assert set(saw) <= {"complete", "error event", "broken", "refused"}
    assert saw["complete"] > 100
    arrived = {name: page["chiron_requests_arrived_total", name, "m"] for name in ("chat", "batch")}
    assert arrived["chat"] == len(answers) + LEAVERS
    ended = {key[3]: int(v) for key, v in page.items() if key[:2] == ("chiron_requests_total", "chat") and v}
    lost = len(answers) - saw["complete"]
    assert ended == {"finished": saw["complete"], "cancelled": LEAVERS} | ({"failed": lost} if lost else {})
    streams = sum(answer.verdict == "complete" and b"data:" in answer.text for answer in answers)
    assert page["chiron_time_to_first_token_seconds_count", "chat", "m"] >= streams
    assert page["chiron_http_responses_total", "200"] >= saw["complete"]
    assert page["chiron_evictions_total", "batch", "m"] > 0
    assert page["chiron_instance_failures_total", "m/emulated", "m"] == 1
    assert page[("chiron_event_log_dropped_lines_total",)] == 0
    assert len(list((site.directory / "chiron-data").glob("events.jsonl.*"))) >= 2, "the log was rotated under load"
    lines = events(site)
    assert sum(check_ends(lines).values()) == sum(arrived.values())
    told = {
        name: Counter(d["outcome"] for d in lines if d["event"] == "ended" and d["class"] == name) for name in arrived
    }
    assert told["chat"] == ended
    assert told["batch"]["finished"] == ITEMS
