"""``chiron plan``: the fewest instances by rules that are known, what changes do, and what a user sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from chiron.cli import app
from chiron.cli.studies.plan import answer
from chiron.config.build import workload_of
from chiron.config.scenario import parse_scenario
from chiron.sim.setup import Setup
from chiron.studies.journal import Journal
from chiron.studies.plan import Change, Plan, PlanError, as_json, deferred, only_model, plan, usual_changes
from chiron.studies.runner import Runner
from study_factory import GENERATED, Ruled, figures

BATCH = '\n[classes.batch]\nkind = "batch"\ndeadline = "10m"\n'
JOB = """
[[batch_job]]
model = "llama"
class = "batch"
requests = 20
deadline = "1m"
lengths = { input = 9, output = 9 }
"""
KINDS = '[{ profile = "llama-3.1-8b/a100/tp1" }, { profile = "llama-3.1-8b/h100/tp1" }]'
SCENARIO = parse_scenario(GENERATED.replace("max_instances = 4", "max_instances = 40"), directory=Path())
NEEDED = 13


def rule(setup: Setup) -> dict[str, Any]:
    """Enough instances keep the SLOs; half of the GPU-hours where the policy may scale."""
    (spec,) = setup.models
    share = 1.0 if spec.min_instances == spec.max_instances else 0.5
    return figures(min(1.0, spec.max_instances / NEEDED), share * spec.max_instances)


def planned(rule: Callable[[Setup], Any], changes: list[Change] | None = None, **options: Any) -> Plan:
    scenario = options.pop("scenario", SCENARIO)
    runner = Runner(Ruled(rule, options.pop("order", 1)), Journal(options.pop("journal", None)))
    found = plan(scenario, "chiron", [1, 2], changes or [], runner, target=0.99, **options)
    json.dumps(as_json(found, scenario="x", policy="chiron", seeds=[1, 2], target=0.99), allow_nan=False)
    return found


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(GENERATED)
    return path


@pytest.mark.parametrize("needed", [1, 2, 12, 13, 39, 40])
def test_the_fewest_instances_are_found_and_no_number_twice(needed: int) -> None:
    asked: list[tuple[int, int, int]] = []

    def counted(setup: Setup) -> dict[str, Any]:
        (spec,) = setup.models
        asked.append((spec.min_instances, spec.max_instances, setup.seed))
        return figures(1.0 if spec.max_instances >= needed else 0.98, float(spec.max_instances))

    (found,) = planned(counted).options
    assert (found.fixed.kept, found.fixed.at.least, found.fixed.at.most) == (True, needed, needed)
    assert (found.autoscaled.kept, found.autoscaled.at.least, found.autoscaled.at.most) == (True, 1, needed)
    assert len(asked) == len(set(asked)) <= 2 * 26


def test_a_fleet_that_never_suffices_says_how_close_it_came() -> None:
    (found,) = planned(lambda setup: figures(0.9 + 0.001 * setup.models[0].max_instances, 1.0)).options
    assert not found.fixed.kept
    assert not found.autoscaled.kept
    assert (found.fixed.at.most, found.fixed.at.worst) == (40, pytest.approx(0.94))


def test_where_no_upper_bound_helps_the_number_that_must_stay_up_is_found() -> None:
    (found,) = planned(lambda setup: figures(1.0 if setup.models[0].min_instances >= 6 else 0.9, 3.0)).options
    assert (found.fixed.at.least, found.fixed.at.most) == (6, 6)
    assert (found.autoscaled.kept, found.autoscaled.at.least, found.autoscaled.at.most) == (True, 6, 40)


def test_all_seeds_must_keep_the_target() -> None:
    def worse(setup: Setup) -> dict[str, Any]:
        return figures(1.0 if setup.models[0].max_instances >= 5 + setup.seed else 0.5, 1.0)

    assert planned(worse).options[0].fixed.at.most == 7


def test_the_order_in_which_simulations_end_changes_nothing_and_a_plan_that_was_killed_goes_on(tmp_path: Path) -> None:
    left = 11

    def until_killed(setup: Setup) -> dict[str, Any]:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return rule(setup)

    with pytest.raises(KeyboardInterrupt):
        planned(until_killed, journal=tmp_path / "trials.jsonl")
    assert planned(rule) == planned(rule, order=-1) == planned(rule, journal=tmp_path / "trials.jsonl")


def test_every_kind_is_sized_and_the_cheapest_is_changed() -> None:
    text = GENERATED.replace('[{ profile = "llama-3.1-8b/a100/tp1" }]', KINDS)
    made = parse_scenario(text.replace("max_instances = 4", "max_instances = 40"), directory=Path())

    def by_kind(setup: Setup) -> dict[str, Any]:
        needed = 4 if "h100" in setup.models[0].kinds[0].name else 9
        needed -= 2 * (setup.workload.classes[0].ttft_s > 5.0)
        count = setup.models[0].max_instances
        return figures(1.0 if count >= needed else 0.5, float(count))

    found = planned(by_kind, usual_changes(made), scenario=made)
    assert [(sized.case.kind, sized.fixed.at.most) for sized in found.options] == [
        ("llama-3.1-8b/a100/tp1", 9),
        ("llama-3.1-8b/h100/tp1", 4),
    ]
    assert found.best("llama").case.kind == "llama-3.1-8b/h100/tp1"
    sizes = {sized.case.change.name: sized.fixed.at.most for sized in found.changes if sized.case.change is not None}
    assert sizes == {
        "TTFT SLOs x 2": 2,
        "ITL SLOs x 1.5": 4,
        "starts in a quarter of the time": 4,
        "a quarter of the interactive requests as batch work": 4,
    }


@pytest.mark.parametrize(
    ("prices", "cheapest", "said"),
    [
        ((1.0, 1.0), "a100", ""),
        ((1.0, 9.0), "a100", ""),
        ((9.0, 1.0), "h100", ""),
        ((1.0, 0.0), "a100", "compared by GPU-hours, because h100 has no price"),
        ((0.0, 0.0), "a100", "compared by GPU-hours, because a100 and h100 have no price"),
    ],
)
def test_a_kind_without_a_price_is_not_the_cheapest_for_it(
    prices: tuple[float, float], cheapest: str, said: str
) -> None:
    kinds = ", ".join(
        f'{{ profile = "llama-3.1-8b/{gpu}/tp1", name = "{gpu}", price_per_gpu_hour = {price} }}'
        for gpu, price in zip(("a100", "h100"), prices, strict=True)
    )
    text = GENERATED.replace('[{ profile = "llama-3.1-8b/a100/tp1" }]', f"[{kinds}]")
    made = parse_scenario(text.replace("max_instances = 4", "max_instances = 40"), directory=Path())

    def by_kind(setup: Setup) -> dict[str, Any]:
        (kind,) = setup.models[0].kinds
        count = setup.models[0].max_instances
        needed = 4 if kind.name == "a100" else 9
        cost = count * kind.price_per_gpu_hour
        return figures(1.0 if count >= needed else 0.5, float(count)) | {"cost": cost}

    found = planned(by_kind, scenario=made)
    assert found.best("llama").case.kind == cheapest
    words = answer(found, "llama", "chiron", 0.99)
    assert said in words
    assert ("no price" in words) == bool(said)
    told = as_json(found, scenario="x", policy="chiron", seeds=[1], target=0.99)
    assert told["compared_by"] == {"llama": "gpu_hours" if said else "cost"}


def test_each_model_is_sized_with_its_own_requests_alone() -> None:
    second = '\n[models.other]\ninstances = [{ profile = "llama-3.1-8b/a100/tp1" }]\nmax_instances = 40\n[[workload]]\n'
    second += 'model = "other"\nclass = "chat"\ngenerate = { kind = "poisson", rate = 8, duration = "30s", lengths = { input = 200, output = 20 } }\n'  # noqa: E501
    made = parse_scenario(GENERATED.replace("max_instances = 4", "max_instances = 40") + second, directory=Path())
    whole = workload_of(made, 1)
    parts = [only_model(whole, name) for name in whole.models]
    assert sum(map(len, parts)) == len(whole)
    assert [set(part.model.tolist()) for part in parts] == [{0}, {0}]
    found = planned(lambda s: figures(float(s.models[0].max_instances * 30 >= len(s.workload)), 1.0), scenario=made)
    assert found.models == ["llama", "other"]
    assert found.best("other").fixed.at.most > found.best("llama").fixed.at.most


def test_a_share_of_the_interactive_requests_becomes_batch_work_with_a_deadline() -> None:
    made = parse_scenario(GENERATED + BATCH + JOB, directory=Path())
    whole = workload_of(made, 1)
    jobs = np.array([not cls.interactive for cls in whole.classes])[whole.cls]
    moved = deferred(whole, 0.25, made.classes, seed=1)
    batch = np.array([not cls.interactive for cls in moved.classes])[moved.cls]
    assert 0.1 < batch[~jobs].mean() < 0.4
    np.testing.assert_array_equal(moved.deadline_s[batch & ~jobs], whole.arrival_s[batch & ~jobs] + 600.0)
    np.testing.assert_array_equal(moved.deadline_s[jobs], whole.deadline_s[jobs])
    np.testing.assert_array_equal(moved.deadline_s[~batch], whole.deadline_s[~batch])
    assert deferred(whole, 0.25, {}, seed=1).classes[-1].name == "deferred"


@pytest.mark.parametrize(
    ("change", "deadlines"),
    [
        ("batch_job.0.deadline=5m", {300.0}),
        ("classes.batch.deadline=5m", {60.0}),
        (None, {120.0}),
    ],
)
def test_a_deadline_that_is_asked_for_is_the_one_that_is_planned(change: str | None, deadlines: set[float]) -> None:
    made = parse_scenario(GENERATED.replace("max_instances = 4", "max_instances = 40") + BATCH + JOB, directory=Path())
    if change is None:
        (asked,) = (each for each in usual_changes(made) if each.name == "batch deadlines x 2")
    else:
        asked = Change(name=change, overrides=(change,))
    seen: set[float] = set()

    def watched(setup: Setup) -> dict[str, Any]:
        batch = np.array([not cls.interactive for cls in setup.workload.classes])[setup.workload.cls]
        seen.update((setup.workload.deadline_s - setup.workload.arrival_s)[batch].round(6).tolist())
        return rule(setup)

    planned(watched, scenario=made)
    assert seen == {60.0}
    seen.clear()
    planned(watched, [asked], scenario=made)
    assert seen == {60.0} | deadlines


def test_a_simulation_that_fails_is_told_with_its_fleet() -> None:
    with pytest.raises(PlanError, match=r"llama on llama-3.1-8b/a100/tp1 with \d+ to \d+ instances: no"):
        planned(lambda setup: ValueError("no"))


def test_the_command_says_the_plan_and_writes_json_and_page(scenario: Path) -> None:
    out = scenario.with_name("plan")
    result = call("plan", scenario, "-p", "static", "--no-changes", "--jobs", 1, "--max", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert "llama needs 1 GPU (1 x llama-3.1-8b/a100/tp1) as a fixed fleet." in result.stdout
    told = json.loads((out / "plan.json").read_text())
    assert (told["options"][0]["fixed"]["most"], told["changes"]) == (1, [])
    assert "Attainment by fleet" in (out / "plan.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "1.5"], "--target is 1.5; it must be above 0 and at most 1"),
        (["--max", "0"], "--max is 0; it must be 1 to 10000"),
        (["--policy", "chirn"], "--policy: unknown policy 'chirn'; did you mean 'chiron'"),
        (["--instance", "llama-8b"], "models.llama.instances[0]: profile 'llama-8b'"),
        (
            ["--instance", "other=llama-3.1-8b/a100/tp1"],
            "--instance other=llama-3.1-8b/a100/tp1: unknown model 'other'",
        ),
        (["--what-if", "classes.chat.tft=2s", "--max", "1"], "--what-if classes.chat.tft=2s: "),
        (["--report", "nowhere/x.html"], "there is no directory"),
        (["--settings", "none.toml"], "none.toml: cannot be read"),
        (["--out", "small.toml"], "small.toml: is a file; name a directory"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line(
    options: list[str], message: str, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scenario.parent)
    result = call("plan", scenario.name, "--no-changes", "--jobs", 1, *options)
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (2, True), result.output
