"""Profiles load by name or path, survive a round trip, and a bad file says what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_store import load_profile, profile_names, save_profile

A100 = "llama-3.1-8b/a100/tp1"


def written(path: Path, **changes: object) -> Path:
    data = json.loads(json.dumps({name: getattr(load_profile(A100), name) for name in Profile.__slots__}))
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_every_packaged_profile_loads_under_its_own_name() -> None:
    names = profile_names()
    assert len(names) == 12
    assert names == tuple(sorted(names))
    for name in names:
        profile = load_profile(name)
        assert profile.name == name
        assert name == f"{profile.model}/{profile.gpu}/tp{profile.tp}"
        assert profile.source
        assert profile.price_per_gpu_hour > 0


def test_a_saved_profile_reads_back_equal(tmp_path: Path) -> None:
    profile = replace(load_profile(A100), name="mine", step_overhead_ms=1.25, captured_sizes=(1, 8))
    save_profile(profile, tmp_path / "mine.json")
    assert load_profile(tmp_path / "mine.json") == profile
    assert load_profile(str(tmp_path / "mine.json")) == profile


def test_keys_with_defaults_may_be_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "p.json", price_per_gpu_hour=None, source=None, mape=None)
    assert load_profile(path).price_per_gpu_hour == 0.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_capacity": 5}, ["unknown key 'kv_capacity'", "did you mean 'kv_capacity_tokens'?"]),
        ({"h_ms": None}, ["missing 'h_ms'"]),
        ({"tp": "4"}, ['tp is "4"', "a whole number"]),
        ({"tp": True}, ["tp is true", "a whole number"]),
        ({"tp": 0}, ["tp is 0", "at least 1"]),
        ({"kv_capacity_tokens": 1.5}, ["kv_capacity_tokens is 1.5", "a whole number"]),
        ({"c_ms_per_context_token": -1e-5}, ["c_ms_per_context_token is -1e-05", "at least 0"]),
        ({"h_ms": float("nan")}, ["h_ms is nan", "finite"]),
        ({"name": 7}, ["name is 7", "a string"]),
        ({"captured_sizes": 8}, ["captured_sizes is 8", "a list of whole numbers"]),
        ({"captured_sizes": [1, "8"]}, ['captured_sizes is [1, "8"]', "a list of whole numbers"]),
        ({"captured_sizes": [8, 8]}, ["captured_sizes is [8, 8]", "ascend"]),
        ({"captured_sizes": [0, 8]}, ["captured_sizes is [0, 8]", "at least 1"]),
        ({"h_ms": 0, "w0_ms": 0, "f_ms_per_token": 0}, ["a step must take some time"]),
    ],
)
def test_a_bad_value_is_named_with_its_file(tmp_path: Path, changes: dict[str, object], words: list[str]) -> None:
    path = written(tmp_path / "bad.json", **changes)
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    for word in [*words, str(path)]:
        assert word in str(caught.value)


def test_a_key_given_twice_is_an_error_not_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text('{"tp": 1, "tp": 2}', encoding="utf-8")
    with pytest.raises(ProfileError, match="'tp' occurs twice"):
        load_profile(path)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "line 1 column 2 is not JSON"), ("[1]", "expected one JSON object, found list")]
)
def test_a_file_that_is_no_profile_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ProfileError, match=words):
        load_profile(path)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ProfileError, match=r"did you mean llama-3\.1-8b/h100/tp") as caught:
        load_profile("llama-3.1-8b/h100/tp3")
    assert "llama-3.1-70b/h200/tp8" in str(caught.value)
    with pytest.raises(ProfileError, match="no such file"):
        load_profile("missing.json")
