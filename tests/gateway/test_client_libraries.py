"""LangChain, LlamaIndex, instructor, LiteLLM and the openai SDK against the gateway of the demo, with both engines.

They are installed from the package index, at the versions in ``client_libraries.txt``, into an environment of their
own. What they could not do is in a table here and in ``docs/clients.md``, and a check that begins to pass fails too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("openvino_genai")

from chiron.cli.demo.plan import write_config
from edge_site import ask
from fault_site import FaultSite, wait_for
from ports import free_port

HERE = Path(__file__).parents[1] / "support" / "gateway"
PINS = HERE / "client_libraries.txt"
INSTALL_TIMEOUT_S = 1200.0
CHECKS_TIMEOUT_S = 900.0

QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "LITELLM_LOG": "ERROR"}
"""Nothing is asked of or told to anybody else."""
READS_NO_PROMPT = {"instructor_json", "instructor_markdown_json"}
"""They tell the model the schema in the prompt only."""
COULD_NOT = {
    "emulated": READS_NO_PROMPT,
    "openvino": READS_NO_PROMPT
    | {"llamaindex_alternatives"}  # Its runtime knows the likelihood of what is said and of nothing else.
    # Whether to call a tool is the model's choice, and the toy's is noise.
    | {"langchain_tools_by_themselves", "langchain_agent_calls_a_tool", "instructor_parallel_tools"},
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has them."""
    directory = tmp_path_factory.mktemp("libraries")
    subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True)
    python = directory / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    pins = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    probe = [*pip, "download", "--no-deps", "--dest", directory / "probe", pins[0]]
    found = subprocess.run(probe, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    if found.returncode:
        pytest.skip(f"no package index here: {found.stderr.strip().splitlines()[-1:]}")
    install = [*pip, "install", "--no-deps", "--only-binary", ":all:", "-r", PINS]
    done = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture(scope="module", params=["emulated", "openvino"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, engine: str) -> Iterator[FaultSite]:
    """The demo's gateway."""
    directory = tmp_path_factory.mktemp("demo")
    text = write_config(directory, embedded=engine == "openvino", port=free_port())
    with FaultSite(directory, text) as running:
        wait_for(lambda: ask(running.url + "/ready").status == 200, "the gateway has an engine")
        yield running


@pytest.mark.slow
def test_each_library_does_what_it_can(libraries: Path, engine: str, site: FaultSite) -> None:
    done = subprocess.run(
        [libraries, "-W", "ignore", HERE / "client_libraries.py", site.url + "/v1", "demo"],
        env=os.environ | QUIET,
        capture_output=True, text=True, timeout=CHECKS_TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    failed = {name: what for name, what in said.items() if what != "ok"}
    assert set(failed) == COULD_NOT[engine], failed
