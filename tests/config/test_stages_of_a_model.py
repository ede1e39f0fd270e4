"""A model as a pipeline of stages in a scenario file: what it becomes, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiron.config.build import setups
from chiron.config.read import ConfigError
from chiron.config.scenario import Scenario, load_scenario, parse_scenario
from chiron.policies.stages.balance import StageBalanceSettings
from chiron.policies.stages.hpa import StageHpaSettings
from chiron.sim.run import simulate

TEXT = """
compare = ["whole", "staged"]
[classes.chat]
kind = "interactive"
ttft = "5s"
[models.llama]
instances = [{ profile = "llama-2-13b/a100" }]
[models.llama.stages]
profile = "llama-2-13b/a100"
split = 4
[[workload]]
model = "llama"
class = "chat"
generate = { kind = "poisson", rate = 1, duration = "20s", lengths = { input = 100, output = 20 } }
[policies.whole]
policy = "static"
[policies.staged]
policy = "static"
stages = { policy = "stage-hpa", target = 0.5 }
"""


def scenario(*assignments: str) -> Scenario:
    return parse_scenario(TEXT, directory=Path()).with_overrides(*assignments)


def test_policies_with_stages_run_pipelines_and_the_others_whole_models() -> None:
    whole, staged = setups(scenario())
    assert whole.models[0].kinds[0].pipeline is None
    assert (whole.stages, whole.stage_policy) == ({}, "")
    assert whole.models[0].kinds[0].weight_bytes == 26_031_728_640
    (kind,) = staged.models[0].kinds
    assert kind.pipeline is not None
    assert [stage.layers for stage in kind.pipeline.stages] == [(0, 9), (10, 19), (20, 29), (30, 39)]
    assert sum(stage.weight_bytes for stage in kind.pipeline.stages) == whole.models[0].kinds[0].weight_bytes
    assert kind.pipeline.hop_bytes_per_s == 12.5e9
    assert staged.stage_settings == StageHpaSettings(target=0.5)
    assert simulate(staged).summary["requests"] == simulate(whole).summary["requests"]


def test_stages_can_be_named_one_by_one_and_a_stage_policy_by_its_name() -> None:
    (staged,) = setups(
        scenario(
            "models.llama.stages={profile='llama-2-13b/a100', hop_latency='1ms', "
            "stage=[{layers='0-29', name='body', max=3}, {layers='30-39', initial=2, price_per_gpu_hour=1}]}",
            "policies.staged.stages='stage-balance'",
        ),
        ["staged"],
    )
    pipeline = staged.models[0].kinds[0].pipeline
    assert pipeline is not None
    assert [(s.name, s.max_replicas, s.initial_replicas) for s in pipeline.stages] == [("body", 3, 1), ("30-39", 8, 2)]
    assert pipeline.stages[1].price_per_gpu_hour == 1
    assert pipeline.hop_s == 0.001
    assert staged.stage_settings == StageBalanceSettings()


def test_a_model_may_run_as_stages_only() -> None:
    only = scenario("models.llama={stages={profile='llama-3.1-70b/a100', split=4}}")
    assert setups(only, ["staged"])[0].models[0].kinds[0].gpus == 4
    with pytest.raises(ConfigError, match=r"models\.llama\.instances: missing; only a policy with stages"):
        setups(only, ["whole"])


def test_a_policy_that_composes_steps_runs_whole_models_only() -> None:
    with pytest.raises(ConfigError, match=r"policy 'staged': 'niyama' decides who gets .* which stages let nobody"):
        setups(scenario("policies.staged.policy='niyama'"), ["staged"])


LONG = "stages={profile='llama-2-13b/a100', stage=[{layers='%s'}, {layers='%s'}]}"


def test_stages_begin_with_what_gpus_there_are() -> None:
    busy = "workload.0.generate.rate=400"
    alone, limited = (setups(scenario(busy, *more), ["staged"])[0] for more in ((), ("gpus.a100=7",)))
    counts = [s.initial_replicas for s in alone.models[0].kinds[0].pipeline.stages]  # type: ignore[union-attr]
    assert min(counts) > 1
    assert [s.initial_replicas for s in limited.models[0].kinds[0].pipeline.stages] == [1] * 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("models.llama." + LONG % ("0-9", "11-39"), r"models\.llama\.stages: a hole: layers 10-10 belong to no stage"),
        ("models.llama." + LONG % ("0-19", "19-39"), r"models\.llama\.stages: an overlap: layer 19"),
        ("models.llama." + LONG % ("0-19", "20-40"), "layer 40 does not exist; the model has 0-39"),
        (
            "models.llama." + LONG % ("0-19", "20 to 39"),
            r"stages\.stage\[1\]: layers is '20 to 39'; it must be a range",
        ),
        ("models.llama.stages.split=41", "41 stages of 40 layers; allowed: 1 to 40"),
        ("models.llama.stages.stage=[{layers='0-39'}]", "give either split or a list of stage"),
        ("models.llama.stages.profile='llama-2-13b/a10'", "did you mean llama-2-13b/a100"),
        ("models.llama.stages.hops=3", r"models\.llama\.stages\.hops: unknown key"),
        ("models.llama.stages.hop_gbit_per_s=0", "hop_gbit_per_s is 0"),
        ("models.llama.stages={profile='llama-3.1-70b/a100', split=1}", "leave no room for KV on one a100"),
        ("policies.staged.stages='stage-hpq'", r"policies\.staged\.stages: unknown stage policy 'stage-hpq'; did you"),
        ("policies.staged.stages={target=1}", "must be the name of a stage policy, or a table"),
        ("policies.staged.stages={policy='stage-hpa', targt=1}", r"policies\.staged\.stages\.targt: unknown key"),
        ("gpus.a100=3", r"gpus\.a100: 3; the stages of llama have 4 at time 0: lower initial"),
        ("models={llama={instances=[{profile='llama-2-13b/a100'}]}}", r"no model does; add \[models\.NAME\.stages\]"),
    ],
)
def test_what_cannot_be_is_refused_by_name(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        setups(scenario(assignment))


def test_the_packaged_scenario_has_both() -> None:
    made = setups(load_scenario("staged", ["duration=60"]))
    assert [bool(setup.stages) for setup in made] == [False, False, True, True, True]
