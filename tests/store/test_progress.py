"""Items per second and the time to the end come from counts of the last minute."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chiron.store.port import Batch
from chiron.store.progress import SLOT_S, SLOTS, Slots, count_ends, eta_s, items_per_s

BATCH = Batch(
    id="batch_1",
    owner="",
    input_file_id="file-1",
    endpoint="/v1/completions",
    completion_window="1h",
    status="in_progress",
    metadata={},
    created_s=990.0,
    expires_s=4600.0,
    in_progress_s=1000.0,
    total=10_000,
)


def after(seconds: int, per_s: int) -> Batch:
    """The batch after a steady run."""
    recent: Slots = ()
    for second in range(seconds):
        recent = count_ends(recent, per_s, 1000.0 + second)
    return replace(BATCH, completed=seconds * per_s, recent=recent)


@pytest.mark.parametrize("seconds", [1, 5, 59, 60, 61, 300, 305])
def test_a_steady_rate_is_found(seconds: int) -> None:
    batch = after(seconds, 20)
    assert items_per_s(batch, 1000.0 + seconds) == pytest.approx(20)
    assert eta_s(batch, 1000.0 + seconds) == pytest.approx((10_000 - seconds * 20) / 20)


def test_only_the_last_minute_counts() -> None:
    slow = after(600, 1)
    recent = slow.recent
    for second in range(600, 660):
        recent = count_ends(recent, 50, 1000.0 + second)
    assert items_per_s(replace(slow, recent=recent), 1660.0) == pytest.approx(50)
    assert len(recent) == SLOTS
    assert recent[0][0] == 1660 - SLOTS * SLOT_S


def test_a_stall_shows_as_no_rate_and_an_eta_from_the_average() -> None:
    batch = after(100, 10)
    assert items_per_s(batch, 1200.0) == 0
    assert eta_s(batch, 1200.0) == pytest.approx(9000 / (1000 / 200))


def test_there_is_no_eta_before_the_first_result_nor_after_the_last() -> None:
    assert eta_s(BATCH, 1001.0) is None
    assert items_per_s(BATCH, 1001.0) == 0
    assert eta_s(replace(after(10, 1), status="completed"), 1010.0) is None
    assert eta_s(replace(BATCH, status="validating", in_progress_s=None), 1001.0) is None


def test_a_clock_that_goes_back_does_no_harm() -> None:
    recent = count_ends(count_ends((), 5, 2000.0), 5, 1500.0)
    assert sum(count for _, count in recent) == 10
    assert items_per_s(replace(BATCH, recent=recent), 900.0) >= 0
