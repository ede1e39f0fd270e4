"""The bench of cells: nothing of the lost cell's traffic is lost with it, and a small run of one cell."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from cells import Cell, cells, run


def test_the_other_cells_get_all_that_the_lost_one_had() -> None:
    arguments = Namespace(cells=5, instances=100, rate=0.4, seconds=60.0, lost_at=30.0, seed=3)
    spread = dict(cells(arguments))
    for part in spread.values():
        assert all(each.before == pytest.approx(40.0, rel=0.051) for each in part)
    assert len(spread["over all"]) == 4
    gained = [sum(each.after - each.before for each in part) for part in spread.values()]
    retried = [sum(each.retried for each in part) for part in spread.values()]
    assert gained[0] == pytest.approx(gained[1])
    assert gained[0] == pytest.approx(40.0, rel=0.051)
    assert retried[0] == pytest.approx(retried[1], abs=4)


def test_a_cell_with_room_meets_its_slos_before_and_after() -> None:
    cell = Cell(seed=1, instances=8, before=0.5, after=0.6, retried=2, lost_s=60.0, seconds=180.0)
    outcome = run(cell)
    assert outcome.requests > 50
    assert min(outcome.before, outcome.later) > 0.95
