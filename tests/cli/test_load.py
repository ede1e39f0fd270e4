"""``chiron load`` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest
from typer.testing import CliRunner, Result

from chiron.cli import app
from chiron.cli.load.command import without_secrets
from chiron.telemetry.store import load_result
from load_server import Endpoint, running

SCENARIO = """
[classes.chat]
kind = "interactive"
ttft = "2s"

[classes.night]
kind = "batch"
deadline = "1m"

[models.m]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]

[[workload]]
model = "m"
class = "chat"
generate = { kind = "poisson", rate = 20, duration = "1s", lengths = { input = 50, output = 4 } }

[[batch_job]]
model = "m"
class = "night"
at = "200ms"
requests = 6
lengths = { input = 50, output = 4 }
"""


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["load", *map(str, words)])


def test_a_run_prints_a_table_and_writes_json_report_and_result(tmp_path: Path) -> None:
    with running(Endpoint()) as endpoint:
        words = ["--url", f"{endpoint.url}/v1", "--model", "m", "--rate", 20, "--duration", "1s", "--key", "s3cret"]
        words += ["--class-mix", "chat=0.5,flex=0.5", "--class", "chat=ttft:60s", "--output-tokens", 1]
        files = {"--json": tmp_path / "r.json", "--report": tmp_path / "r.html", "--save": tmp_path / "r.chiron"}
        done = call(*words, *(word for pair in files.items() for word in pair))
    assert done.exit_code == 0, done.output
    assert "chat" in done.stdout
    made = json.loads(files["--json"].read_text())
    assert made["summary"]["finished"] == made["summary"]["requests"] == made["load"]["sent"]
    assert made["summary"]["gpu_hours"] is None
    saved = load_result(files["--save"])
    assert saved.settings["digest"] == made["load"]["digest"]
    assert [cls.ttft_s for cls in saved.classes] == [60.0, float("inf")]
    assert saved.classes[0].itl_s == 0.1  # The default of a known class stays.
    page = files["--report"].read_text()
    assert "attains at least 99 % in every class." in page
    assert "s3cret" not in page + done.output
    explained = CliRunner().invoke(app, ["explain", str(files["--save"])]).stdout
    assert "No fleet is in it" in explained
    assert "changes of the plan" not in explained, "none were seen, which is not the same as none"


def test_the_same_seed_asks_the_same_and_json_goes_to_stdout_alone() -> None:
    with running(Endpoint()) as endpoint:
        words = ["--url", endpoint.url, "-m", "m", "--rate", 60, "--kind", "gamma", "--arrival", "cv=2"]
        words += ["--duration", "500ms", "--output-tokens", 2, "--json", "-"]
        first, second, other = call(*words), call(*words), call(*words, "--seed", 2)
    digests = [json.loads(done.stdout)["load"]["digest"] for done in (first, second, other)]
    assert digests[0] == digests[1] != digests[2]


def test_a_scenario_sends_its_streams_and_submits_its_jobs(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    file.write_text(SCENARIO)
    with running(Endpoint()) as endpoint:
        done = call("--url", endpoint.url, "--scenario", file, "--json", "-")
        classes = json.loads(done.stdout)["load"]["classes"]
        (job,) = json.loads(done.stdout)["load"]["jobs"]
        assert (job["status"], job["results"], classes["night"]["finished"]) == ("completed", 6, 5)
        assert classes["chat"]["finished"] == classes["chat"]["requests"] > 5


@pytest.mark.parametrize(("words", "message"), [
    (["--rate", 5], "--model is missing"),
    (["-m", "m"], "give one of --trace, --scenario, --rate; there is none of them"),
    (["-m", "m", "--rate", 5, "--trace", "x"], "there is --trace and --rate"),
    (["-m", "m", "--rate", -1], "--rate -1: must be a finite number above 0"),
    (["-m", "m", "--rate", 5, "--kind", "gama"], "--kind 'gama'; did you mean 'gamma'"),
    (["-m", "m", "--rate", 5, "--arrival", "cw=2"], "--arrival.cw: unknown key"),
    (["-m", "m", "--rate", 5, "--class-mix", "chat"], "--class-mix 'chat': expected NAME=VALUE"),
    (["-m", "m", "--rate", 5, "--class-mix", "vip=1"], "unknown class 'vip'; known are chat, flex"),
    (["-m", "m", "--rate", 5, "--class", "vip=tft:1s"], "--class vip.tft: unknown key"),
    (["-m", "m", "--rate", 5, "--duration", "soon"], "--duration: duration 'soon': expected"),
    (["-m", "m", "--rate", 5, "--grace", "5x"], "--grace: duration '5x': expected"),
    (["-m", "m", "--rate", 5, "--probe-timeout", "0s"], "probe_timeout_s is 0.0; it must be above 0"),
    (["-m", "m", "--rate", 5, "--body", "[]"], "--body: [] must be a JSON object"),
    (["-m", "m", "--rate", 5, "--prompt", "token-ids"], "prompt is 'token-ids'; it must be text with the chat API"),
    (["-m", "m", "--rate", 5, "--in-flight-max", 0], "in_flight_max is 0; it must be 1 or more"),
    (["-m", "m", "--rate", 5, "--report", "/nowhere/r.html"], "there is no directory /nowhere"),
    (["--scenario", "demo", "--batch-jobs", "api2"], "--batch-jobs 'api2'; did you mean 'api'"),
    (["-m", "m", "--rate", 5, "--url", "http://127.0.0.1:9"], "no answer to a probe: http://127.0.0.1:9: cannot"),
])  # fmt: skip
def test_bad_input_is_one_line(words: list[object], message: str) -> None:
    done = call(*words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


SOURCES = {
    "--trace": ["--trace", "azure-2023-conv", "--model", "m", "--duration", "10s"],
    "--rate": ["--rate", 5, "--model", "m"],
    "--scenario": ["--scenario", "demo"],
}
OWN = {
    "--start": ("10m", ["--trace"]),
    "--kind": ("poisson", ["--rate"]),
    "--arrival": ("cv=2", ["--rate"]),
    "--lengths": ("azure-2023-conv", ["--rate"]),
    "--input-tokens": (256, ["--rate"]),
    "--output-tokens": ("mean=9,cv=1", ["--rate"]),
    "--model": ("m", ["--trace", "--rate"]),
    "--class-mix": ("chat=1", ["--trace", "--rate"]),
    "--class": ("chat=ttft:1s", ["--trace", "--rate"]),
    "--set": ("name=x", ["--scenario"]),
    "--batch-jobs": ("api", ["--scenario"]),
    "--batch-wait": ("1m", ["--scenario"]),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("option", OWN)
def test_an_option_that_its_source_would_ignore_is_an_error_even_with_its_default(option: str, source: str) -> None:
    value, fits = OWN[option]
    kind = ["--kind", "gamma"] if option == "--arrival" and source == "--rate" else []
    done = call(*SOURCES[source], option, value, *kind, "--dry-run")
    if source in fits:
        assert done.exit_code == 0, done.output
        return
    assert done.exit_code == 2
    assert f"{option} does not go with {source}, it belongs to {' or '.join(fits)}; leave it out" in done.stderr
    assert ("--set changes them" in done.stderr) == (source == "--scenario")
    assert len(done.stderr.strip().splitlines()) == 1


def test_drawn_lengths_beside_observed_ones_are_an_error() -> None:
    done = call("-m", "m", "--rate", 5, "--lengths", "azure-2023-conv", "--output-tokens", 9, "--dry-run")
    assert done.exit_code == 2
    assert "--output-tokens does not go with --lengths" in done.stderr


def test_a_dry_run_sends_nothing() -> None:
    done = call("--scenario", "demo", "--duration", "3m", "--dry-run", "--url", "http://127.0.0.1:9")
    assert done.exit_code == 0
    assert "1 batch jobs (12,000 items)" in done.stdout


def test_secrets_are_left_out_of_a_shown_command() -> None:
    words = ["load", "--key", "a", "--header", "X: b", "--key=c", "--rate", "5"]
    assert without_secrets(words) == ["load", "--key", "...", "--header", "...", "--key=...", "--rate", "5"]


def interrupted(endpoint: Endpoint, requests: int, *words: str) -> tuple[int, bytes, bytes]:
    """Exit status, stdout and stderr of a run that gets ctrl-C once the server has seen so many requests."""
    command = [sys.executable, "-c", "from chiron.cli import main; main()", "load", "--url", endpoint.url, *words]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        until_s = monotonic() + 60
        while len(endpoint.bodies) < requests and monotonic() < until_s:
            sleep(0.02)
        os.kill(child.pid, signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    return child.returncode, out, err


@pytest.mark.slow
def test_ctrl_c_stops_sending_and_reports_what_was_done(tmp_path: Path) -> None:
    target = tmp_path / "r.json"
    with running(Endpoint()) as endpoint:
        words = ["-m", "m", "--rate", "50", "--duration", "1h", "--json", str(target)]
        code, out, err = interrupted(endpoint, 10, *words)
    assert code == 130, err
    made = json.loads(target.read_text())
    assert made["load"]["stopped"]
    assert made["summary"]["finished"] == made["summary"]["requests"] >= 8
    assert b"stopped early" in out


def test_a_server_that_accepts_and_does_not_answer_is_told_and_then_given_up() -> None:
    with running(Endpoint()) as endpoint:
        done = call("--url", endpoint.url, "-m", "silent", "--rate", 5, "--probe-timeout", "3500ms")
    assert done.exit_code == 2
    told, given_up = done.stderr.splitlines()
    assert told.startswith(f"waiting for {endpoint.url}: no answer yet to a request for one token of model 'silent'")
    assert "(--probe-timeout)" in told
    assert "no answer within 3.5 s; --probe-timeout sets how long" in given_up


@pytest.mark.slow
def test_ctrl_c_ends_a_run_whose_server_does_not_answer_the_probes() -> None:
    with running(Endpoint()) as endpoint:
        code, out, err = interrupted(endpoint, 1, "-m", "silent", "--rate", "5")
    assert (code, out) == (130, b""), err
    *told, last = err.splitlines()
    assert b"nothing was measured" in last
    assert all(line.startswith(b"waiting for") for line in told), "it says so after a while"
