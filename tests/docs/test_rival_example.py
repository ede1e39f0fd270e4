"""The policy that CONTRIBUTING.md shows works as it stands there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chiron.config.build import setups
from chiron.config.scenario import load_scenario
from chiron.policies.policy import PolicyEntry
from chiron.policies.registry import POLICIES
from chiron.sim.run import simulate
from chiron.telemetry.result import Result
from scenario_text import SMALL

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


def block(name: str) -> str:
    """The Python block under the comment ``rival: name``."""
    found = re.findall(rf"<!-- rival: {name} -->\n```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    assert len(found) == 1
    return str(found[0])


@pytest.fixture
def rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file as saved by a reader, and its line in the registry."""
    path = tmp_path / "target.py"
    path.write_text(block("file"))
    spec = importlib.util.spec_from_file_location("rival_example_target", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    lines: dict[str, Any] = eval(f"{{{block('registry')}}}", {**vars(module), "PolicyEntry": PolicyEntry})
    assert list(lines) == ["target"]
    monkeypatch.setitem(POLICIES, "target", lines["target"])
    return module


def run(tmp_path: Path, *overrides: str) -> Result:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    (setup,) = setups(load_scenario(str(path), overrides), policies=["target"], seeds=[1])
    return simulate(setup)


@pytest.mark.usefixtures("rival")
def test_the_example_grows_the_fleet_with_the_requests_on_it(tmp_path: Path) -> None:
    small_target = run(tmp_path, "policies.target.requests_per_instance=5", "models.llama.initial=1")
    large_target = run(tmp_path, "policies.target.requests_per_instance=500", "models.llama.initial=1")
    assert small_target.summary["finished"] == small_target.summary["requests"] > 200
    assert small_target.summary["instances_peak"] > large_target.summary["instances_peak"] == 1
    grown = [d for d in small_target.decisions if d.kind == "fleet" and d.after > d.before]
    assert {d.reason for d in grown} == {"target"}
    assert all(d.numbers["requests"] > 5 * d.before for d in grown)


@pytest.mark.usefixtures("rival")
def test_a_misspelt_setting_of_the_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"policies\.target\.requests_per_instanc.*requests_per_instance"):
        run(tmp_path, "policies.target.requests_per_instanc=5")


def test_the_example_is_as_short_as_it_is_said_to_be() -> None:
    assert len(block("file").splitlines()) < 40
    assert len(block("registry").splitlines()) == 1
