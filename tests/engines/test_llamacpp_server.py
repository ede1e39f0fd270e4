"""llama.cpp's server as an engine process: it starts quickly, streams, tells its load, and stops when told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from chiron.engines.metrics import read_row
from chiron.engines.rows import ENGINES

COMMAND = [sys.executable, "-m", "chiron.engines.serve.llamacpp"]
SLOTS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    from chiron.engines.serve.toy import toy_model

    return toy_model(directory=tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(model: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [*COMMAND, "--model", str(model), "--served-model-name", "toy", "--max-num-seqs", str(SLOTS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("chiron-engine ready port=")
        yield process, int(line.rpartition("=")[2])
    finally:
        process.kill()
        process.communicate()


def ask(port: int, path: str, **fields: Any) -> bytes:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        if fields:
            connection.request("POST", path, json.dumps(fields), {"content-type": "application/json"})
        else:
            connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        return body
    finally:
        connection.close()


@contextmanager
def open_stream(port: int) -> Iterator[HTTPResponse]:
    """A stream that has begun and has long to go; leaving closes it."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    try:
        assert response.readline().startswith(b"data: ")
        yield response
    finally:
        response.close()
        connection.close()


def figures(port: int) -> dict[str, float]:
    return read_row(ENGINES["llamacpp"], ask(port, ENGINES["llamacpp"].metrics_path).decode())


def test_it_answers_streams_and_counts(server: tuple[subprocess.Popen[str], int]) -> None:
    _, port = server
    assert json.loads(ask(port, "/v1/models"))["data"][0]["id"] == "toy"
    ask(port, ENGINES["llamacpp"].health_path)
    messages = [{"role": "user", "content": "hello"}]
    whole = json.loads(ask(port, "/v1/chat/completions", messages=messages, max_tokens=5, ignore_eos=True))
    assert whole["usage"]["completion_tokens"] == 5
    options = {"stream": True, "stream_options": {"include_usage": True}}
    text = ask(port, "/v1/completions", prompt=[5, 6, 7], max_tokens=8, ignore_eos=True, **options)
    events = [json.loads(event[6:]) for event in text.split(b"\n\n") if event.startswith(b"data: {")]
    assert events[-1]["usage"]["completion_tokens"] == 8
    read = figures(port)
    assert (read["running"], read["waiting"], read["generation_tokens"]) == (0, 0, 13)
    assert read["steps"] > 0
    assert read["itl_sum_s"] > 0


def test_a_client_that_leaves_frees_its_slot(server: tuple[subprocess.Popen[str], int]) -> None:
    _, port = server
    for _ in range(3 * SLOTS):
        with open_stream(port):
            pass
    deadline_s = time.monotonic() + 60
    while figures(port)["running"]:
        assert time.monotonic() < deadline_s
    assert figures(port)["generation_tokens"] < 3 * SLOTS * 1000, "no stream ran to its end"


def test_it_stops_at_once_though_a_stream_runs(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    with open_stream(port) as stream:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        # Cut off: it did not wait for the stream to end.
        rest = b""
        with suppress(HTTPException, ConnectionError):
            while line := stream.readline():
                rest += line
        assert b"[DONE]" not in rest


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "No such file"), (b"text", "not a GGUF file"), (b"GGUF" + bytes(40), "did not start")],
    ids=["missing", "text", "broken"],
)
def test_a_wrong_model_is_told(tmp_path: Path, content: bytes | None, named: str) -> None:
    pytest.importorskip("xllamacpp")
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    result = subprocess.run([*COMMAND, "--model", str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert named in result.stderr
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    program = "import sys; sys.modules['xllamacpp'] = None; from chiron.engines.serve.llamacpp import main; main()"
    command = [sys.executable, "-c", program, "--model", str(tmp_path / "model.gguf")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "pip install 'chiron-serving[llamacpp]'" in result.stderr
