"""``chiron stages serve``, ``head`` and ``run`` leave their command lines to the engine, help included."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chiron.cli import app

NEEDED = {"serve": "--layers", "head": "--stage", "run": "--stages"}


def said(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["stages", *arguments])


@pytest.mark.parametrize(
    ("command", "option"), [("serve", "--kv-capacity-tokens"), ("head", "--micro-batches"), ("run", "--start-timeout")]
)
@pytest.mark.parametrize("before", [(), ("models/x",), ("--dtype", "float32")])
def test_help_lists_the_options_wherever_it_is_asked_for(command: str, option: str, before: tuple[str, ...]) -> None:
    result = said(command, *before, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"usage: chiron stages {command} ")
    assert option in result.stdout
    assert "MODEL" in result.stdout.split("options:")[0]


@pytest.mark.parametrize("command", NEEDED)
def test_without_a_model_the_error_names_it(command: str) -> None:
    result = said(command, NEEDED[command], "0-3")
    assert result.exit_code == 2
    assert "the following arguments are required: MODEL" in result.stderr


@pytest.mark.parametrize("command", NEEDED)
def test_the_model_may_follow_its_options(command: str, tmp_path: Path) -> None:
    result = said(command, NEEDED[command], "0-3", str(tmp_path / "none"))
    assert "no config.json there" in str(result.exception)
