"""bench/sensitivity.py: its cases are what they say, and a cell is what it says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from bench_files import bench_file
from chiron.config.scenario import parse_scenario
from chiron.studies.trial import Outcome


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return bench_file("sensitivity")


def test_every_case_is_a_scenario_and_each_of_a_table_another_one(bench: ModuleType) -> None:
    for group in bench.GROUPS.values():
        base = parse_scenario(group.base, directory=Path(), name="x")
        made = [(base.with_overrides(*case.overrides), case.step_time) for case in group.cases]
        assert len({(repr(scenario), factor) for scenario, factor in made}) == len(group.cases), group.title
        assert len({case.name for case in group.cases}) == len(group.cases)


def test_the_least_and_the_longest_cold_start_are_ten_seconds_and_ten_minutes(bench: ModuleType) -> None:
    cases = bench.GROUPS["starts"].cases
    starts = [parse_scenario(bench.BASE, directory=Path(), name="x").with_overrides(*case.overrides) for case in cases]
    times_s = [each.cold_start.node_start_s + each.cold_start.model_load_s for each in starts]
    assert (times_s[0], times_s[-1]) == (10.0, 600.0)


def test_a_cell_is_bold_where_every_seed_keeps_every_class(bench: ModuleType) -> None:
    def run(chat: float, hours: float) -> Outcome:
        return Outcome(summary={"attainment": {"chat": chat, "batch": 1.0}, "gpu_hours": hours})

    assert bench.cell([run(0.991, 6.0), run(1.0, 8.0)], 3.5) == "**99.5%**, 2.00x"
    assert bench.cell([run(0.989, 6.0), run(1.0, 8.0)], 3.5) == "99.4%, 2.00x"
    assert bench.cell([run(1.0, 6.0), Outcome(error="broke")], 3.5) == "failed"


def test_each_table_says_where_ours_keeps_its_slos_and_who_is_cheaper(bench: ModuleType) -> None:
    def run(chat: float, hours: float) -> list[Outcome]:
        return [Outcome(summary={"attainment": {"chat": chat}, "gpu_hours": hours})]

    group = bench.Group(title="T", about="A.", cases=(bench.Case(name="x"), bench.Case(name="y")), policies=("a", "b"))
    found = {("T", "x", "a"): run(1.0, 4.0), ("T", "x", "b"): run(0.98, 1.0)}
    found |= {("T", "y", "a"): run(1.0, 4.0), ("T", "y", "b"): run(1.0, 4.0)}
    alone = "`a` keeps 99 % of every class in 2 of 2 rows, and no other that does so needs fewer GPU-hours."
    assert bench.verdict(group, found) == alone
    assert f"A. {alone}" in bench.section(group, found)
    found |= {("T", "x", "a"): run(0.98, 4.0), ("T", "x", "b"): run(1.0, 9.0), ("T", "y", "b"): run(1.0, 3.9)}
    assert bench.verdict(group, found).endswith(
        "1 of 2 rows; with fewer GPU-hours, or where it does not: `b` at x, `b` at y."
    )


def test_slower_engines_are_slower_in_every_part_of_a_step(bench: ModuleType) -> None:
    case = bench.Case(name="x", overrides=("workload.0.generate.duration=20", "batch_job=[]"), step_time=1.15)
    group = bench.GROUPS["steps"]
    (plain, *_), (slow, *_) = (bench.made(group, bench.replace(case, step_time=f), [1]) for f in (1.0, 1.15))
    (before,), (after,) = plain.profiles.values(), slow.profiles.values()
    times = ("h_ms", "w0_ms", "f_ms_per_token", "c_ms_per_context_token", "q_ms_per_token_squared")
    assert [getattr(after, name) for name in times] == pytest.approx([1.15 * getattr(before, name) for name in times])
    assert slow.initial == plain.initial, "fleets were sized before"
