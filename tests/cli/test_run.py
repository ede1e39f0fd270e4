"""The commands as a user runs them, on a scenario of some 290 requests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner, Result

import chiron
from chiron.cli import app
from chiron.cli.explain.command import moment, parse_moment
from chiron.cli.explain.source import RunHistory
from chiron.config.build import setups
from chiron.config.scenario import load_scenario, parse_scenario
from chiron.sim.many import Run, run_many
from chiron.telemetry.run_data import DecisionPoint
from chiron.telemetry.store import load_result
from scenario_text import SMALL

runner = CliRunner()


def call(*arguments: object) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    (folder / "small.toml").write_text(SMALL)
    # Four times the rate on a fleet that starts with one instance: it has to grow.
    busy = ["--scale", 4, "--set", "models.llama.initial=1", "--set", "workload.0.generate.duration=4m"]
    result = call("simulate", folder / "small.toml", "-p", "chiron", "-s", 1, *busy, "--save", folder / "run.chiron")
    assert result.exit_code == 0, result.output
    return folder / "run.chiron"


def test_simulate_prints_a_table_and_writes_one_json_object_per_policy_and_seed(scenario: Path) -> None:
    target = scenario.with_name("out.json")
    result = call("simulate", scenario, "--json", target, "--jobs", 1)
    assert result.exit_code == 0
    assert "scenario small" in result.stdout
    summaries = json.loads(target.read_text())
    assert [(s["policy"], s["seed"]) for s in summaries] == [("static", 1), ("static", 2)]
    schema = Path(chiron.__file__).with_name("data") / "result.schema.json"
    for summary in summaries:
        jsonschema.validate(summary, json.loads(schema.read_text()))


def test_json_on_stdout_is_nothing_but_json(scenario: Path) -> None:
    result = call("simulate", scenario, "-s", 1, "--json", "-")
    assert len(json.loads(result.stdout)) == 1
    assert "scenario small" in result.stderr


def test_the_same_policy_runs_twice_under_two_labels(scenario: Path) -> None:
    sets = ["--set", "policies.tuned.policy=chiron", "--set", "policies.tuned.tick=20s"]
    result = call("compare", scenario, "-p", "chiron", "-p", "tuned", "-s", 1, *sets, "--json", "-", "--jobs", 1)
    assert [s["policy"] for s in json.loads(result.stdout)] == ["chiron", "tuned"]
    assert result.exit_code == 0


@pytest.mark.slow
def test_several_jobs_give_what_one_job_gives(scenario: Path) -> None:
    one, two = (call("compare", scenario, "--json", "-", "--jobs", jobs) for jobs in (1, 2))
    strip = [[{k: v for k, v in s.items() if k != "wall_s"} for s in json.loads(r.stdout)] for r in (one, two)]
    assert strip[0] == strip[1]
    assert len(strip[0]) == 2


def test_events_and_saved_results_of_several_runs_have_policy_and_seed_in_their_names(scenario: Path) -> None:
    folder = scenario.parent
    call("compare", scenario, "--events", folder / "log.jsonl", "--save", folder / "run.chiron", "--jobs", 1)
    for seed in (1, 2):
        events = [json.loads(line) for line in (folder / f"log.static.{seed}.jsonl").read_text().splitlines()]
        assert {"arrival", "ended"} <= {event["event"] for event in events}
        assert load_result(folder / f"run.static.{seed}.chiron").seed == seed


@pytest.mark.slow
def test_a_saved_result_holds_the_text_that_reproduces_it(saved: Path) -> None:
    first = load_result(saved)
    again = parse_scenario(first.scenario_text, directory=saved.parent)
    (end,) = run_many([Run(setup=setup) for setup in setups(again, policies=["chiron"], seeds=[1])])
    assert end.result is not None
    assert end.result.decisions == first.decisions
    assert end.result.requests.finish_s.tolist() == first.requests.finish_s.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "nowhere.toml"], "error: scenario 'nowhere.toml' is neither a file nor"),
        (["simulate", "SMALL", "-p", "chirron"], "error: policy: unknown policy 'chirron'; did you mean 'chiron'"),
        (["simulate", "SMALL", "--set", "models.llama.max=3"], "models.llama.max: unknown key (value 3)"),
        (["simulate", "SMALL", "--set", "scale"], "error: --set 'scale': expected path=value"),
        (["simulate", "SMALL", "--scale", "-1"], "scale: -1.0: must be above 0"),
        (["simulate", "SMALL", "--duration", "ten"], "error: --duration: duration 'ten': expected"),
        (["simulate", "SMALL", "--json", "/nowhere/x.json"], "error: /nowhere/x.json: there is no directory /nowhere"),
        (["simulate", "SMALL", "--report", "."], "error: .: is a directory; name a file"),
        (["bound", "SMALL", "--set", "gpus.a100=x"], "gpus.a100: 'x' must be a whole number"),
        (["explain", "SMALL"], "line 1 is not an event"),
        (["explain", "nowhere.chiron"], "error: nowhere.chiron: No such file or directory"),
        (["explain", "SAVED", "--at", "noon"], "error: --at 'noon': expected the time"),
        (["explain", "SAVED", "--model", "lama"], "error: --model 'lama': did you mean 'llama'"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    arguments: list[str], message: str, scenario: Path, saved: Path
) -> None:
    named = {"SMALL": str(scenario), "SAVED": str(saved)}
    result = call(*(named.get(argument, argument) for argument in arguments))
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.exit_code == 2
    assert result.stdout == ""


def test_bound_is_explained_and_no_policy_beats_it(scenario: Path) -> None:
    result = call("bound", scenario)
    least = re.search(r"fewer than ([\d.]+) GPU-hours", result.stdout)
    assert least is not None
    assert "llama" in result.stdout
    spent = json.loads(call("simulate", scenario, "-s", 1, "--json", "-").stdout)[0]["gpu_hours"]
    assert 0 < float(least[1]) <= spent + 0.005


def test_explain_lists_reasons_and_tells_the_story_of_a_moment(saved: Path) -> None:
    growth = next(d for d in load_result(saved).decisions if d.kind == "fleet" and d.after > d.before)
    overview = call("explain", saved)
    assert "changes of the plan" in overview.stdout
    story = call("explain", saved, "--at", f"{growth.t_s + 1}s").stdout
    assert f"The plan grew from {growth.before:g} to {growth.after:g} instances" in story
    assert "Why: " in story
    assert "Fleet as decided upon" in story
    assert "Work: " in story


def test_explain_refuses_a_time_that_is_none_and_names_the_option(saved: Path) -> None:
    refused = call("explain", saved, "--at", "12:99")
    assert refused.exit_code == 2
    assert "--at '12:99': expected the time since the start, as 41:00, 1:02:03 or 41m" in refused.stderr


def test_a_decision_is_told_at_the_second_that_it_is_shown_with() -> None:
    decision = DecisionPoint(
        t_s=10.3, kind="fleet", subject="m", before=1, after=3, reason="interactive_load", numbers={}
    )
    history = RunHistory(
        title="", models=("m",), decisions=(decision,), ends_s=60.0, state=lambda _, at_s: [f"state {at_s}"]
    )
    told = list(moment(history, "m", parse_moment("0:10")))
    assert "  The plan grew from 1 to 3 instances at 0:10." in told
    assert "  state 10.3" in told
    assert "had not changed" in "".join(moment(history, "m", parse_moment("0:09")))
    assert "had not changed" in "".join(moment(history, "m", parse_moment("10.2s")))


def test_an_event_log_tells_the_same_story_even_if_its_last_line_was_cut_off(scenario: Path, saved: Path) -> None:
    log = scenario.with_name("log.jsonl")
    again = load_result(saved).scenario_text
    scenario.write_text(again)
    call("simulate", scenario, "-p", "chiron", "-s", 1, "--events", log)
    with log.open("a") as lines:
        lines.write('{"t":1e9,"eve')
    growth = next(d for d in load_result(saved).decisions if d.kind == "fleet" and d.after > d.before)
    stories = [call("explain", file, "--at", f"{growth.t_s + 1}s").stdout for file in (saved, log)]
    pattern = r"The plan grew .*\n.*Why: .*|Next: .*"
    assert re.findall(pattern, stories[0]) == re.findall(pattern, stories[1])
    assert len(re.findall(pattern, stories[0])) == 2
    assert "waiting" in stories[1]


@pytest.mark.parametrize(("text", "seconds"), [("41:00", 2460), ("1:02:03", 3723), ("41m", 2460), ("2460", 2460)])
def test_moments_read_as_clock_or_duration(text: str, seconds: float) -> None:
    assert parse_moment(text) == seconds


def test_the_listings_name_scenarios_and_policies() -> None:
    assert "azure" in call("scenarios").stdout
    assert "chiron" in call("policies").stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+ \((compiled|plain Python)\)\n", call("version").stdout)
    assert call("--version").stdout == call("version").stdout
    assert "Examples" in call("compare", "--help").stdout


class _Deadly:
    """Ends the process that unpickles it, as running out of memory would."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (7,)


