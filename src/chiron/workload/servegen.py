"""ServeGen: arrivals and lengths synthesised from the published clients of a production service.

The data (github.com/alibaba/ServeGen) gives, per client and window of 600 s over 14 days, a request count and the
fitted distribution of the gaps between requests (Gamma or Weibull), and, per client and window of 6 h, the
distributions of prompt and output lengths. The lengths of some clients were not published.

``synthesise`` makes the requests of any slice. Each client is a renewal process in *operational time*, in which it
makes one request per unit on average; a window maps that time to seconds at its own rate. So the published rate
holds in every window, the published pattern holds within it, and a gap may cross a window's end. A rate scale
multiplies the rates and leaves the patterns alone, as ServeGen itself scales.

Lengths are kept as tables: the range of probability is cut into bins (narrow in the upper tail) and each bin keeps
its mean, so that every table has the mean of its source exactly (to a rounding of half a token) while the extreme
tail is averaged within the last bins. Prompt and output lengths are published as separate marginals; they are drawn
independently. A client without lengths draws from the others', each in proportion to its requests.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from math import gamma, inf
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chiron.workload.errors import TraceFormatError, WorkloadSettingError, require
from chiron.workload.seeds import generator
from chiron.workload.servegen_checks import (
    CLIENTS_MAX,
    COUNT_MAX,
    SHAPE_MAX,
    SHAPE_MIN,
    TABLES,
    WINDOWS_MAX,
    check_clients,
    check_size,
    check_tables,
    real,
    whole,
)
from chiron.workload.types import Floats, Ints, Trace

WINDOW_S = 600
LENGTH_WINDOW_S = 21_600
REQUESTS_MAX = 50_000_000
"""A slice that would hold more is refused: it was meant to be shorter, or scaled down."""

EDGES: Floats = np.concatenate(
    [np.linspace(0, 0.9, 46)[:-1], np.linspace(0.9, 0.99, 10)[:-1], [0.99, 0.993, 0.996, 0.998, 0.999, 1.0]]
)
"""Bins of probability of the length tables."""

_GAMMA, _WEIBULL = 1, 2
_BURN_IN_GAPS = 1000
"""Gaps among which the start of a slice falls, so that it does not begin at an arrival of every client."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServeGen:
    """Clients as tables; rows are clients, columns windows of 600 s."""

    name: str
    counts: npt.NDArray[np.int32]
    """Requests of each client in each window."""
    patterns: npt.NDArray[np.uint8]
    """Distribution of the gaps: 1 Gamma, 2 Weibull, 0 in a silent window."""
    shapes: npt.NDArray[np.float32]
    """Its shape parameter; its scale follows from the rate."""
    length_client: npt.NDArray[np.int16]
    length_window: npt.NDArray[np.int16]
    """Client and window of 6 h of each row of the two tables below."""
    input_table: npt.NDArray[np.int32]
    output_table: npt.NDArray[np.int32]

    @property
    def duration_s(self) -> float:
        return float(self.counts.shape[1] * WINDOW_S)


def is_servegen(path: str | Path) -> bool:
    return str(path).endswith(("_client_rates.parquet", ".npz"))


def read_servegen(path: str | Path) -> ServeGen:
    """From the packaged form (.npz), or from ``*_client_rates.parquet`` with ``*_client_lengths.parquet`` beside it.

    Columns of the first: client, window_start_s, rate_rps, pattern, pat_arg1 (shape). Of the second: client,
    window_start_s, field (input_tokens or output_tokens), value, prob.
    """
    path = Path(path)
    return _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)


