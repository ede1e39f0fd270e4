"""ServeGen slices hold the published rates, patterns and lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chiron.workload.errors import TraceFormatError, WorkloadSettingError
from chiron.workload.load import load_lengths, load_trace
from chiron.workload.servegen import EDGES, read_servegen, synthesise
from chiron.workload.servegen_checks import TABLES
from chiron.workload.stats import counts, gap_cv

WINDOWS = 12


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Two clients over two hours: 0 is bursty (Gamma, CV 3) and silent in the third window, 1 is regular (Weibull,
    shape 3) and has no lengths."""
    rows = [(c, w * 600, 0.0 if (c, w) == (0, 2) else 2.0 + c) for c in range(2) for w in range(WINDOWS)]
    pattern = ["" if rate == 0 else ("Gamma", "Weibull")[c] for c, _, rate in rows]
    shape = [0.0 if rate == 0 else (1 / 9, 3.0)[c] for c, _, rate in rows]
    rates = {
        "client": [row[0] for row in rows],
        "window_start_s": [row[1] for row in rows],
        "rate_rps": [row[2] for row in rows],
        "pattern": pattern,
        "pat_arg1": shape,
    }
    pq.write_table(pa.table(rates), tmp_path / "toy_client_rates.parquet")
    values = np.arange(1, 1001)
    lengths = {
        "client": [0] * 1001,
        "window_start_s": [0] * 1001,
        "field": ["input_tokens"] * 1000 + ["output_tokens"],
        "value": [*values.astype(float), 42.0],
        "prob": [*np.full(1000, 1e-3), 1.0],
    }
    pq.write_table(pa.table(lengths), tmp_path / "toy_client_lengths.parquet")
    return tmp_path / "toy_client_rates.parquet"


def test_rates_hold_in_every_window_and_silence_is_silent(published: Path) -> None:
    data = read_servegen(published)
    runs = [counts(synthesise(data, duration_s=7200, seed=seed).arrival_s, 600)[:11] for seed in range(20)]
    expected = np.full(11, 600 * 5.0)
    expected[2] = 600 * 3.0
    assert np.mean(runs, axis=0) == pytest.approx(expected, rel=0.03)


def test_clients_keep_their_pattern_at_any_scale(published: Path) -> None:
    data = read_servegen(published)
    for client, cv in ((0, 3.0), (1, 0.3634)):  # Weibull of shape 3 has CV 0.3634.
        counts_alone = np.full_like(data.counts, 1200)
        counts_alone[1 - client] = 0
        one = replace(
            data,
            counts=counts_alone,
            patterns=np.repeat(data.patterns[:, :1], WINDOWS, axis=1),
            shapes=np.repeat(data.shapes[:, :1], WINDOWS, axis=1),
        )
        for scale in (0.5, 5.0):
            trace = synthesise(one, duration_s=7200, rate_scale=scale)
            assert len(trace) == pytest.approx(counts_alone.sum() * scale, rel=0.1)
            assert gap_cv(trace.arrival_s) == pytest.approx(cv, rel=0.1)


def test_lengths_come_from_the_published_tables_and_the_source_tells_the_gaps(published: Path) -> None:
    trace = synthesise(read_servegen(published), duration_s=7200)
    assert trace.input_tokens.mean() == pytest.approx(500.5, rel=0.02)
    assert set(trace.output_tokens) == {42}
    share = 3 / (3 + 2 * 11 / 12)
    assert f"{share:.0%} of the requests are of clients without published lengths" in trace.source


def test_tables_keep_the_mean_exactly(published: Path) -> None:
    data = read_servegen(published)
    mean = (data.input_table[0] * np.diff(EDGES)).sum()
    assert mean == pytest.approx(500.5, abs=0.5)


def test_a_slice_begins_inside_a_window_and_at_zero(published: Path) -> None:
    data = read_servegen(published)
    trace = synthesise(data, start_s=900, duration_s=60)
    assert trace.arrival_s[0] >= 0
    assert trace.arrival_s[-1] < 60
    assert len(trace) == pytest.approx(300, rel=0.35)


def test_the_packaged_form_matches_its_published_rates() -> None:
    trace = load_trace("servegen-m-small", start_s=3600, duration_s=86_400, rate_scale=0.002)
    # 14-day mean 1,174 requests/s; the first weekday is within the daily swing of it.
    assert 0.6 < len(trace) / 86_400 / (1174 * 0.002) < 1.4
    again = load_trace("servegen-m-small", start_s=3600, duration_s=86_400, rate_scale=0.002)
    assert trace.arrival_s.tolist() == again.arrival_s.tolist()
    assert trace.output_tokens.tolist() == again.output_tokens.tolist()
    assert "without published lengths" in trace.source


