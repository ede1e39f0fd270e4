"""Rivals live: the policies of the simulator before real processes, by ``--policy``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fault_site import Answer, Api, FaultSite, config, item
from serve_trial import check_ends, check_log, emulated, events, ready, send, until, verdicts

EXTRA = """
[policies.llumnix-quick]
policy = "llumnix-tuned"
interval = "1s"
scale_up_blocks = 60
scale_down_blocks = 400
migrate_below_blocks = 100

[policies.hpa-quick]
policy = "hpa-queue-tuned"
sync = "1s"
target = 1
stabilise_down = "2s"
max_num_seqs = 8
"""
TOKENS = 100
QUICK = ("llumnix-quick", "hpa-quick")
"""The rivals with small numbers: they grow within seconds."""


async def story(site: FaultSite, items: int, item_tokens: int) -> dict[str, Any]:
    async with Api(site.url) as api:
        await until(lambda status: ready(status) >= 1, api, "one is ready")
        batch = await api.submit([item(f"c{i}", tokens=item_tokens) for i in range(items)])
        answers = await send(api, per_s=25.0, for_s=8.0, tokens=TOKENS)
        assert set(await verdicts(answers)) == {"complete"}
        assert all(once(answer) for answer in answers), "no text comes twice, wherever batch work is moved"
        status: dict[str, Any] = await until(
            lambda s: s if s["batches"][0]["status"] == "completed" else None, api, f"{batch} completes", 300.0
        )
        assert status["batches"][0]["completed"] == items
        return status


def once(answer: Answer) -> bool:
    """A stream has one beginning, and at most one piece of text a token."""
    return answer.text.count(b'"role"') <= 1 and answer.text.count(b'"content"') <= TOKENS + 1


@pytest.mark.slow
@pytest.mark.parametrize("policy", [*QUICK, "llumnix-tuned", "hpa-queue-tuned", "chiron-paper", "static"])
def test_a_rival_serves_everybody(tmp_path: Path, policy: str) -> None:
    items, tokens = (60 if policy in QUICK else 20), 160  # What one instance does in a few seconds more.
    if policy == "llumnix-quick":  # Long items still run on the first instance when others have started, and are moved.
        items, tokens = 60, 600
    model = emulated(min_instances=1, max_instances=4, max_num_seqs=12, kv_capacity_tokens=8000)
    with FaultSite(tmp_path, config(model, extra=EXTRA), "--policy", policy) as site:
        status = asyncio.run(story(site, items, tokens))
    assert status["policy"] == policy
    check_log(site)
    lines = events(site)
    assert check_ends(lines) == {"finished": items + 200}
    changes = [line for line in lines if line["event"] == "decision" and line["kind"] == "fleet"]
    if policy in QUICK:
        assert sum(line["event"] == "ready" for line in lines) > 1
    if policy == "llumnix-quick":
        assert status["migrations"] > 0
    if policy == "static":
        assert not changes
