"""A saved result comes back equal; anything else is refused with the reason. Tables keep every row."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiron.telemetry.errors import StoreError
from chiron.telemetry.result import Result
from chiron.telemetry.store import load_result, save_result
from result_factory import hour, small


def same(a: Result, b: Result) -> None:
    for column in fields(a.requests):
        mine, theirs = getattr(a.requests, column.name), getattr(b.requests, column.name)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    for name in ("policy", "seed", "scenario", "scenario_text", "models", "classes", "summary", "settings"):
        assert getattr(a, name) == getattr(b, name), name
    for name in ("fleet", "batch_sizes", "decisions"):
        # nan is not equal to itself; its text is.
        assert repr(getattr(a, name)) == repr(getattr(b, name)), name


def altered(path: Path, change: Any) -> Path:
    """The saved file with its members passed through ``change(name, data) -> data or None``."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    path.write_bytes(out.getvalue())
    return path


def edited(path: Path, **changes: Any) -> Path:
    def change(name: str, data: bytes) -> bytes:
        return json.dumps(json.loads(data) | changes).encode() if name == "result.json" else data

    return altered(path, change)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made = small()
    # A list: JSON has no tuples, and settings come back as lists.
    return save_result(made, tmp_path / "run.chiron")


def test_a_saved_result_comes_back_equal(saved: Path) -> None:
    same(small(), load_result(saved))


def test_an_hour_comes_back_equal_and_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    result = hour("chiron")
    first, second = save_result(result, tmp_path / "a"), save_result(hour("chiron"), tmp_path / "b")
    same(result, load_result(first))
    assert first.read_bytes() == second.read_bytes()


def test_nothing_is_left_beside_the_file_and_an_old_one_is_replaced(saved: Path) -> None:
    save_result(small(seed=7), saved)
    assert load_result(saved).seed == 7
    assert list(saved.parent.iterdir()) == [saved]


def test_settings_that_are_no_plain_values_are_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"settings\.where"):
        save_result(replace(small(), settings={"where": Path("x")}), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_and_a_missing_folder_are_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read .*No such file"):
        load_result(tmp_path / "none")
    with pytest.raises(StoreError, match=r"cannot write .*No such file"):
        save_result(small(), tmp_path / "none" / "run.chiron")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 broken"])
def test_what_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(StoreError, match="is not a saved result"):
        load_result(tmp_path / "x")


def test_a_truncated_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-200])
    with pytest.raises(StoreError, match="is not a saved result"):
        load_result(saved)


def test_a_flipped_byte_is_refused(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    at = data.index(b"result.json") + 40
    data[at] ^= 0xFF
    saved.write_bytes(bytes(data))
    with pytest.raises(StoreError, match="is not a saved result"):
        load_result(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version is 2; this Chiron reads 1"),
        ({"format": "other"}, "is not a saved result"),
        ({"more": 1}, r"\['more'\]"),
        ({"fleet": {"t_s": []}}, "fleet: columns must be"),
        ({"classes": {"name": ["a"], "kind": [], "ttft_s": [1], "itl_s": [1], "deadline_s": [1]}}, "differ in length"),
        (
            {"classes": {"name": ["a"], "kind": ["batch"], "ttft_s": [0], "itl_s": [1], "deadline_s": [1]}},
            "ttft_s is 0",
        ),
        ({"models": []}, "model spans"),
        ({"summary": {}}, "missing keys"),
    ],
)
def test_a_document_that_does_not_fit_is_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        load_result(edited(saved, **changes))


def test_pickles_and_wrong_types_in_columns_are_refused(saved: Path) -> None:
    for array, message in (
        (np.array([{"a": 1}], dtype=object), "allow_pickle"),
        (np.zeros(3, dtype=np.float32), "must be 1-d float64"),
    ):
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        data = buffer.getvalue()
        altered(saved, lambda name, old, data=data: data if name == "requests/arrival_s.npy" else old)
        with pytest.raises(StoreError, match=message):
            load_result(saved)


def test_a_missing_column_is_refused_by_name(saved: Path) -> None:
    altered(saved, lambda name, data: None if name == "requests/cls.npy" else data)
    with pytest.raises(StoreError, match=r"requests/cls\.npy"):
        load_result(saved)


def test_frames_hold_every_row_under_its_name() -> None:
    result = small(met=0.5)
    frame = result.requests_frame()
    assert len(frame) == 201
    assert frame.groupby("cls", observed=True)["attained"].mean().to_dict() == {"chat": 0.5, "jobs": 1.0}
    assert frame["model"].unique().tolist() == ["llama"]
    assert frame.loc[0, "ttft_s"] == 1.0
    assert result.fleet_frame()["ready_mixed"].tolist() == [2, 3]
    assert result.decisions_frame()["reason"].tolist() == ["below_slo", "ibp_high"]
    assert result.batch_sizes_frame()["max_batch_size"].tolist() == [8]


def test_frames_show_nan_for_what_never_happened() -> None:
    table = small().requests
    frame = replace(small(), requests=replace(table, finish_s=np.full(201, -1.0), outcome=np.full(201, 4, "i1")))
    assert frame.requests_frame()["finish_s"].isna().all()
    assert frame.requests_frame()["outcome"].unique().tolist() == ["unfinished"]


def test_frames_of_nothing_keep_their_columns() -> None:
    empty = replace(small(), fleet=(), decisions=(), batch_sizes=())
    assert "ready_batch" in empty.fleet_frame().columns
    assert "reason" in empty.decisions_frame().columns
    assert len(empty.batch_sizes_frame()) == 0


def test_importing_results_and_saving_needs_no_plotting_and_no_pandas() -> None:
    code = (
        "import sys, chiron.telemetry.result, chiron.telemetry.summary, chiron.telemetry.store;"
        "import chiron.telemetry.html, chiron.telemetry.figures;"
        "print([m for m in ('pandas', 'plotly', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
