"""Every format in every container reads to the same trace; what cannot be used is counted, named and limited."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron.workload.errors import BadRowsError, TraceFormatError, UnknownTraceError, WorkloadSettingError
from chiron.workload.load import PACKAGED, load_lengths, load_trace
from chiron.workload.readers import read_lengths, read_trace
from chiron.workload.types import Trace
from chiron.workload.writers import write_trace

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.2299600,3180,8
2023-11-16 18:17:05.9799600,110,27
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,4808,10
2024-05-10 00:00:00.259930+00:00,3180,8
2024-05-10 00:00:02.009930+00:00,110,27
"""
OFFSETS = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 02:00:00.009930+02:00,4808,10
2024-05-10 00:00:00.259930Z,3180,8
2024-05-09 19:00:02.009930-05:00,110,27
"""
BURSTGPT_6 = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,4808,10,4818,Conversation log
5.25,GPT-4,3180,8,3188,API log
7,ChatGPT,110,27,137,Conversation log
"""
BURSTGPT_8 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,a,1.5,ChatGPT,4808,10,4818,Conversation log
5.25,b,2,GPT-4,3180,8,3188,"API log, new"
7,c,9,ChatGPT,110,27,137,Conversation log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 4808, "output_length": 10, "hash_ids": [0, 1]}
{"timestamp": 250, "input_length": 3180, "output_length": 8, "hash_ids": [0]}
{"timestamp": 2000, "input_length": 110, "output_length": 27, "hash_ids": []}
"""
PLAIN_CSV = "input_tokens;output_tokens;arrival_s\n4808;10;0\n3180;8;0.25\n110;27;2\n"
PLAIN_EPOCH = "timestamp,prompt_tokens,completion_tokens\n1.7e9,4808,10\n1700000000.25,3180,8\n1700000002,110,27\n"
PLAIN_JSONL = """{"timestamp": "2024-05-10T00:00:00", "prompt_tokens": 4808, "completion_tokens": 10}

{"timestamp": "2024-05-10T00:00:00.25", "prompt_tokens": 3180, "completion_tokens": 8}
{"timestamp": "2024-05-10T00:00:02", "prompt_tokens": 110, "completion_tokens": 27}
"""


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("azure", AZURE_2023),
        ("azure", AZURE_2024),
        ("azure", OFFSETS),
        ("burstgpt", BURSTGPT_6),
        ("burstgpt", BURSTGPT_8),
        ("mooncake", MOONCAKE),
        ("plain", PLAIN_CSV),
        ("plain", PLAIN_EPOCH),
        ("plain", PLAIN_JSONL),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_each_format_is_recognised_and_read(tmp_path: Path, format: str, text: str, compressed: bool) -> None:
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if compressed else b"\xef\xbb\xbf" + text.encode())
    for asked in ("auto", format):
        trace = read_trace(path, format=asked)
        assert trace.arrival_s == pytest.approx([0, 0.25, 2], abs=1e-6)
        assert trace.input_tokens.tolist() == [4808, 3180, 110]
        assert trace.output_tokens.tolist() == [10, 8, 27]
        assert trace.source == f"trace ({format})"
        assert not trace.bad_rows


def test_parquet_reads_like_csv_and_names_its_bad_rows(tmp_path: Path) -> None:
    times = np.array(["2024-05-10T00:00:02", "2024-05-10", "NaT", "2024-05-10T00:00:00.25"], dtype="datetime64[us]")
    table = pa.table({"TIMESTAMP": times, "ContextTokens": [110, 4808, 5, 3180], "GeneratedTokens": [27, 10, 5, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    trace = read_trace(tmp_path / "a.parquet", bad_rows_max=0.5)
    assert trace.arrival_s.tolist() == [0, 2]
    assert trace.input_tokens.tolist() == [4808, 110]
    assert [row.line for row in trace.bad_rows] == [3, 4]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"arrival_s": [0.0]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(TraceFormatError, match=r"pip install 'chiron-serving\[parquet\]'"):
        read_trace(tmp_path / "a.parquet")


def test_loading_a_packaged_trace_imports_neither_pyarrow_nor_matplotlib() -> None:
    code = (
        "import sys; from chiron.workload.load import load_trace; import chiron.workload.plot;"
        "load_trace('azure-2023-code');"
        "print(sorted({'pyarrow', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


BAD_CSV = """arrival_s,input_tokens,output_tokens
3,10,20
x,10,20
1,0,20
2,10,-3
inf,1,1
-1,1,1
1

