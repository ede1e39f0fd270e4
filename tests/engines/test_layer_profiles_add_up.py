"""Stages of a model add up to the model, and a split that is none is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from chiron.engines.layers import check_ranges, even_split, layer_profile_names, load_layer_profile
from chiron.engines.profile import ProfileError


@pytest.mark.parametrize("name", layer_profile_names())
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_stages_take_what_the_whole_takes(name: str, stages: int) -> None:
    profile = load_layer_profile(name)
    ranges = even_split(profile.layers, stages)
    check_ranges(ranges, profile.layers)
    parts = [profile.stage(*each) for each in ranges if stages > 2 or "13b" in name]
    whole_bytes = profile.layers * profile.layer_bytes + profile.embedding_bytes + profile.head_bytes
    assert sum(profile.weight_bytes(*each) for each in ranges) == whole_bytes
    for tokens in (1, 64, 2048) if parts else ():
        knee_ms = profile.layers * profile.layer_w0_ms + profile.head_w0_ms
        token_ms = profile.layers * profile.layer_f_ms_per_token * tokens
        whole_ms = profile.layers * profile.layer_h_ms + (knee_ms**4 + token_ms**4) ** 0.25
        assert 1000 * sum(part.base_s(tokens) for part in parts) == pytest.approx(whole_ms, rel=0.01)


def test_sizes_are_those_of_the_models() -> None:
    for name, parameters in (("llama-2-13b/a100", 13.02e9), ("llama-3.1-70b/h100", 70.55e9)):
        profile = load_layer_profile(name)
        assert profile.weight_bytes(0, profile.layers - 1) == pytest.approx(2 * parameters, rel=0.001)


def test_what_fits_no_gpu_is_refused() -> None:
    with pytest.raises(ProfileError, match="leave no room for KV on one a100; use more stages"):
        load_layer_profile("llama-3.1-70b/a100").stage(0, 79)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 9), (11, 39)], "a hole: layers 10-10 belong to no stage"),
        ([(0, 9), (9, 39)], "an overlap: layer 9 belongs to two stages"),
        ([(0, 9), (10, 38)], "a hole: layers 39-39 belong to no stage"),
        ([(0, 9), (10, 40)], "layer 40 does not exist; the model has 0-39"),
        ([(5, 2)], "layers 5-2 descend"),
    ],
)
def test_a_split_with_a_hole_or_an_overlap_is_refused(ranges: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        check_ranges(ranges, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layers": 0}, "layers is 0"), ({"tp": 4}, "unknown key 'tp'"), ({"hidden": "wide"}, "hidden is 'wide'")],
)
def test_a_file_is_read_strictly(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**asdict(load_layer_profile("llama-2-13b/a100")), **change}))
    with pytest.raises(ProfileError, match=message):
        load_layer_profile(file)
    with pytest.raises(ProfileError, match="did you mean"):
        load_layer_profile("llama-2-13b/a1000")
