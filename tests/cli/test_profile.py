"""``chiron profile`` as a user calls it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chiron.cli import app
from chiron.engines.profile_points import GRID
from chiron.engines.profile_store import load_profile, profile_names

A100 = "llama-3.1-8b/a100/tp1"
FIT = ["--kv-capacity-tokens", "400000", "--kv-bytes-per-token", "131072"]


def chiron(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["profile", *(str(argument) for argument in arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, result.stderr


def test_list_has_a_row_for_every_packaged_profile() -> None:
    code, out, _ = chiron("list")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if "/tp" in line}
    assert set(rows) == set(profile_names())
    assert "445,548" in rows[A100]
    assert "3.3 / 19" in rows[A100], "error of the knee"
    assert "5.3 / 23" in rows[A100], "error of the linear form"


def test_list_narrows_by_text_and_says_when_nothing_is_left() -> None:
    _, out, _ = chiron("list", "70b/h200")
    assert [line.split()[0] for line in out.splitlines() if "/tp" in line] == [
        "llama-3.1-70b/h200/tp4",
        "llama-3.1-70b/h200/tp8",
    ]
    code, _, error = chiron("list", "gpt")
    assert code == 2
    assert error.startswith("error: no packaged profile contains 'gpt'")


def test_show_prints_units_and_the_grid_beside_the_fit() -> None:
    code, out, _ = chiron("show", A100)
    assert code == 0
    assert "8.59143 ms" in out
    assert "445,548 tokens of 131,072 bytes" in out
    # One decode at 1,024 tokens: ours, and the grid's.
    assert "12.0 (11.9)" in out
    assert "in chunks of 2,048" in out


def test_show_json_is_a_file_that_loads(tmp_path: Path) -> None:
    code, out, _ = chiron("show", A100, "--json")
    assert code == 0
    (tmp_path / "copy.json").write_text(out, encoding="utf-8")
    assert load_profile(tmp_path / "copy.json") == load_profile(A100)


def test_show_takes_a_file_with_anything_for_a_name(tmp_path: Path) -> None:
    data = json.loads(chiron("show", A100, "--json")[1]) | {"name": "my [bold] model", "model": "other"}
    (tmp_path / "mine.json").write_text(json.dumps(data), encoding="utf-8")
    code, out, _ = chiron("show", tmp_path / "mine.json")
    assert code == 0
    assert "my [bold] model" in out
    assert "(11.9)" not in out, "no grid for a model of the user's"


def test_fit_of_the_grid_gives_the_packaged_profile(tmp_path: Path) -> None:
    out_file = tmp_path / "my.json"
    code, out, _ = chiron(
        "fit", GRID, "-o", out_file, "--name", "my/h100", *FIT, "--model", "8b", "--system", "h100", "--tp", 1
    )
    assert code == 0
    assert "my/h100: error 3.8 % mean, 17.1 % worst" in out
    mine, ours = load_profile(out_file), load_profile("llama-3.1-8b/h100/tp1")
    assert (mine.h_ms, mine.f_ms_per_token) == pytest.approx((ours.h_ms, ours.f_ms_per_token), rel=1e-3)
    assert (mine.tp, mine.gpu, mine.kv_capacity_tokens, mine.price_per_gpu_hour) == (1, "h100", 400000, 3.0)


def test_fit_warns_when_the_form_does_not_suit(tmp_path: Path) -> None:
    rows = [
        f"{b},{c},{n},{5 if (b + n // 256) % 2 else 50}" for b in (1, 2, 8) for c in (64, 512) for n in (0, 256, 1024)
    ]
    csv = tmp_path / "noise.csv"
    csv.write_text("decode_batch,context_len,prefill_tokens,latency_ms\n" + "\n".join(rows), encoding="utf-8")
    code, _, error = chiron("fit", csv, "-o", tmp_path / "p.json", "--name", "x", *FIT)
    assert code == 0
    assert "warning: the mean error is above 10%" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "llama-3.1-8b/h100/tp9"], "did you mean llama-3.1-8b/h100/tp"),
        (["plot", A100, "-o", "x.gif"], "its ending must be one of .png, .svg, .pdf"),
        (["plot", A100, "-o", "no/such/dir/x.png"], "cannot be written"),
        (["fit", "missing.csv", "-o", "x.json", "--name", "x", *FIT], "missing.csv: cannot be read"),
        (["fit", str(GRID), "-o", "x.json", "--name", "x", *FIT], "choose one with model, system and tp"),
        (["fit", str(GRID), "-o", "x.json", "--name", "x", *FIT, "--model", "9b"], "no rows match model=9b"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = chiron(*arguments)
    assert code == 2
    assert error.startswith("error: ")
    assert words in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_plot_draws_what_was_fitted_and_what_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("matplotlib.legend.Legend._find_best_position", lambda *_: pytest.fail("a legend has no place"))
    data = json.loads(chiron("show", A100, "--json")[1]) | {"model": "other", "kv_capacity_tokens": 3000}
    (tmp_path / "mine.json").write_text(json.dumps(data), encoding="utf-8")
    out_file = tmp_path / "plot.svg"
    code, _, error = chiron("plot", A100, tmp_path / "mine.json", "-o", out_file)
    assert code == 0
    assert str(out_file) in error
    assert out_file.read_text(encoding="utf-8").count('<g id="axes_') == 4
    code, _, _ = chiron("plot", A100, "-o", tmp_path / "plot.png")
    assert code == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(find_spec("aiconfigurator_core") is not None, reason="aiconfigurator-core is installed")
def test_from_aic_says_what_to_install(tmp_path: Path) -> None:
    code, _, error = chiron("from-aic", "Qwen/Qwen3-32B", "--system", "h200_sxm", "-o", tmp_path / "q.json")
    assert code == 2
    assert "pip install 'chiron-serving[aic]'" in error
    assert not (tmp_path / "q.json").exists()
