"""The command line. Results go to stdout, everything else to stderr.

Exit status: 0 done, 1 a run failed by a fault of the program, 2 bad input, 130 stopped by ctrl-C (what was done by
then is written).
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from chiron.cli.common.group import ErrorsInALine

COMMANDS = {
    "simulate": (
        "chiron.cli.simulate.command:simulate",
        "Run one policy (the scenario's first, or those given) on a scenario.",
    ),
    "compare": (
        "chiron.cli.simulate.command:compare",
        "Run several policies (the scenario's, or those given) on the same requests; print a table and a verdict.",
    ),
    "bound": (
        "chiron.cli.simulate.command:bound",
        "The fewest GPU-hours that any scheduler could need for a scenario, and where they come from.",
    ),
    "tune": (
        "chiron.cli.studies.tune:tune",
        "Search the settings of a policy, on requests that are not judged; write them with the search behind them.",
    ),
    "plan": (
        "chiron.cli.studies.plan:plan",
        "How many GPUs a workload needs: the fewest that keep every SLO, as a fixed fleet and scaled by a policy.",
    ),
    "explain": (
        "chiron.cli.explain.command:explain",
        "Explain in words why the fleet scaled up or down.",
    ),
    "advice": (
        "chiron.cli.advice:advice",
        "Say what `chiron serve --advise` would have done, and saved.",
    ),
    "replay": (
        "chiron.cli.replay:replay",
        "Tell a control plane again what a gateway's was told, and compare every decision and placement.",
    ),
    "scenarios": (
        "chiron.cli.simulate.command:scenarios",
        "List the packaged scenarios.",
    ),
    "policies": (
        "chiron.cli.simulate.command:policies",
        "List the policies, with their settings and defaults.",
    ),
    "demo": (
        "chiron.cli.demo.command:demo",
        "Real requests, real engine processes, one endpoint: watch it scale, then read the verdict.",
    ),
    "serve": (
        "chiron.cli.serve:serve",
        "Serve OpenAI's API in front of your engines, with autoscaling.",
    ),
    "init": (
        "chiron.cli.init:init",
        "Write a commented config: every common key with its default. An existing file is never overwritten.",
    ),
    "doctor": (
        "chiron.cli.doctor.command:doctor",
        "Check this machine, a config and its engines: each line is ok, warn or fail, with what to do next.",
    ),
    "load": (
        "chiron.cli.load.command:load",
        "Send a trace, a scenario or generated traffic to any OpenAI endpoint, open loop, and report.",
    ),
    "top": (
        "chiron.cli.top.command:top",
        "Watch a running gateway: instances, queues, latency against SLOs, batches, decisions and their reasons.",
    ),
    "key": (
        "chiron.cli.key:key",
        "Make an API key: show it once, and print the lines to add to the config.",
    ),
    "batch": (
        "chiron.cli.batch.command:app",
        "Batch jobs of a running gateway: submit a file of requests with a deadline, follow it, fetch the results.",
    ),
    "store": (
        "chiron.cli.store:app",
        "Move the store of batch jobs.",
    ),
    "ray": (
        "chiron.cli.ray:app",
        "Look at instances on a Ray cluster, and remove what is left there.",
    ),
    "stages": (
        "chiron.cli.stages:app",
        "Serve one model from stages: ranges of its layers.",
    ),
    "trace": (
        "chiron.cli.trace:app",
        "Look at traces, convert them, make them. Durations read `45s`, `10m`, `1h30m`; a bare number is seconds.",
    ),
    "profile": (
        "chiron.cli.profile.command:app",
        "Profiles: how long one step of an engine takes and how much KV fits, of (model, GPU, TP, engine).",
    ),
}
"""In the order of the help: where each command is, a function or a ``Typer`` of its own; and how its help begins."""


class Commands(ErrorsInALine):
    """A command's module is imported when it is called: what it needs not, such as the simulator, costs no time."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *(name for name in self.commands if name not in COMMANDS)]

    def get_command(self, ctx: Any, name: str) -> Any:
        for wanted in [name] if name in COMMANDS or name in self.commands else COMMANDS:  # All, to suggest one.
            if wanted not in self.commands:
                self.commands[wanted] = _command(wanted)
        return super().get_command(ctx, name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of commands imports none of them."""
        real = self.commands
        self.commands = {name: TyperCommand(name, help=says) for name, (_, says) in COMMANDS.items()} | dict(real)
        super().format_help(ctx, formatter)
        self.commands = real


def _command(name: str) -> Any:
    module, _, attribute = COMMANDS[name][0].partition(":")
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
