"""The bench of the gateway's HTTP beside libraries. Without them it says so; what it measures of ours answers alike."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest

from ports import free_port

BENCH = Path(__file__).parents[2] / "bench"
LIBRARIES = ("uvicorn", "granian", "aiohttp")


@pytest.mark.skipif(
    all(importlib.util.find_spec(name) for name in LIBRARIES), reason="all libraries of the bench are installed"
)
def test_a_missing_library_is_named_with_the_way_to_install_it() -> None:
    done = subprocess.run([sys.executable, str(BENCH / "http_stack.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not installed" in done.stderr
    assert "bench/requirements.txt" in done.stderr


@pytest.mark.parametrize("target", ["own server", "own server, ASGI"])
def test_each_of_our_servers_gives_the_same_answers(target: str) -> None:
    port = free_port()
    command = [sys.executable, str(BENCH / "http_stack_target.py"), target, str(port)]
    with subprocess.Popen(command) as process:
        try:
            assert ask(port, "GET", b"") == str(process.pid).encode()
            assert b'"object": "chat.completion"' in ask(port, "POST", b"{}")
            stream = ask(port, "POST", b'{"stream": true}')
            assert stream.count(b"data: {") == 100
            assert stream.endswith(b"data: [DONE]\n\n")
        finally:
            process.terminate()


def ask(port: int, method: str, body: bytes) -> bytes:
    """One answer; waits for the server to listen."""
    for _ in range(600):
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(method, "/v1/chat/completions", body)
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return connection.getresponse().read()
        finally:
            connection.close()
    raise AssertionError(f"nothing listens on port {port}")
