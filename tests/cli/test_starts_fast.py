"""A command imports what it needs, no more: each costs its user the time that its imports take."""

from __future__ import annotations

import subprocess
import sys

import typer

from chiron.cli import COMMANDS, app

HEAVY = "numpy scipy plotly matplotlib pandas chiron.sim chiron.gateway.service"


LIGHT = ["--version", "--help", "batch --help", "top --help", "key --help", "serve --help"]
PROGRAM = f"""
import sys
from chiron.cli import app
for command in sys.argv[1:]:
    app(command.split(), standalone_mode=False)
    print("heavy:", command, [name for name in {HEAVY.split()} if name in sys.modules])
"""


def test_commands_that_calculate_nothing_import_nothing_that_does() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *LIGHT], capture_output=True, text=True, check=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("heavy:")]
    assert said == [f"heavy: {command} []" for command in LIGHT]


def test_every_command_is_where_it_is_said_to_be_and_has_a_help() -> None:
    group = typer.main.get_command(app)
    assert group.list_commands(None) == [*COMMANDS, "version"]  # type: ignore[attr-defined]
    for name in group.list_commands(None):  # type: ignore[attr-defined]
        command = group.get_command(None, name)  # type: ignore[attr-defined]
        assert (command.name, bool(command.help)) == (name, True)
        if name in COMMANDS:
            assert " ".join(command.help.split("\n\n")[0].split()) == COMMANDS[name][1], "as the list of commands says"