2.5,1.5,1
2e9,1,1
1,99999999999,1
1,nan,1
0.5,7,8
"""


def test_bad_rows_are_kept_with_their_lines_and_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(BAD_CSV)
    trace = read_trace(tmp_path / "a.csv", bad_rows_max=0.9)
    assert trace.arrival_s.tolist() == [0.5, 3]  # Sorted, and arrival_s is not shifted.
    assert [row.line for row in trace.bad_rows] == [3, 4, 5, 6, 7, 8, 10, 11, 12, 13]
    assert trace.bad_rows[1].why == "input_tokens is '0', not a whole number from 1 to 10,000,000"
    assert trace.bad_rows[2].why.startswith("output_tokens is '-3'")
    assert trace.bad_rows[0].why.startswith("arrival_s is 'x', not a number of 0 or more")


def test_a_json_line_that_is_no_object_spoils_only_itself(tmp_path: Path) -> None:
    lines = [f'{{"timestamp": {i}, "input_length": 1, "output_length": 1}}' for i in range(5)]
    lines[2:3] = ["{broken", "[1, 2]", '"text"', '{"timestamp": null, "input_length": 1, "output_length": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    trace = read_trace(tmp_path / "a.jsonl", bad_rows_max=0.5)
    assert len(trace) == 4
    assert [row.line for row in trace.bad_rows] == [3, 4, 5, 6]


def test_zero_tokens_of_burstgpt_count_against_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    path.write_text(header + "".join(f"{i},m,5,{0 if i < 6 else 5},5,log\n" for i in range(100)))
    with pytest.raises(BadRowsError, match=r"6 of 100 rows are bad \(6.0%; at most 5.0% is allowed\): line 2: Resp"):
        read_trace(path)
    assert len(read_trace(path, bad_rows_max=0.06)) == 94


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"a,b\n1,2\n", "the columns are 'a', 'b'; expected azure"),
        (b"arrival_s,input_tokens,output_tokens\n", "has no rows"),
        (b"arrival_s,input_tokens,output_tokens\n1,0,0\n", "1 of 1 rows are bad"),
        (b"[1, 2]\n", "a JSON list; expected one object per line"),
        (b'{"timestamp": 1,\n', "line 1: not a JSON object"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "binary"),
        (b"PAR1 but not really", "not a readable Parquet file"),
        (gzip.compress(b"arrival_s,input_tokens,output_tokens\n" + b"1,2,3\n" * 100, mtime=0)[:-9], "line"),
        (b"PK\x03\x04rubbish", "zip archive"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "thing"
    path.write_bytes(content)
    with pytest.raises((TraceFormatError, BadRowsError), match="thing") as error:
        read_trace(path, bad_rows_max=1.0)
    assert says in str(error.value)


def test_format_and_limit_are_checked(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(PLAIN_CSV)
    with pytest.raises(TraceFormatError, match="'csv' is unknown; it must be one of auto, azure"):
        read_trace(tmp_path / "a.csv", format="csv")
    with pytest.raises(TraceFormatError, match="expected burstgpt"):
        read_trace(tmp_path / "a.csv", format="burstgpt")
    with pytest.raises(WorkloadSettingError, match=r"bad_rows_max is 5; it must be a fraction"):
        read_trace(tmp_path / "a.csv", bad_rows_max=5)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.csv.gz"])
@given(
    rows=st.lists(
        st.tuples(st.floats(0, 1e8), st.integers(1, 10_000_000), st.integers(1, 10_000_000)), min_size=1, max_size=20
    )
)
def test_what_is_written_reads_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, name: str, rows: list[tuple[float, int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    rows.sort(key=lambda row: row[0])
    trace = Trace(
        arrival_s=np.array([row[0] for row in rows]),
        input_tokens=np.array([row[1] for row in rows]),
        output_tokens=np.array([row[2] for row in rows]),
        source="made",
    )
    write_trace(trace, path)
    back = read_trace(path)
    assert back.arrival_s.tolist() == trace.arrival_s.tolist()
    assert back.input_tokens.tolist() == trace.input_tokens.tolist()
    assert back.output_tokens.tolist() == trace.output_tokens.tolist()


def test_mooncake_output_has_whole_milliseconds_and_no_hash_ids(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(PLAIN_CSV)
    write_trace(read_trace(tmp_path / "a.csv"), tmp_path / "a.jsonl", format="mooncake")
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert records[1] == {"timestamp": 250, "input_length": 3180, "output_length": 8}
    assert read_trace(tmp_path / "a.jsonl").arrival_s.tolist() == [0, 0.25, 2]


def test_lengths_need_no_arrivals(tmp_path: Path) -> None:
    (tmp_path / "lengths.csv").write_text("input_tokens,output_tokens\n5,6\n7,8\n")
    lengths = read_lengths(tmp_path / "lengths.csv")
    assert lengths.input_tokens.tolist() == [5, 7]
    with pytest.raises(TraceFormatError, match="expected azure"):
        read_trace(tmp_path / "lengths.csv")


# Published figures of the packaged traces, from their authors' files.
@pytest.mark.parametrize(
    ("name", "requests", "span_s", "mean_input", "mean_output"),
    [
        ("azure-2023-conv", 19_366, 3501.7, 1154.7, 211.1),
        ("azure-2023-code", 8_819, 3435.9, 2047.8, 27.9),
        ("mooncake-conversation", 12_031, 3537.0, 12_035.1, 342.6),
    ],
)
def test_packaged_traces_are_whole(
    name: str, requests: int, span_s: float, mean_input: float, mean_output: float
) -> None:
    trace = load_trace(name)
    assert len(trace) == requests
    assert not trace.bad_rows
    assert trace.arrival_s[-1] == pytest.approx(span_s, abs=0.1)
    assert trace.input_tokens.mean() == pytest.approx(mean_input, abs=0.1)
    assert trace.output_tokens.mean() == pytest.approx(mean_output, abs=0.1)
    assert name in trace.source


def test_packaged_lengths_are_whole() -> None:
    assert len(load_lengths("sharegpt-300").input_tokens) == 300
    assert len(load_lengths("arxiv-summarization").input_tokens) == 28_257
    assert len(load_lengths("azure-2023-code").input_tokens) == 8_819


def test_an_unknown_name_lists_the_names_and_the_closest() -> None:
    with pytest.raises(UnknownTraceError, match="did you mean azure-2023-conv") as error:
        load_trace("azure-2023-con")
    assert all(name in str(error.value) for name in PACKAGED)


def test_a_set_of_lengths_is_no_trace() -> None:
    with pytest.raises(WorkloadSettingError, match="without arrivals"):
        load_trace("sharegpt-300")


def test_loading_slices_and_scales() -> None:
    trace = load_trace("azure-2023-conv", start_s=600, duration_s=600, rate_scale=2)
    whole = load_trace("azure-2023-conv")
    expected = 2 * ((whole.arrival_s >= 600) & (whole.arrival_s < 1200)).sum()
    assert len(trace) == expected
    assert 0 <= trace.arrival_s[0] < 5
    assert trace.arrival_s[-1] < 600
    assert "rate x 2" in trace.source
