"""``engine = "staged"`` in a serve config: read strictly, checked against the model, and known to policies."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path

import pytest

pytest.importorskip("msgspec")

from chiron.config.read import ConfigError
from chiron.config.serve import parse_serve
from chiron.engines.staged.tiny import TinySettings, write_tiny
from chiron.gateway.instances.stages import read_stages

STAGES = '[{ layers = "0-1", max = 3, pace = "20ms" }, { layers = "2-3", kv_capacity_tokens = 640 }]'


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("config")
    write_tiny(found / "tiny", TinySettings(layers=4, hidden=16, heads=2, kv_heads=1))
    return found


def config(stages: str, more: str = "", top: str = "") -> str:
    return f'{top}\n[models.m]\nengine = "staged"\nmodel_path = "tiny"\nstages = {stages}\n{more}\n'


def test_an_instance_is_a_pipeline_and_its_process_is_told_the_stages(directory: Path) -> None:
    read = parse_serve(config(STAGES, top='stage_policy = "stage-balance"'), directory=directory)
    assert read.stage_policy == "stage-balance"
    (kind,) = read.models[0].kinds
    pipeline = kind.kind.pipeline
    assert pipeline is not None
    assert [(s.name, s.min_replicas, s.max_replicas) for s in pipeline.stages] == [("0-1", 1, 3), ("2-3", 1, 1)]
    assert pipeline.stages[0].step_times[0] == (1, 0.02)
    assert pipeline.stages[1].kv_capacity_tokens == 640
    assert pipeline.token_bytes == 64
    command = kind.source.command  # type: ignore[union-attr]
    told = json.loads(command[command.index("--stages") + 1])
    assert told[0] == {"layers": "0-1", "min": 1, "max": 3, "device": "cpu", "pace_ms": 20.0, "pace_sequence_ms": 0.0}


def test_stages_have_the_kv_of_the_instance_if_they_have_none_of_their_own(directory: Path) -> None:
    read = parse_serve(config(STAGES, "kv_capacity_tokens = 4096"), directory=directory)
    pipeline = read.models[0].kinds[0].kind.pipeline
    assert pipeline is not None
    assert [stage.kv_capacity_tokens for stage in pipeline.stages] == [4096, 640]


def test_a_stage_policy_has_its_settings_in_the_table_of_the_policy(directory: Path) -> None:
    table = '[policies.chiron]\nstages = { policy = "stage-hpa", target = 0.6, stabilise_down = "1m" }'
    read = parse_serve(config(STAGES, table), directory=directory)
    assert read.stage_policy == "stage-hpa"
    assert (read.stage_settings.target, read.stage_settings.stabilise_down_s) == (0.6, 60.0)
    assert (read.policy, read.policy_label) == ("chiron", "chiron")
    assert parse_serve(config(STAGES), directory=directory).stage_policy == ""


def test_step_times_come_from_a_plan(directory: Path) -> None:
    stages = [{"layers": layers, "step_s": {"1": 0.001, "8": 0.004}} for layers in ("0-1", "2-3")]
    (directory / "plan.json").write_text(json.dumps({"stages": stages}))
    read = parse_serve(config(STAGES, 'stages_plan = "plan.json"'), directory=directory)
    pipeline = read.models[0].kinds[0].kind.pipeline
    assert pipeline is not None
    assert pipeline.stages[1].step_times == ((1, 0.001), (8, 0.004))


def test_a_stage_may_have_more_than_one_replica_at_least(directory: Path) -> None:
    stages = '[{ layers = "0-1", min = 2, max = 3, gpus = 2 }, { layers = "2-3" }]'
    kind = parse_serve(config(stages), directory=directory).models[0].kinds[0].kind
    pipeline = kind.pipeline
    assert pipeline is not None
    assert kind.gpus == 3, "one replica of each"
    assert (pipeline.stages[0].min_replicas, pipeline.stages[0].initial_replicas) == (2, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (config('[{ layers = "0-1" }]'), "models.m.stages: layers 2-3 are in no stage"),
        (config('[{ layers = "0-2" }, { layers = "2-3" }]'), "models.m.stages: layers 2-2 are in two stages"),
        (config('[{ layers = "0-3", min = 2 }]'), "models.m.stages[0]: max is 1; it must be min (2, 1 or more) to 256"),
        (config('[{ layers = "0-3", most = 2 }]'), "models.m.stages[0].most: unknown key"),
        (config("[]"), "stages is missing"),
        (config('[{ layers = "0-3", pace = "61s" }]'), "pace is 61.0; it must be 0 to a minute"),
        (config('[{ layers = "0-3", device = "GPU 1" }]'), "device is 'GPU 1'; it must be cpu, cuda, cuda:0"),
        (config('[{ layers = "0-3", device = "cuda:1", max = 2 }]'), "max is 2; it must be 1 with a GPU as device"),
        (config(STAGES, 'stages_plan = "none.json"'), "models.m.stages_plan: 'none.json' is not what"),
        (config(STAGES, top='stage_policy = "stage-hpb"'), "stage_policy: unknown policy 'stage-hpb'"),
        (
            config(STAGES, '[policies.chiron]\nstages = "stage-hpa"', 'stage_policy = "stage-hpa"'),
            "stage_policy: 'stage-hpa', but the table of the policy has stages as well",
        ),
        (config(STAGES).replace('"tiny"', '"none"'), "no config.json there"),
        (config(STAGES).replace('"staged"', '"emulated"'), "it belongs to engine = 'staged'"),
    ],
)
def test_what_cannot_work_is_an_error_that_names_the_key(directory: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_serve(text, directory=directory)
    assert said in str(caught.value)


def test_what_a_pipeline_says_of_its_stages_is_read_with_care() -> None:
    stage = {"ready": 1, "draining": 0, "busy_s": 1.5, "passes": 3, "tokens": 9, "waiting": 0, "kv_used_tokens": 64}
    said = {
        "running": 2,
        "waiting": 0,
        "context_tokens": 30,
        "stages": [stage, {**stage, "starting": 1, "start_s": 3.5}],
    }
    sample = read_stages(json.dumps(said).encode(), 7.0)
    assert sample is not None
    assert (sample.taken_s, sample.stages[1].starting, sample.stages[1].start_s) == (7.0, 1, 3.5)
    assert isnan(sample.stages[0].start_s)
    for key, value in (("ready", -1), ("ready", True), ("busy_s", "1"), ("passes", None), ("tokens", float("inf"))):
        assert read_stages(json.dumps({**said, "stages": [{**stage, key: value}]}).encode(), 7.0) is None
    assert read_stages(b"[]", 7.0) is None
    assert read_stages(b"{", 7.0) is None
