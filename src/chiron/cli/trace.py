"""`chiron trace`: look at traces, convert them, make them."""

from __future__ import annotations

from math import inf, isnan
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chiron.cli.common.durations import seconds_of
from chiron.cli.common.group import ErrorsInALine
from chiron.workload.errors import WorkloadSettingError
from chiron.workload.generate import Arrivals, ClosedLoop, Diurnal, Gamma, Poisson, Spikes, generate
from chiron.workload.lengths import EmpiricalLengths, IndependentLengths, Lengths, parse_field_lengths
from chiron.workload.load import PACKAGED, is_clients, load_lengths, load_trace
from chiron.workload.plot import plot_trace
from chiron.workload.readers import BAD_ROWS_MAX
from chiron.workload.stats import Quantiles, TraceStats, quantiles, trace_stats
from chiron.workload.types import Trace
from chiron.workload.writers import write_trace

CLIENTS_DEFAULT_S = 600.0
"""Slice of a client model (ServeGen) that `inspect` and `plot` take unless told."""
_BAD_ROWS_SHOWN = 10

app = typer.Typer(
    cls=ErrorsInALine,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Look at traces, convert them, make them. Durations read `45s`, `10m`, `1h30m`; a bare number is seconds.",
    epilog="Start with: `chiron trace list`, then `chiron trace inspect azure-2023-conv`",
)
make = typer.Typer(
    cls=ErrorsInALine,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Make a trace. OUT ends in .csv or .jsonl, or .gz after it.",
    epilog="Example: `chiron trace generate spikes out.csv --rate 5 --factor 3 --duration 1h --lengths sharegpt-300`",
)
app.add_typer(make, name="generate")

Source = Annotated[
    str,
    typer.Argument(metavar="NAME|PATH", help="A packaged trace (`chiron trace list`) or a file.", show_default=False),
]
From = Annotated[
    str,
    typer.Option(
        "--from", metavar="FORMAT", help="Format of a file: auto, azure, burstgpt, mooncake, plain, servegen."
    ),
]
Start = Annotated[str, typer.Option(metavar="DURATION", help="Begin here; it becomes time 0.")]
Duration = Annotated[
    str | None, typer.Option(metavar="DURATION", help="Keep this much.", show_default="to the end; ServeGen: 10m")
]
ConvertDuration = Annotated[
    str | None, typer.Option(metavar="DURATION", help="Keep this much.", show_default="to the end; ServeGen: required")
]
Scale = Annotated[
    float, typer.Option(metavar="FACTOR", help="Multiply the rate; the day's shape and the burstiness stay.")
]
Seed = Annotated[int, typer.Option(help="Seed of every draw.")]
BadRows = Annotated[
    float, typer.Option(metavar="FRACTION", min=0, max=1, help="Refuse a file with more unusable rows than this.")
]
OutFormat = Annotated[
    str, typer.Option("--format", metavar="FORMAT", help="Format to write: auto (by the name), csv, jsonl, mooncake.")
]


@app.command("list")
def list_packaged() -> None:
    """The packaged traces and sets of lengths."""
    table = _table("name", "what", "holds", "source and licence")
    kinds = {"trace": "trace", "clients": "client model", "lengths": "lengths"}
    for name, packaged in PACKAGED.items():
        table.add_row(name, kinds[packaged.kind], packaged.about, packaged.origin)
    Console().print(table)


@app.command(
    epilog="Examples: `chiron trace inspect azure-2023-code` · "
    "`chiron trace inspect servegen-m-small --start 8h --duration 1h --scale 0.01`"
)
def inspect(
    source: Source,
    from_: From = "auto",
    start: Start = "0s",
    duration: Duration = None,
    scale: Scale = 1.0,
    seed: Seed = 0,
    bad_rows_max: BadRows = BAD_ROWS_MAX,
) -> None:
    """Requests, rates, burstiness, lengths, bad rows, source."""
    console = Console()
    if _is_lengths(source):
        if duration is not None or seconds_of("--start", start) > 0 or scale != 1:
            raise WorkloadSettingError(f"{source} has no arrivals: --start, --duration and --scale do not apply")
        _print_lengths(console, load_lengths(source))
        return
    _print_trace(console, _load(source, from_, start, duration, scale, seed, bad_rows_max, CLIENTS_DEFAULT_S))


