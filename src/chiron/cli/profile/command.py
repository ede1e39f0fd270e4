"""``chiron profile``: list, show and plot profiles, fit one to measurements, or make one from aiconfigurator."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from chiron.cli.profile.plot import plot_profiles
from chiron.cli.profile.tables import decode_ms, decode_table, facts, fit_table, prefill_ms, prefill_table
from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_aic import profile_from_aic
from chiron.engines.profile_fit import fit_profile
from chiron.engines.profile_hardware import DEFAULT_PRICE_PER_GPU_HOUR
from chiron.engines.profile_points import grid_points, read_points
from chiron.engines.profile_store import load_profile, profile_json, profile_names, save_profile

DOUBTFUL_MAPE = 0.1

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Profiles: how long one step of an engine takes and how much KV fits, of (model, GPU, TP, engine).",
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME|PATH", help="A packaged profile (`chiron profile list`), or a JSON file.")
]
PriceOption = Annotated[
    float | None,
    typer.Option(
        "--price",
        min=0,
        show_default=False,
        help="US dollars per GPU-hour. Default: ours for the GPU, or 0 if unknown.",
    ),
]
BudgetOption = Annotated[
    int,
    typer.Option(
        "--max-num-batched-tokens", min=1, help="Token budget of one step: decodes first, the rest for prefill chunks."
    ),
]
OutOption = Annotated[Path, typer.Option("--out", "-o", metavar="FILE.json", help="Where to write the profile.")]


@app.command("list", epilog="Example: `chiron profile list llama-3.1-8b`")
def list_profiles(
    text: Annotated[str, typer.Argument(metavar="[TEXT]", help="Only names that contain this.")] = "",
) -> None:
    """List the packaged profiles: speed, KV capacity, how far the fit is off, price.

    ITL is the time of one decode step, in milliseconds, at a context of 1,024 tokens and a batch of 1, 32 and 128.
    Prefill is one step of 2,048 prompt tokens, in milliseconds. Errors are relative to the grid of step times, mean and
    worst, in percent: of our form (knee) and of the best linear one.
    """
    names = [name for name in profile_names() if text in name]
    if not names:
        raise ProfileError(f"no packaged profile contains {text!r}; packaged: {', '.join(profile_names())}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("profile", no_wrap=True)
    headings = [
        "KV\ntokens",
        "ITL ms\nB=1",
        "\n32",
        "\n128",
        "prefill ms\n2,048",
        "error %\nknee",
        "\nlinear",
        "$ per\nGPU-h",
    ]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        profile = load_profile(name)
        table.add_row(
            name,
            f"{profile.kv_capacity_tokens:,}",
            *(f"{decode_ms(profile, batch, 1024):.1f}" for batch in (1, 32, 128)),
            f"{prefill_ms(profile, 2048):.0f}",
            f"{100 * profile.mape:.1f} / {100 * profile.max_error:.0f}",
            f"{100 * profile.linear_mape:.1f} / {100 * profile.linear_max_error:.0f}",
            f"{profile.price_per_gpu_hour:.2f}",
        )
    _console().print(table)


@app.command(
    epilog="Start a profile of your own from one of ours: `chiron profile show llama-3.1-8b/h100/tp1 --json > my.json`"
)
def show(
    name: NameArgument,
    json: Annotated[bool, typer.Option("--json", help="Print the profile's file instead.")] = False,
) -> None:
    """Show a profile: its coefficients with units, decode and prefill times, and the same from the grid."""
    profile = load_profile(name)
    if json:
        typer.echo(profile_json(profile), nl=False)
        return
    console = _console()
    console.print(facts(profile))
    points = grid_points(profile)
    against = " (in brackets: the grid it was fitted to)" if points else ""
    console.print(f"\nITL, ms{against}; - where the contexts exceed the KV capacity", style="bold", highlight=False)
    console.print(decode_table(profile, points))
    console.print(f"\nPrefill of one prompt, ms{against}", style="bold", highlight=False)
    console.print(prefill_table(profile, points))


@app.command(epilog="Example: `chiron profile plot llama-3.1-8b/a100/tp1 llama-3.1-8b/h100/tp1 -o profiles.png`")
def plot(
    names: Annotated[list[str], typer.Argument(metavar="NAME|PATH...", help="One profile a row.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="A .png, .svg or .pdf file.")],
) -> None:
    """Plot fitted against measured: ITL over batch size at several contexts, and prefill over prompt length."""
    profiles = [load_profile(name) for name in names]
    plot_profiles([(profile, grid_points(profile)) for profile in profiles], out)
    typer.echo(f"wrote {out}", err=True)


@app.command(
    epilog="Example: `chiron profile fit steps.csv -o my.json --name my-model/h100/tp1 --kv-capacity-tokens 400000"
    " --kv-bytes-per-token 131072`"
)
def fit(
    csv: Annotated[
        Path,
        typer.Argument(
            metavar="CSV",
            help="Measured steps: columns decode_batch, context_len, prefill_tokens, latency_ms;"
            " optional prefill_offset, phase, model, system, tp.",
        ),
    ],
    out: OutOption,
    name: Annotated[str, typer.Option("--name", help="The profile's name, such as my-model/h100/tp1.")],
    kv_capacity_tokens: Annotated[
        int, typer.Option("--kv-capacity-tokens", min=1, help="KV tokens of an instance; vLLM logs it at start.")
    ],
    kv_bytes_per_token: Annotated[
        int,
        typer.Option(
            "--kv-bytes-per-token",
            min=1,
            help="2 x layers x KV heads x head size x bytes per value (Llama 3.1 8B: 131072).",
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="The model; chooses rows where the CSV has several.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="The GPU, such as h100; chooses rows likewise.")
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option("--tp", min=1, help="GPUs of the instance; chooses rows likewise. Default 1.", show_default=False),
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="Which engine was measured.")] = "vllm",
    max_num_batched_tokens: BudgetOption = 2048,
    price: PriceOption = None,
) -> None:
    """Fit a profile to measured step times and say how far off it is.

    A row is one engine step: decode_batch sequences decode at a mean context of context_len tokens, and prefill_tokens
    of a prompt are prefilled, from prefill_offset (0 if absent). Cover what the engine will see: several batch sizes
    and contexts, several prompt sizes, alone and together.
    """
    measured = read_points(csv, model=model, system=system, tp=tp)
    report = fit_profile(measured.points)
    gpu = (measured.system or "unknown").lower().removesuffix("_sxm")
    profile = report.profile(
        name=name,
        model=measured.model or name,
        gpu=gpu,
        tp=measured.tp or 1,
        engine=engine,
        kv_capacity_tokens=kv_capacity_tokens,
        kv_bytes_per_token=kv_bytes_per_token,
        max_num_batched_tokens=max_num_batched_tokens,
        price_per_gpu_hour=DEFAULT_PRICE_PER_GPU_HOUR.get(gpu, 0.0) if price is None else price,
        source=f"fit to {len(measured.points)} steps of {csv.name}",
    )
    save_profile(profile, out)
    _console().print(fit_table(report))
    worst = report.worst
    typer.echo(
        f"worst: {worst.phase} step, {worst.decoding:g} decodes at {worst.context_len:g} tokens, "
        f"{worst.prefill_tokens:g} prefill tokens: {worst.latency_ms:.2f} ms measured, "
        f"{report.worst_fitted_ms:.2f} ms fitted"
    )
    _finish(profile, out)


@app.command(
    "from-aic",
    epilog="Example: `chiron profile from-aic Qwen/Qwen3-32B --system h200_sxm --tp 2 -o qwen3-32b.json`"
    " (after `pip install 'chiron-serving[aic]'`)",
)
def from_aic(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face name, such as Qwen/Qwen3-32B.")],
    system: Annotated[str, typer.Option("--system", help="aiconfigurator's name of a GPU system, such as h100_sxm.")],
    out: OutOption,
    backend: Annotated[str, typer.Option("--backend", help="vllm, sglang or trtllm.")] = "vllm",
    tp: Annotated[int, typer.Option("--tp", min=1, help="GPUs of one instance.")] = 1,
    name: Annotated[
        str | None, typer.Option("--name", help="The profile's name.", show_default="MODEL/GPU/tpN")
    ] = None,
    max_num_batched_tokens: BudgetOption = 2048,
    price: PriceOption = None,
) -> None:
    """Make a profile of another model, GPU or engine from aiconfigurator-core's measured kernel times.

    A model whose configuration the package does not carry makes it ask Hugging Face for one.
    """
    # It warns about every table that it falls back on, for models that are not asked for.
    logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)
    profile = profile_from_aic(
        model,
        system,
        backend,
        tp,
        name=name,
        price_per_gpu_hour=price,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    save_profile(profile, out)
    _finish(profile, out)


def _finish(profile: Profile, out: Path) -> None:
    typer.echo(f"{profile.name}: error {100 * profile.mape:.1f} % mean, {100 * profile.max_error:.1f} % worst")
    typer.echo(f"wrote {out}", err=True)
    if profile.mape > DOUBTFUL_MAPE:
        typer.echo(
            f"warning: the mean error is above {DOUBTFUL_MAPE:.0%}: this engine does not follow the form, or the "
            "points are noisy; do not rely on this profile before you know which",
            err=True,
        )


def _console() -> Console:
    # Piped, rich would fold tables at 80 columns.
    console = Console()
    return console if console.is_terminal else Console(width=120)
