"""What is no model that the staged engine can serve is refused at start, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chiron.engines.staged.architecture import read_architecture
from chiron.engines.staged.errors import StagedModelError
from chiron.engines.staged.split import StageRange, balanced, by_memory, check_split, read_range
from chiron.engines.staged.tiny import TinySettings, write_tiny
from chiron.engines.staged.weights import read_model_files

SMALL = TinySettings(layers=4, hidden=16, heads=2, kv_heads=1)


def changed(directory: Path, **changes: Any) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architectures is ['GemmaForCausalLM']; it must be one of Llama"),
        ({"architectures": None}, "architectures is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn'; it must be one of"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type is 'longrope'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number from 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must be a divisor of num_attention_heads (2)"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not implemented"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; it must be one of float32"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ],
)
def test_of_a_config_what_is_not_known(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    directory = changed(write_tiny(tmp_path / "model", SMALL), **changes)
    with pytest.raises(StagedModelError) as caught:
        read_architecture(directory)
    assert said in str(caught.value)


def test_a_tensor_that_is_missing_or_has_another_shape(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "model", SMALL)
    whole = StageRange(begin=0, end=4)
    read_model_files(directory).stage_tensors(whole)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(StagedModelError, match=r"tensor model\.layers\.\d\..* is missing from its safetensors files"):
        read_model_files(directory).stage_tensors(whole)
    changed(directory, intermediate_size=48)
    with pytest.raises(StagedModelError, match=r"gate_proj.weight has the shape \[32, 16\]; it must be \[48, 16\]"):
        read_model_files(directory).stage_tensors(StageRange(begin=0, end=1))


@pytest.mark.parametrize("cut", [4, 100, -10])
def test_a_file_that_is_cut_off(tmp_path: Path, cut: int) -> None:
    directory = write_tiny(tmp_path / "model", SMALL)
    file = directory / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(StagedModelError, match=r"model-00001-of-00002\.safetensors"):
        read_model_files(directory)


def test_copies_have_one_fingerprint_and_other_models_another(tmp_path: Path) -> None:
    one = write_tiny(tmp_path / "one", SMALL)
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    other = write_tiny(tmp_path / "other", TinySettings(layers=4, hidden=16, heads=2, kv_heads=1, seed=1))
    prints = [read_model_files(each).fingerprint for each in (one, copy, other)]
    assert prints[0] == prints[1] != prints[2]
    assert read_model_files(changed(copy, rope_theta=1.0)).fingerprint != prints[0]


def test_a_fine_tune_of_one_tensor_is_another_model(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "model", SMALL)
    before = read_model_files(directory)
    place = before.tensors["model.layers.1.self_attn.q_proj.weight"]
    data = bytearray(place.file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    offset = json.loads(data[8 : 8 + length])["model.layers.1.self_attn.q_proj.weight"]["data_offsets"][0]
    for at in range(8 + length + offset, 8 + length + offset + place.bytes):
        data[at] ^= 1
    place.file.write_bytes(data)
    assert read_model_files(directory).fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        (["0-3", "5-7"], "layers 4-4 are in no stage"),
        (["0-3", "3-7"], "layers 3-3 are in two stages"),
        (["0-3"], "layers 4-7 are in no stage"),
        (["1-7"], "layers 0-0 are in no stage"),
        (["0-3", "4-8"], "layers 4-8: this model has layers 0 to 7"),
        ([], "0 stages: there must be 1 to 64"),
    ],
)
def test_a_split_with_a_hole_or_an_overlap(ranges: list[str], said: str) -> None:
    with pytest.raises(StagedModelError) as caught:
        check_split([read_range(each) for each in ranges], 8)
    assert str(caught.value) == said


@pytest.mark.parametrize("text", ["", "3-1", "a-b", "-1", "0-99999"])
def test_a_range_that_is_none(text: str) -> None:
    with pytest.raises(StagedModelError, match="must be FIRST-LAST"):
        read_range(text)


def test_a_balanced_split_counts_what_the_ends_cost() -> None:
    assert [str(each) for each in balanced([1.0] * 8, 4)] == ["0-1", "2-3", "4-5", "6-7"]
    assert [str(each) for each in balanced([1.0] * 8, 4, last=3.0)] == ["0-2", "3-4", "5-6", "7-7"]
    with pytest.raises(StagedModelError, match="9 stages: a model of 8 layers has 1 to 8"):
        balanced([1.0] * 8, 9)


def test_a_split_by_memory_fills_one_device_after_another() -> None:
    assert [str(each) for each in by_memory([10] * 4, [25, 100], first=5)] == ["0-1", "2-3"]
    with pytest.raises(StagedModelError, match="the devices hold layers 0-1 of 4"):
        by_memory([10] * 4, [25], first=5)
    with pytest.raises(StagedModelError, match=r"hold not even layer 0 \(15 bytes\)"):
        by_memory([10] * 4, [12], first=5)