@app.command(
    epilog="Examples: `chiron trace convert azure-2023-conv day.jsonl --format mooncake` · "
    "`chiron trace convert my.csv busy.csv --scale 4 --start 10m --duration 30m`"
)
def convert(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write.", show_default=False)],
    from_: From = "auto",
    format: OutFormat = "auto",
    scale: Scale = 1.0,
    start: Start = "0s",
    duration: ConvertDuration = None,
    seed: Seed = 0,
    bad_rows_max: BadRows = BAD_ROWS_MAX,
) -> None:
    """Write a trace, or a slice of it at another rate, in another format."""
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise WorkloadSettingError(f"OUT is the source itself ({out}); it must be another file")
    _write(_load(source, from_, start, duration, scale, seed, bad_rows_max, inf), out, format)


@app.command(epilog="Example: `chiron trace plot mooncake-conversation -o mooncake.png`")
def plot(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="PNG, SVG or PDF.", show_default=False)],
    from_: From = "auto",
    start: Start = "0s",
    duration: Duration = None,
    scale: Scale = 1.0,
    seed: Seed = 0,
    bad_rows_max: BadRows = BAD_ROWS_MAX,
) -> None:
    """Draw rate over time, lengths, and gaps between arrivals."""
    trace = _load(source, from_, start, duration, scale, seed, bad_rows_max, CLIENTS_DEFAULT_S)
    plot_trace(trace, out, title=f"{source}: {len(trace):,} requests")
    typer.echo(f"wrote {out}", err=True)


# generate -----------------------------------------------------------------------------------------------------

Out = Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .csv or .jsonl.", show_default=False)]
Rate = Annotated[float, typer.Option(help="Requests per second.", show_default=False)]
For = Annotated[str, typer.Option("--duration", metavar="DURATION", help="Length of the trace.")]
LengthsFrom = Annotated[
    str | None,
    typer.Option(
        "--lengths",
        metavar="NAME|PATH",
        help="Draw (prompt, output) pairs from this trace or set of lengths.",
        show_default="sharegpt-300, unless --input and --output are given",
    ),
]
_FIELD = "`512`, `mean=512,cv=1.2` or `p50=300,p99=4000` (lognormal), optionally with `,max=8192`."
InputLengths = Annotated[
    str | None, typer.Option("--input", metavar="LENGTHS", help=f"Prompt tokens: {_FIELD}", show_default=False)
]
OutputLengths = Annotated[
    str | None, typer.Option("--output", metavar="LENGTHS", help="Output tokens, likewise.", show_default=False)
]
Cv = Annotated[float, typer.Option(help="Burstiness of the gaps: 1 is Poisson, above it bursty, 0 regular.")]


@make.command()
def poisson(
    out: Out,
    rate: Rate,
    duration: For = "10m",
    lengths: LengthsFrom = None,
    input: InputLengths = None,
    output: OutputLengths = None,
    seed: Seed = 0,
    format: OutFormat = "auto",
) -> None:
    """Independent arrivals at a constant rate."""
    _generate(Poisson(rate=rate), out, duration, _lengths(lengths, input, output), seed, format)


@make.command()
def gamma(
    out: Out,
    rate: Rate,
    cv: Annotated[float, typer.Option(help="Standard deviation / mean of the gaps; 1 is Poisson.", show_default=False)],
    duration: For = "10m",
    lengths: LengthsFrom = None,
    input: InputLengths = None,
    output: OutputLengths = None,
    seed: Seed = 0,
    format: OutFormat = "auto",
) -> None:
    """Gamma gaps at a constant rate: bursty or regular."""
    _generate(Gamma(rate=rate, cv=cv), out, duration, _lengths(lengths, input, output), seed, format)


