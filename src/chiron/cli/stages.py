"""``chiron stages``: one model as a pipeline of stages, each a service of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from chiron.cli.common.extras import install_hint
from chiron.config.read import ConfigError

app = typer.Typer(help="Serve one model from stages: ranges of its layers.", no_args_is_help=True)

_PASSED_ON: dict[str, Any] = {"help_option_names": []}


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOption:
    """An option that is read elsewhere: only its name is known here."""

    opts: list[str]


class EngineCommand(TyperCommand):
    """Knows the options of an engine's own command line, and leaves all that follows to it, ``--help`` too."""

    parser = ""
    """Module that makes it."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._own = list(self.params)
        try:
            parser = import_module(self.parser).make_parser(positional=True)
        except ImportError:
            return  # Without the extra; calling the command says so.
        names = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
        self.params += [PassedOption(opts=[name]) for name in names]  # type: ignore[misc]

    def get_params(self, ctx: Any) -> list[Any]:
        return self._own

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


class ServeCommand(EngineCommand):
    parser = "chiron.engines.staged.stage"


class HeadCommand(EngineCommand):
    parser = "chiron.engines.staged.head"


class RunCommand(EngineCommand):
    parser = "chiron.engines.staged.instance"


@app.callback()
def stages() -> None:
    """Commands for models that are served from stages."""


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors.")],
    count: Annotated[str, typer.Option("--stages", help="How many, or auto.")] = "auto",
    memory: Annotated[
        str, typer.Option("--memory-gb", metavar="GB,GB,...", help="By what each device holds of weights instead.")
    ] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16; default: as stored.")] = "",
    device: Annotated[str, typer.Option("--device", help="To measure on: cpu, cuda, cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of a stage, on a CPU.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, max=4096, help="Batch size that times are balanced for.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Where to split a model: bytes, measured step times and activations of each stage, balanced by time.

    Examples:

    - `chiron stages plan models/llama-3.1-8b --stages 4`

    - `chiron stages plan models/llama-3.1-8b --memory-gb 8,8,4 --json`
    """
    from chiron.engines.staged.architecture import DTYPES
    from chiron.engines.staged.plan import BATCHES, make_plan, measure, split
    from chiron.engines.staged.weights import read_model_files

    if dtype and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    files = read_model_files(model)
    dtype = dtype or files.architecture.dtype
    batches = sorted({*BATCHES, batch})
    try:
        times = measure(files, dtype=dtype, device=device, threads=threads, batches=batches)
    except ImportError as error:
        raise ConfigError(f"{error}; {install_hint('staged')}") from None
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device!r}: {str(error).splitlines()[0]}") from None
    ranges = split(files, times, count, _rooms(memory), batch=batch, dtype=dtype)
    planned = make_plan(files, ranges, times, dtype)
    if as_json:
        typer.echo(json.dumps(planned.fields(), indent=2))
    else:
        _show(planned, batches)


def _rooms(text: str) -> list[int]:
    try:
        return [round(float(each) * 1e9) for each in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"--memory-gb {text!r}: must be numbers with commas between them") from None


def _show(planned: Any, batches: list[int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{planned.model}, {planned.dtype}")
    for name in (
        "layers",
        "weights MB",
        "KV bytes/token",
        "sent bytes/token",
        *(f"step ms, batch {b}" for b in batches),
    ):
        table.add_column(name, justify="right")
    for each in planned.stages:
        steps = [f"{1e3 * each.step_s[batch]:.2f}" for batch in batches]
        table.add_row(
            str(each.stage),
            f"{each.weights_bytes / 1e6:.1f}",
            str(each.kv_bytes_per_token),
            str(each.sent_bytes_per_token),
            *steps,
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@app.command(cls=ServeCommand, context_settings=_PASSED_ON)
def serve(context: typer.Context) -> None:
    """One replica of a stage: `chiron stages serve MODEL --layers 0-9 --port 9000`."""
    from chiron.engines.staged.stage import main

    main(context.args, positional=True)


@app.command(cls=HeadCommand, context_settings=_PASSED_ON)
def head(context: typer.Context) -> None:
    """The head of a pipeline, with OpenAI's API: `chiron stages head MODEL --stage 0-9=HOST:PORT,HOST:PORT ...`."""
    from chiron.engines.staged.head import main

    main(context.args, positional=True)


@app.command(cls=RunCommand, context_settings=_PASSED_ON)
def run(context: typer.Context) -> None:
    """A whole pipeline on this machine: a head, and replicas of its stages, which it starts and stops."""
    from chiron.engines.staged.instance import main

    main(context.args, positional=True)


@app.command()
def tiny(
    directory: Annotated[Path, typer.Argument(help="Where the model is written; it must not exist.")],
    family: Annotated[str, typer.Option("--family", help="llama, mistral, qwen2 or qwen3.")] = "llama",
    layers: Annotated[int, typer.Option("--layers", min=1, max=1024)] = 8,
    hidden: Annotated[int, typer.Option("--hidden", min=16, max=16_384)] = 256,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """Write a small model with random weights, to try things out: its text is noise."""
    from chiron.engines.staged.tiny import TinySettings, write_tiny

    try:
        settings = TinySettings(family=family, layers=layers, hidden=hidden, dtype=dtype, seed=seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if directory.exists():
        raise ConfigError(f"{directory}: exists already, and is not overwritten")
    write_tiny(directory, settings)
    typer.echo(f"{directory}: random weights; its text is noise", err=True)
