"""``chiron init``, ``doctor``, ``key``, and how ``chiron serve`` refuses, as a user runs them."""

from __future__ import annotations

import json
import shutil
import socket
import stat
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("httptools")
pytest.importorskip("psutil")

from chiron.cli import app
from chiron.cli.common import extras
from chiron.config.serve import load_serve
from chiron.gateway.relay.keys import hash_secret
from chiron.store.damage import Damage
from peer_certificates import Authority

runner = CliRunner()


def call(*arguments: object) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def doctor(*arguments: object) -> dict[str, dict[str, str]]:
    found = json.loads(call("doctor", "--json", *arguments).stdout)
    return {line["what"]: line for line in found}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class EngineStub(BaseHTTPRequestHandler):
    """A vLLM that knows one model; paths that ``broken`` names answer 500."""

    broken: tuple[str, ...] = ()
    metrics = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:generation_tokens_total 5\n"

    def do_GET(self) -> None:
        pages = {"/health": "", "/v1/models": '{"data": [{"id": "m"}]}', "/metrics": self.metrics}
        self.answer(pages.get(self.path))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.answer('data: {"choices": [{"text": "x"}]}\n\ndata: [DONE]\n\n')

    def answer(self, body: str | None) -> None:
        self.send_response(404 if body is None else 500 if self.path in self.broken else 200)
        self.end_headers()
        self.wfile.write((body or "").encode())

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def engine() -> Iterator[tuple[str, type[EngineStub]]]:
    class Own(EngineStub):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Own) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", Own
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--engine", "vllm", "--endpoint", "http://127.0.0.1:8001", "--model", "llama-3.1-8b"],
        ["-e", "vllm", "--model-path", "org/name"],
        ["-e", "emulated"],
        ["-e", "llamacpp"],
        ["-e", "sglang"],
        ["-e", "tgi"],
        ["-e", "openai"],
        ["-e", "command"],
    ],
)
def test_init_writes_a_config_that_loads(options: list[str], here: Path) -> None:
    result = call("init", *options)
    assert result.exit_code == 0
    assert "chiron serve chiron.toml" in result.stderr
    config = load_serve(here / "chiron.toml")
    assert len(config.models) == 1
    assert f"# max_num_seqs = {config.models[0].kinds[0].kind.max_num_seqs}" in (here / "chiron.toml").read_text()


def test_init_never_overwrites_and_refuses_what_cannot_be_served(here: Path) -> None:
    call("init")
    before = (here / "chiron.toml").read_text()
    again = call("init")
    assert (again.exit_code, (here / "chiron.toml").read_text()) == (2, before)
    assert "exists already" in again.stderr
    wrong = call("init", "other.toml", "-e", "vlm")
    assert (wrong.exit_code, (here / "other.toml").exists()) == (2, False)
    assert "did you mean 'vllm'" in wrong.stderr
    assert "there is no such file" in call("init", "other.toml", "--model-path", "no.gguf").stderr


def test_key_appends_a_hash_to_the_config_and_shows_the_key_once(here: Path) -> None:
    call("init")
    result = call("key", "--name", "team-a")
    secret = result.stderr.split()[-1]
    assert secret not in result.stdout
    with (here / "chiron.toml").open("a") as file:
        file.write(result.stdout)
    (key,) = load_serve(here / "chiron.toml").keys
    assert (key.name, key.hash) == ("team-a", hash_secret(secret.encode()))


def test_key_into_a_file_is_for_its_owner_only_and_never_overwrites(here: Path) -> None:
    result = call("key", "--admin", "--out", "admin.key")
    path = here / "admin.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().strip() not in result.output
    assert tomllib.loads(result.stdout)["admin_key_hash"] == hash_secret(path.read_text().strip().encode())
    assert call("key", "--out", "admin.key").exit_code == 2


def test_doctor_without_a_config_checks_the_machine() -> None:
    found = doctor()
    assert found["python"]["state"] == "ok"
    assert found["extra serve"]["state"] == "ok"
    assert "chiron init" in found["config"]["found"]


def test_doctor_finds_a_healthy_engine_and_changes_nothing(engine: tuple[str, Any], here: Path) -> None:
    url, _ = engine
    call("init", "-e", "vllm", "--endpoint", url, "-m", "m")
    result = call("doctor", "--set", "server.port=0")
    assert result.exit_code == 0, result.output
    assert "figures recognised" in result.stdout
    assert "first token after" in result.stdout
    assert [path.name for path in here.iterdir()] == ["chiron.toml"]