@make.command()
def spikes(
    out: Out,
    rate: Annotated[float, typer.Option(help="Requests per second between bursts.", show_default=False)],
    factor: Annotated[float, typer.Option(help="Rate in a burst / base rate.")] = 3.0,
    length: Annotated[str, typer.Option(metavar="DURATION", help="Length of a burst.")] = "30s",
    period: Annotated[str, typer.Option(metavar="DURATION", help="From burst to burst; the first half-way in.")] = "5m",
    cv: Cv = 1.0,
    duration: For = "30m",
    lengths: LengthsFrom = None,
    input: InputLengths = None,
    output: OutputLengths = None,
    seed: Seed = 0,
    format: OutFormat = "auto",
) -> None:
    """A base rate with regular bursts."""
    arrivals = Spikes(
        rate=rate,
        factor=factor,
        length_s=seconds_of("--length", length),
        period_s=seconds_of("--period", period),
        cv=cv,
    )
    _generate(arrivals, out, duration, _lengths(lengths, input, output), seed, format)


@make.command()
def diurnal(
    out: Out,
    rate: Annotated[float, typer.Option(help="Mean requests per second.", show_default=False)],
    peak_to_trough: Annotated[float, typer.Option(help="Peak rate / trough rate.")] = 2.0,
    period: Annotated[str, typer.Option(metavar="DURATION", help="Trough to trough; it starts at a trough.")] = "24h",
    noise: Annotated[float, typer.Option(help="CV of a random factor on the rate, drawn each minute.")] = 0.0,
    cv: Cv = 1.0,
    duration: For = "24h",
    lengths: LengthsFrom = None,
    input: InputLengths = None,
    output: OutputLengths = None,
    seed: Seed = 0,
    format: OutFormat = "auto",
) -> None:
    """A day: a sine between trough and peak, with noise."""
    arrivals = Diurnal(
        rate=rate, peak_to_trough=peak_to_trough, period_s=seconds_of("--period", period), noise=noise, cv=cv
    )
    _generate(arrivals, out, duration, _lengths(lengths, input, output), seed, format)


@make.command("closed-loop")
def closed_loop(
    out: Out,
    users: Annotated[int, typer.Option(help="Users who wait, think and send the next request.", show_default=False)],
    think: Annotated[str, typer.Option(metavar="DURATION", help="Mean thinking time (exponential).")] = "30s",
    response: Annotated[str, typer.Option(metavar="DURATION", help="Assumed time to a full answer.")] = "10s",
    duration: For = "10m",
    lengths: LengthsFrom = None,
    input: InputLengths = None,
    output: OutputLengths = None,
    seed: Seed = 0,
    format: OutFormat = "auto",
) -> None:
    """Users in a loop, approximated: a trace cannot react, so every answer is assumed to take `--response`."""
    arrivals = ClosedLoop(
        users=users, think_s=seconds_of("--think", think), response_s=seconds_of("--response", response)
    )
    _generate(arrivals, out, duration, _lengths(lengths, input, output), seed, format)


def _generate(arrivals: Arrivals, out: Path, duration: str, lengths: Lengths, seed: int, format: str) -> None:
    _write(generate(arrivals, duration_s=seconds_of("--duration", duration), lengths=lengths, seed=seed), out, format)


def _lengths(source: str | None, prompt: str | None, output: str | None) -> Lengths:
    if prompt is None and output is None:
        return load_lengths(source or "sharegpt-300")
    if source is not None:
        raise WorkloadSettingError("--lengths and --input/--output exclude each other; give one or the other")
    if prompt is None or output is None:
        missing = "--input" if prompt is None else "--output"
        raise WorkloadSettingError(f"--input and --output go together; {missing} is missing")
    return IndependentLengths(input=parse_field_lengths(prompt), output=parse_field_lengths(output))


# Shared -------------------------------------------------------------------------------------------------------


def _is_lengths(source: str) -> bool:
    return source in PACKAGED and PACKAGED[source].kind == "lengths"


