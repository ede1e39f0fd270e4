"""Lengths, classes and fields of requests, against a server with a tokenizer of its own."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from chiron.load.body import Bodies, BodySettings
from chiron.load.errors import PlanError, TargetError
from chiron.load.plan import JobKey, Lengths, LoadPlan, make_plan, mixed
from chiron.load.prompt import Filler, TokenMeter
from chiron.load.result import figures
from chiron.load.run import LoadRun, run_load
from chiron.workload.types import Trace
from load_factory import CHAT, FLEX, plan_of, settings_of, workload
from load_server import Endpoint, running


def run(endpoint: Endpoint, plan: LoadPlan, **changes: Any) -> LoadRun:
    return asyncio.run(run_load(plan, settings_of(endpoint.url, **changes)))


def test_prompts_have_the_wanted_length_as_the_server_counts_it() -> None:
    with running(Endpoint()) as endpoint:
        tokens = figures(run(endpoint, plan_of(np.arange(10) * 0.01)))["tokens"]
    assert tokens["counted_by_server"] == 10
    assert tokens["input"] == pytest.approx(1000, abs=10)
    assert tokens["output"] == tokens["output_wanted"] == 40


def test_without_calibration_the_answers_themselves_correct_the_length() -> None:
    with running(Endpoint()) as endpoint:
        # The last one leaves when the others have been answered.
        done = run(endpoint, plan_of([*np.arange(10) * 0.03, 2.5]), calibrate=False)
        assert len(endpoint.bodies) == 1 + 11  # One probe, to see that the server is there.
    assert done.record.input_tokens[-1] == pytest.approx(100, abs=3)


def test_classes_carry_their_promises_and_their_tier() -> None:
    body = BodySettings(key="secret", headers={"X-Run": "7"}, extra={"temperature": 0})
    with running(Endpoint()) as endpoint:
        run(endpoint, plan_of([0.0, 0.2], cls=[0, 1]), body=body)
        chat, flex = endpoint.headers[-2:]
        assert chat[b"x-slo-ttft-ms"] == b"500"
        assert chat[b"x-slo-tpot-ms"] == b"100"
        assert chat[b"authorization"] == b"Bearer secret"
        assert chat[b"x-run"] == b"7"
        assert b"x-slo-ttft-ms" not in flex
        assert "service_tier" not in endpoint.bodies[-2]
        assert endpoint.bodies[-1]["service_tier"] == "flex"
        assert endpoint.bodies[-1]["ignore_eos"] is True
        assert endpoint.bodies[-1]["temperature"] == 0
        assert endpoint.bodies[-1]["stream_options"] == {"include_usage": True}
    assert "secret" not in repr(body)


def test_a_server_that_refuses_ignore_eos_is_asked_without_it() -> None:
    with running(Endpoint()) as endpoint:
        done = run(endpoint, plan_of([0.0], model="strict"))
        assert "ignore_eos" not in endpoint.bodies[-1]
        assert not done.ignore_eos
        assert any("does not take ignore_eos" in warning for warning in figures(done)["warnings"])
        with pytest.raises(TargetError, match="model 'strict': status 422: extra field: ignore_eos"):
            run(endpoint, plan_of([0.0], model="strict"), ignore_eos=True)


def test_token_ids_are_exact() -> None:
    body = BodySettings(api="completions", prompt="token-ids")
    with running(Endpoint()) as endpoint:
        done = run(endpoint, plan_of([0.0, 0.01]), body=body)
        prompt = endpoint.bodies[-1]["prompt"]
        assert len(prompt) == 100
        assert all(100 <= one <= 255 for one in prompt)
    assert figures(done)["tokens"]["input"] == 200


def test_an_answer_in_one_piece_or_without_usage_is_measured_as_far_as_it_goes() -> None:
    with running(Endpoint()) as endpoint:
        whole = figures(run(endpoint, plan_of([0.0], model="whole")))
        uncounted = figures(run(endpoint, plan_of([0.0], model="uncounted")))
    assert whole["classes"]["chat"]["finished"] == 1
    assert whole["classes"]["chat"]["output_tokens"] == 4
    assert uncounted["classes"]["chat"]["output_tokens"] == 4  # events with text
    assert any("no usage" in warning for warning in uncounted["warnings"])
    assert any("prompt lengths are a guess" in warning for warning in uncounted["warnings"])


def test_every_body_is_json_and_begins_differently() -> None:
    for settings in (BodySettings(), BodySettings(api="completions", extra={"stop": ['"']})):
        bodies = Bodies(workload([0.0] * 20, model='m"\\x'), settings, seed=3, ignore_eos=True)
        read = [json.loads(bodies.body(row, stream=True)[0]) for row in range(20)]
        texts = [r["messages"][0]["content"] if "messages" in r else r["prompt"] for r in read]
        assert len({text[:12] for text in texts}) == 20
        assert read[0]["model"] == 'm"\\x'
        again = Bodies(workload([0.0] * 20, model='m"\\x'), settings, seed=3, ignore_eos=True)
        assert again.body(7, stream=True) == bodies.body(7, stream=True)


def test_prompts_longer_than_the_pool_have_their_length_all_the_same() -> None:
    filler = Filler(1, 1)
    assert len(filler.text(0, 3_000_000)) == 3_000_000
    assert len(json.loads(b"[" + filler.token_ids(0, 700_000) + b"]")) == 700_000


def test_the_meter_survives_servers_that_count_nonsense() -> None:
    meter = TokenMeter()
    for size, tokens in ((1000, 0), (2000, 0), (500, 10**9)):
        meter.observe(size, tokens)
        assert meter.size(100) >= 1
    honest = TokenMeter()
    for size in (100, 1000, 5000):
        honest.observe(size, 20 + size // 4)
    assert honest.line() == pytest.approx((20, 4))


def test_equal_seeds_make_equal_streams_and_the_digest_says_so() -> None:
    trace = Trace(
        arrival_s=np.arange(1000.0), input_tokens=np.full(1000, 9), output_tokens=np.full(1000, 9), source="made"
    )
    classes = {"chat": CHAT, "flex": FLEX}

    def made(seed: int, share: float) -> LoadPlan:
        mix = {"chat": share, "flex": 1 - share}
        return make_plan(mixed(trace, model="m", mix=mix, classes=classes, seed=seed), name="n", seed=seed)

    assert made(1, 0.8).digest == made(1, 0.8).digest
    assert len({made(1, 0.8).digest, made(2, 0.8).digest, made(1, 0.7).digest}) == 3
    assert (made(1, 0.8).workload.cls == 0).mean() == pytest.approx(0.8, abs=0.05)
    with pytest.raises(PlanError, match="unknown class 'chatt'; known are chat, flex"):
        mixed(trace, model="m", mix={"chatt": 1.0}, classes=classes, seed=1)


def test_jobs_are_split_from_requests_of_their_class_and_lengths_are_cut() -> None:
    work = workload([0.0, 1.0, 1.0, 1.0, 2.0], cls=[0, 1, 1, 0, 1])
    key = JobKey(model="m", cls="flex", at_s=1.0, deadline_s=60.0)
    plan = make_plan(work, name="n", seed=1, jobs=[key], lengths=Lengths(input_scale=0.5, output_max=2))
    assert plan.single.tolist() == [0, 3, 4]
    assert plan.jobs[0].rows.tolist() == [1, 2]
    assert plan.workload.input_tokens.tolist() == [50] * 5
    assert plan.workload.output_tokens.tolist() == [2] * 5
    one_by_one = make_plan(work, name="n", seed=1, jobs=[key], batch_as="requests")
    assert (one_by_one.single.tolist(), one_by_one.jobs) == ([0, 1, 2, 3, 4], ())
    without = make_plan(work, name="n", seed=1, jobs=[key], batch_as="skip")
    assert without.workload.arrival_s.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("settings", [
    {"api": "chat", "prompt": "token-ids"}, {"api": "embeddings"}, {"key": "a\nb"}, {"extra": {"stream": False}},
])  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="it must be"):
        BodySettings(**settings)
