"""Traces from files.

A *format* is a set of column names with the unit of the time column; a *container* is CSV, JSON lines or Parquet,
optionally gzipped (text only). The two are independent, and both are recognised from the first bytes and the
header or first record.

| format     | arrival                              | prompt                | output                |
|------------|--------------------------------------|-----------------------|-----------------------|
| azure      | TIMESTAMP (date and time)            | ContextTokens         | GeneratedTokens       |
| burstgpt   | Timestamp (s)                        | Request tokens        | Response tokens       |
| mooncake   | timestamp (ms)                       | input_length          | output_length         |
| plain      | arrival_s, arrival_ms, arrival_ns, timestamp | input_tokens  | output_tokens         |

Azure covers the 2023 and 2024 releases, BurstGPT the releases with 6 and with 8 columns. ``plain`` also takes
``prompt_tokens`` and ``completion_tokens``; its ``timestamp`` is seconds or a date and time. Names match without
regard to case. Times named ``arrival_*`` count from the start of the trace and are kept; all others are shifted so
that the earliest row is at 0.
"""

from __future__ import annotations

import csv
import gzip
import json
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from chiron.workload.errors import BadRowsError, TraceFormatError, WorkloadSettingError
from chiron.workload.lengths import EmpiricalLengths
from chiron.workload.types import BadRow, Floats, Ints, Trace

BAD_ROWS_MAX = 0.05
"""Fraction of unusable rows above which a file is refused: more looks like a misread file than like noise."""

_CHUNK_ROWS = 2_048
"""Small on purpose: at 65,536 the rows of a chunk fall out of the cache and reading takes three times as long."""
_BATCH_ROWS = 65_536
"""The same for Parquet, whose columns are arrays already."""
_TOKENS_MAX = 10_000_000
_FROM_START_MAX_S = 1e9
"""30 years after the start is an epoch time under the wrong name."""
_BAD_ROWS_SHOWN = 5

_Unit = float | Literal["datetime", "either"]
_Times = npt.NDArray[Any]
"""Seconds (float64) or moments (datetime64[ns])."""
_Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Column names, the first that a file has counts. Units: seconds per tick, or how a date and time is told."""

    arrival: Mapping[str, _Unit]
    input: tuple[str, ...]
    output: tuple[str, ...]


FORMATS: dict[str, Format] = {
    "azure": Format(arrival={"TIMESTAMP": "datetime"}, input=("ContextTokens",), output=("GeneratedTokens",)),
    "burstgpt": Format(arrival={"Timestamp": 1.0}, input=("Request tokens",), output=("Response tokens",)),
    "mooncake": Format(arrival={"timestamp": 1e-3}, input=("input_length",), output=("output_length",)),
    "plain": Format(
        arrival={"arrival_s": 1.0, "arrival_ms": 1e-3, "arrival_ns": 1e-9, "timestamp": "either"},
        input=("input_tokens", "prompt_tokens"),
        output=("output_tokens", "completion_tokens"),
    ),
}

_BROKEN = (OSError, EOFError, zlib.error)
"""What a damaged or truncated (gzip) file raises while it is read."""

_Container = Literal["csv", "jsonl", "parquet"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where a given file keeps what."""

    path: Path
    format: str
    container: _Container
    delimiter: str
    columns: tuple[str, ...]
    """Names of the arrival, prompt and output columns as the file spells them; no arrival in a file of lengths."""
    unit: _Unit
    from_start: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    lines: Sequence[int]
    columns: tuple[Sequence[Any], ...]


def read_trace(path: str | Path, *, format: str = "auto", bad_rows_max: float = BAD_ROWS_MAX) -> Trace:
    """The trace in ``path``, sorted by arrival.

    Rows with a missing, negative or non-finite value, or with no token, are kept aside as ``bad_rows``. Raises
    TraceFormatError, BadRowsError (more than ``bad_rows_max`` of all rows are bad), OSError.
    """
    layout = _layout(Path(path), format, arrivals=True)
    return _collect(layout, bad_rows_max)


def read_lengths(path: str | Path, *, format: str = "auto", bad_rows_max: float = BAD_ROWS_MAX) -> EmpiricalLengths:
    """The lengths in ``path``: a trace, or the same columns without an arrival column."""
    layout = _layout(Path(path), format, arrivals=False)
    trace = _collect(layout, bad_rows_max)
    return EmpiricalLengths(input_tokens=trace.input_tokens, output_tokens=trace.output_tokens, source=trace.source)