def synthesise(
    data: ServeGen, *, start_s: float = 0.0, duration_s: float, rate_scale: float = 1.0, seed: int = 0
) -> Trace:
    """Requests of ``[start_s, start_s + duration_s)`` of the 14 days, re-based to 0."""
    require(0 <= start_s < data.duration_s, "start", start_s, f"in 0..{data.duration_s:g} s, the data's length")
    require(duration_s > 0, "duration", duration_s, "above 0")
    require(0 < rate_scale < inf, "rate scale", rate_scale, "above 0 and finite")
    end_s = min(start_s + duration_s, data.duration_s)
    windows = range(int(start_s // WINDOW_S), min(data.counts.shape[1], int(-(-end_s // WINDOW_S))))
    _refuse_huge(data, windows, start_s, end_s, rate_scale)
    arrivals, clients = [], []
    for client in range(len(data.counts)):
        rng = generator(seed, f"servegen {data.name} client {client}")
        times = _client_times(data, client, windows, rate_scale, rng)
        times = times[(times >= start_s) & (times < end_s)]
        arrivals.append(times)
        clients.append(np.full(len(times), client))
    arrival_s, client_of = np.concatenate(arrivals), np.concatenate(clients)
    order = np.argsort(arrival_s, kind="stable")
    arrival_s, client_of = arrival_s[order], client_of[order]
    prompt, output, pooled = _lengths(data, arrival_s, client_of, generator(seed, f"servegen {data.name} lengths"))
    return Trace(
        arrival_s=arrival_s - start_s,
        input_tokens=prompt,
        output_tokens=output,
        source=(
            f"{data.name}, synthesised from ServeGen's clients: seconds {start_s:,.10g} to {end_s:,.10g} of "
            f"{data.duration_s / 86_400:g} days, rates x {rate_scale:g}, seed {seed}; lengths from tables of "
            f"{len(EDGES) - 1} bin means, prompt and output independent; {pooled:.0%} of the requests are of clients "
            "without published lengths and draw from the other clients'"
        ),
    )


def _refuse_huge(data: ServeGen, windows: range, start_s: float, end_s: float, rate_scale: float) -> None:
    covered = (end_s - start_s) / max(len(windows) * WINDOW_S, 1)
    expected = float(data.counts[:, windows.start : windows.stop].sum(dtype=np.int64)) * rate_scale * covered
    if expected > REQUESTS_MAX:
        raise WorkloadSettingError(
            f"{data.name}: {end_s - start_s:g} s at rate scale {rate_scale:g} would be about {expected:,.0f} requests; "
            f"at most {REQUESTS_MAX:,} are allowed: shorten the duration or lower the rate scale"
        )


def _client_times(data: ServeGen, client: int, windows: range, rate_scale: float, rng: np.random.Generator) -> Floats:
    """Arrivals of one client in whole windows, seconds."""
    times: list[Floats] = []
    ahead = -1.0
    """Operational time from the start of the window to the client's next request; -1 until its first window."""
    for window in windows:
        expected = float(data.counts[client, window]) * rate_scale
        if expected == 0.0:
            continue
        shape, pattern = float(data.shapes[client, window]), int(data.patterns[client, window])
        if ahead < 0:
            ahead = _first_gap(pattern, shape, rng)
        if ahead >= expected:
            ahead -= expected
            continue
        marks = _marks(ahead, expected, pattern, shape, rng)
        inside = marks < expected
        times.append((window + marks[inside] / expected) * WINDOW_S)
        ahead = float(marks[np.argmin(inside)]) - expected
    return np.concatenate(times) if times else np.empty(0)


def _first_gap(pattern: int, shape: float, rng: np.random.Generator) -> float:
    """From a uniform moment to the next request: long gaps are the likelier ones to be in."""
    marks = np.cumsum(_gaps(pattern, shape, _BURN_IN_GAPS, rng))
    moment = rng.uniform(0, marks[-1])
    return float(marks[np.searchsorted(marks, moment)] - moment)


def _marks(ahead: float, expected: float, pattern: int, shape: float, rng: np.random.Generator) -> Floats:
    """Operational times of arrivals from ``ahead`` on, up to the first at or beyond ``expected``."""
    parts = [np.array([ahead])]
    while parts[-1][-1] < expected:
        left = expected - parts[-1][-1]
        parts.append(parts[-1][-1] + np.cumsum(_gaps(pattern, shape, int(1.1 * left) + 16, rng)))
    return np.concatenate(parts)


def _gaps(pattern: int, shape: float, count: int, rng: np.random.Generator) -> Floats:
    """Gaps of mean 1."""
    if pattern == _WEIBULL:
        return rng.weibull(shape, count) / gamma(1 + 1 / shape)
    return rng.gamma(shape, 1 / shape, count)


def _lengths(data: ServeGen, arrival_s: Floats, client_of: Ints, rng: np.random.Generator) -> tuple[Ints, Ints, float]:
    """Prompt and output lengths, and the fraction of requests whose client has none published."""
    rows = _table_rows(data)
    donors = np.flatnonzero(rows[:, 0] >= 0)
    without = rows[client_of, 0] < 0
    weights = data.counts[donors].sum(axis=1, dtype=np.float64)
    source = client_of.copy()
    if without.any():
        weights = weights / weights.sum() if weights.any() else None
        source[without] = rng.choice(donors, size=int(without.sum()), p=weights)
    row = rows[source, (arrival_s // LENGTH_WINDOW_S).astype(np.int64)]
    prompt = data.input_table[row, _bins(len(row), rng)]
    output = data.output_table[row, _bins(len(row), rng)]
    return prompt.astype(np.int64), output.astype(np.int64), float(without.mean()) if len(without) else 0.0


def _bins(count: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    return np.searchsorted(EDGES, rng.random(count), side="right") - 1


def _table_rows(data: ServeGen) -> npt.NDArray[np.int64]:
    """Row of the length tables of each client and window of 6 h: the nearest one that it has, -1 without any."""
    windows = np.arange(-(-data.counts.shape[1] * WINDOW_S // LENGTH_WINDOW_S))
    rows = np.full((len(data.counts), len(windows)), -1)
    for client in np.unique(data.length_client):
        own = np.flatnonzero(data.length_client == client)
        distance = np.abs(data.length_window[own][None, :] - windows[:, None])
        rows[client] = own[np.argmin(distance, axis=1)]
    return rows


# Files --------------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> ServeGen:
    with path.open("rb") as file:
        try:
            members = np.load(file, allow_pickle=False)
            arrays = {name: members[name] for name in TABLES}
        except (LookupError, ValueError, TypeError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise TraceFormatError(f"{path} is not a packaged ServeGen model: {error}") from error
    check_tables(path, arrays, len(EDGES) - 1)
    return ServeGen(name=path.stem, **arrays)


def _read_parquet(path: Path) -> ServeGen:
    lengths = path.with_name(path.name.replace("_client_rates", "_client_lengths"))
    if not lengths.is_file():
        raise TraceFormatError(f"{path} needs {lengths.name} beside it for the lengths")
    rate_columns = _columns(path, ("client", "window_start_s", "rate_rps", "pattern", "pat_arg1"))
    counts, patterns, shapes, known = _rates(path, rate_columns)
    client, window, prompt, output = _length_tables(
        lengths, _columns(lengths, ("client", "window_start_s", "field", "value", "prob"))
    )
    check_clients(known, client, path.name, str(lengths))
    return ServeGen(
        name=path.name.replace("_client_rates.parquet", ""),
        counts=counts,
        patterns=patterns,
        shapes=shapes,
        length_client=client,
        length_window=window,
        input_table=prompt,
        output_table=output,
    )


def _columns(path: Path, names: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise TraceFormatError("reading Parquet needs pyarrow: pip install 'chiron-serving[parquet]'") from error
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise TraceFormatError(f"{path} is not a readable Parquet file: {error}") from error
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise TraceFormatError(
            f"{path} lacks the column {missing[0]!r}; it has {', '.join(table.column_names)}; "
            f"expected {', '.join(names)}"
        )
    if not table.num_rows:
        raise TraceFormatError(f"{path} has no rows")
    return {name: table.column(name).to_numpy() for name in names}


def _rates(
    path: Path, columns: dict[str, npt.NDArray[Any]]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.float32], Ints]:
    """Tables of counts, patterns and shapes, and the clients that have rows."""
    client = whole(path, "client", columns["client"], CLIENTS_MAX - 1)
    window = whole(path, "window_start_s", columns["window_start_s"], WINDOWS_MAX * WINDOW_S - 1) // WINDOW_S
    size = (int(client.max()) + 1, int(window.max()) + 1)
    check_size(path, *size)
    counts, patterns = np.zeros(size, np.int32), np.zeros(size, np.uint8)
    shapes = np.zeros(size, np.float32)
    counts[client, window] = np.rint(real(path, "rate_rps", columns["rate_rps"], 0.0, COUNT_MAX / WINDOW_S) * WINDOW_S)
    names = columns["pattern"].astype(str)
    patterns[client, window] = np.where(names == "Gamma", _GAMMA, np.where(names == "Weibull", _WEIBULL, 0))
    counts[patterns == 0] = 0
    sending = counts[client, window] > 0
    shapes[client[sending], window[sending]] = real(
        path, "pat_arg1", columns["pat_arg1"][sending], SHAPE_MIN, SHAPE_MAX
    )
    return counts, patterns, shapes, np.unique(client)


def _length_tables(
    path: Path, columns: dict[str, npt.NDArray[Any]]
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    is_output = columns["field"].astype(str) == "output_tokens"
    client = whole(path, "client", columns["client"], CLIENTS_MAX - 1)
    seconds = whole(path, "window_start_s", columns["window_start_s"], WINDOWS_MAX * LENGTH_WINDOW_S - 1)
    key = (client << 32) | (seconds // LENGTH_WINDOW_S << 1) | is_output
    values = real(path, "value", columns["value"], 0.0, COUNT_MAX)
    shares = real(path, "prob", columns["prob"], 0.0, 1e9)
    order = np.lexsort((values, key))
    key, value, prob = key[order], values[order], shares[order]
    starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    ends = np.r_[starts[1:], len(key)]
    tables = {
        int(key[a]): _bin_means(value[a:b], prob[a:b]) for a, b in zip(starts, ends, strict=True) if prob[a:b].any()
    }
    both = sorted(k for k in tables if not k & 1 and k | 1 in tables)
    if not both:
        raise TraceFormatError(f"{path} holds no client with both input_tokens and output_tokens")
    return (
        np.array([k >> 32 for k in both], np.int16),
        np.array([(k & 0xFFFFFFFF) >> 1 for k in both], np.int16),
        np.array([tables[k] for k in both], np.int32),
        np.array([tables[k | 1] for k in both], np.int32),
    )


def _bin_means(value: Floats, prob: Floats) -> npt.NDArray[np.int32]:
    """Mean of the distribution inside each bin of probability: its quantile function, averaged."""
    value = np.maximum(value, 1.0)
    weight = prob / prob.sum()
    # The integral of a step function is linear between the steps, so interpolation of it is exact.
    mass = np.r_[0.0, np.cumsum(weight)]
    integral = np.interp(EDGES * mass[-1], mass, np.r_[0.0, np.cumsum(value * weight)])
    means: Floats = np.diff(integral) / np.diff(EDGES)
    return np.rint(means).astype(np.int32)
