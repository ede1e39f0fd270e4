"""``chiron serve --advise``: everything is decided and said, and nothing is touched."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chiron.cli import app
from chiron.net.client import Origin
from fault_site import Answer, Api, FaultSite, chat, config, item
from serve_trial import PROFILE, check_ends, check_log, emulated_fleet, events, ready, send, until, verdicts

SEQS = 64
WAIT = ("arrival", "dispatch")
MORE = "advised fleet of m: 2 ->"
EXTRA = """
[policies.quick]
policy = "chiron"
tick = "250ms"

[classes.chat]
kind = "interactive"
ttft = "1s"
itl = "11ms"

[classes.batch]
kind = "batch"
deadline = "1h"
"""
"""Step times of the profile go from 9 to 14 ms with the batch: this ITL wants a smaller one than engines allow."""


def model(urls: list[str]) -> str:
    """Endpoints, and beyond them a kind that could be started."""
    return f"""
min_instances = 1
max_instances = 6
max_num_seqs = {SEQS}
instances = [
    {{ engine = "emulated", name = "there", endpoints = {urls} }},
    {{ engine = "emulated", name = "more", profile = "{PROFILE}" }},
]"""


async def limit_of(url: str) -> int:
    """The engine's own, as it says."""
    origin = Origin(url)
    try:
        return int(json.loads((await origin.fetch("GET", "/chiron/limits")).body)["limit"])
    finally:
        await origin.close()


async def trial(site: FaultSite, count: int, advises_more: bool) -> dict[str, Any]:
    """Interactive work and a batch whose deadline is near; the status in the end."""
    jobs = [item(f"c{i}", tokens=400) for i in range(400)]
    async with Api(site.url) as api:
        await until(lambda status: ready(status) == count, api, "every endpoint is ready")
        await api.submit(jobs, window="3s")
        answers = await send(api, per_s=25.0, for_s=5.0, tokens=60)
        assert set(await verdicts(answers)) == {"complete"}
        for window in ("12s", "48s"):  # A gateway that stalled may have decided nothing while there was time left.
            if MORE in site.log.read_text() or not advises_more:
                break
            batch = await api.submit([*jobs, *(item(f"d{i}", tokens=400) for i in range(2000))], window=window)
            while (await api.batch(batch))["status"] not in ("completed", "expired"):
                await asyncio.sleep(0.05)
        status: dict[str, Any] = await api.get("/chiron/status")
        assert ready(status) == count, "nobody came or went"
        return status


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["quick", "llumnix-tuned", "hpa-queue-tuned", "chiron-paper"])
def test_advice_is_journalled_and_nothing_is_touched(tmp_path: Path, policy: str) -> None:
    with emulated_fleet(2, "--max-num-seqs", str(SEQS)) as urls:
        text = f'policy = "{policy}"\n' + config(model(urls), extra=EXTRA)
        with FaultSite(tmp_path, text, "--advise") as site:
            status = asyncio.run(trial(site, len(urls), policy == "quick"))
            assert "(advise: decides and logs, changes nothing)" in site.log.read_text()
            screen = CliRunner().invoke(app, ["top", "--once", "--url", site.url]).output
            assert "(advises only)" in screen
            said = CliRunner().invoke(app, ["advice", str(site.directory / "chiron-data" / "events.jsonl")])
            assert "with advice" in said.output or "nothing has been decided" in said.output
        assert [asyncio.run(limit_of(url)) for url in urls] == [SEQS] * 2, "no engine was told anything"
    assert status["advise"] is True
    assert (status["evictions"], status["migrations"]) == (0, 0)
    about = status["models"][0]
    assert [i["max_batch_size"] for i in about["instances"]] == [SEQS] * 2
    assert sum(about["planned"].values()) == 2
    lines = events(site)
    check_log(site)
    assert check_ends(lines)["finished"] >= 125
    decisions = [line for line in lines if line["event"] == "decision"]
    assert all(line["reason"] for line in decisions)
    check_changes(decisions)
    if policy == "quick":
        assert {"batch_size", "fleet"} <= {line["kind"] for line in decisions}
        assert MORE in site.log.read_text()
    changes = [line["event"] for line in lines if line["event"] in ("created", "ready", "draining", "gone", "failed")]
    assert changes == ["created"] * 2 + ["ready"] * 2


def check_changes(decisions: list[dict[str, Any]]) -> None:
    """Advice is not said again: each differs from the one before it on the same thing, and begins where that ended."""
    by_subject: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in decisions:
        by_subject.setdefault((line["kind"], line["subject"]), []).append(line)
    for (kind, _), told in by_subject.items():
        if kind == "batch_size":
            assert all(line["before"] != line["after"] for line in told)
            assert all(one["after"] == other["before"] for one, other in pairwise(told))


@pytest.mark.slow
def test_a_request_that_advice_would_make_room_for_waits_as_before_a_plain_proxy(tmp_path: Path) -> None:
    """Full of batch work, one slot after another: nothing is evicted, everything is answered."""

    async def story(site: FaultSite) -> None:
        async with Api(site.url) as api:
            await until(lambda status: ready(status) == 1, api, "the endpoint is ready")
            batch = await api.submit([item(f"c{i}", tokens=200) for i in range(24)])
            await until(lambda s: s["models"][0]["instances"][0]["running_batch"] == 4, api, "batch work fills it")
            answers = [Answer(api.origin, chat(f"q{i}", tokens=10)) for i in range(6)]
            assert set(await verdicts(answers)) == {"complete"}
            await until(lambda s: s["batches"][0]["status"] == "completed", api, f"{batch} completes")
            status = await api.get("/chiron/status")
            assert status["evictions"] == 0
            assert status["batches"][0]["completed"] == 24

    with emulated_fleet(1, "--max-num-seqs", "4") as urls:
        model = f'engine = "emulated"\nmax_num_seqs = 4\nendpoints = {urls}\nmin_instances = 0'
        with FaultSite(tmp_path, config(model), "--advise") as site:
            asyncio.run(story(site))
    check_log(site)
    lines = events(site)
    first = next(line["request"] for line in lines if line["event"] == "arrival" and line["class"] == "chat")
    came_s, begun_s = (line["t"] for line in lines if line.get("request") == first and line["event"] in WAIT)
    ended_s = [line["t"] for line in lines if line["event"] == "ended" and line["class"] == "batch"]
    assert any(came_s < t <= begun_s for t in ended_s), "there was no room until an item had ended"
