"""The process that speaks with Ray may hang, die or talk nonsense: the gateway waits no longer than it must."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import psutil
import pytest

from child_processes import children
from chiron.fleet.ray.client import AgentClient, AgentSettings
from chiron.fleet.ray.cluster import Answer, Node, Question, RayError, Seen
from ray_agent_stub import a_python

QUESTION = Question(holder="x")
READY = 'print(\'{"ray": "2.60.0"}\', flush=True); sys.stdin.readline()'
SEEN = {"name": "n", "phase": "ready", "why": "", "host": "10.0.0.1", "port": 80, "holder": "x", "stopping": False}


def answer(**seen: object) -> str:
    said = {"instances": [{**SEEN, **seen}], "nodes": [{"address": "10.0.0.1", "resources": {"GPU": 8}}]}
    return f"{READY}; print({json.dumps(said)!r}, flush=True); sys.stdin.read()"


def client(directory: Path, body: str, *, connect_s: float = 60.0, answer_s: float = 60.0) -> AgentClient:
    settings = AgentSettings(connect_timeout_s=connect_s, answer_timeout_s=answer_s)
    return AgentClient("auto", "chiron", a_python(directory, body), settings)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit(7)", r"the agent has ended \(status 7\)"),
        ("sys.exit('no module named ray')", r"the agent has ended \(status 1\): no module named ray"),
        ('print(\'{"error": "ConnectionError: no cluster"}\')', "ConnectionError: no cluster"),
        (f"{READY}; os._exit(3)", r"the agent has ended \(status 3\)"),
        (f"{READY}; print('nonsense', flush=True)", "the agent's answer cannot be read"),
        (f"{READY}; print('[]', flush=True)", "the agent's answer is no table"),
        (f"{READY}; print('{{}}', flush=True)", "the agent's answer cannot be read: KeyError: 'nodes'"),
        (answer(phase="fine"), "phase 'fine'"),
        (answer(port=70_000), "port 70000"),
        (answer(host="10.0.0.1/x?"), "host '10.0.0.1/x"),
    ],
)
def test_an_agent_that_fails_is_an_error_in_words(body: str, reason: str, tmp_path: Path) -> None:
    async def story() -> None:
        asked = client(tmp_path, body)
        with pytest.raises(RayError, match=reason):
            await asked.ask(QUESTION)
        await asked.close()

    asyncio.run(story())
    assert not children()


@pytest.mark.parametrize("body", ["time.sleep(600)", f"{READY}; time.sleep(600)"], ids=["joining", "asked"])
def test_one_that_hangs_is_ended_at_its_deadline_and_another_is_asked(body: str, tmp_path: Path) -> None:
    async def story() -> None:
        patience = {"connect_s": 0.2} if body.startswith("time") else {"answer_s": 0.2}
        asked = client(tmp_path, body, **patience)
        with pytest.raises(RayError, match=r"Ray has not answered within 0.2 s"):
            await asked.ask(QUESTION)
        assert asked.pid is None
        assert not children(), "it is ended"
        a_python(tmp_path, answer())
        patient = client(tmp_path, answer())
        told = await patient.ask(QUESTION)
        assert told == Answer(instances=(Seen(**SEEN),), nodes=(Node(address="10.0.0.1", resources={"GPU": 8.0}),))  # type: ignore[arg-type]
        assert patient.ray_version == "2.60.0"
        await patient.close()

    asyncio.run(story())
    assert not children()


def test_an_agent_ends_with_its_gateway(tmp_path: Path) -> None:
    """The agent itself, before it has found a cluster: it must not wait for one when nobody is left."""
    ray = tmp_path / "ray.py"
    ray.write_text("import time\n__version__ = '1'\ndef init(**_): time.sleep(600)\n")

    async def story() -> None:
        body = (
            f"os.environ['PYTHONPATH'] = {str(tmp_path)!r}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        )
        asked = client(tmp_path, body, connect_s=600.0)
        asking = asyncio.ensure_future(asked.ask(QUESTION))
        until_s = time.monotonic() + 60.0
        while asked.pid is None:
            assert time.monotonic() < until_s
            await asyncio.sleep(0.01)
        process = psutil.Process(asked.pid)
        assert asked._process is not None
        assert asked._process.stdin is not None
        asked._process.stdin.close()
        assert await asyncio.to_thread(process.wait, 60.0) in (0, None)
        with pytest.raises(RayError):
            await asking
        await asked.close()

    asyncio.run(story())
