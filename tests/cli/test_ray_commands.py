"""``chiron ray``, and what ``chiron doctor`` and ``chiron init`` say of Ray; the agent is a stub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chiron.cli import app
from ray_agent_stub import a_python

runner = CliRunner()
WAITS = "chiron:chiron:m%2Fvllm:0a1b2c3d4e5f:33333333"
FREE, HELD = "chiron:chiron:m%2Fvllm:0a1b2c3d4e5f:11111111", "chiron:chiron:m%2Fvllm:0a1b2c3d4e5f:22222222"
AGENT = f"""
def seen(name, holder, phase="ready"):
    at = {{"host": "10.0.0.1", "port": 80}} if phase == "ready" else {{"host": "", "port": 0}}
    state = {{"phase": phase, "why": "", "stopping": False, **at}}
    return {{"name": name, "holder": holder, **state}}

print(json.dumps({{"ray": "2.60.0"}}), flush=True)
there = [seen({FREE!r}, ""), seen({HELD!r}, "gateway-1"), seen({WAITS!r}, "", "pending")]
for line in sys.stdin:
    stop = json.loads(line)["stop"]
    nodes = [{{"address": "10.0.0.1", "resources": {{"GPU": 4, "CPU": 32, "memory": 1e9}}}}] * 2
    print(json.dumps({{"instances": there, "nodes": nodes}}), flush=True)
    there = [each for each in there if each["name"] not in stop]
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return a_python(tmp_path, AGENT)


def call(*arguments: object) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_what_runs_is_listed(python: str) -> None:
    result = call("ray", "list", "--python", python)
    assert result.stdout.splitlines() == [
        f"{FREE}  ready  at 10.0.0.1:80  of no gateway",
        f"{HELD}  ready  at 10.0.0.1:80  of gateway gateway-1",
        f"{WAITS}  pending  of a gateway that waits for it, or of none",
    ]
    assert "3 instances in namespace chiron; 2 nodes (CPU 64, GPU 8)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([FREE], 0, "removed 1"),
        ([HELD], 2, "gateway gateway-1 has it; stop that first, or use --force"),
        ([HELD, FREE, "--force"], 0, "removed 2"),
        (["--free"], 0, "removed 1"),
        (["--free", "--force"], 0, "removed 2"),
        ([WAITS], 0, "removed 1"),
        ([], 2, "name instances, or use --free"),
        (["x"], 2, "'x': there is none in namespace chiron; `chiron ray list` lists them"),
    ],
)
def test_what_nobody_looks_after_is_removed(python: str, arguments: list[str], status: int, words: str) -> None:
    result = call("ray", "remove", "--python", python, *arguments)
    assert (result.exit_code, words in result.stderr) == (status, True), result.stderr


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    result = call("ray", "list", "--python", a_python(tmp_path, "sys.exit('no cluster')"))
    assert result.exit_code == 2
    assert result.stderr == "error: --address auto: the agent has ended (status 1): no cluster\n"


@pytest.mark.parametrize(
    ("gpus", "nodes", "state", "words"),
    [
        (4, 1, "ok", "needs CPU 1, GPU 4; 2 of 2 nodes are large enough"),
        (8, 2, "ok", "needs CPU 1, GPU 4 on each of 2 nodes; 2 of 2 nodes are large enough"),
        (8, 1, "warn", "needs CPU 1, GPU 8; 0 of 2 nodes are large enough"),
    ],
)
def test_doctor_asks_the_cluster_and_looks_for_room(
    python: str, tmp_path: Path, gpus: int, nodes: int, state: str, words: str
) -> None:
    config = tmp_path / "chiron.toml"
    lines = [
        'engine = "vllm"',
        'model_path = "org/m"',
        f"gpus = {gpus}",
        f"ray = {{ python = {python!r}, nodes = {nodes} }}",
    ]
    config.write_text("\n".join(["[models.m]", *lines]))
    found = {line["what"]: line for line in json.loads(call("doctor", "--json", config).stdout)}
    assert found["Ray auto"]["found"] == "version 2.60.0, 2 nodes (CPU 64, GPU 8)"
    assert found["room for m/vllm"]["found"] == words
    assert found["room for m/vllm"]["state"] == state
    assert "1 of them of no gateway" in found["Ray auto: instances"]["found"]


def test_doctor_says_what_to_do_when_there_is_no_cluster(tmp_path: Path) -> None:
    config = tmp_path / "chiron.toml"
    python = a_python(tmp_path, "sys.exit('no cluster')")
    config.write_text(f'[models.m]\nengine = "vllm"\nmodel_path = "org/m"\nray = {{ python = {python!r} }}')
    found = {line["what"]: line for line in json.loads(call("doctor", "--json", config).stdout)}
    assert (found["Ray auto"]["state"], found["Ray auto"]["found"]) == (
        "fail",
        "the agent has ended (status 1): no cluster",
    )
    assert "ray start --head" in found["Ray auto"]["next"]


def test_init_writes_the_line_for_ray(python: str) -> None:
    assert call("init", "c.toml", "--engine", "vllm", "--model-path", "org/m", "--ray", "10.0.0.1:6379").exit_code == 0
    assert 'ray = { address = "10.0.0.1:6379" }' in Path("c.toml").read_text().splitlines()
    result = call("init", "d.toml", "--endpoint", "http://127.0.0.1:1", "--engine", "vllm", "--ray", "auto")
    assert (result.exit_code, "are started nowhere" in result.stderr) == (2, True)
