"""Scenario files: read, refused with a path, overridden, and turned into runs."""

from __future__ import annotations

import json
import re
from importlib import resources
from math import inf
from pathlib import Path

import numpy as np
import pytest

from chiron.config.build import setups
from chiron.config.read import ConfigError, keys_of
from chiron.config.scenario import Scenario, load_scenario, parse_scenario, scenario_files
from chiron.config.sections import (
    BatchJobSection,
    InstanceSection,
    ModelSection,
    StageSection,
    StagesSection,
    StreamSection,
    Telemetry,
)
from chiron.core.types import RequestClass
from chiron.fleet.model import ColdStart, Failures
from chiron.workload.generate import KINDS
from scenario_text import SMALL


def small(*overrides: str) -> Scenario:
    return parse_scenario(SMALL, directory=Path()).with_overrides(*overrides)


def test_durations_classes_and_models_are_read() -> None:
    scenario = small()
    assert scenario.classes["chat"].itl_s == 0.2
    assert scenario.classes["chat"].deadline_s == inf
    assert scenario.batch_job[0].at_s == 10.0
    assert scenario.models["llama"].instances[0].profile == "llama-3.1-8b/a100/tp1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("clases={}", r"clases: unknown key .*did you mean 'classes'"),
        ("policies.chiron.utilisaton=1", r"policies\.chiron\.utilisaton: unknown key .*did you mean 'utilisation'"),
        ("policies.mine.policy=chirron", r"policies\.mine\.policy: unknown policy 'chirron'; did you mean 'chiron'"),
        ("policies.mine.tick='5s'", r"policies\.mine: unknown policy 'mine'"),
        ("compare=['statik']", r"compare\[0\]: unknown policy 'statik'; did you mean 'static'"),
        ("classes.chat.kind=interactiv", r"classes\.chat\.kind: 'interactiv'; did you mean 'interactive'"),
        ("classes.chat.ttft=0", r"classes\.chat: class 'chat': ttft_s is 0\.0; it must be above 0"),
        ("models.llama.max_instances=0", r"models\.llama: max_instances is 0; it must be 1 or more"),
        ("models.llama.initial=5", r"models\.llama: initial is 5; it must be 'auto' or 0 to max_instances \(4\)"),
        ("models.llama.instances=[]", r"models\.llama: instances is \[\]"),
        ("workload.0.model=lama", r"workload\[0\]\.model: unknown name 'lama'; did you mean 'llama'"),
        ("workload.0.trace=azure-2023-conv", r"workload\[0\]: give either trace or generate"),
        ("workload.0.generate.kind=poison", r"workload\[0\]\.generate\.kind: 'poison'; did you mean 'poisson'"),
        ("workload.0.generate.rate=0", r"workload\[0\]\.generate: rate is 0\.0; it must be a finite number above 0"),
        ("workload.0.generate.cv=2", r"workload\[0\]\.generate\.cv: unknown key"),
        ("workload.0.start=5", r"workload\[0\]: start, duration and format belong to a trace"),
        ("workload.3.start=5", r"'3' must be the number of an entry, 0 to 0"),
        ("name.x=5", r"'name' is a value \('small'\), not a table"),
        ("batch_job.0.lengths.input=0", r"batch_job\[0\]\.lengths: input is 0; it must be 1 or more"),
        ("classes.batch={kind='batch'}", r"batch_job\[0\]\.deadline: 'none': set it here or in classes\.batch"),
        ("seeds=[]", r"seeds: \(\): name at least one"),
        ("seeds=[1, 1]", r"seeds: \(1, 1\): each seed once"),
        ("scale=0", r"scale: 0\.0: must be above 0"),
        ("gpus.a100=0", r"gpus\.a100: 0: must be 1 or more"),
        ("sleepers.host_memory_gb=-1", r"sleepers: host_memory_gb is -1\.0; it must be 0 or more"),
        ("cold_start.peer_gb_per_s=0", r"cold_start: peer_gb_per_s is 0\.0; it must be above 0"),
    ],
)
def test_a_mistake_is_refused_with_its_path(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("workload.0.generate.lengths=sharegtp", r"workload\[0\]: 'sharegtp' is neither a file nor a packaged"),
        ("models.llama.instances.0.profile=llama", r"models\.llama\.instances\[0\]: profile 'llama' is neither"),
        ("duration=1ms", r"duration: 0\.001 s holds no request; the first arrives at"),
        ("models.llama.initial=4", None),
    ],
)
def test_what_only_a_run_needs_is_checked_when_runs_are_made(change: str, message: str | None) -> None:
    if message is None:
        assert setups(small(change))[0].initial == {"llama": 4}
        return
    with pytest.raises(ConfigError, match=message):
        setups(small(change))


