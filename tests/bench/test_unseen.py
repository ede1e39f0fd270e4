"""Scenarios drawn at random are the same each time, can all be run, and are judged by who knows the future."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from chiron.config.build import workload_of
from chiron.config.scenario import parse_scenario

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
from drawn_traffic import FRESH_FROM, JUDGED_MIN, PAST_MIN, drawn
from unseen import Ran, numbers, split, verdict


def ran(policy: str, gpu_hours: float, fluid_gpu_hours: float | None = None, **shares: float) -> Ran:
    return Ran(
        name="1",
        policy=policy,
        seed=1,
        shares=shares,
        gpu_hours=gpu_hours,
        over_bound=2.0,
        itl_missed=0.0,
        peak=1,
        wall_s=0.0,
        fluid_gpu_hours=fluid_gpu_hours,
    )


def test_a_number_is_one_scenario() -> None:
    assert drawn(7) == drawn(7)
    assert len({drawn(n).text for n in range(50)}) == 50


@pytest.mark.slow
def test_every_scenario_can_be_read_and_all_kinds_come() -> None:
    kinds = Counter[str]()
    for number in range(FRESH_FROM, FRESH_FROM + 60):
        scenario = parse_scenario(f'name = "x"\n{drawn(number).text}', directory=Path(), name="x")
        assert scenario.calibration is not None
        assert scenario.calibration.first_s == 60 * PAST_MIN
        kinds[drawn(number).about.split(", ")[1].split(" (")[0].split(" every")[0]] += 1
        kinds["batch"] += bool(scenario.batch_job)
        kinds["long prompts"] += "long prompts" in drawn(number).about
    assert len(kinds) == 7
    assert min(kinds.values()) >= 4


@pytest.mark.parametrize("number", [1, 4])
def test_the_past_and_what_is_judged_share_no_request_and_a_stream_goes_on(number: int) -> None:
    scenario = parse_scenario(f'name = "x"\n{drawn(number).text}', directory=Path(), name="x")
    past, judged = (workload_of(scenario, 1, part=part) for part in ("calibration", "judged"))
    assert past.arrival_s[-1] < 60 * PAST_MIN
    assert judged.arrival_s[0] < 60
    assert 60 * (JUDGED_MIN - 1) < judged.arrival_s[-1] < 60 * JUDGED_MIN


def test_only_where_the_clairvoyant_row_keeps_the_slos_somebody_else_is_asked_to() -> None:
    pairs = [
        (ran("chiron", 3.0, chat=99.5, batch=99.0), ran("clairvoyant", 2.0, chat=99.1, batch=100.0)),
        (ran("chiron", 2.2, chat=99.5, batch=98.9), ran("clairvoyant", 2.0, chat=99.1, batch=100.0)),
        (ran("chiron", 9.0, chat=99.5), ran("clairvoyant", 1.0, chat=98.9)),
    ]
    assert verdict(pairs) == (
        "99 % of every class in 1 of the 2 in which the clairvoyant row keeps it (of 3 in all);"
        " GPU-hours over its in those 2: median 1.30x, worst 1.50x"
    )
    assert "none" in verdict(pairs[2:])


def test_the_distance_from_the_bound_is_split_into_parts_that_add_up_to_it() -> None:
    policy = ran("chiron", 3.0, chat=99.5)
    assert split(policy, ran("clairvoyant", 2.0, 1.25, chat=99.5)) == "1.00 | +0.25 | +0.75 | +1.00"
    assert split(policy, ran("clairvoyant", 2.0, chat=99.5)) == "1.00 | | | +1.00", "a fluid has no batch work"


def test_numbers_come_one_by_one_or_in_a_row() -> None:
    assert numbers("100-103") == [100, 101, 102, 103]
    assert numbers("5") == [5]
