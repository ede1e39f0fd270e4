"""The command line. Results go to stdout, everything else to stderr.

Exit status: 0 done, 1 a run failed by a fault of the program, 2 bad input, 130 stopped by ctrl-C (what was done by
then is written).
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer

from chiron.cli.common.group import ErrorsInALine

COMMANDS = {
    "simulate": "chiron.cli.simulate.command:simulate",
    "compare": "chiron.cli.simulate.command:compare",
    "bound": "chiron.cli.simulate.command:bound",
    "tune": "chiron.cli.studies.tune:tune",
    "plan": "chiron.cli.studies.plan:plan",
    "explain": "chiron.cli.explain.command:explain",
    "advice": "chiron.cli.advice:advice",
    "replay": "chiron.cli.replay:replay",
    "scenarios": "chiron.cli.simulate.command:scenarios",
    "policies": "chiron.cli.simulate.command:policies",
    "demo": "chiron.cli.demo.command:demo",
    "serve": "chiron.cli.serve:serve",
    "init": "chiron.cli.init:init",
    "doctor": "chiron.cli.doctor.command:doctor",
    "load": "chiron.cli.load.command:load",
    "top": "chiron.cli.top.command:top",
    "key": "chiron.cli.key:key",
    "batch": "chiron.cli.batch.command:app",
    "store": "chiron.cli.store:app",
    "ray": "chiron.cli.ray:app",
    "stages": "chiron.cli.stages:app",
    "trace": "chiron.cli.trace:app",
    "profile": "chiron.cli.profile.command:app",
}
"""In the order of the help: where each command is, a function or a ``Typer`` of its own."""


class Commands(ErrorsInALine):
    """A command's module is imported when it is called: what it needs not, such as the simulator, costs no time."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *(name for name in self.commands if name not in COMMANDS)]

    def get_command(self, ctx: Any, name: str) -> Any:
        for wanted in [name] if name in COMMANDS or name in self.commands else COMMANDS:  # All, to suggest one.
            if wanted not in self.commands:
                self.commands[wanted] = _command(wanted)
        return super().get_command(ctx, name)


def _command(name: str) -> Any:
    module, _, attribute = COMMANDS[name].partition(":")
    found = getattr(import_module(module), attribute)
    holder = typer.Typer(rich_markup_mode="markdown", callback=lambda: None)
    if isinstance(found, typer.Typer):
        holder.add_typer(found, name=name)
    else:
        holder.command(name)(found)
    group: Any = typer.main.get_command(holder)
    return group.commands[name]


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="SLO-aware, hierarchical autoscaling for LLM serving, and the simulator that proves it on your trace.",
    epilog="Start with: `chiron demo`, or `chiron compare demo --report report.html`",
)


@app.command()
def version() -> None:
    """Print the version, and whether it is compiled."""
    from importlib.metadata import version as installed_version

    from chiron.core.compiled import build

    typer.echo(f"{installed_version('chiron-serving')} ({build()})")


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
