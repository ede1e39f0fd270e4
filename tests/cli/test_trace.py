"""`chiron trace` from the shell's side: what it prints, what it writes, how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from chiron.cli import app
from chiron.workload.load import PACKAGED, load_trace
from chiron.workload.readers import read_trace


def chiron(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["trace", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: object) -> str:
    result = chiron(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def test_list_names_every_trace_with_its_licence() -> None:
    output = chiron("list").stdout
    assert all(name in output for name in PACKAGED)
    assert "CC-BY-4.0" in output


def test_help_shows_examples() -> None:
    for command in (["--help"], ["inspect", "--help"], ["convert", "--help"], ["plot", "--help"], ["generate"]):
        result = CliRunner().invoke(app, ["trace", *command])
        assert "chiron trace " in result.output


def test_inspect_tells_rates_burstiness_lengths_and_source() -> None:
    output = chiron("inspect", "azure-2023-conv").stdout
    for fact in ("19,366 over 58.4 minutes", "5.53 requests/s", "CV 1.09", "CC-BY-4.0", "14,050"):
        assert fact in output
    assert "60 s" in output


def test_inspect_takes_a_slice_at_another_rate() -> None:
    output = chiron("inspect", "azure-2023-conv", "--start", "10m", "--duration", "5m", "--scale", "2").stdout
    expected = load_trace("azure-2023-conv", start_s=600, duration_s=300, rate_scale=2)
    assert f"{len(expected):,} over 5.0 minutes" in output


def test_inspect_of_a_client_model_and_of_lengths() -> None:
    output = chiron("inspect", "servegen-m-small", "--scale", "0.01").stdout
    assert "over 10.0 minutes" in output
    assert "without published lengths" in " ".join(output.split())
    assert "300, without arrivals" in chiron("inspect", "sharegpt-300").stdout
    assert "no arrivals" in refused("inspect", "sharegpt-300", "--duration", "5m")


def test_inspect_shows_bad_rows_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = "".join(f"{i},5,5\n" for i in range(40))
    path.write_text(f"arrival_s,input_tokens,output_tokens\n{rows}[bold],0,5\n")
    output = chiron("inspect", path).stdout
    assert "1 left out" in output
    assert "42    arrival_s is '[bold]'" in output
    assert "1 of 41 rows are bad" in refused("inspect", path, "--bad-rows-max", "0")


def test_convert_writes_what_it_says(tmp_path: Path) -> None:
    out = tmp_path / "day.jsonl"
    result = chiron("convert", "azure-2023-code", out, "--format", "mooncake", "--duration", "10m")
    assert result.stdout == ""
    records = [json.loads(line) for line in out.read_text().splitlines()]
    expected = load_trace("azure-2023-code", duration_s=600)
    assert f"{len(expected):,} requests" in result.stderr
    assert [record["input_length"] for record in records] == expected.input_tokens.tolist()
    again = tmp_path / "again.csv.gz"
    chiron("convert", out, again, "--from", "mooncake")
    assert read_trace(again).output_tokens.tolist() == expected.output_tokens.tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        ("poisson", "--rate", "3"),
        ("gamma", "--rate", "3", "--cv", "2"),
        ("spikes", "--rate", "3", "--factor", "4"),
        ("diurnal", "--rate", "3", "--noise", "0.2"),
        ("closed-loop", "--users", "60", "--think", "15s", "--response", "5s"),
    ],
)
def test_generate_writes_the_same_trace_for_the_same_seed(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    kind, *options = arguments
    lengths = ("--input", "mean=500,cv=1", "--output", "100")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        chiron("generate", kind, tmp_path / f"{name}.csv.gz", *options, "--duration", "10m", *lengths, "--seed", seed)
    a, b, c = ((tmp_path / f"{name}.csv.gz").read_bytes() for name in "abc")
    assert a == b != c
    trace = read_trace(tmp_path / "a.csv.gz")
    assert 600 < len(trace) < 4000
    assert set(trace.output_tokens) == {100}


def test_generate_draws_lengths_from_a_trace(tmp_path: Path) -> None:
    chiron("generate", "poisson", tmp_path / "a.csv", "--rate", "5", "--lengths", "azure-2023-code")
    assert set(read_trace(tmp_path / "a.csv").input_tokens) <= set(load_trace("azure-2023-code").input_tokens)


@pytest.mark.parametrize("name", ["a.png", pytest.param("a.svg", marks=pytest.mark.slow)])
def test_plot_draws_a_picture(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # matplotlib warns of a search for a place that takes a second, be it only because the machine is slow.
    monkeypatch.setattr("matplotlib.legend.Legend._find_best_position", lambda *_: pytest.fail("a legend has no place"))
    chiron("plot", "azure-2023-code", "-o", tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith((b"\x89PNG", b"<?xml"))
    assert len(content) > 20_000


@pytest.mark.parametrize(
    "rows", ["0,1,1\n", *(pytest.param(rows, marks=pytest.mark.slow) for rows in ("1,2,3\n1,2,3\n", "1,2,3\n"))]
)
def test_plot_and_inspect_take_the_smallest_traces(tmp_path: Path, rows: str) -> None:
    (tmp_path / "a.csv").write_text(f"arrival_s,input_tokens,output_tokens\n{rows}")
    chiron("plot", tmp_path / "a.csv", "-o", tmp_path / "a.png")
    chiron("inspect", tmp_path / "a.csv")


def test_refusals_name_the_value_and_what_is_allowed(tmp_path: Path) -> None:
    out = tmp_path / "x.csv"
    assert "did you mean azure-2023-conv?" in refused("inspect", "azure-2023-con")
    assert "'5x': expected a number of seconds" in refused("inspect", "azure-2023-conv", "--duration", "5x")
    assert "no request there; the trace covers 0 s" in refused("inspect", "azure-2023-conv", "--start", "2h")
    assert "rate scale is -1.0" in refused("inspect", "azure-2023-conv", "--scale", "-1")
    assert "must end in .csv or .jsonl" in refused("convert", "azure-2023-conv", tmp_path / "x.foo")
    assert "give a duration" in refused("convert", "servegen-m-small", out)
    assert "without arrivals" in refused("convert", "sharegpt-300", out)
    assert "No such file or directory" in refused("convert", "azure-2023-conv", tmp_path / "no" / "x.csv")
    assert "rate is 0.0" in refused("generate", "poisson", out, "--rate", "0")
    assert "--output is missing" in refused("generate", "poisson", out, "--rate", "1", "--input", "5")
    assert "must end in .png" in refused("plot", "azure-2023-conv", "-o", tmp_path / "x.gif")
    assert "format 'zzz' is unknown" in refused("inspect", "azure-2023-conv", "--from", "zzz")
    assert not out.exists()


def test_a_file_is_not_converted_onto_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n1,2,3\n")
    assert "OUT is the source itself" in refused("convert", path, path)
    assert path.read_text().endswith("1,2,3\n")
