"""The figures of bench/protection.py, by hand. The measurement itself takes minutes."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import pytest

from bench_files import bench_file


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return bench_file("protection")


def test_figures_of_streams(bench: ModuleType) -> None:
    load = bench.Load(ttft_s=1.0, itl_s=0.1)
    quick = bench.Stream(10.0, times_s=[10.5, 10.55, 10.6], status=200)
    late = bench.Stream(10.0, times_s=[11.5, 11.55, 11.6], status=200)
    slow = bench.Stream(10.0, times_s=[10.5, 10.8, 11.1], status=200)
    lost = bench.Stream(10.0, times_s=[10.5], status=200, error="reset")
    row = bench.figures([quick, late, slow, lost], load)
    assert (row["requests"], row["failed"], row["in_slo"]) == (4, 1, 0.25)
    assert row["ttft_p99_s"] == pytest.approx(1.5)
    assert row["itl_p99_s"] == pytest.approx(0.3)
    assert bench.figures([], load) == {}


def test_tokens_are_events_that_hold_one(bench: ModuleType) -> None:
    stream = bench.Stream(0.0)
    stream.on_data(
        b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"choices":[{"delta":{"content":"b"}}]}\n\n'
    )
    stream.on_data(b'data: {"choices":[],"usage":{}}\n\ndata: [DONE]\n\n')
    assert len(stream.times_s) == 2


def test_the_same_seed_sends_the_same(bench: ModuleType) -> None:
    first, second = (bench.arrivals(random.Random("1"), 6.0, 20.0) for _ in range(2))
    assert first == second
    assert 60 < len(first) < 180
    assert all(0.0 < at_s < 20.0 for at_s in first)


def test_the_table_has_medians_spread_and_shares_of_batch_alone(bench: ModuleType) -> None:
    chat = {"ttft_p50_s": 0.05, "itl_p50_s": 0.03, "itl_p99_s": 0.04, "in_slo": 1.0}
    rows: dict[str, list[dict[str, Any]]] = {
        bench.ALONE: [chat | {"ttft_p99_s": s, "batch_tokens_per_s": 0.0} for s in (0.1, 0.3, 0.12)],
        bench.BATCH: [{"batch_tokens_per_s": tokens} for tokens in (900.0, 1000.0, 1100.0)],
        bench.CHIRON: [chat | {"ttft_p99_s": 0.1, "batch_tokens_per_s": 800.0, "evictions": 7}],
    }
    _, _, alone, batch, chiron = bench.table(rows).splitlines()
    assert alone == "| interactive alone | 50 ms | 120 ms (100-300) | 30 ms | 40 ms | 100 % |  |  |  |"
    assert batch == "| batch alone |  |  |  |  |  | 1,000 (900-1,100) | 100 % (90-110) |  |"
    assert chiron == "| chiron | 50 ms | 100 ms | 30 ms | 40 ms | 100 % | 800 | 80 % | 7 |"
