"""A command imports what it needs, no more: each costs its user the time that its imports take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from chiron.cli import COMMANDS, app

HEAVY = "numpy scipy plotly matplotlib pandas chiron.sim chiron.gateway.service"


@pytest.mark.parametrize("command", ["--version", "batch --help", "top --help", "key --help", "serve --help"])
def test_commands_that_calculate_nothing_import_nothing_that_does(command: str) -> None:
    program = (
        "import sys; from chiron.cli import app; app(sys.argv[1:], standalone_mode=False);"
        f"print('heavy:', [m for m in {HEAVY.split()} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, *command.split()], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_every_command_is_where_it_is_said_to_be_and_has_a_help() -> None:
    group = typer.main.get_command(app)
    assert group.list_commands(None) == [*COMMANDS, "version"]  # type: ignore[attr-defined]
    for name in group.list_commands(None):  # type: ignore[attr-defined]
        command = group.get_command(None, name)  # type: ignore[attr-defined]
        assert (command.name, bool(command.help)) == (name, True)
