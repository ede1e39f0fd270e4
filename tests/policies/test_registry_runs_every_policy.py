"""Every policy by its name: a short run through the real simulator, and the tuned ones against what was found."""

from __future__ import annotations

import pickle
import re
import tomllib
from collections import Counter
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import write_tuned
from chiron.cli import app
from chiron.config.build import setups
from chiron.config.policies import read_policies
from chiron.config.scenario import Scenario, load_scenario, parse_scenario
from chiron.policies.ranges import tunables, value_of
from chiron.policies.registry import POLICIES
from chiron.sim.run import simulate
from chiron.studies.calibration import Calibration, Window, check_apart, seen, windows
from chiron.telemetry.result import Result
from policy_names import every

CALIBRATION = Path(__file__).parents[2] / "bench" / "calibration"
SMALL = """
[classes.chat]
kind = "interactive"
ttft = "5s"
itl = "200ms"
[classes.jobs]
kind = "batch"
deadline = "4m"
[models.llama]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]
initial = 4
max_instances = 8
[cold_start]
node_start = "5s"
model_load = "10s"
[[workload]]
model = "llama"
class = "chat"
generate = { kind = "spikes", rate = 20, factor = 3, length = "20s", period = "60s", duration = "3m", lengths = { input = 800, output = 120 } }
[[batch_job]]
model = "llama"
class = "jobs"
at = "20s"
requests = 600
lengths = { input = 500, output = 150 }
"""  # noqa: E501


@cache
def run(policy: str, text: str = SMALL) -> Result:
    scenario: Scenario = parse_scenario(text, directory=Path())
    (setup,) = setups(scenario, policies=[policy])
    return simulate(setup, with_bound=False)


SHORT = SMALL.replace('duration = "3m"', 'duration = "2m"').replace("requests = 600", "requests = 400")


LEAST_ATTAINED = {"aibrix-kpa": 0.05}
"""Its only metric is the share of KV in use, and the engines' batch sizes are reached before half of that is."""


@pytest.mark.parametrize("policy", every())
def test_a_run_ends_every_request_within_the_bounds(policy: str) -> None:
    result = run(policy, SHORT)
    assert result.summary["finished"] == result.summary["requests"]
    assert result.summary["instances_peak"] <= 8
    assert all(sum(point.ready.values()) + point.starting >= 1 for point in result.fleet)
    assert result.summary["attainment"]["chat"] > LEAST_ATTAINED.get(policy, 0.3)


def test_llumnix_migrates_and_comes_down_when_idle() -> None:
    result = run("llumnix")
    reasons = Counter(d.reason for d in result.decisions if d.kind == "fleet")
    assert reasons["freeness_high"] >= 2
    assert result.fleet[-1].planned < 4


def test_chiron_paper_holds_batch_work_and_lets_interactive_requests_pass() -> None:
    text = SMALL.replace("requests = 600", "requests = 3_000")
    paper, llumnix = run("chiron-paper", text), run("llumnix", text)
    assert max(point.waiting_batch for point in paper.fleet) > 0
    assert max(point.waiting_batch for point in llumnix.fleet) == 0  # it dispatches all at once
    assert paper.summary["attainment"]["chat"] > llumnix.summary["attainment"]["chat"]
    assert paper.summary["attainment"]["jobs"] == llumnix.summary["attainment"]["jobs"] == 1.0


@pytest.mark.slow
def test_chiron_paper_adds_batch_instances_for_a_deadline_and_gives_them_back() -> None:
    tight = SMALL.replace("requests = 600", "requests = 16_000").replace("max_instances = 8", "max_instances = 16")
    result = run("chiron-paper", tight.replace('deadline = "4m"', 'deadline = "120s"'))
    assert max(point.ready["batch"] for point in result.fleet) >= 1
    assert max(point.bbp for point in result.fleet) >= 1
    ends = [d.numbers["batch"] for d in result.decisions if d.reason == "batch_queue_empty"]
    assert ends
    assert set(ends) == {0.0}


def test_tuned_policies_carry_what_the_tuning_found() -> None:
    found = tomllib.loads((resources.files("chiron") / "data" / "tuned.toml").read_text(encoding="utf-8"))
    assert write_tuned.WRITTEN.read_text(encoding="utf-8") == write_tuned.text_of(write_tuned.values_of(found))
    rivals = {name for name in found["policies"] if name not in write_tuned.COMPARED}
    assert rivals == {name.removesuffix("-tuned") for name in POLICIES if name.endswith("-tuned")}
    for name, choice in read_policies(found).items():
        if name in rivals:
            tuned = POLICIES[f"{name}-tuned"].settings()
            assert {each.name: value_of(tuned, each.name) for each in tunables(type(choice.settings))} == {
                each.name: value_of(choice.settings, each.name) for each in tunables(type(choice.settings))
            }
            assert pickle.loads(pickle.dumps(tuned)) == tuned


