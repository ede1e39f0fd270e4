"""What a gateway leaves behind elsewhere is known as its own by those that replace it, and by nobody else."""

from __future__ import annotations

from pathlib import Path

from chiron.config.serve import parse_serve
from chiron.gateway.owner import FILE, owner_of
from chiron.gateway.settings import ServeConfig

MODEL = '[models.m]\nengine = "openai"\nendpoints = ["http://127.0.0.1:9"]\n'


def config(directory: Path, head: str = "") -> ServeConfig:
    directory.mkdir(exist_ok=True)
    return parse_serve(f"{head}[server]\ndata = '{directory}'\n{MODEL}", directory=directory)


def test_a_data_directory_is_one_owner(tmp_path: Path) -> None:
    first = owner_of(config(tmp_path / "a"))
    assert first == owner_of(config(tmp_path / "a")) != owner_of(config(tmp_path / "b"))
    assert [path.name for path in (tmp_path / "a").iterdir()] == [FILE]
    for damaged in ("", "x\n", f"{first}{first}"):
        (tmp_path / "a" / FILE).write_text(damaged)
        assert owner_of(config(tmp_path / "a")) not in ("", first, damaged)


def test_gateways_of_one_database_are_one_owner_whoever_connects(tmp_path: Path) -> None:
    owners = {
        owner_of(config(tmp_path / user, f"store = 'postgresql://{user}:secret@db:5432/chiron'\n")) for user in "ab"
    }
    assert owners == {"db:5432/chiron chiron"}


def test_gateways_of_different_schemas_of_one_database_are_different_owners(tmp_path: Path) -> None:
    owners = {
        owner_of(config(tmp_path / schema, f"[store]\nurl = 'postgresql://db/chiron'\nschema = '{schema}'\n"))
        for schema in ("one", "two")
    }
    assert len(owners) == 2


def test_without_a_disk_nobody_owns_it(tmp_path: Path) -> None:
    (tmp_path / "a" / FILE).mkdir(parents=True)  # Which can be neither read nor made.
    assert owner_of(config(tmp_path / "a")) == ""
