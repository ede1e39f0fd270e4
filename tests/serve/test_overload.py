"""Overload, live: one engine that may not become more, and far more requests than it can serve in time."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest

from fault_site import Api, FaultSite, config
from serve_trial import check_ends, check_log, emulated, events, ready, send, until, verdicts

TTFT_S = 2.0
EXTRA = f"""
[classes.chat]
kind = "interactive"
ttft = "{TTFT_S}s"
itl = "1s"

[policies.chiron.overload]
refuse = REFUSE
"""
PER_S, FOR_S, SETTLED_S = 30.0, 25.0, 10.0
STALL_S = 0.5


def stalls(times_s: list[float]) -> list[tuple[float, float]]:
    """When nothing at all happened, though dozens of things happen in each second: the machine was held up."""
    return [(one, other) for one, other in pairwise(sorted(times_s)) if other - one > STALL_S]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("refuse", [False, True])
def test_what_the_engine_does_in_an_overload_it_does_in_time(tmp_path: Path, refuse: bool) -> None:
    """Eight places and 60 tokens at some 11 ms: a good ten requests/s. Judged against the same run: of all that was
    begun, once the overload had been seen, nearly everything but the turns of the lost was on time, unless it waited
    while the machine stalled."""
    model = emulated(min_instances=1, max_instances=1, max_num_seqs=8, classes=["chat"])
    extra = EXTRA.replace("REFUSE", str(refuse).lower())

    async def story() -> tuple[dict[str, int], list[float]]:
        async with Api(site.url) as api:
            await until(lambda status: ready(status) >= 1, api, "it is ready")
            answers = await send(api, per_s=PER_S, for_s=FOR_S, tokens=60)
            found = await verdicts(answers, 300.0)
            later = [float(a.retry_after) for a in answers if a.status == 429]
            return dict(found), later

    with FaultSite(tmp_path, config(model, extra=extra)) as site:
        found, later = asyncio.run(story())
    check_log(site)
    lines = events(site)
    ends = check_ends(lines)
    assert sum(found.values()) == round(PER_S * FOR_S)
    arrived = {line["request"]: line["t"] for line in lines if line["event"] == "arrival"}
    begun = {line["request"]: line["t"] for line in lines if line["event"] == "first_token"}
    since_s, until_s = min(arrived.values()) + SETTLED_S, max(arrived.values())
    settled = [id for id, at_s in begun.items() if since_s <= at_s <= until_s]
    held_up = stalls([line["t"] for line in lines])
    judged = [id for id in settled if not any(arrived[id] < end and begun[id] > start for start, end in held_up)]
    assert len(judged) >= 20, (len(judged), held_up)
    late = [id for id in judged if begun[id] - arrived[id] > TTFT_S]
    assert len(late) <= 0.15 * len(judged), (len(late), len(judged), held_up)
    if refuse:
        assert ends["shed"] == len(later) > 50
        assert min(later) >= 1
    else:
        assert ends["shed"] == 0
        assert set(found) == {"complete"}
