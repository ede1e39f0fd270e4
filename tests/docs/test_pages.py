"""What the documents say exists does exist: links, commands, options, targets, functions, packages."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from chiron.cli import app
from scenario_text import SMALL

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "src/chiron", "tests", "tools", "bench", ".ci")
TEXTS = {".md", ".py", ".toml", ".json", ".lock", ".html", ".css", ".js", ".yml", ".yaml", ""}


def files() -> list[Path]:
    """Every text file of the project."""
    found = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return sorted(path for path in found if path.suffix in TEXTS)


PAGES = [path for path in files() if path.suffix == ".md"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(text: str) -> Iterator[str]:
    """Lines of code blocks, and inline code."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for block in blocks:
        yield from block.replace("\\\n", " ").splitlines()
    for part in re.split(r"^```[a-z]*\n.*?^```", text, flags=re.DOTALL | re.MULTILINE):
        yield from re.findall(r"`([^`\n]+)`", part)


def commands(text: str, program: str) -> list[list[str]]:
    """Calls of a program, split into words."""
    found = []
    for line in code(text):
        for call in line.removeprefix("$ ").split("&&"):
            words = shlex.split(call.replace("'", " "), comments=True)
            if len(words) > 1 and words[0] == program:
                found.append(words[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_and_anchor_resolves(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    missing = []
    for target in targets:
        where, _, anchor = target.partition("#")
        if "://" in where:
            continue
        there = page.parent / where if where else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            missing.append(target)
    assert missing == []


@cache
def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them: the second of the same name ends in -1."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        said = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
        name = re.sub(r"[^\w -]", "", said).replace(" ", "-")
        number = 0
        while (numbered := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(numbered)
    return found


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_chiron_command_and_option_exists(page: Path) -> None:
    for words in commands(page.read_text(), "chiron"):
        command = command_line()
        while words and hasattr(command, "commands") and (found := command.get_command(None, words[0])) is not None:
            command = found
            del words[0]
        assert command.name != "chiron" or not words or words[0].isupper() or words[0].startswith("-"), words
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= known, f"chiron {command.name}: {used - known}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {words[0] for words in commands(page.read_text(), "make")}
    assert used <= targets


def test_bare_make_lists_the_targets() -> None:
    make = shutil.which("make")
    assert make is not None
    said = subprocess.run([make, "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^make ([a-z-]+) ", said, re.MULTILINE))
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    assert listed == set(targets[1].split())


def test_the_readme_has_the_two_commands_and_a_figure() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo\nmake test\n" in text
    (figure,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert (ROOT / figure).stat().st_size > 1000


@pytest.mark.slow
def test_the_readme_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = tmp_path / "small.toml"
    scenario.write_text(SMALL.replace("seeds = [1, 2]", "seeds = [1]"))
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert '"demo"' in lines
    monkeypatch.chdir(tmp_path)
    exec(lines.replace('"demo"', repr(str(scenario))), {})
    assert float(capsys.readouterr().out.split()[0]) > 0
    assert "</html>" in (tmp_path / "report.html").read_text()


def test_the_code_map_lists_every_package() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    packages = [path.parent for path in (ROOT / "src/chiron").rglob("__init__.py")]
    data = [path for path in (ROOT / "src/chiron/data").iterdir() if path.is_dir()]
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    missing = [name_of(path) for path in packages if f"`{name_of(path)}/`" not in rows and path.name != "chiron"]
    missing += [name_of(path) for path in data if f"`data/{path.name}/`" not in rows]
    assert missing == []


def test_the_code_map_lists_only_what_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(rows) > 30
    stale = [row for row in rows if not (ROOT / row).exists() and not (ROOT / "src/chiron" / row).exists()]
    assert stale == []


def test_every_function_that_the_architecture_names_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`(?:\w+\.)*(\w+)\(\)`", text))
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    defined = set(re.findall(r"def (\w+)\(", source))
    assert len(named) > 30
    assert named <= defined


def test_lock_files_hold_only_pins_and_development_adds_to_the_base() -> None:
    base = (ROOT / "requirements.lock").read_text().splitlines()
    development = (ROOT / "requirements-dev.lock").read_text().splitlines()
    assert [line for line in [*base, *development] if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)] == []
    assert set(base) < set(development)
    assert not {"pytest", "ruff", "mypy", "hypothesis"} & {line.partition("==")[0] for line in base}


HOSTS = {
    "10.255.255.1",
    "10.255.255.2",
    "127.0.0.1",
    "127.0.0.1.evil.example",
    "192.168.0.7",
    "HOST",
    "arxiv.org",
    "chiron.llm.svc",
    "deb.debian.org",
    "download.pytorch.org",
    "creativecommons.org",
    "engine",
    "evil.example",
    "example.com",
    "example.org",
    "github.com",
    "json-schema.org",
    "localhost",
    "llm.example.org",
    "localhost.invalid",
    "printer",
    "semver.org",
    "staged-head",
    "www.apache.org",
    "www.w3.org",
    "x",
}
"""Hosts that the project refers to. A new one is added here, on purpose."""


@pytest.mark.parametrize("folder", [".", *FOLDERS])
def test_files_name_no_unknown_host_and_no_path_of_a_machine(folder: str) -> None:
    machine = re.compile(r"(?<![\w.*])/(?:work|home|root|opt|mnt|Users)/[A-Za-z]")
    unfinished = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
    odd = []
    for path in files():
        inside = path.parent == ROOT if folder == "." else (ROOT / folder) in path.parents
        if not inside:
            continue
        text = path.read_text(errors="replace")
        hosts = set(re.findall(r"https?://([\w.-]+)", text)) - HOSTS
        found = (*sorted(hosts), *machine.findall(text), *unfinished.findall(text))
        odd += [f"{name_of(path)}: {what}" for what in found]
    assert odd == []
