"""The fit finds coefficients it was given, says how far off it is, and refuses data that cannot determine it."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest

from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_fit import fit_profile
from chiron.engines.profile_hardware import MODEL_SHAPES, kv_capacity_tokens
from chiron.engines.profile_points import StepPoint, grid_points, read_points
from chiron.engines.profile_store import load_profile, profile_names

COEFFICIENTS = ("h_ms", "w0_ms", "f_ms_per_token", "c_ms_per_context_token", "q_ms_per_token_squared")
TRUTH = Profile(
    name="truth",
    model="m",
    gpu="g",
    tp=1,
    engine="e",
    h_ms=4.0,
    w0_ms=6.0,
    f_ms_per_token=0.03,
    c_ms_per_context_token=5e-5,
    q_ms_per_token_squared=8e-7,
    kv_capacity_tokens=1,
    kv_bytes_per_token=1,
)


def steps(profile: Profile = TRUTH, noise: float = 0.0) -> list[StepPoint]:
    draw = random.Random("profile-fit")
    points = []
    for batch, context, tokens, offset in product((0, 1, 16, 64, 256, 1024), (128, 2048), (0, 256, 2048), (0, 4096)):
        if batch + tokens == 0 or (tokens == 0 and offset > 0):
            continue
        seconds = profile.step_s(
            decoding=batch, context_tokens=batch * context, prefill_tokens=tokens, prefill_offset=offset
        )
        points.append(
            StepPoint(
                phase="mixed" if tokens and batch else "prefill" if tokens else "decode",
                decoding=batch,
                context_len=context,
                prefill_tokens=tokens,
                attention=(offset + tokens) ** 2 - offset**2,
                latency_ms=1000 * seconds * (1 + noise * draw.uniform(-1, 1)),
            )
        )
    return points


def test_exact_steps_give_back_the_coefficients() -> None:
    report = fit_profile(steps())
    for name in COEFFICIENTS:
        assert getattr(report, name) == pytest.approx(getattr(TRUTH, name), rel=1e-4)
    assert report.error.max_error < 1e-5
    assert report.linear.mape > 0.02, "the linear form cannot bend"


def test_the_error_figures_are_those_of_the_points() -> None:
    points = steps(noise=0.1)
    report = fit_profile(points)
    profile = report.profile(name="p", model="m", gpu="g", tp=1, engine="e", kv_capacity_tokens=1, kv_bytes_per_token=1)
    assert report.error.points == len(points) == sum(error.points for error in report.by_phase.values())
    errors = []
    for point in points:
        attention_ms = profile.q_ms_per_token_squared * point.attention
        context = point.decoding * point.context_len
        fitted = 1000 * profile.step_s(decoding=int(point.decoding), context_tokens=context)
        fitted += 1000 * (
            profile.base_s(int(point.decoding + point.prefill_tokens)) - profile.base_s(int(point.decoding))
        )
        errors.append(abs((fitted + attention_ms) / point.latency_ms - 1))
    assert report.error.mape == pytest.approx(sum(errors) / len(errors))
    assert report.error.max_error == pytest.approx(max(errors))
    assert report.worst == points[errors.index(max(errors))]
    assert 0.01 < report.error.mape < 0.1


def test_a_cost_that_the_engine_does_not_have_comes_out_as_zero() -> None:
    free = {name: getattr(TRUTH, name) for name in TRUTH.__slots__} | {"q_ms_per_token_squared": 0.0, "w0_ms": 0.0}
    report = fit_profile(steps(Profile(**free)))
    assert report.q_ms_per_token_squared == pytest.approx(0.0, abs=1e-11)
    assert report.error.max_error < 1e-3


def test_the_fit_is_the_same_every_time() -> None:
    assert fit_profile(steps(noise=0.1)) == fit_profile(steps(noise=0.1))


@pytest.mark.parametrize("name", profile_names())
def test_a_packaged_profile_is_what_its_grid_gives(name: str) -> None:
    profile = load_profile(name)
    points = grid_points(profile)
    assert len(points) == 366
    report = fit_profile(points)
    for coefficient in COEFFICIENTS:
        assert getattr(profile, coefficient) == pytest.approx(getattr(report, coefficient), rel=1e-3)
    assert profile.mape == pytest.approx(report.error.mape, abs=1e-4)
    assert profile.max_error == pytest.approx(report.error.max_error, abs=1e-3)
    assert profile.linear_mape == pytest.approx(report.linear.mape, abs=1e-4)
    assert profile.mape < 0.06
    assert profile.max_error < 0.25
    assert profile.mape < profile.linear_mape
    assert profile.max_error < profile.linear_max_error
    shape = MODEL_SHAPES[profile.model]
    assert profile.kv_bytes_per_token == shape.kv_bytes_per_token
    assert profile.kv_capacity_tokens == kv_capacity_tokens(shape, profile.gpu, profile.tp)


def test_a_bigger_gpu_and_more_gpus_are_faster_and_hold_more() -> None:
    def both(name: str) -> tuple[float, int]:
        profile = load_profile(name)
        return profile.step_s(decoding=64, context_tokens=64 * 1024), profile.kv_capacity_tokens

    for slow, fast in (("a100/tp1", "h100/tp1"), ("h100/tp1", "h200/tp1"), ("a100/tp1", "a100/tp2")):
        slow_s, slow_kv = both(f"llama-3.1-8b/{slow}")
        fast_s, fast_kv = both(f"llama-3.1-8b/{fast}")
        assert fast_s < slow_s
        assert fast_kv >= slow_kv


def test_a_model_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ProfileError, match="no room for KV on 1 x h100"):
        kv_capacity_tokens(MODEL_SHAPES["llama-3.1-70b"], "h100", 1)
    with pytest.raises(ProfileError, match="gpu 'b200' is unknown; known: a100"):
        kv_capacity_tokens(MODEL_SHAPES["llama-3.1-8b"], "b200", 1)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (lambda p: False, "0 points"),
        (lambda p: p.prefill_tokens == 0, "0 prefill sizes above 0"),
        (lambda p: p.prefill_tokens > 0, "0 batch sizes among the decode-only steps"),
        (lambda p: p.context_len == 128, "1 context lengths"),
    ],
)
def test_too_little_data_is_refused(keep: object, words: str) -> None:
    assert callable(keep)
    with pytest.raises(ProfileError, match=words):
        fit_profile([point for point in steps() if keep(point)])


HEADER = "decode_batch,context_len,prefill_tokens,latency_ms"


def csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_row_without_a_phase_means_what_it_says(tmp_path: Path) -> None:
    path = csv(tmp_path / "a.csv", HEADER + ",prefill_offset", "8,100,0,5,", "8,100,512,9,1024", "0,0,512,9,0")
    decode, mixed, prefill = read_points(path).points
    assert (decode.phase, decode.attention) == ("decode", 0)
    assert (mixed.phase, mixed.decoding, mixed.attention) == ("mixed", 8, 1536**2 - 1024**2)
    assert (prefill.phase, prefill.attention) == ("prefill", 512**2)


def test_a_grid_row_follows_the_grid_conventions(tmp_path: Path) -> None:
    path = csv(tmp_path / "a.csv", HEADER + ",phase", "1,512,512,9,prefill", "8,4096,512,9,mixed")
    prefill, mixed = read_points(path).points
    assert (prefill.decoding, prefill.attention) == (0, 512**2)
    assert mixed.attention == sum((o + 512) ** 2 - o**2 for o in range(0, 4096, 512)) / 8


def test_rows_are_chosen_by_model_system_and_tp(tmp_path: Path) -> None:
    rows = [f"{m},{s},{t},1,64,0,{m[-2]}{t}" for m in ("org/x-7B", "org/x-9B") for s in ("h100_sxm",) for t in (1, 2)]
    path = csv(tmp_path / "a.csv", "model,system,tp," + HEADER, *rows)
    found = read_points(path, model="9b", system="H100", tp=2)
    assert (found.model, found.system, found.tp) == ("org/x-9B", "h100_sxm", 2)
    assert [point.latency_ms for point in found.points] == [92.0]
    with pytest.raises(ProfileError, match=r"choose one .*model=org/x-9B system=h100_sxm tp=1; .*tp=2$"):
        read_points(path, model="9B")
    with pytest.raises(ProfileError, match="no rows match model=8B, tp=1; the file holds: model=org/x-7B"):
        read_points(path, model="8B", tp=1)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["decode_batch,context_len", "1,2"], "column prefill_tokens, latency_ms is missing"),
        ([HEADER, "1,64,0,5", "1,64,0,"], "line 3: latency_ms is ''; expected a number"),
        ([HEADER, "1,64,0,0"], "line 2: latency_ms is 0; it must be above 0"),
        ([HEADER, "1,64,-3,5"], "line 2: prefill_tokens is '-3'; expected a number, 0 or more"),
        ([HEADER, "1,64,inf,5"], "line 2: prefill_tokens is 'inf'"),
        ([HEADER, "0,64,0,5"], "line 2: decode_batch and prefill_tokens are both 0"),
        ([HEADER, "1,64"], "line 2: prefill_tokens is ''"),
        ([HEADER + ",phase", "1,64,0,5,warmup"], "phase is 'warmup'; allowed: decode, prefill, mixed"),
        ([HEADER + ",phase", "1,64,9,5,decode"], "phase is decode but prefill_tokens is 9"),
        ([HEADER], "no rows"),
        ([HEADER + ",tp", "1,64,0,5,two"], "tp is 'two'"),
    ],
)
def test_a_bad_csv_is_named_by_line_and_column(tmp_path: Path, lines: list[str], words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        read_points(csv(tmp_path / "bad.csv", *lines))


def test_a_binary_or_missing_csv_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\x1f\x8bnot gzip")
    for path in (tmp_path / "x.csv", tmp_path / "missing.csv"):
        with pytest.raises(ProfileError, match="cannot be read"):
            read_points(path)
