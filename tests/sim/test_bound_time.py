"""Who may be in flight together, and how much work fits into paid time: against brute force and a linear program."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest

from chiron.sim.bound_time import absorbed, peak_load


def test_the_peak_load_of_a_window_is_the_most_that_overlaps_it() -> None:
    random = np.random.default_rng(3)
    arrival_s = np.sort(random.uniform(0, 1_000, 300))
    due_s = arrival_s + random.uniform(0, 50, 300)
    due_s[::17] = inf
    load = random.uniform(0.1, 5.0, 300)
    found = peak_load(arrival_s, due_s, load)
    # A maximum is reached when a window opens.
    level = np.array([load[(arrival_s <= t) & (due_s >= t)].sum() for t in arrival_s])
    exact = np.array([level[(arrival_s >= a) & (arrival_s <= d)].max() for a, d in zip(arrival_s, due_s, strict=True)])
    assert (found >= exact).all()
    assert np.mean(found <= exact * 1.0001) > 0.9, "only windows that end within one bin of another may come out high"


def test_windows_that_touch_count_as_overlapping() -> None:
    assert peak_load(np.array([0.0, 1.0]), np.array([1.0, 2.0]), np.ones(2)) == pytest.approx([2.0, 2.0])
    assert peak_load(np.array([0.0, 1.1]), np.array([1.0, 2.0]), np.ones(2)) == pytest.approx([1.0, 1.0])


def test_all_at_one_instant_overlap_and_nobody_is_no_load() -> None:
    assert peak_load(np.zeros(3), np.zeros(3), np.ones(3)) == pytest.approx([3.0] * 3)
    assert len(peak_load(np.zeros(0), np.zeros(0), np.zeros(0))) == 0


def test_a_due_time_before_the_arrival_is_a_window_of_one_instant() -> None:
    assert peak_load(np.array([5.0, 0.0]), np.array([1.0, 9.0]), np.ones(2)) == pytest.approx([2.0, 2.0])
    assert absorbed(np.array([50.0]), np.array([10.0]), np.array([0.01]), rate=1.0, end_s=100.0) == pytest.approx(0.01)


@pytest.mark.parametrize("seed", range(5))
def test_absorbed_work_is_the_optimum_of_the_linear_program(seed: int) -> None:
    from scipy.optimize import linprog  # Half a second that the collection of tests need not take.

    random = np.random.default_rng(seed)
    parts, jobs, end_s, rate = 16, 30, 160.0, 3.0
    first = random.integers(0, parts, jobs)
    last = np.minimum(first + random.integers(0, 5, jobs), parts - 1)
    work = random.uniform(0, 60, jobs)
    # x[job, part] >= 0 where the window covers the part; jobs and parts have capacities.
    allowed = (first[:, None] <= np.arange(parts)) & (np.arange(parts) <= last[:, None])
    by_job = np.kron(np.eye(jobs), np.ones(parts))
    by_part = np.kron(np.ones(jobs), np.eye(parts))
    program = linprog(
        -np.ones(jobs * parts),
        A_ub=np.vstack([by_job, by_part]),
        b_ub=np.concatenate([work, np.full(parts, rate * end_s / parts)]),
        bounds=[(0, None if ok else 0) for ok in allowed.ravel()],
    )
    part_s = end_s / parts
    due_s = (last + 1) * part_s - 1e-6  # Within the last slot of the part: a window covers each slot it touches.
    assert absorbed(first * part_s, due_s, work, rate=rate, end_s=end_s) == pytest.approx(-program.fun)
    assert -program.fun < work.sum(), "the case is one where not everything fits"


def test_work_after_the_end_is_not_absorbed() -> None:
    assert absorbed(np.array([200.0]), np.array([300.0]), np.array([5.0]), rate=1.0, end_s=100.0) == 0.0
    assert absorbed(np.array([0.0]), np.array([inf]), np.array([500.0]), rate=1.0, end_s=100.0) == pytest.approx(100.0)
    assert absorbed(np.array([0.0]), np.array([inf]), np.array([5.0]), rate=0.0, end_s=100.0) == 0.0