def test_every_rival_was_tuned_with_the_same_budget_on_nothing_that_is_published() -> None:
    found = tomllib.loads((resources.files("chiron") / "data" / "tuned.toml").read_text(encoding="utf-8"))
    assert set(found["policies"]) <= {name for name in POLICIES if not name.endswith("-tuned")} - {"static"}
    assert len({(row["trials"], row["seed"], row["target"]) for row in found["search"].values()}) == 1
    tuned_on = [
        Window(source=each["source"], digest=each["digest"], start_s=each["start"], end_s=each["end"])
        for each in found["calibration"]
    ]
    names = dict.fromkeys(name for row in found["search"].values() for name in row["calibration"])
    places = [CALIBRATION / f"{name.removeprefix('calibration-')}.toml" for name in names]
    asked = seen([Calibration(scenario=load_scenario(place), part="judged") for place in places], None)
    assert {repr(window) for window in tuned_on} == {repr(window) for window in asked}
    for name in ("azure", "mooncake", "servegen-m-small", "servegen-m-mid", "two-models"):
        check_apart(tuned_on, windows(load_scenario(name), "judged"), name)


def tuned_alone(text: str, name: str) -> str:
    """What ``chiron tune`` would have written had it tuned this policy only."""
    parts = re.split(r"^(?=\[policies\.|\[\[first|\[\[calibration)", text, flags=re.MULTILINE)
    (mine,) = (part for part in parts if part.startswith(f'[policies."{name}"]'))
    mine = re.sub(r"^(command|objective) = .*\n", "", mine, flags=re.MULTILINE)
    return "".join([parts[0], mine, *(part for part in parts[1:] if not part.startswith("[policies."))])


def test_a_few_policies_that_were_tuned_anew_take_the_place_of_what_was_there() -> None:
    text = write_tuned.FOUND.read_text(encoding="utf-8")
    before = tomllib.loads(text)
    other = re.sub(r"^command = .*", 'command = "chiron tune -p skyserve"', text, flags=re.MULTILINE)
    other = re.sub(r"^(target_qps|settings.target_qps) = .*", r"\1 = 7.5", other, flags=re.MULTILINE)
    after = tomllib.loads(write_tuned.taken_over(text, tuned_alone(other, "skyserve")))
    assert after["policies"].pop("skyserve")["target_qps"] == 7.5
    assert after["search"].pop("skyserve")["command"] == "chiron tune -p skyserve"
    del before["policies"]["skyserve"], before["search"]["skyserve"]
    assert after == before


def test_what_was_tuned_later_keeps_its_own_objective_and_adds_what_it_has_seen() -> None:
    text = write_tuned.FOUND.read_text(encoding="utf-8")
    before = tomllib.loads(text)
    other = re.sub("^objective = .*", 'objective = "less"', text, flags=re.MULTILINE, count=1)
    other = re.sub("^digest = .*", 'digest = "0"', other, flags=re.MULTILINE)
    other = tuned_alone(other, "skyserve").replace('"skyserve"', '"static"')
    after = tomllib.loads(write_tuned.taken_over(text, other))
    assert after["policies"]["static"] == before["policies"]["skyserve"]
    assert after["search"]["static"]["objective"] == "less"
    assert after["objective"] == before["objective"]
    assert after["calibration"][: len(before["calibration"])] == before["calibration"]
    assert {each["digest"] for each in after["calibration"][len(before["calibration"]) :]} == {"0"}
    assert {key: after["policies"][key] for key in before["policies"]} == before["policies"]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("policies.llumnix.scale_up_blocks=70", "scale_up_blocks is 70.0; it must be below scale_down_blocks (60.0)"),
        ("policies.hpa-queue.target=0", "target is 0.0; it must be above 0"),
        ("policies.hpa-kv.metric='cpu'", "policies.hpa-kv.metric"),
        ("policies.chiron-paper.theta=1.5", "theta is 1.5; it must be above 0 and at most 1"),
        ("policies.chiron-paper.packing.prefil=1", "policies.chiron-paper.packing.prefil: unknown key"),
    ],
)
def test_bad_settings_are_errors_that_say_where(assignment: str, message: str, tmp_path: Any) -> None:
    file = tmp_path / "small.toml"
    file.write_text(SMALL, encoding="utf-8")
    policy = assignment.split(".")[1]
    answer = CliRunner().invoke(app, ["simulate", str(file), "-p", policy, "--set", assignment])
    assert answer.exit_code == 2
    assert message in " ".join(answer.output.split())
