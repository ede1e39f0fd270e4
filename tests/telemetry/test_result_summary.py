"""The figures of a run against hand calculations, and against the schema that is shipped."""

from __future__ import annotations

import json
from math import inf, nan

import jsonschema
import numpy as np
import pytest

from chiron.telemetry.errors import SummaryError
from chiron.telemetry.summary import check_summary, reversals, schema
from result_factory import CHAT, CLASSES, hour, requests, summary_of

FOUR = [
    {},  # 1 s to the first token, (10.9 - 1) / 99 = 100 ms between tokens: attained
    {"first_token_s": 10.5, "finish_s": 20.4, "output_tokens": 100},  # too late a first token
    {"outcome": 1, "first_token_s": -1.0, "finish_s": -1.0, "output_tokens": 0},  # rejected
    {"cls": 1, "first_token_s": 5.0, "finish_s": 6.0, "output_tokens": 1, "deadline_s": 1800.0},  # attained
]


def test_attainment_counts_every_request_of_the_class_but_rejected_ones() -> None:
    summary = summary_of(requests(FOUR))
    assert summary["attainment"] == {"chat": 0.5, "jobs": 1.0}
    assert summary["attainment_all"] == pytest.approx(2 / 3)
    assert summary["models"]["llama"]["attainment"] == pytest.approx(2 / 3)
    assert (summary["requests"], summary["finished"], summary["rejected"]) == (4, 3, 1)


@pytest.mark.parametrize("outcome", [2, 3, 4, 5])
def test_a_request_that_did_not_finish_is_missed_however_fast_it_was(outcome: int) -> None:
    assert summary_of(requests([{"outcome": outcome}]))["attainment"] == {"chat": 0.0}


def test_errors_of_clients_are_neither_attained_nor_missed() -> None:
    summary = summary_of(requests([{"outcome": 1}] * 5))
    assert (summary["attainment"], summary["attainment_all"], summary["rejected"]) == ({}, None, 5)


def test_each_promise_alone_can_be_missed() -> None:
    late_first_token = {"first_token_s": 10.1, "finish_s": 12.0}
    slow_tokens = {"first_token_s": 1.0, "finish_s": 1.0 + 99 * 0.201}
    past_deadline = {"deadline_s": 10.8}
    on_the_limit = {"first_token_s": 10.0, "finish_s": 10.0 + 99 * 0.199, "deadline_s": 10.0 + 99 * 0.199}
    for row, met in ((late_first_token, 0.0), (slow_tokens, 0.0), (past_deadline, 0.0), (on_the_limit, 1.0)):
        assert summary_of(requests([row]))["attainment"] == {"chat": met}, row


def test_latencies_are_over_requests_that_have_them_and_null_otherwise() -> None:
    summary = summary_of(requests(FOUR))
    assert summary["ttft_s"]["chat"]["mean"] == pytest.approx((1.0 + 10.5) / 2)
    assert summary["ttft_s"]["chat"]["p50"] == pytest.approx(5.75)
    assert summary["itl_s"]["chat"]["p99"] == pytest.approx(0.1)
    assert summary["itl_s"]["jobs"] == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_rates_divide_by_what_was_billed_and_simulated() -> None:
    summary = summary_of(requests(FOUR), gpu_seconds=7200.0, sim_s=300.0)
    assert summary["gpu_hours"] == 2.0
    assert summary["throughput_rps"] == 3 / 300
    assert summary["tokens_per_gpu_s"] == 201 / 7200
    assert summary["slo_tokens_per_gpu_s"] == 101 / 7200


def test_nothing_over_nothing_is_null() -> None:
    summary = summary_of(requests([]), gpu_seconds=0.0, sim_s=0.0)
    assert summary["attainment"] == {}
    assert [summary[k] for k in ("attainment_all", "throughput_rps", "tokens_per_gpu_s")] == [None, None, None]
    jsonschema.validate(summary, schema())


