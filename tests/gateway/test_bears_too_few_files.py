"""File descriptors that run out: the gateway goes on, says so, and takes new clients in place of idle ones."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path

import pytest

FILES = 160
GATEWAY = """
import asyncio, logging, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
if sys.argv[3] == "uvloop":
    import uvloop
    uvloop.install()
from chiron.config.serve import load_serve
from chiron.gateway.service import Service
logging.basicConfig(level="WARNING")
async def main():
    service = Service(load_serve(sys.argv[1], [], None))
    print(await service.start(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await service.stop(0.0)
asyncio.run(main())
"""
CONFIG = """
[models.m]
engine = "openai"
endpoints = ["http://127.0.0.1:9"]
[server]
port = 0
[limits]
idle = "10m"
header_timeout = "10m"
"""


def ask(port: int, path: str) -> bytes:
    """The body of a 200; empty if it was closed or refused."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.read() if answer.status == 200 else b""
    except OSError:
        return b""
    finally:
        connection.close()


@pytest.mark.parametrize("loop", [pytest.param("asyncio", marks=pytest.mark.slow), "uvloop"])
def test_more_clients_than_file_descriptors_stop_nobody(tmp_path: Path, loop: str) -> None:
    config = tmp_path / "chiron.toml"
    config.write_text(CONFIG)
    command = [sys.executable, "-c", GATEWAY, str(config), str(FILES), loop]
    said = tmp_path / "stderr"
    with (
        said.open("wb") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as gateway,
        ExitStack() as stack,
    ):
        assert gateway.stdin is not None
        assert gateway.stdout is not None
        port = int(gateway.stdout.readline().decode().strip().rpartition(":")[2])
        for _ in range(2 * FILES):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        ends_s = time.monotonic() + 60.0
        while not (page := ask(port, "/chiron/status")):
            assert time.monotonic() < ends_s, said.read_text()
            time.sleep(0.1)
        files = json.loads(page)["files"]
        assert files["max"] == FILES
        assert 0 < files["open"] < FILES
        gateway.stdin.close()
        assert gateway.wait(60) == 0
    log = said.read_text()
    assert f"this process may have {FILES} file descriptors (ulimit -n)" in log
    assert "short of connections or memory: idle and slow clients are disconnected" in log
    assert "Too many open files" not in log
    assert len(log) < 20_000
