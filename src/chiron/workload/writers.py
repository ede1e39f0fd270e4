"""Traces to files.

``csv`` and ``jsonl`` have the columns arrival_s, input_tokens, output_tokens and read back exactly. ``mooncake`` has
timestamp (whole milliseconds), input_length, output_length; it carries no ``hash_ids``, since a trace here does not
know which requests share a prefix. A name that ends in .gz is compressed.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

from chiron.workload.errors import TraceFormatError
from chiron.workload.types import Trace


def write_trace(trace: Trace, path: str | Path, *, format: str = "auto") -> None:
    """``format`` auto goes by the name: .csv or .jsonl, with or without .gz. Raises TraceFormatError, OSError."""
    path = Path(path)
    lines = WRITERS[_format(path, format)](trace)
    if path.suffix == ".gz":
        # The name and the time of writing stay out, so that equal traces make equal files.
        with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            packed.writelines(line.encode() for line in lines)
        return
    with path.open("w", encoding="utf-8", newline="") as text:
        text.writelines(lines)


def _format(path: Path, format: str) -> str:
    if format == "auto":
        format = path.name.removesuffix(".gz").rpartition(".")[2].lower()
        if format not in WRITERS:
            raise TraceFormatError(f"{path}: the name must end in .csv or .jsonl (or .gz after it), or give a format")
    if format not in WRITERS:
        raise TraceFormatError(f"format {format!r} cannot be written; it must be one of {', '.join(WRITERS)}")
    return format


def _csv(trace: Trace) -> Iterator[str]:
    yield "arrival_s,input_tokens,output_tokens\n"
    for arrival_s, prompt, output in _rows(trace):
        yield f"{arrival_s!r},{prompt},{output}\n"


def _jsonl(trace: Trace) -> Iterator[str]:
    for arrival_s, prompt, output in _rows(trace):
        yield f'{{"arrival_s": {arrival_s!r}, "input_tokens": {prompt}, "output_tokens": {output}}}\n'


def _mooncake(trace: Trace) -> Iterator[str]:
    for arrival_s, prompt, output in _rows(trace):
        yield f'{{"timestamp": {round(arrival_s * 1000)}, "input_length": {prompt}, "output_length": {output}}}\n'


def _rows(trace: Trace) -> Iterator[tuple[float, int, int]]:
    return zip(trace.arrival_s.tolist(), trace.input_tokens.tolist(), trace.output_tokens.tolist(), strict=True)


WRITERS: dict[str, Callable[[Trace], Iterator[str]]] = {"csv": _csv, "jsonl": _jsonl, "mooncake": _mooncake}