def test_an_initial_fleet_that_exceeds_the_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"models\.llama\.initial: 4 instances of .* there is room for 3"):
        setups(small("models.llama.initial=4", "gpus.a100=3"))


def test_a_file_that_is_not_toml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("name = 'x'\nseeds = [1,,2]\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not TOML: .*line 2"):
        load_scenario(path)


def test_an_unknown_name_lists_the_packaged_scenarios() -> None:
    with pytest.raises(ConfigError, match=r"'azzure' is neither a file nor .*did you mean 'azure'"):
        load_scenario("azzure")


def test_overrides_become_part_of_the_text_that_reproduces_the_run() -> None:
    changed = small("scale=2", "policies.slow.policy=static", "name=with a space", 'models."llama".max_instances=3')
    again = parse_scenario(changed.text, directory=Path())
    assert again == changed
    assert (again.scale, again.name, again.models["llama"].max_instances) == (2.0, "with a space", 3)


def test_an_assignment_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected path=value"):
        small("scale")


def test_one_setup_per_policy_and_seed_sharing_the_workload_of_a_seed() -> None:
    made = setups(small("policies.tuned.policy=chiron", "policies.tuned.tick=10s"), policies=["static", "tuned"])
    assert [(s.label, s.policy, s.seed) for s in made] == [
        ("static", "static", 1),
        ("static", "static", 2),
        ("tuned", "chiron", 1),
        ("tuned", "chiron", 2),
    ]
    assert made[0].workload is made[2].workload
    assert made[2].settings.tick_s == 10.0
    assert not np.array_equal(made[0].workload.arrival_s[:50], made[1].workload.arrival_s[:50])


def test_the_same_seed_gives_the_same_workload() -> None:
    first, second = (setups(small(), seeds=[7])[0].workload for _ in range(2))
    assert np.array_equal(first.arrival_s, second.arrival_s)
    assert np.array_equal(first.output_tokens, second.output_tokens)


def test_scale_multiplies_streams_and_jobs_and_duration_cuts_both() -> None:
    plain = setups(small(), seeds=[1])[0].workload
    double = setups(small("scale=2"), seeds=[1])[0].workload
    batch = double.classes.index(next(c for c in double.classes if c.name == "batch"))
    assert (double.cls == batch).sum() == 100
    assert 1.6 < (double.cls != batch).sum() / (plain.cls != batch).sum() < 2.4
    cut = setups(small("duration=10s"), seeds=[1])[0].workload
    assert cut.arrival_s.max() < 10.0
    assert not any(cut.classes[i].name == "batch" for i in cut.cls)


def test_a_job_deadline_stands_in_for_that_of_its_class() -> None:
    workload = setups(small("batch_job.0.deadline=2m"), seeds=[1])[0].workload
    assert sorted(set(workload.deadline_s[np.isfinite(workload.deadline_s)])) == [130.0]