@pytest.mark.parametrize("name", ["llamacpp", "tgi"])
def test_doctor_minds_no_model_name_that_the_engine_does_not_mind(
    engine: tuple[str, Any], here: Path, name: str
) -> None:
    url, _ = engine
    call("init", "-e", "vllm", "--endpoint", url, "-m", "other")
    config = here / "chiron.toml"
    config.write_text(config.read_text().replace('"vllm"', f'"{name}"'))
    line = doctor("chiron.toml")[f"endpoint {url}: models"]
    assert (line["state"], line["found"]) == ("ok", f"m; {name} answers to 'other' too")


@pytest.mark.parametrize(
    ("change", "model", "what", "state", "words"),
    [
        ({"broken": ("/health",)}, "m", "", "fail", "GET /health answers 500"),
        ({}, "other", ": models", "fail", "it does not know 'other'; it has: m"),
        ({"metrics": "sglang:num_running_reqs 1\n"}, "m", ": metrics", "warn", "not recognised: running, waiting"),
        ({"broken": ("/metrics",)}, "m", ": metrics", "warn", "GET /metrics answers 500"),
        ({"broken": ("/v1/completions",)}, "m", ": streaming", "fail", "POST /v1/completions answers 500"),
    ],
)
def test_doctor_says_what_is_wrong_with_an_engine(
    engine: tuple[str, Any], change: dict[str, Any], model: str, what: str, state: str, words: str
) -> None:
    url, stub = engine
    for name, value in change.items():
        setattr(stub, name, value)
    call("init", "-e", "vllm", "--endpoint", url, "-m", model)
    line = doctor("chiron.toml")[f"endpoint {url}{what}"]
    assert line["state"] == state
    assert words in line["found"]
    assert line["next"]


def test_doctor_fails_for_a_used_port_an_unwritable_directory_and_a_missing_program(here: Path) -> None:
    (here / "file").write_text("")
    text = '[models.m]\nengine = "command"\ncommand = ["no-such-program", "{port}"]\n[server]\ndata = "file/data"\n'
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (here / "c.toml").write_text(text + f"port = {port}\n")
        result = call("doctor", "c.toml")
        found = doctor("c.toml")
    assert result.exit_code == 1
    assert found[f"port {port}"]["state"] == "fail"
    assert found["data directory"]["state"] == "fail"
    assert "not found on PATH" in found["engine m/command"]["found"]


@pytest.mark.parametrize(
    ("log", "state", "words"),
    [
        ("logs/new/events.jsonl", "ok", "is made at the start"),
        ("file/events.jsonl", "fail", "file is no directory"),
        ("directory", "fail", "is no file"),
    ],
)
def test_doctor_looks_where_the_event_log_will_be(here: Path, log: str, state: str, words: str) -> None:
    (here / "file").write_text("")
    (here / "directory").mkdir()
    call("init")
    line = doctor("--set", f"telemetry.event_log={log}")["event log"]
    assert line["state"] == state
    assert words in line["found"]
    assert "event log" not in doctor()