# What is in the file ------------------------------------------------------------------------------------------


def _layout(path: Path, format: str, *, arrivals: bool) -> _Layout:
    if format not in ("auto", *FORMATS):
        raise TraceFormatError(f"format {format!r} is unknown; it must be one of auto, {', '.join(FORMATS)}")
    container, delimiter, record = _head(path)
    spelled = {name.strip().casefold(): name for name in record}
    for name in FORMATS if format == "auto" else (format,):
        wanted = FORMATS[name]
        prompt, output = _first(wanted.input, spelled), _first(wanted.output, spelled)
        arrival = _first(tuple(wanted.arrival), spelled) if arrivals else None
        if prompt is None or output is None or (arrivals and arrival is None):
            continue
        lengths = (spelled[prompt.casefold()], spelled[output.casefold()])
        unit: _Unit = 1.0
        if arrival is not None:
            unit = _settled(wanted.arrival[arrival], record[spelled[arrival.casefold()]])
        return _Layout(
            path=path,
            format=name,
            container=container,
            delimiter=delimiter,
            columns=lengths if arrival is None else (spelled[arrival.casefold()], *lengths),
            unit=unit,
            from_start=arrival is None or arrival.startswith("arrival_"),
        )
    raise TraceFormatError(
        f"{path}: the columns are {', '.join(map(repr, list(record)[:12])) or 'missing'}; "
        f"expected {_expected(format, arrivals)}"
    )


def _first(names: Sequence[str], spelled: Mapping[str, str]) -> str | None:
    return next((name for name in names if name.casefold() in spelled), None)


def _settled(unit: _Unit, value: object) -> _Unit:
    """A column that may hold seconds or dates: the first record decides."""
    if unit != "either":
        return unit
    if isinstance(value, datetime | np.datetime64):
        return "datetime"
    try:
        float(str(value))
    except ValueError:
        return "datetime"
    return 1.0


def _expected(format: str, arrivals: bool) -> str:
    rows = []
    for name in FORMATS if format == "auto" else (format,):
        wanted = FORMATS[name]
        parts = ["|".join(wanted.arrival)] if arrivals else []
        parts += ["|".join(wanted.input), "|".join(wanted.output)]
        rows.append(f"{name} ({', '.join(parts)})")
    return " or ".join(rows)