def test_offset_and_repeat_move_and_multiply_a_stream(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("arrival_s,input_tokens,output_tokens\n0,10,5\n4,10,5\n")
    text = SMALL.replace('generate = { kind = "poisson", rate = 4, duration = "1m", lengths = "sharegpt-300" }', "")
    text = text.replace('class = "chat"', 'class = "chat"\ntrace = "own.csv"\nrepeat = 2\noffset = "20s"')
    (tmp_path / "s.toml").write_text(text)
    workload = setups(load_scenario(tmp_path / "s.toml"), seeds=[1])[0].workload
    chat = workload.arrival_s[workload.input_tokens == 10]
    assert chat.tolist() == [20.0, 24.0, 24.0, 28.0]


def test_auto_initial_follows_the_interactive_work_and_no_batch() -> None:
    # 4 requests/s of 0.16 GPU-seconds or so keep about one A100 busy; the 10,000 batch requests do not count.
    plain = setups(small())[0].initial["llama"]
    assert plain == setups(small("batch_job.0.requests=10000"))[0].initial["llama"]
    ten = setups(small("workload.0.generate.rate=40", "models.llama.max_instances=40", "gpus.a100=40"))[0].initial
    assert 5 * plain <= ten["llama"] <= 12 * plain
    assert setups(small("workload.0.generate.rate=40"))[0].initial["llama"] == 4, "within max_instances"


def test_an_instance_kind_carries_what_the_scenario_changes_of_its_profile() -> None:
    setup = setups(
        small(
            "models.llama.instances=[{profile='llama-3.1-8b/a100/tp1', name='mine', price_per_gpu_hour=9, "
            "max_num_seqs=64, step_overhead='2ms', kv_capacity_tokens=50000, "
            "admission='3ms', captured_sizes=[8, 16]}]"
        )
    )[0]
    (kind,) = setup.models[0].kinds
    assert (kind.name, kind.price_per_gpu_hour, kind.max_num_seqs, kind.kv_capacity_tokens) == ("mine", 9, 64, 50000)
    assert setup.profiles["mine"].step_overhead_ms == 2.0
    assert setup.profiles["mine"].admission_ms == 3.0
    assert setup.profiles["mine"].captured_sizes == (8, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("admission=-1.0", r"instances\[0\]\.admission: duration -1.0 must be finite and not negative"),
        ("captured_sizes=[8, 4]", r"captured_sizes is \[8, 4\]; it must be 1 or more, and ascend"),
        ("captured_sizes=[0, 4]", r"captured_sizes is \[0, 4\]; it must be 1 or more, and ascend"),
    ],
)
def test_times_and_sizes_of_steps_are_checked_where_they_are_set(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(f"models.llama.instances=[{{profile='llama-3.1-8b/a100/tp1', {change}}}]")


def test_one_name_for_two_kinds_of_instance_is_refused() -> None:
    twice = "models.llama.instances=[{profile='llama-3.1-8b/a100/tp1'}, {profile='llama-3.1-8b/a100/tp1'}]"
    with pytest.raises(ConfigError, match=r"instances\[0\]: the name .* give this one a name of its own"):
        setups(small(twice))


SECTIONS = [
    *(Scenario, RequestClass, ModelSection, InstanceSection, StreamSection, BatchJobSection),
    *(StageSection, StagesSection),
    *(ColdStart, Failures, Telemetry, *KINDS.values()),
]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_manual_names_every_key(section: type) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "scenario.md").read_text(encoding="utf-8")
    own = {"text", "directory"} if section is Scenario else set()
    missing = [key for key in keys_of(section) if key not in own and not re.search(rf"\b{key}\b", manual)]
    assert missing == []


@pytest.mark.parametrize("name", list(scenario_files()))
def test_every_packaged_scenario_makes_runs(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.description
    made = setups(scenario, seeds=scenario.seeds[:1])
    assert [setup.label for setup in made] == list(scenario.labels)
    assert len(made[0].workload) > 1000


def test_what_sleeps_has_a_known_size(tmp_path: Path) -> None:
    profile = json.loads(resources.files("chiron").joinpath("data/profiles/llama-3.1-8b/a100/tp1.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps({**profile, "model": "own", "name": "own"}))
    sleeping = ("sleepers.host_memory_gb=64", f'models.llama.instances.0.profile="{tmp_path}/own.json"')
    message = r"sleepers\.sleeper_gb: not given, and how large the weights of 'own' \(models\.llama\) are is not known"
    with pytest.raises(ConfigError, match=message):
        setups(small(*sleeping))
    assert setups(small(*sleeping, "sleepers.sleeper_gb=20"))[0].sleep.sleeper_gb == 20


def test_sleepers_of_two_models_are_told_apart() -> None:
    other = 'models.other.instances=[{ profile = "llama-3.1-8b/a100/tp1" }]'
    assert len(setups(small(other))[0].models) == 2
    message = r"models\.other\.instances\[0\]: the name 'llama-3\.1-8b/a100/tp1' is one of models\.llama too"
    with pytest.raises(ConfigError, match=message):
        setups(small(other, "sleepers.host_memory_gb=64"))