def test_the_packaged_form_serves_as_lengths() -> None:
    lengths = load_lengths("servegen-m-mid")
    assert len(lengths.input_tokens) > 10_000


def test_fourteen_days_at_full_rate_are_refused() -> None:
    with pytest.raises(WorkloadSettingError, match="14 days, 1,420,558,786 requests in all: give a duration"):
        load_trace("servegen-m-small")
    with pytest.raises(WorkloadSettingError, match="at most 50,000,000 are allowed"):
        load_trace("servegen-m-small", duration_s=14 * 86_400)
    with pytest.raises(WorkloadSettingError, match="start is 2000000"):
        load_trace("servegen-m-small", start_s=2e6, duration_s=60)


def test_broken_files_are_refused_by_name(published: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"client": [1]}), tmp_path / "odd_client_rates.parquet")
    with pytest.raises(TraceFormatError, match=r"needs odd_client_lengths.parquet beside it"):
        load_trace(tmp_path / "odd_client_rates.parquet", duration_s=60)
    pq.write_table(pa.table({"client": [1]}), tmp_path / "odd_client_lengths.parquet")
    with pytest.raises(TraceFormatError, match="lacks the column 'window_start_s'"):
        load_trace(tmp_path / "odd_client_rates.parquet", duration_s=60)
    (tmp_path / "x.npz").write_bytes(b"rubbish")
    with pytest.raises(TraceFormatError, match="not a packaged ServeGen model"):
        load_trace(tmp_path / "x.npz", duration_s=60)


def test_lengths_of_a_client_that_the_rates_do_not_have_are_refused_by_name(published: Path) -> None:
    lengths = published.with_name("toy_client_lengths.parquet")
    table = pq.read_table(lengths)
    for stranger in (2, 70_000):
        moved = {name: table.column(name).to_pylist() for name in table.column_names} | {"client": [stranger] * 1001}
        pq.write_table(pa.table(moved), lengths)
        with pytest.raises(TraceFormatError, match=f"toy_client_lengths.parquet.*client.*{stranger}"):
            load_lengths(published)


@pytest.mark.parametrize(
    ("file", "column", "value"),
    [
        ("rates", "client", -1),
        ("rates", "client", 2**40),
        ("rates", "window_start_s", -600),
        ("rates", "rate_rps", float("nan")),
        ("rates", "rate_rps", -1.0),
        ("rates", "pat_arg1", 0.0),
        ("rates", "pat_arg1", None),
        ("lengths", "client", None),
        ("lengths", "window_start_s", 2**50),
        ("lengths", "value", float("inf")),
        ("lengths", "prob", -0.5),
        ("lengths", "value", "many"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_file_and_name(
    published: Path, file: str, column: str, value: object
) -> None:
    path = published.with_name(f"toy_client_{file}.parquet")
    columns = {name: pq.read_table(path).column(name).to_pylist() for name in pq.read_table(path).column_names}
    columns[column] = [value] * len(columns[column]) if isinstance(value, str) else [value, *columns[column][1:]]
    pq.write_table(pa.table(columns), path)
    with pytest.raises(TraceFormatError, match=f"toy_client_{file}.*{column}"):
        load_trace(published, duration_s=600)


@pytest.mark.parametrize("name", ["counts", "length_client", "length_window", "input_table", "shapes", "patterns"])
@pytest.mark.parametrize(
    "change", [lambda a: a[:1], lambda a: a.astype("U8"), lambda a: a * 0 - 9, lambda a: a[..., None]]
)
def test_a_packaged_model_with_tables_that_do_not_fit_is_refused(
    published: Path, tmp_path: Path, name: str, change: Callable[[Any], Any]
) -> None:
    data = read_servegen(published)
    arrays = {table: getattr(data, table).astype("f4" if table == "shapes" else "i8") for table in TABLES}
    double = {
        t: np.concatenate([a, a])
        for t, a in arrays.items()
        if t in ("length_client", "length_window", "input_table", "output_table")
    }
    arrays |= double | {name: change((arrays | double)[name])}
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(TraceFormatError, match=r"odd\.npz: "):
        load_trace(tmp_path / "odd.npz", duration_s=600)


@pytest.mark.slow
def test_a_packaged_model_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    whole = resources.files("chiron").joinpath("data/traces/servegen-m-small.npz").read_bytes()
    for size in (0, 10, 5_000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(TraceFormatError, match="not a packaged ServeGen model"):
            load_trace(tmp_path / "cut.npz", duration_s=60)