def _load(
    source: str,
    format: str,
    start: str,
    duration: str | None,
    scale: float,
    seed: int,
    bad_rows_max: float,
    clients_default_s: float,
) -> Trace:
    if duration is not None:
        duration_s = seconds_of("--duration", duration)
    else:
        duration_s = clients_default_s if format in ("auto", "servegen") and is_clients(source) else inf
    return load_trace(
        source,
        format=format,
        start_s=seconds_of("--start", start),
        duration_s=duration_s,
        rate_scale=scale,
        seed=seed,
        bad_rows_max=bad_rows_max,
    )


def _write(trace: Trace, out: Path, format: str) -> None:
    if len(trace) == 0:
        raise WorkloadSettingError("no request arrives in this duration; make it longer or the rate higher")
    write_trace(trace, out, format=format)
    skipped = f", {len(trace.bad_rows):,} bad rows left out" if trace.bad_rows else ""
    typer.echo(f"wrote {out}: {len(trace):,} requests over {_span(float(trace.arrival_s[-1]))}{skipped}", err=True)


def _print_trace(console: Console, trace: Trace) -> None:
    if len(trace) == 0:
        raise WorkloadSettingError("no request arrives in this slice; make it longer or the scale higher")
    stats = trace_stats(trace)
    _print_facts(console, _facts(trace, stats))
    if stats.windows:
        console.print(
            "\n[bold]Rates and burstiness[/] (dispersion: variance / mean of the counts; 1 is steady Poisson)"
        )
        console.print(_windows_table(stats))
    console.print("\n[bold]Lengths[/]")
    console.print(_lengths_table(stats.input_tokens, stats.output_tokens))
    if trace.bad_rows:
        first = f", the first {_BAD_ROWS_SHOWN}" if len(trace.bad_rows) > _BAD_ROWS_SHOWN else ""
        console.print(f"\n[bold]Bad rows[/] ({len(trace.bad_rows):,}{first})", highlight=False)
        console.print(_bad_rows_table(trace))


def _facts(trace: Trace, stats: TraceStats) -> dict[str, str]:
    return {
        "source": trace.source,
        "requests": f"{stats.requests:,} over {_span(stats.span_s)}",
        "mean rate": f"{stats.rate:,.2f} requests/s, {stats.input_tokens_per_s:,.0f} prompt and "
        f"{stats.output_tokens_per_s:,.0f} output tokens/s",
        "gaps": "too few" if isnan(stats.gap_cv) else f"CV {stats.gap_cv:.2f} (1 is Poisson)",
        "bad rows": f"{len(trace.bad_rows):,} left out" if trace.bad_rows else "none",
    }


def _print_facts(console: Console, facts: dict[str, str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(name, Text(fact))
    console.print(table)


def _windows_table(stats: TraceStats) -> Table:
    table = _table("window", "windows", "p50 1/s", "p99 1/s", "max 1/s", "dispersion", "largest rise")
    for window in stats.windows:
        table.add_row(
            f"{window.window_s:g} s",
            f"{window.windows:,}",
            *(f"{rate:,.2f}" for rate in (window.rate_p50, window.rate_p99, window.rate_max)),
            f"{window.dispersion:,.2f}",
            f"{window.spike:,.1f}x",
        )
    return table


def _print_lengths(console: Console, lengths: EmpiricalLengths) -> None:
    _print_facts(console, {"source": lengths.source, "pairs": f"{len(lengths.input_tokens):,}, without arrivals"})
    console.print()
    console.print(_lengths_table(quantiles(lengths.input_tokens), quantiles(lengths.output_tokens)))


def _lengths_table(prompt: Quantiles, output: Quantiles) -> Table:
    table = _table("tokens", "mean", "p50", "p90", "p99", "max")
    for name, field in (("prompt", prompt), ("output", output)):
        values = (field.mean, field.p50, field.p90, field.p99, field.max)
        table.add_row(name, *(f"{value:,.0f}" for value in values))
    return table


def _bad_rows_table(trace: Trace) -> Table:
    table = _table("line", "why")
    for row in trace.bad_rows[:_BAD_ROWS_SHOWN]:
        table.add_row(f"{row.line:,}", Text(row.why))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    words = {"what", "holds", "source and licence", "why"}
    for name in others:
        table.add_column(name, justify="left" if name in words else "right", overflow="fold")
    return table


def _span(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
