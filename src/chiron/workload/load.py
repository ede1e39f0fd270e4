"""Traces and lengths by name or path: one way in for scenario files and the command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from hashlib import sha256
from importlib.resources import files
from math import inf, isinf
from pathlib import Path
from typing import Literal

import numpy as np

from chiron.workload.errors import TraceFormatError, UnknownTraceError, WorkloadSettingError
from chiron.workload.lengths import EmpiricalLengths, lengths_of
from chiron.workload.readers import BAD_ROWS_MAX, FORMATS, read_lengths, read_trace
from chiron.workload.servegen import is_servegen, read_servegen, synthesise
from chiron.workload.transform import scale_rate, slice_trace
from chiron.workload.types import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Packaged:
    file: str
    kind: Literal["trace", "clients", "lengths"]
    """``clients`` are synthesised (ServeGen) and need a duration; ``lengths`` have no arrivals."""
    about: str
    origin: str
    """Where it comes from and its licence."""


_SERVEGEN = "github.com/alibaba/ServeGen, Apache-2.0; lengths thinned to tables of bin means"
_AZURE = "Azure LLM inference trace 2023, github.com/Azure/AzurePublicDataset, CC-BY-4.0 (Patel et al., ISCA 2024)"

PACKAGED: dict[str, Packaged] = {
    "azure-2023-conv": Packaged(
        file="azure-2023-conv.csv.gz", kind="trace", about="conversation, 58 minutes, 19,366 requests", origin=_AZURE
    ),
    "azure-2023-code": Packaged(
        file="azure-2023-code.csv.gz", kind="trace", about="code completion, 57 minutes, 8,819 requests", origin=_AZURE
    ),
    "mooncake-conversation": Packaged(
        file="mooncake-conversation.jsonl.gz",
        kind="trace",
        about="long-context conversation, 59 minutes, 12,031 requests in steps of 3 s",
        origin="Mooncake FAST'25 release, github.com/kvcache-ai/Mooncake, Apache-2.0; hash_ids left out",
    ),
    "servegen-m-small": Packaged(
        file="servegen-m-small.npz",
        kind="clients",
        about="43 clients of a small model, 14 days, mean 1,174 requests/s",
        origin=_SERVEGEN,
    ),
    "servegen-m-mid": Packaged(
        file="servegen-m-mid.npz",
        kind="clients",
        about="109 clients of a mid-size model, 14 days, mean 1,790 requests/s",
        origin=_SERVEGEN,
    ),
    "sharegpt-300": Packaged(
        file="sharegpt-300.csv.gz",
        kind="lengths",
        about="300 ShareGPT turns, Llama 3.1 tokens",
        origin="github.com/casys-kaist/LLMServingSim, MIT; token counts only",
    ),
    "arxiv-summarization": Packaged(
        file="arxiv-summarization.csv.gz",
        kind="lengths",
        about="28,257 summaries of arXiv papers, Llama 2 tokens",
        origin="github.com/microsoft/vidur, MIT",
    ),
}


def load_trace(
    source: str | Path,
    *,
    format: str = "auto",
    start_s: float = 0.0,
    duration_s: float = inf,
    rate_scale: float = 1.0,
    seed: int = 0,
    bad_rows_max: float = BAD_ROWS_MAX,
) -> Trace:
    """``[start_s, start_s + duration_s)`` of a packaged trace or a file, re-based to 0, its rate scaled.

    ``format`` is one of auto, azure, burstgpt, mooncake, plain, servegen. ServeGen's clients are synthesised at the
    scaled rate; any other trace goes through ``scale_rate``. ``seed`` names the draws of both. Raises
    WorkloadError or OSError.
    """
    path, packaged = _find(source)
    if packaged is not None and packaged.kind == "lengths":
        raise WorkloadSettingError(f"{source!r} is a set of lengths without arrivals; generate arrivals for it")
    if format == "servegen" or (format == "auto" and is_servegen(path)):
        return _synthesised(path, packaged, start_s, duration_s, rate_scale, seed)
    if format not in ("auto", *FORMATS):
        raise TraceFormatError(f"format {format!r} is unknown; it must be one of auto, {', '.join(FORMATS)}, servegen")
    trace = read_trace(path, format=format, bad_rows_max=bad_rows_max)
    if packaged is not None:
        trace = _named(trace, f"{source} ({packaged.origin})")
    if start_s > 0 or not isinf(duration_s):
        trace = slice_trace(trace, start_s=start_s, duration_s=duration_s)
    return trace if rate_scale == 1.0 else scale_rate(trace, rate_scale, seed=seed)


def load_lengths(source: str | Path, *, bad_rows_max: float = BAD_ROWS_MAX) -> EmpiricalLengths:
    """Observed lengths of a packaged set, of a trace, or of a file with or without arrivals."""
    path, packaged = _find(source)
    if is_servegen(path):
        # A day holds every hour once; a thousandth of its requests is still some 100,000.
        return lengths_of(_synthesised(path, packaged, 0.0, 86_400.0, 1e-3, 0))
    lengths = read_lengths(path, bad_rows_max=bad_rows_max)
    if packaged is None:
        return lengths
    return EmpiricalLengths(
        input_tokens=lengths.input_tokens,
        output_tokens=lengths.output_tokens,
        source=f"{source} ({packaged.origin})",
    )


def trace_digest(source: str | Path, *, format: str = "auto") -> str:
    """Of the requests of a whole trace, or of the clients that are synthesised: equal for a copy in another container,
    compressed, or written differently. Raises WorkloadError or OSError."""
    path, _ = _find(source)
    if format == "servegen" or (format == "auto" and is_servegen(path)):
        data = read_servegen(path)
        arrays = [getattr(data, each.name) for each in fields(data) if each.name != "name"]
    else:
        trace = read_trace(path, format=format)
        arrays = [trace.arrival_s, trace.input_tokens, trace.output_tokens]
    digest = sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def is_clients(source: str | Path) -> bool:
    """Whether ``source`` is synthesised, and so needs a duration."""
    return is_servegen(_find(source)[0])


def _find(source: str | Path) -> tuple[Path, Packaged | None]:
    packaged = PACKAGED.get(str(source))
    if packaged is not None:
        # The wheel is installed unpacked, so a resource is a file.
        return Path(str(files("chiron").joinpath("data", "traces", packaged.file))), packaged
    path = Path(source)
    if path.exists():
        return path, None
    close = get_close_matches(str(source), PACKAGED, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UnknownTraceError(
        f"{str(source)!r} is neither a file nor a packaged trace (those are {', '.join(PACKAGED)}){hint}"
    )


def _synthesised(
    path: Path, packaged: Packaged | None, start_s: float, duration_s: float, rate_scale: float, seed: int
) -> Trace:
    data = read_servegen(path)
    if isinf(duration_s):
        requests = int(data.counts.sum(dtype="int64"))
        raise WorkloadSettingError(
            f"{path.stem} describes clients over {data.duration_s / 86_400:g} days, {requests:,} requests in all: "
            "give a duration, and a rate scale for fewer requests per second"
        )
    trace = synthesise(data, start_s=start_s, duration_s=duration_s, rate_scale=rate_scale, seed=seed)
    return trace if packaged is None else _named(trace, f"{trace.source} ({packaged.origin})")


def _named(trace: Trace, source: str) -> Trace:
    return Trace(
        arrival_s=trace.arrival_s,
        input_tokens=trace.input_tokens,
        output_tokens=trace.output_tokens,
        source=source,
        bad_rows=trace.bad_rows,
    )