def _head(path: Path) -> tuple[_Container, str, dict[str, object]]:
    """Container, delimiter and the first record (CSV: header names with the first row's values)."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        return "parquet", "", _parquet_head(path)
    if magic[:2] == b"PK":
        raise TraceFormatError(f"{path} is a zip archive; expected CSV, JSON lines or Parquet")
    with _open_text(path) as text:
        try:
            lines = [line for line in islice(text, 100) if line.strip()][:2]
        except _BROKEN as error:
            raise TraceFormatError(f"{path}: {error}") from error
    if not lines:
        raise TraceFormatError(f"{path} is empty; expected a header or a first record")
    if "\0" in lines[0] or "\ufffd" in lines[0]:
        raise TraceFormatError(f"{path} is a binary file; expected CSV, JSON lines or Parquet")
    if lines[0].lstrip().startswith(("{", "[")):
        return "jsonl", "", _jsonl_head(path, lines[0])
    delimiter = max(",;\t", key=lines[0].count)
    rows = list(csv.reader(lines, delimiter=delimiter))
    values = rows[1] if len(rows) > 1 else []
    return "csv", delimiter, {name: values[i] if i < len(values) else "" for i, name in enumerate(rows[0])}


def _jsonl_head(path: Path, line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TraceFormatError(f"{path}, line 1: not a JSON object on one line ({error})") from error
    if not isinstance(record, dict):
        raise TraceFormatError(f"{path}, line 1: a JSON {type(record).__name__}; expected one object per line")
    return record


def _parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise TraceFormatError("reading Parquet needs pyarrow: pip install 'chiron-serving[parquet]'") from error
    return parquet


def _parquet_head(path: Path) -> dict[str, object]:
    parquet = _parquet()
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            first = next(iter(file.iter_batches(batch_size=1)), None)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these.
        raise TraceFormatError(f"{path} is not a readable Parquet file: {error}") from error
    row = first.to_pylist()[0] if first is not None and first.num_rows else {}
    return {name: row.get(name) for name in names}


def _open_text(path: Path) -> IO[str]:
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    # A byte that is not UTF-8 spoils its own row, not the file; a byte-order mark is no part of a name.
    if gzipped:
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="replace", newline="")
    return path.open("r", encoding="utf-8-sig", errors="replace", newline="")


# Rows, a chunk at a time --------------------------------------------------------------------------------------


def _chunks(layout: _Layout) -> Iterator[_Chunk]:
    return {"csv": _csv_chunks, "jsonl": _jsonl_chunks, "parquet": _parquet_chunks}[layout.container](layout)


def _csv_chunks(layout: _Layout) -> Iterator[_Chunk]:
    with _open_text(layout.path) as text:
        reader = csv.reader(text, delimiter=layout.delimiter)
        try:
            header = next(row for row in reader if row)
            places = [header.index(name) for name in layout.columns]
            while numbered := [(reader.line_num, row) for row in islice(reader, _CHUNK_ROWS)]:
                rows = [row for _, row in numbered if row]
                lines = [line for line, row in numbered if row]
                yield _Chunk(lines=lines, columns=tuple(_cells(rows, place) for place in places))
        except (csv.Error, *_BROKEN) as error:
            raise TraceFormatError(f"{layout.path}, line {reader.line_num}: {error}") from error


def _cells(rows: list[list[str]], place: int) -> list[str]:
    try:
        return [row[place] for row in rows]
    except IndexError:
        return [row[place] if place < len(row) else "" for row in rows]


def _jsonl_chunks(layout: _Layout) -> Iterator[_Chunk]:
    with _open_text(layout.path) as text:
        numbered = enumerate(text, start=1)
        try:
            while chunk := list(islice(numbered, _CHUNK_ROWS)):
                kept = [(number, line) for number, line in chunk if not line.isspace()]
                records = _records([line for _, line in kept])
                yield _Chunk(
                    lines=[number for number, _ in kept],
                    columns=tuple([record.get(name) for record in records] for name in layout.columns),
                )
        except _BROKEN as error:
            raise TraceFormatError(f"{layout.path}: {error}") from error


def _records(lines: list[str]) -> list[dict[str, Any]]:
    """One record per line; an empty one for a line that is no JSON object."""
    try:
        # One call for many lines costs half of many calls.
        records: list[Any] = json.loads(f"[{','.join(lines)}]")
        if len(records) == len(lines) and all(isinstance(record, dict) for record in records):
            return records
    except ValueError:
        pass
    return [_record(line) for line in lines]


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _parquet_chunks(layout: _Layout) -> Iterator[_Chunk]:
    row = 1
    with _parquet().ParquetFile(layout.path) as file:
        try:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(layout.columns)):
                columns = tuple(batch.column(name).to_numpy(zero_copy_only=False) for name in layout.columns)
                yield _Chunk(lines=range(row, row + batch.num_rows), columns=columns)
                row += batch.num_rows
        except (OSError, ValueError) as error:
            raise TraceFormatError(f"{layout.path}, row {row} or later: {error}") from error


# From cells to a trace ----------------------------------------------------------------------------------------


def _collect(layout: _Layout, bad_rows_max: float) -> Trace:
    if not 0 <= bad_rows_max <= 1:
        raise WorkloadSettingError(f"bad_rows_max is {bad_rows_max!r}; it must be a fraction from 0 to 1")
    parts: list[tuple[_Times, Ints, Ints]] = []
    bad: list[BadRow] = []
    rows = 0
    for chunk in _chunks(layout):
        cells = chunk.columns if len(chunk.columns) == 3 else ([0.0] * len(chunk.lines), *chunk.columns)
        times = _times(cells[0], layout.unit)
        prompt, output = _numbers(cells[1]), _numbers(cells[2])
        good = _good_times(times, layout.from_start) & _good_tokens(prompt) & _good_tokens(output)
        parts.append((times[good], prompt[good].astype(np.int64), output[good].astype(np.int64)))
        bad += [
            BadRow(line=chunk.lines[i], why=_why(layout, chunk, i, times, prompt))
            for i in np.flatnonzero(~good).tolist()
        ]
        rows += len(good)
    _refuse(layout, bad, rows, bad_rows_max)
    arrival_s = _seconds(np.concatenate([part[0] for part in parts]), layout.from_start)
    order = np.argsort(arrival_s, kind="stable")
    return Trace(
        arrival_s=arrival_s[order],
        input_tokens=np.concatenate([part[1] for part in parts])[order],
        output_tokens=np.concatenate([part[2] for part in parts])[order],
        source=f"{layout.path.name} ({layout.format})",
        bad_rows=tuple(bad),
    )


def _refuse(layout: _Layout, bad: list[BadRow], rows: int, bad_rows_max: float) -> None:
    if rows == 0:
        raise BadRowsError(f"{layout.path} has no rows")
    if rows > len(bad) and len(bad) <= bad_rows_max * rows:
        return
    shown = "; ".join(f"line {row.line}: {row.why}" for row in bad[:_BAD_ROWS_SHOWN])
    more = f"; and {len(bad) - _BAD_ROWS_SHOWN} more" if len(bad) > _BAD_ROWS_SHOWN else ""
    raise BadRowsError(
        f"{layout.path}: {len(bad)} of {rows} rows are bad ({len(bad) / rows:.1%}; at most {bad_rows_max:.1%} "
        f"is allowed): {shown}{more}"
    )


def _times(cells: Sequence[Any], unit: _Unit) -> _Times:
    if isinstance(unit, float):
        return _numbers(cells) * unit
    try:
        with warnings.catch_warnings():
            # numpy warns of any UTC offset; the slower way below reads offsets properly.
            warnings.simplefilter("error")
            if isinstance(cells, list):
                cells = [str(cell).removesuffix("+00:00").removesuffix("Z") for cell in cells]
            return np.asarray(cells, dtype="datetime64[ns]")
    except (ValueError, TypeError, Warning):
        return np.array([_time(cell) for cell in cells], dtype="datetime64[ns]")


def _time(cell: object) -> np.datetime64:
    try:
        moment = datetime.fromisoformat(str(cell).strip())
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC).replace(tzinfo=None)
        return np.datetime64(moment, "ns")
    except (ValueError, OverflowError):
        return np.datetime64("NaT", "ns")


def _numbers(cells: Sequence[Any]) -> Floats:
    """Cells as floats; nan where a cell is no number."""
    try:
        return np.asarray(cells, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return np.array([_number(cell) for cell in cells], dtype=np.float64)


def _number(cell: object) -> float:
    try:
        return float(cell)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        return float("nan")


def _good_times(times: _Times, from_start: bool) -> _Flags:
    if times.dtype.kind == "M":
        return np.asarray(~np.isnat(times))
    return np.asarray((times >= 0) & (times < (_FROM_START_MAX_S if from_start else np.inf)))


def _good_tokens(tokens: Floats) -> _Flags:
    return np.asarray((tokens >= 1) & (tokens <= _TOKENS_MAX) & (np.floor(tokens) == tokens))


def _seconds(times: _Times, from_start: bool) -> Floats:
    if times.dtype.kind == "M":
        # Differences of whole nanoseconds first: a float of epoch seconds would lose the last digits.
        return np.asarray((times - times.min()) / np.timedelta64(1, "s"))
    return times if from_start else np.asarray(times - times.min())


def _why(layout: _Layout, chunk: _Chunk, i: int, times: _Times, prompt: Floats) -> str:
    names, cells = layout.columns, [column[i] for column in chunk.columns]
    if not _good_times(times[i : i + 1], layout.from_start)[0]:
        limit = f" below {_FROM_START_MAX_S:g} (seconds from the start)" if layout.from_start else ""
        wanted = "a date and time" if layout.unit == "datetime" else f"a number of 0 or more{limit}"
        return f"{names[0]} is {_shown(cells[0])}, not {wanted}"
    at = -2 if not _good_tokens(prompt[i : i + 1])[0] else -1
    return f"{names[at]} is {_shown(cells[at])}, not a whole number from 1 to {_TOKENS_MAX:,}"


def _shown(cell: object) -> str:
    text = repr(cell.item() if isinstance(cell, np.generic) else cell)
    return text if len(text) <= 40 else text[:37] + "..."