@pytest.mark.slow
def test_a_run_that_dies_is_reported_and_costs_no_other() -> None:
    made = setups(parse_scenario(SMALL, directory=Path()))
    runs = [Run(setup=replace(made[0], settings=_Deadly(), label="doomed")), Run(setup=made[1])]
    dead, alive = sorted(run_many(runs, jobs=2), key=lambda end: end.index)
    assert dead.result is None
    assert "exit status 7" in dead.error
    assert dead.run.name == "doomed, seed 1"
    assert alive.result is not None
    assert alive.result.seed == 2


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_raises_is_reported_with_its_traceback(jobs: int) -> None:
    made = setups(parse_scenario(SMALL, directory=Path()))
    runs = [Run(setup=replace(made[0], policy="none")), Run(setup=made[1])]
    broken, fine = sorted(run_many(runs, jobs=jobs), key=lambda end: end.index)
    assert "unknown policy 'none'" in broken.error
    assert "Traceback" in broken.details
    assert fine.result is not None


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_keeps_what_is_done_and_exits_with_130(scenario: Path, jobs: int) -> None:
    target = scenario.with_name("out.json")
    command = [sys.executable, "-c", _INTERRUPTIBLE, str(scenario), str(target), str(jobs)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        if "GPU-hours" in line:
            child.send_signal(signal.SIGINT)
            break
    _, rest = child.communicate(timeout=60)
    assert child.returncode == 130, rest
    stopped = re.search(r"stopped: (\d+) of 60 runs are done and written", rest)
    assert stopped is not None, rest
    assert 1 <= int(stopped[1]) < 60
    assert len(json.loads(target.read_text())) == int(stopped[1])


_INTERRUPTIBLE = """
import signal, sys
from chiron.cli import app
# Who starts tests in the background may have told them to ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
_, scenario, target, jobs = sys.argv
seeds = [word for seed in range(60) for word in ("-s", str(seed))]
# No stall of whoever interrupts is to be as long as all of them.
longer = ["--set", "workload.0.generate.duration=3m"] if jobs == "1" else []
app(["compare", scenario, *seeds, *longer, "--json", target, "--jobs", jobs])
"""


def test_five_lines_of_python_compare_and_report(scenario: Path) -> None:
    results = chiron.compare(scenario, policies=["static"], seeds=[1], jobs=1)
    assert results[0].summary["finished"] == results[0].summary["requests"]
    page = chiron.report(results, scenario.with_name("report.html"))
    assert "static" in page.read_text(encoding="utf-8")
    assert chiron.simulate(load_scenario(scenario), "static", 1).summary["requests"] == len(results[0].requests.cls)
    assert chiron.bound(scenario, 1).gpu_hours <= results[0].summary["gpu_hours"]


def test_importing_chiron_is_light() -> None:
    code = "import sys, chiron; assert 'compare' in dir(chiron); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_simulated_result_holds_each_instances_batch_size_from_its_start_to_its_end(tmp_path: Path) -> None:
    scenario = tmp_path / "small.toml"
    scenario.write_text(SMALL)
    points = chiron.simulate(scenario, "static", 1, overrides=["failures.at=['20s']"]).batch_sizes
    sizes = [(p.instance_id, p.max_batch_size) for p in points]
    assert sizes == [(1, 256), (1, 0), (2, 256)]
    assert [p.t_s for p in points[:2]] == [0.0, 20.0]