def test_a_reversal_turns_the_same_models_plan_within_the_window() -> None:
    changes = [
        (0.0, "a", 1, 3),
        (10.0, "b", 3, 2),  # another model: no reversal
        (20.0, "a", 3, 2),  # turned after 20 s
        (30.0, "a", 2, 2),  # no change at all
        (75.0, "a", 2, 4),  # turned after 55 s
        (135.0, "a", 4, 3),  # turned after 60 s: not within 60 s
        (140.0, "a", 3, 1),  # same direction
    ]
    assert reversals(changes, 60.0) == 2
    assert summary_of(requests([]), plan_changes=changes)["scaling_actions"] == 6


def test_late_batch_is_batch_with_a_deadline_that_was_not_met() -> None:
    rows = [
        {"cls": 1, "finish_s": 1801.0, "deadline_s": 1800.0},
        {"cls": 1, "outcome": 4, "finish_s": -1.0, "deadline_s": 1800.0},
        {"cls": 1, "finish_s": 1799.0, "deadline_s": 1800.0},
        {"cls": 1, "finish_s": 5000.0, "deadline_s": inf},
        {"cls": 1, "outcome": 4, "finish_s": -1.0, "deadline_s": inf},
        {"cls": 0, "finish_s": 1801.0, "deadline_s": 1800.0},
    ]
    assert summary_of(requests(rows))["batch_late"] == 2


def test_models_are_broken_down() -> None:
    rows = [{}, {"model": 1}, {"model": 1, "outcome": 2}]
    assert summary_of(requests(rows), models=("a", "b", "c"))["models"] == {
        "a": {"requests": 1, "finished": 1, "attainment": 1.0},
        "b": {"requests": 2, "finished": 1, "attainment": 0.5},
        "c": {"requests": 0, "finished": 0, "attainment": None},
    }


def test_summaries_follow_the_shipped_schema_and_are_strict_json() -> None:
    for table in (requests(FOUR), hour("chiron").requests):
        summary = summary_of(table)
        jsonschema.validate(json.loads(json.dumps(summary, allow_nan=False)), schema())
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("key", sorted(schema()["properties"]))
def test_the_schema_notices_a_missing_key(key: str) -> None:
    summary = summary_of(requests(FOUR))
    del summary[key]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate(summary)
    with pytest.raises(SummaryError, match=key):
        check_summary(summary)


def test_the_schema_allows_no_other_key() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(summary_of(requests(FOUR)) | {"extra": 1}, schema())


@pytest.mark.parametrize(("key", "value"), [("cost", nan), ("gpu_seconds", -1.0), ("gpu_hours_bound", inf)])
def test_figures_out_of_range_are_refused_by_name(key: str, value: float) -> None:
    named = {"gpu_seconds": "gpu_hours"}.get(key, key)
    with pytest.raises(SummaryError, match=f"{named} is"):
        summary_of(requests(FOUR), **{key: value})


def test_an_index_that_points_nowhere_is_refused() -> None:
    with pytest.raises(SummaryError, match=r"cls spans 0\.\.1; allowed is 0\.\.0"):
        summary_of(requests(FOUR), classes=(CHAT,))
    with pytest.raises(SummaryError, match="model spans"):
        summary_of(requests([{"model": 3}]))


def test_attainment_equals_a_slow_count_request_by_request() -> None:
    result = hour("chiron", slack=1.0)
    table = result.requests
    met = [0, 0]
    for i, cls in enumerate(table.cls):
        promise = CLASSES[cls]
        ttft = table.first_token_s[i] - table.arrival_s[i]
        tokens = table.output_tokens[i]
        itl = (table.finish_s[i] - table.first_token_s[i]) / (tokens - 1) if tokens > 1 else 0.0
        met[cls] += bool(ttft <= promise.ttft_s and itl <= promise.itl_s and table.finish_s[i] <= table.deadline_s[i])
    shares = {c.name: met[k] / np.count_nonzero(table.cls == k) for k, c in enumerate(CLASSES)}
    assert result.summary["attainment"] == pytest.approx(shares, abs=1e-12)
    assert 0.1 < shares["chat"] < 0.999
