"""The command line. Results go to stdout, everything else to stderr.

Exit status: 0 done, 1 a run failed by a fault of the program, 2 bad input, 130 stopped by ctrl-C (what was done by
then is written).
"""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import Annotated, Any

import typer

from chiron.cli import run
from chiron.cli.batch import app as batch_app
from chiron.cli.demo import demo
from chiron.cli.doctor import doctor
from chiron.cli.explain import explain
from chiron.cli.group import ErrorsInALine
from chiron.cli.init import init
from chiron.cli.key import key
from chiron.cli.load import load
from chiron.cli.profile import app as profile_app
from chiron.cli.serve import serve
from chiron.cli.top import top
from chiron.cli.trace import app as trace_app

app = typer.Typer(
    cls=ErrorsInALine,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="SLO-aware, hierarchical autoscaling for LLM serving, and the simulator that proves it on your trace.",
    epilog="Start with: `chiron demo`, or `chiron compare demo --report report.html`",
)
app.command()(run.simulate)
app.command()(run.compare)
app.command()(run.bound)
app.command()(explain)
app.command()(run.scenarios)
app.command()(run.policies)
app.command()(demo)
app.command()(serve)
app.command()(init)
app.command()(doctor)
app.command()(load)
app.command()(top)
app.command()(key)
app.add_typer(batch_app, name="batch")
app.add_typer(trace_app, name="trace")
app.add_typer(profile_app, name="profile")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(installed_version("chiron-serving"))


def _version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of ``chiron`` itself."""


def main() -> Any:
    """The console script."""
    return app()
