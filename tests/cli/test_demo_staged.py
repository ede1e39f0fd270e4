"""``chiron demo --staged``: what it sends, what it shows of stages, and what it says of each policy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

import result_factory
from chiron.cli import app
from chiron.cli.demo.stage_watch import StageWatch
from chiron.cli.demo.staged import DURATION_S, SETTINGS, SLOW, staged_plan, surge_of, write_model, write_staged_config
from chiron.cli.demo.staged_verdict import Surge, found_bottleneck, policy_lines
from chiron.config.scenario import load_scenario
from chiron.config.serve import load_serve
from chiron.telemetry.result import Result
from chiron.telemetry.run_data import DecisionPoint

pytest.importorskip("httptools")
pytest.importorskip("tokenizers")

SURGE = Surge(begin_s=20.0, end_s=50.0)
MOST = {"0-1": 2, "4-5": 3}


def test_the_gateway_keeps_the_promises_that_the_scenario_makes(tmp_path: Path) -> None:
    write_model(tmp_path)
    staged_plan(tmp_path, DURATION_S, seed=1)
    for policy in SETTINGS:
        (tmp_path / policy).mkdir()
        write_staged_config(tmp_path / policy, policy, port=0)
        config, scenario = load_serve(tmp_path / policy / "chiron.toml"), load_scenario(tmp_path / "scenario.toml")
        assert dict(config.classes) == dict(scenario.classes)
        assert config.stage_policy == policy
        (kind,) = config.models[0].kinds
        assert kind.kind.pipeline is not None
        slowest = max(kind.kind.pipeline.stages, key=lambda stage: stage.step_times[0][1])
        assert (slowest.name, len(kind.kind.pipeline.stages)) == (SLOW, 4)


def test_the_surge_is_where_it_is_said_to_be(tmp_path: Path) -> None:
    plan, surge = staged_plan(tmp_path, DURATION_S, seed=1), surge_of(DURATION_S)
    sent_s = plan.workload.arrival_s
    in_it = (sent_s >= surge.begin_s) & (sent_s < surge.end_s)
    calm_s = DURATION_S - (surge.end_s - surge.begin_s)
    assert in_it.sum() / (surge.end_s - surge.begin_s) > 6 * (~in_it).sum() / calm_s


def step(t_s: float, layers: str, before: float, after: float) -> DecisionPoint:
    return DecisionPoint(
        t_s=t_s, kind="stage", subject=f"demo#1/{layers}", before=before, after=after, reason="", numbers={}
    )


def ran(*steps: DecisionPoint) -> tuple[Result, Result]:
    """The client's clock is 10 s behind the gateway's."""
    rows = [{"arrival_s": t, "first_token_s": t + ttft, "finish_s": t + ttft + 9.9} for t, ttft in ((21, 4), (45, 1))]
    client = result_factory.small()
    table = result_factory.requests(rows)
    client = replace(
        client,
        requests=table,
        settings={"classes": {"chat": {"attainment": 0.75}}},
        summary=result_factory.summary_of(table, sim_s=60.0),
    )
    later = result_factory.requests([{"arrival_s": row["arrival_s"] + 10} for row in rows])
    return client, replace(client, requests=later, decisions=steps)


def test_the_verdict_tells_when_the_slow_stage_grew_and_what_it_took() -> None:
    client, gateway = ran(step(34.0, "4-5", 1, 2), step(40.0, "4-5", 2, 3), step(65.0, "4-5", 3, 1))
    replicas, latency, used = policy_lines("p", client, gateway, slow="4-5", most=MOST, surge=SURGE)
    assert found_bottleneck(client, gateway, slow="4-5", most=MOST, surge=SURGE)
    assert replicas == (
        "p: replicas of the slow stage 1 → 2 4 s into the surge, 2 → 3 10 s into the surge, 3 → 1 5 s after it; "
        "no other stage grew"
    )
    assert "2 of 2 requests answered, 75 % within both SLOs (10 s, 200 ms)" in latency
    assert "of its first third TTFT p50 4.00 s, ITL p50 100.0 ms; of its last third TTFT p50 1.00 s" in latency
    assert used == "p: 176 replica-seconds, 58.66 % of all stages at their most, 5 replicas (300)"


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((), "never changed; no other stage grew"),
        (
            (step(34.0, "0-1", 1, 2), step(35.0, "4-5", 1, 2)),
            "1 → 2 5 s into the surge; of the others layers 0-1 grew",
        ),
    ],
)
def test_the_verdict_does_not_praise_a_policy_that_scaled_another_stage(steps: Any, said: str) -> None:
    client, gateway = ran(*steps)
    assert said in policy_lines("p", client, gateway, slow="4-5", most=MOST, surge=SURGE)[0]
    assert not found_bottleneck(client, gateway, slow="4-5", most=MOST, surge=SURGE)


@contextmanager
def pipeline(answers: list[dict[str, Any]]) -> Iterator[str]:
    """Tells the next answer, and the last one again and again."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers.pop(0) if len(answers) > 1 else answers[0]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_stages_are_shown_with_their_replicas_and_how_busy_they_are() -> None:
    stage = {"layers": "4-5", "ready": 2, "starting": 1, "draining": 0, "busy_s": 1.0, "waiting": 7}
    watch = StageWatch()
    assert watch.lines() == []
    with pipeline([{"stages": [stage]}, {"stages": [{**stage, "busy_s": 4.0}]}, {"stages": [{}]}]) as url:
        for now_s in (10.0, 12.0, 14.0):  # What makes no sense changes nothing.
            watch.look({"now_s": now_s, "models": [{"instances": [{"url": url, "state": "ready"}]}]})
    assert watch.lines()[1].plain == "4-5     ■ ■ □         ███████████████·····  75%    7"
    assert watch.brief() == "; stages 4-5 x2 75%"


def test_it_goes_with_no_engine_of_the_other_demo(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--staged", "--engine", "emulated", "--out", str(tmp_path)])
    assert done.exit_code != 0
    assert "does not go with --staged" in done.output + str(done.exception)


@pytest.mark.slow
def test_a_short_demo_runs_to_its_verdict_and_its_report(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "chiron", "demo", "--staged", "--duration", "40s", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    for policy in SETTINGS:
        assert re.search(rf"{policy}: \d+ of \d+ requests answered", done.stdout), done.stdout
        assert re.search(rf"{policy}: replicas of the slow stage 1 → \d", done.stdout), done.stdout
    assert "verdict: " in done.stdout
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "stage-hpa" in page
    assert "Replicas of stages" in page
