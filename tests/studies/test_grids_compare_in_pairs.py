"""``chiron compare`` over a grid: means, intervals, differences on the same requests, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from chiron.cli import app
from chiron.config.build import setups
from chiron.config.read import ConfigError
from chiron.config.scenario import parse_scenario
from chiron.sim.setup import Setup
from chiron.studies.grid import Asked, Cell, as_json, grid, loads_of, seeds_of
from chiron.studies.journal import Journal
from chiron.studies.runner import Progress, Runner
from chiron.studies.statistics import estimate
from chiron.studies.trial import trial
from study_factory import GENERATED, Ruled, figures

SCENARIO = parse_scenario(GENERATED, directory=Path())
ASKED = Asked(loads=(0.5, 1.0), policies=("static", "hpa-queue"), seeds=(1, 2, 3), baseline="static")


def rule(setup: Setup) -> dict[str, Any]:
    """Seeds differ by much, and policies on one seed by a tenth."""
    hours = 10.0 * setup.seed * len(setup.workload)
    return figures(0.99, hours) if setup.policy == "static" else figures(0.995, 0.9 * hours)


def cells(executor: Any, journal: Path | None = None) -> dict[tuple[float, str], Cell]:
    made = grid(SCENARIO, ASKED, Runner(executor, Journal(journal)))
    json.dumps(as_json("traced", ASKED, made), allow_nan=False)
    return {(cell.load, cell.policy): cell for cell in made}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(GENERATED)
    return path


def test_an_interval_is_student_s_and_a_single_value_has_none() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2.0 - 4.302653 / 3**0.5, abs=1e-5)
    assert estimate([0.9, 1.0], most=1.0).high == 1.0
    assert estimate([2.0]) == estimate([2.0])
    assert estimate([2.0]).low is None
    assert [estimate(values).sign for values in ([1.0, 1.1], [-1.0, -1.1], [-1.0, 1.0], [1.0])] == [1, -1, 0, 0]


def test_policies_are_compared_seed_by_seed_so_that_what_seeds_share_is_no_spread() -> None:
    cell = cells(Ruled(rule))[1.0, "hpa-queue"]
    assert cell.gpu_hours is not None
    assert cell.gpu_hours_over_baseline is not None
    assert cell.attainment_over_baseline is not None
    assert cell.gpu_hours.low == 0.0
    assert cell.gpu_hours_over_baseline.mean == pytest.approx(-0.1)
    assert cell.gpu_hours_over_baseline.high == pytest.approx(-0.1)
    assert cell.attainment_over_baseline.sign == 1
    assert cells(Ruled(rule))[1.0, "static"].gpu_hours_over_baseline is None


def test_a_load_multiplies_the_requests() -> None:
    made = cells(Ruled(lambda setup: figures(1.0, float(len(setup.workload)))))
    half, whole = (made[load, "static"].gpu_hours for load in (0.5, 1.0))
    assert half is not None
    assert whole is not None
    assert half.mean == pytest.approx(whole.mean / 2, rel=0.25)


def test_a_run_that_fails_costs_its_seed_and_is_told() -> None:
    def broken(setup: Setup) -> dict[str, Any] | Exception:
        return ValueError("no") if (setup.seed, setup.policy) == (2, "hpa-queue") else rule(setup)

    cell = cells(Ruled(broken))[1.0, "hpa-queue"]
    assert dict(cell.failed) == {2: "no"}
    assert list(cell.runs) == [1, 3]
    assert cell.gpu_hours_over_baseline is not None
    assert cell.gpu_hours_over_baseline.n == 2
    nothing = cells(Ruled(lambda setup: ValueError("no")))[0.5, "static"]
    assert nothing.gpu_hours is None
    assert len(nothing.failed) == 3


def test_a_policy_that_is_far_off_in_its_first_two_seeds_runs_no_third_whichever_it_is() -> None:
    def worst(policy: str, load: float, shares: Sequence[float]) -> list[int]:
        def told(setup: Setup) -> dict[str, Any]:
            mine = (setup.policy, len(setup.workload) > 90) == (policy, load == 1.0)
            return figures(shares[setup.seed - 1] if mine else 0.95, 1.0)

        executor = Ruled(told)
        made = grid(SCENARIO, replace(ASKED, early=True), Runner(executor, Journal(None)))
        (cell,) = [each for each in made if (each.load, each.policy) == (load, policy)]
        others = [list(each.runs) for each in made if each is not cell]
        assert others == [[1, 2, 3]] * 3
        assert len(executor.names) == 9 + len(cell.runs)
        return list(cell.runs)

    for policy in ASKED.policies:
        assert worst(policy, 0.5, [0.93, 0.93, 1.0]) == [1, 2]
        assert worst(policy, 1.0, [0.93, 0.945, 0.5]) == [1, 2, 3], "only one of them is more than five points off"
    assert worst("static", 1.0, [0.5, 0.5, 1.0]) == [1, 2]


def test_without_early_stop_every_seed_runs_however_bad() -> None:
    made = cells(Ruled(lambda setup: figures(0.1, 1.0)))
    assert [list(cell.runs) for cell in made.values()] == [[1, 2, 3]] * 4


def test_the_bound_is_known_for_every_seed_when_the_first_policy_is_out_early() -> None:
    def told(setup: Setup) -> dict[str, Any]:
        return figures(0.1 if setup.policy == "static" else 1.0, 1.0)

    executor = Ruled(told)
    made = grid(SCENARIO, replace(ASKED, early=True), Runner(executor, Journal(None)))
    assert {cell.policy: list(cell.runs) for cell in made if cell.load == 1.0} == {
        "static": [1, 2],
        "hpa-queue": [1, 2, 3],
    }
    assert [name for name in executor.with_bound if "load 1," in name] == [
        "static at load 1, seed 1",
        "static at load 1, seed 2",
        "hpa-queue at load 1, seed 3",
    ]


def test_the_time_that_is_left_goes_by_requests_not_by_runs() -> None:
    told: list[Progress] = []
    grid(SCENARIO, ASKED, Runner(Ruled(rule), Journal(None), told.append))
    light, heavy = (
        sum(
            len(setup.workload) for setup in setups(SCENARIO.with_overrides(f"scale={load}"), ASKED.policies, [1, 2, 3])
        )
        for load in ASKED.loads
    )
    assert [(each.done, each.total) for each in told] == [(number, 12) for number in range(1, 13)]
    assert told[5].left_s(60.0) == pytest.approx(60.0 * heavy / light)
    assert heavy > 1.5 * light
    assert told[-1].left_s(60.0) == 0.0


def test_of_trials_that_are_not_known_yet_each_counts_as_the_mean() -> None:
    told: list[Progress] = []
    runner = Runner(Ruled(rule), Journal(None), told.append)
    runner.total = 6
    made = setups(SCENARIO, ["static"], [1, 2])
    runner.run([trial(setup) for setup in made])
    requests = sum(len(setup.workload) for setup in made)
    assert (told[-1].simulated, told[-1].left) == (requests, 4 * requests / 2)


def test_a_grid_that_was_killed_goes_on(tmp_path: Path) -> None:
    def until_killed(setup: Setup) -> dict[str, Any]:
        if setup.seed == 3 and setup.policy == "hpa-queue":
            raise KeyboardInterrupt
        return rule(setup)

    journal = tmp_path / "trials.jsonl"
    with pytest.raises(KeyboardInterrupt):
        cells(Ruled(until_killed), journal)
    resumed = Ruled(rule)
    assert cells(resumed, journal) == cells(Ruled(rule))
    assert len(resumed.names) == 12 - 5


def test_the_command_writes_table_json_and_page_and_simulates_nothing_twice(scenario: Path) -> None:
    out = scenario.with_name("grid")
    options = ("--loads", "0.5,1", "--seeds", "1", "-p", "static", "-p", "hpa-queue", "--jobs", 1, "--out", out)
    first = call("compare", scenario, *options)
    assert first.exit_code == 0, first.output
    assert "scenario generated, load 0.5" in first.stdout
    told = json.loads((out / "grid.json").read_text())
    expected = [(load, policy) for load in (0.5, 1.0) for policy in ("static", "hpa-queue")]
    assert [(cell["load"], cell["policy"]) for cell in told["cells"]] == expected
    page = (out / "grid.html").read_text()
    assert "Attainment by class against GPU-hours, load 0.5" in page
    assert page.count("<figure") == 2
    again = call("compare", scenario, *options)
    assert "4 simulations known already" in again.stderr
    assert again.stdout == first.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loads", "1,x"], "--loads '1,x': must be numbers above 0"),
        (["--loads", "0"], "--loads '0': must be numbers above 0"),
        (["--loads", "1,1"], "each once"),
        (["--loads", "nan"], "must be numbers above 0"),
        (["--seeds", "5..1", "--loads", "1"], "--seeds '5..1': must be whole numbers"),
        (["--seeds", "1..2", "--seed", "3"], "give either --seed or --seeds"),
        (["--loads", "1", "--baseline", "chiron"], "--baseline chiron: does not run; choose one of hpa-queue"),
        (["--loads", "1", "--events", "x.jsonl"], "--events: a grid keeps figures of each run"),
        (["--out", "small.toml"], "small.toml: is a file; name a directory"),
        (["--loads", "1", "--report", "nowhere/x.html"], "there is no directory"),
        (["--loads", "1", "--figures", "small.toml"], "--figures small.toml: is a file; name a directory"),
        (["--ray-python", "python3"], "--ray-python: belongs to --ray"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(
    options: list[str], message: str, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scenario.parent)
    result = call("compare", scenario.name, *options)
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (2, True), result.output


def test_loads_and_seeds_are_read_as_they_are_written() -> None:
    assert loads_of("0.4, 1,2.5") == (0.4, 1.0, 2.5)
    assert seeds_of("1..3,7") == (1, 2, 3, 7)
    with pytest.raises(ConfigError, match="the most is 20000"):
        Asked(loads=loads_of("1,2"), policies=tuple("abcdefghijk"), seeds=seeds_of("0..999"), baseline="a")