def test_doctor_shows_the_mistake_in_a_config(here: Path) -> None:
    (here / "c.toml").write_text('[models.m]\nengine = "vlm"\n')
    result = call("doctor", "c.toml")
    assert result.exit_code == 1
    assert "did you mean 'vllm'" in result.stdout


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make certificates")
def test_doctor_checks_that_tls_files_fit_and_how_long_they_last(here: Path) -> None:
    for name, days in (("a", 400), ("b", 1)):
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost"
        own = ["-days", str(days), "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        subprocess.run([*command.split(), *own], check=True, capture_output=True)
    call("init")

    def tls(cert: str, key: str) -> dict[str, str]:
        return doctor("--set", f"server.tls_cert={cert}", "--set", f"server.tls_key={key}")["TLS"]

    assert tls("a.pem", "a.key")["state"] == "ok"
    assert "valid until" in tls("a.pem", "a.key")["found"]
    assert tls("b.pem", "b.key")["next"] == "renew it soon"
    assert "do not match" in tls("a.pem", "b.key")["found"]
    assert "missing or not readable" in tls("a.pem", "no.key")["found"]


def test_doctor_checks_that_gateways_would_let_this_one_in(here: Path) -> None:
    ca, other = Authority(here / "one"), Authority(here / "other")
    good, key = ca.issue("a")
    text = '[store]\nurl = "postgresql://nobody@127.0.0.1:9/none"\n[models.m]\nengine = "vllm"\n'
    text += 'endpoints = ["http://127.0.0.1:9"]\n[gateways]\nlisten = "127.0.0.1:9443"\n'

    def found(certificate: Path, key: Path, authority: Path) -> str:
        (here / "chiron.toml").write_text(f"{text}certificate = '{certificate}'\nkey = '{key}'\nca = '{authority}'\n")
        one = doctor()["gateways"]
        return f"{one['state']}: {one['found']}"

    assert "127.0.0.1:9443; certificate valid until" in found(good, key, ca.ca)
    assert "renew it soon" in doctor()["gateways"]["next"]
    assert "fail: gateways.ca: no.pem: missing" in found(good, key, Path("no.pem")).replace(f"{here}/", "")
    assert "certificate verify failed" in found(good, key, other.ca) or "issuer" in found(good, key, other.ca)
    assert "expired" in found(*ca.issue("b", days=-1), ca.ca)
    assert "not valid for '127.0.0.1'" in found(*ca.issue("c", host="DNS:elsewhere.example"), ca.ca)
    assert "do not fit" in found(good, ca.issue("d")[1], ca.ca)
    refused = call("serve")
    assert refused.exit_code == 2
    assert "gateways.certificate, gateways.key, gateways.ca: they do not fit" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "no.toml"], "there is no such file; `chiron init no.toml` writes one"),
        (["serve", "--set", "limits.queue_mx=5"], "limits.queue_mx: unknown key (value 5); did you mean 'queue_max'"),
        (["serve", "--host", "0.0.0.0"], "server.host: '0.0.0.0' can be reached from other machines"),
        (["serve", "--policy", "chirron"], "--policy: unknown policy 'chirron'; did you mean 'chiron'"),
        (["serve", "."], ".: is a directory; name the config in it"),
        (["serve", "--data", "chiron.toml"], "server.data: cannot write "),
        (["serve", "--set", "telemetry.event_log=chiron.toml/log"], "telemetry.event_log: cannot write "),
        (
            ["serve", "--set", "server.tls_cert=no.pem", "--set", "server.tls_key=no.key"],
            "no.pem: missing or not readable; set server.tls_cert to a PEM file that this user can read",
        ),
        (["key", "--name", "admin"], "--name 'admin'"),
        (["batch", "submit", "chiron.toml", "--window", "2x"], "--window: duration '2x': expected "),
        (["load", "--model", "m", "--rate", "-2"], "--rate -2: must be a finite number above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments: list[str], message: str) -> None:
    call("init")
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_missing_extra_is_one_line_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.EXTRAS, "openvino", ("no_such_module_here",))
    call("init")
    result = call("serve")
    assert result.exit_code == 2
    assert "not installed: no_such_module_here; pip install 'chiron-serving[openvino]'" in result.stderr
    assert doctor()["extra openvino"]["state"] == "fail"


def test_doctor_says_who_can_read_the_data_and_what_was_damaged(engine: tuple[str, Any], here: Path) -> None:
    url, _ = engine
    call("init", "-e", "vllm", "--endpoint", url, "-m", "m")
    data = here / "chiron-data"
    (data / "files").mkdir(parents=True, mode=0o700)
    data.chmod(0o755)
    found = doctor("--set", "server.port=0")
    assert found["data directory's mode"]["state"] == "warn"
    assert found["damage"]["state"] == "ok"
    data.chmod(0o700)
    Damage(data, lambda: 0.0).note("file 'file-1' is damaged")
    (data / "lost+found").mkdir(mode=0o700)
    (data / "lost+found" / "file-2").touch(mode=0o600)
    found = doctor("--set", "server.port=0")
    assert found["data directory's mode"]["state"] == "ok"
    assert "file 'file-1' is damaged" in found["damage"]["found"]
    assert {found[name]["state"] for name in ("damage", "lost+found")} == {"warn"}
