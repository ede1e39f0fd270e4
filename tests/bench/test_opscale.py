"""bench/opscale.py: the paper's row as it says it, and a row of ours as it was measured."""

from __future__ import annotations

import argparse
from types import ModuleType

import pytest

from bench_files import bench_file
from chiron.policies.registry import POLICIES


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return bench_file("opscale")


def test_the_published_savings_are_those_of_the_paper(bench: ModuleType) -> None:
    saved = [round(100 * (1 - bench.OPSCALE.gpus / each.gpus)) for each in bench.PUBLISHED.values()]
    assert saved == [37, 45, 50]
    assert set(bench.PUBLISHED) <= set(bench.POLICIES) <= set(POLICIES)


def test_ratios_are_over_the_fewest_gpus_that_keep_the_slo(bench: ModuleType) -> None:
    found = [
        bench.Row(policy="chiron", gpus=8.0, attained=0.991),
        bench.Row(policy="dynamollm", gpus=4.0, attained=0.9),
        bench.Row(policy="hpa-queue", gpus=12.0, attained=0.995),
    ]
    lines = bench.table(found).splitlines()
    assert lines[2] == "| OpScale | 7.1 | 1.00x | 98.4 % | | | |"
    assert lines[3] == "| `chiron` |  |  |  | 8.0 | 99.1 % | 1.00x |"
    assert lines[4] == "| `dynamollm` | 11.2 | 1.58x | 88 to 95 % | 4.0 | 90.0 % | misses 99 % |"
    assert lines[5] == "| `hpa-queue` | 13.0 | 1.83x | 88 to 95 % | 12.0 | 99.5 % | 1.50x |"


def test_a_time_in_which_an_epoch_of_half_an_hour_is_hardly_seen_is_refused(bench: ModuleType) -> None:
    assert bench.minutes("60") == 60
    with pytest.raises(
        argparse.ArgumentTypeError, match="30 are too few: DynamoLLM decides after 6 and 36; at least 60"
    ):
        bench.minutes("30")


@pytest.mark.slow
def test_a_row_is_the_gpus_over_the_time_that_requests_come(bench: ModuleType) -> None:
    (row,) = bench.rows(1, 0.5, [1], ["static"])
    result = bench.chiron.simulate(bench.scenario(1, 0.5), "static", 1)
    assert row.gpus == pytest.approx(result.summary["gpu_hours"] * 60.0)
    assert row.attained == min(result.summary["attainment"].values())
