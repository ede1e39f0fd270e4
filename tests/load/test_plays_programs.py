"""Programs against a server: the next call is due a while after those before it have ended, and begins as they did."""

from __future__ import annotations

import asyncio
from io import StringIO
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from chiron.cli.load.view import print_figures
from chiron.load.plan import make_plan
from chiron.load.result import figures, result_of
from chiron.load.run import LoadRun, run_load
from chiron.workload.build import build_workload
from chiron.workload.generate import Gamma
from chiron.workload.lengths import ConstantTokens
from chiron.workload.programs import ProgramShape, ProgramStream
from load_factory import CHAT, settings_of
from load_server import Endpoint, running

SHAPE = ProgramShape(
    steps=3,
    branches=2,
    first=ConstantTokens(tokens=200),
    added=ConstantTokens(tokens=50),
    output=ConstantTokens(tokens=3),
    think_s=0.02,
)


def run(endpoint: Endpoint, model: str = "m", *, programs: int = 3) -> LoadRun:
    stream = ProgramStream(
        kind="agent",
        model=model,
        cls=CHAT,
        arrivals=Gamma(rate=100.0, cv=0.0),
        duration_s=programs / 100.0,
        shape=SHAPE,
        deadline_s=60.0,
    )
    plan = make_plan(build_workload([], programs=[stream], seed=1), name="agents", seed=1)
    return asyncio.run(run_load(plan, settings_of(endpoint.url, request_timeout_s=60.0)))


def test_a_call_is_due_a_think_time_after_the_last_of_those_before_it() -> None:
    with running(Endpoint(ttft_s=0.005)) as endpoint:
        done = run(endpoint)
    record, programs = done.record, done.plan.workload.programs
    assert programs is not None
    assert record.sent == len(done.plan.workload) == 18
    for row in range(18):
        before = programs.parents[programs.parents_from[row] : programs.parents_from[row + 1]]
        if len(before):
            assert record.due_s[row] >= record.last_s[before].max() + programs.think_s[row]
        assert record.sent_s[row] >= record.due_s[row]
    result = result_of(done, "load")
    assert (np.diff(result.requests.arrival_s) >= 0).all()
    assert (result.requests.ttft_s() >= 0).all()
    assert result.summary["programs"]["agent"]["finished"] == 3
    assert result.summary["programs"]["agent"]["attainment"] == 1.0
    console = Console(file=StringIO(), width=200)
    print_figures(console, figures(done))
    assert "programs agent: 3 of 3 finished, 100 % in SLO; from" in console.file.getvalue()  # type: ignore[attr-defined]


def test_calls_name_their_program_and_each_prompt_begins_with_the_last() -> None:
    with running(Endpoint()) as endpoint:
        run(endpoint)
    prompts: dict[bytes, list[str]] = {}
    for headers, body in zip(endpoint.headers, endpoint.bodies, strict=True):
        if b"x-chiron-program" in headers:
            prompts.setdefault(headers[b"x-chiron-program"], []).append(content(body))
    assert sorted(prompts) == [b"1-0", b"1-1", b"1-2"]
    for said in prompts.values():
        assert len(said) == 6
        assert all(longer.startswith(shorter[:200]) for shorter, longer in pairwise(said))
        assert len(said[-1]) > len(said[0])
    assert len({said[0][:40] for said in prompts.values()}) == 3, "programs have prompts of their own"


def content(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])


@pytest.mark.parametrize("model", ["503"])
def test_a_program_whose_call_fails_makes_no_more(model: str) -> None:
    with running(Endpoint()) as endpoint:
        done = run(endpoint, model)
    result = result_of(done, "load")
    assert done.record.sent == len(result.requests.arrival_s) == 6, "the first step of each"
    assert result.summary["programs"]["agent"]["finished"] == 0
    assert all(program.finish_s == -1.0 for program in result.programs)
