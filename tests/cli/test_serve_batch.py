"""``chiron serve`` in a process of its own with emulated engines, and ``chiron batch`` against it."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("httptools")
pytest.importorskip("psutil")

from chiron.cli import app
from chiron.cli.batch import command as batch_command
from chiron.cli.batch.client import Server, ServerError
from chiron.gateway.relay.keys import hash_secret
from ports import free_port

SECRET = "sk-chiron-of-this-test"
CONFIG = f"""
[models.m]
engine = "emulated"
profile = "llama-3.1-8b/a100/tp1"
args = ["--speedup", "50"]
max_instances = 1
max_num_seqs = 8

[server]
port = 0
grace = "30s"

[[keys]]
name = "team"
hash = "{hash_secret(SECRET.encode())}"
"""
START_TIMEOUT_S = 60.0

runner = CliRunner()


class Gateway:
    """A running ``chiron serve``."""

    def __init__(self, directory: Path, *options: str) -> None:
        (directory / "chiron.toml").write_text(CONFIG)
        self.log = directory / "stderr.txt"
        command = [sys.executable, "-c", "from chiron.cli import main; main()", "serve", "chiron.toml", *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=log)
        self.url = self._await_url()

    def _await_url(self) -> str:
        until_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until_s and self.process.poll() is None:
            found = re.search(r"serves at (http\S+)/v1", self.log.read_text())
            if found:
                return found[1]
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"no start: {self.log.read_text()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    running = Gateway(tmp_path_factory.mktemp("serve"))
    yield running
    assert running.stop() == 0, running.log.read_text()
    assert "stopped" in running.log.read_text()
    assert SECRET not in running.log.read_text()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHIRON_API_KEY", SECRET)
    return tmp_path


def call(*arguments: object) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def write_requests(path: Path, count: int, tokens: int = 5, model: str = "m") -> Path:
    body = {"model": model, "max_tokens": tokens, "messages": [{"role": "user", "content": "hello"}]}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    path.write_text("".join(json.dumps({"custom_id": f"c{i}", **line}) + "\n" for i in range(count)))
    return path


def test_a_batch_is_submitted_followed_and_fetched_in_the_order_of_its_lines(gateway: Gateway, here: Path) -> None:
    url = ["--url", gateway.url]
    submitted = call(
        "batch", "submit", write_requests(here / "r.jsonl", 60), "-w", "5m", "-m", "team=x", "--wait", *url
    )
    assert submitted.exit_code == 0, submitted.output
    id = submitted.stdout.strip()
    assert submitted.stdout == f"{id}\n"  # A script takes it as it is: id=$(chiron batch submit ... --wait).
    assert f"{id}: completed, 60 of 60 items (100.0 %)" in submitted.stderr
    assert f"{id}: completed, 60 of 60 items" in call("batch", "status", id, "--watch", *url).stdout
    assert id in call("batch", "status", *url).stdout
    shown = json.loads(call("batch", "status", id, "--json", *url).stdout)
    assert (shown["metadata"], shown["completion_window"]) == ({"team": "x"}, "5m")
    assert id in call("batch", "list", *url).stdout
    call("batch", "results", id, "-o", "out.jsonl", *url)
    lines = [json.loads(line) for line in (here / "out.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"c{i}" for i in range(60)]
    assert {line["response"]["body"]["usage"]["completion_tokens"] for line in lines} == {5}
    assert not (here / "out.jsonl.part").exists()
    nothing = call("batch", "results", id, "--errors", *url)
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "no item failed" in nothing.stderr


def test_a_file_with_bad_lines_is_refused_with_their_numbers(gateway: Gateway, here: Path) -> None:
    path = write_requests(here / "r.jsonl", 3)
    path.write_text(path.read_text() + "{not json\n" + json.dumps({"custom_id": "x", "method": "GET"}) + "\n")
    result = call("batch", "submit", path, "--url", gateway.url)
    assert result.exit_code == 2
    assert "failed" in result.stderr
    assert "line 4: " in result.stderr
    assert "line 5: " in result.stderr


def test_of_many_bad_lines_the_first_are_shown(gateway: Gateway, here: Path) -> None:
    path = write_requests(here / "r.jsonl", 30, model="nobody")
    result = call("batch", "submit", path, "--url", gateway.url)
    assert result.exit_code == 2
    assert result.stderr.count("body.model is 'nobody'") == 10
    assert f"and 20 more: chiron batch status {result.stdout.strip()} --json" in result.stderr


def test_a_batch_can_be_cancelled_and_has_no_results_before_its_end(gateway: Gateway, here: Path) -> None:
    url = ["--url", gateway.url]
    many = write_requests(here / "r.jsonl", 2000, tokens=4000)
    id = call("batch", "submit", many, "-w", "1h", *url).stdout.split()[0]
    early = call("batch", "results", id, *url)
    assert early.exit_code == 2
    assert "results can be fetched when it has ended" in early.stderr
    assert call("batch", "cancel", id, *url).exit_code == 0
    followed = call("batch", "status", id, "--watch", *url)
    assert "cancelled" in followed.stdout
    assert call("batch", "status", "batch_nothing", *url).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "--key", "wrong"], "401: Incorrect API key. (--key, or the variable CHIRON_API_KEY)"),
        (["submit", "r.jsonl", "-w", "2s"], "completion_window is '2s'; it must be from 1m to 30d."),
        (["submit", "r.jsonl", "-w", "soon"], "error: --window: duration 'soon': expected"),
        (["submit", "r.jsonl", "-m", "x"], "--metadata 'x': expected KEY=VALUE"),
        (["submit", "r.jsonl", "--endpoint", "/v1/nothing"], "endpoint is '/v1/nothing'; allowed: "),
        (["submit", "none.jsonl"], "error: none.jsonl: No such file or directory"),
        (["submit", "bad.jsonl"], "bad.jsonl: the first line is not a batch request"),
        (["cancel", "batch_x"], "404"),
        (
            ["list", "--url", "https://127.0.0.1", "--cacert", "none.pem"],
            "--cacert none.pem: No such file or directory",
        ),
        (["list", "--url", "https://127.0.0.1", "--cacert", "bad.jsonl"], "--cacert bad.jsonl: holds no certificate"),
        (["list", "--url", "ftp://x"], "--url 'ftp://x': must be"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    gateway: Gateway, here: Path, arguments: list[str], message: str
) -> None:
    write_requests(here / "r.jsonl", 1)
    (here / "bad.jsonl").write_text("[1]\n")
    result = call("batch", arguments[0], "--url", gateway.url, *arguments[1:])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_server_that_is_not_there_is_one_line() -> None:
    result = call("batch", "list", "--url", f"http://127.0.0.1:{free_port()}")
    assert result.exit_code == 2
    assert "cannot connect: Connection refused; is `chiron serve` running there?" in result.stderr


def test_a_download_that_breaks_off_is_an_error_and_leaves_no_file(here: Path) -> None:
    batch = {"id": "b", "status": "completed", "output_file_id": "f", "error_file_id": None}
    batch |= {"request_counts": {"total": 1, "completed": 1, "failed": 0}}
    answers = [json.dumps(batch).encode(), b"x" * 10]
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for body, length in zip(answers, (len(answers[0]), 100), strict=True):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % length + body)

        thread = threading.Thread(target=serve)
        thread.start()
        result = call("batch", "results", "b", "-o", "out.jsonl", "--url", f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert result.exit_code == 2
    assert "the connection was lost after 10 bytes" in result.stderr
    assert list(here.iterdir()) == []


def test_a_second_gateway_on_the_same_data_or_port_is_refused(gateway: Gateway) -> None:
    config = gateway.log.parent / "chiron.toml"
    events = gateway.log.parent / "chiron-data" / "events.jsonl"
    log_before = events.stat().st_ino
    result = call("serve", config)
    assert result.exit_code == 2
    assert f"in use by another process (pid {gateway.process.pid})" in result.stderr
    assert "choose another directory with --data" in result.stderr
    result = call("serve", config, "--data", "other", "--port", gateway.url.rpartition(":")[2])
    assert result.exit_code == 2
    assert "--port chooses another" in result.stderr
    result = call("serve", config, "--data", "other", "--host", "192.0.2.1")
    assert result.exit_code == 2
    assert "server.host: cannot listen on 192.0.2.1:0: Cannot assign requested address" in result.stderr
    assert [path.stat().st_ino for path in events.parent.glob("events.jsonl*")] == [log_before]
    assert not Path("other", "events.jsonl").exists()


def test_doctor_knows_a_running_chiron_on_its_port(gateway: Gateway, here: Path) -> None:
    port = int(gateway.url.rpartition(":")[2])
    (here / "c.toml").write_text('[models.m]\nengine = "vllm"\nendpoints = ["http://127.0.0.1:9"]\n')
    found = {each["what"]: each for each in json.loads(call("doctor", "c.toml", "--port", port, "--json").stdout)}
    assert found[f"port {port}"]["state"] == "ok"
    assert "a Chiron is running on 127.0.0.1" in found[f"port {port}"]["found"]


def test_who_reads_only_the_first_results_is_told_of_no_lost_connection(gateway: Gateway, here: Path) -> None:
    many = write_requests(here / "r.jsonl", 500)
    id = call("batch", "submit", many, "-w", "5m", "--wait", "--url", gateway.url).stdout.split()[0]
    program = [sys.executable, "-c", "from chiron.cli import main; main()"]
    with subprocess.Popen(
        [*program, "batch", "results", id, "--url", gateway.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"CHIRON_API_KEY": SECRET},
    ) as results:
        assert results.stdout is not None
        assert results.stderr is not None
        results.stdout.close()
        assert results.stderr.read() == b""


def test_a_watched_batch_is_told_in_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seen(status: str, done: int) -> dict[str, Any]:
        return {"id": "b", "status": status, "request_counts": {"total": 9, "completed": done, "failed": 0}}

    answers: list[Any] = [seen("in_progress", 2), seen("in_progress", 2)]
    answers += [ServerError("no answer"), ServerError("no answer"), seen("completed", 9)]

    class Answers:
        def get(self, path: str) -> dict[str, Any]:
            answer = answers.pop(0)
            if isinstance(answer, ServerError):
                raise answer
            return dict(answer)

    for name in ("POLL_S", "LINE_PERIOD_S"):
        monkeypatch.setattr(batch_command, name, 0.0)
    assert batch_command._watch(cast(Server, Answers()), seen("in_progress", 0))["status"] == "completed"
    said = capsys.readouterr().err.splitlines()
    assert said == ["b: in progress, 2 of 9 items (22.2 %)", "no answer; trying again"]


@pytest.mark.slow
def test_ctrl_c_ends_the_watching_and_says_that_the_batch_goes_on(gateway: Gateway, here: Path) -> None:
    url = ["--url", gateway.url]
    many = write_requests(here / "r.jsonl", 2000, tokens=4000)
    program = [sys.executable, "-c", "from chiron.cli import main; main()"]
    watch = subprocess.Popen(
        [*program, "batch", "submit", str(many), "--wait", "-w", "1h", *url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CHIRON_API_KEY": SECRET},
    )
    assert watch.stdout is not None
    assert watch.stderr is not None
    id = watch.stdout.readline().strip()
    assert "in progress" in watch.stderr.readline()
    watch.send_signal(signal.SIGINT)
    _, said = watch.communicate(timeout=60)
    assert watch.returncode == 130
    assert f"the batch continues; chiron batch status {id} --watch follows it again" in said
    assert call("batch", "cancel", id, *url).exit_code == 0


@contextmanager
def on_a_terminal(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, str]]:
    """``chiron serve`` as the leader of a terminal's session; process, the terminal's other side, URL."""
    (directory / "chiron.toml").write_text(CONFIG)
    ours, theirs = pty.openpty()

    def lead() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # These tests may themselves run under nohup.
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-c", "from chiron.cli import main; main()", "serve"],
        cwd=directory,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lead,
    )
    os.close(theirs)
    try:
        said = ""
        while not (found := re.search(r"serves at http://(\S+)/v1", said)):
            said += os.read(ours, 4096).decode()
        yield process, ours, found[1]
    finally:
        process.kill()
        process.wait()


def long_stream(host: str) -> http.client.HTTPResponse:
    """A stream that has begun and takes about a second more."""
    body = {"model": "m", "stream": True, "max_tokens": 4000, "messages": [{"role": "user", "content": "hello"}]}
    asked = http.client.HTTPConnection(host, timeout=60)
    headers = {"authorization": f"Bearer {SECRET}", "connection": "close"}
    asked.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = asked.getresponse()
    assert answer.readline().startswith(b"data: ")
    return answer


@pytest.mark.slow
def test_a_closed_terminal_lets_what_runs_end_however_often_it_says_so(here: Path) -> None:
    with on_a_terminal(here) as (process, terminal, host):
        answer = long_stream(host)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)
        assert answer.read().rstrip().endswith(b"data: [DONE]")
        assert process.wait(60) == 0
    assert (here / "chiron-data" / "result.chiron").exists()


@pytest.mark.slow
def test_under_nohup_the_gateway_outlives_its_terminal(here: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # The child inherits it.
    try:
        running = Gateway(here)
    finally:
        signal.signal(signal.SIGHUP, before)
    running.process.send_signal(signal.SIGHUP)
    assert long_stream(running.url.removeprefix("http://")).read().rstrip().endswith(b"data: [DONE]")
    assert running.stop() == 0


@pytest.mark.slow
def test_a_watched_batch_survives_kill_9_of_the_gateway(here: Path) -> None:
    port = str(free_port())
    first = Gateway(here, "--port", port)
    requests = write_requests(here / "r.jsonl", 300, tokens=2000)
    program = [sys.executable, "-c", "from chiron.cli import main; main()"]
    watch = subprocess.Popen(
        [*program, "batch", "submit", str(requests), "--wait", "-w", "10m", "--url", first.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CHIRON_API_KEY": SECRET},
    )
    assert watch.stdout is not None
    id = watch.stdout.readline().strip()
    until_s = time.monotonic() + 60
    while "in progress, 0 of" in call("batch", "status", id, "--url", first.url).stdout and time.monotonic() < until_s:
        time.sleep(0.1)
    first.stop(signal.SIGKILL)
    second = Gateway(here, "--port", port)
    _, said = watch.communicate(timeout=120)
    assert watch.returncode == 0
    assert "completed, 300 of 300 items" in said
    call("batch", "results", id, "-o", "out.jsonl", "--url", second.url)
    assert len({json.loads(line)["custom_id"] for line in (here / "out.jsonl").read_text().splitlines()}) == 300
    assert second.stop() == 0
