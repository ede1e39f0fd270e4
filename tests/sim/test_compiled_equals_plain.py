"""The optional compiled build (setup.py): equal results, bit by bit; plain Python, and why, where it cannot be made."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from compiled import copy_source, python, setup
from policy_names import ALL_CODE

PROGRAM = """
import pickle
import sys
from chiron.api import load_scenario, scenarios
from chiron.core.compiled import build
from policy_names import ALL_CODE
from scenario_factory import example_setup, everything, run
print(build(), file=sys.stderr)
assert build() == sys.argv[1], build()
for name in scenarios():
    print(name, load_scenario(name))
for policy in sys.argv[2:]:
    setup = pickle.loads(pickle.dumps(example_setup(policy)))  # As for a run on another core.
    for part, text in everything(run(setup)).items():
        print(policy, part, text)
"""


@pytest.fixture(scope="module")
def compiled_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    copy_source(folder)
    said = setup(folder, "build_ext", "--inplace")
    if "installed as plain Python" in said:
        pytest.skip(said.strip().splitlines()[0])
    return folder / "src"


@pytest.mark.slow
def test_every_policy_writes_the_same_bytes_compiled(compiled_source: Path) -> None:
    policies = [*ALL_CODE, "wild"]
    plain = python(PROGRAM, "plain Python", *policies)
    compiled = python(PROGRAM, "compiled", *policies, source=compiled_source)
    assert plain.count(b"\n") > 500 * len(policies)
    for one, other in zip(plain.splitlines(), compiled.splitlines(), strict=True):
        assert one == other


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_plain_python_and_says_why(tmp_path: Path) -> None:
    copy_source(tmp_path)
    said = setup(tmp_path, "bdist_wheel", CC="/no/such/compiler")
    assert "installed as plain Python: no C compiler that finds Python.h" in said
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    build = python("from chiron.core.compiled import build; print(build())", source=tmp_path / "installed")
    assert build.startswith(b"plain Python; not compiled: no C compiler that finds Python.h")


def test_the_variable_is_0_or_1(tmp_path: Path) -> None:
    copy_source(tmp_path)
    with pytest.raises(AssertionError, match="CHIRON_COMPILE is 'yes'; it must be 0 or 1"):
        setup(tmp_path, "--version", CHIRON_COMPILE="yes")
