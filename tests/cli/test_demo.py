"""``chiron demo``: its parts by themselves, and the whole in a process of its own, to its end and killed on the way."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import result_factory
from chiron.cli import app
from chiron.cli.demo.command import busy_and_total_s, machine_lines, prepare
from chiron.cli.demo.plan import about_engines, about_traffic, demo_plan, full_length_s, instances_max, write_config
from chiron.cli.demo.verdict import verdict_lines
from chiron.cli.demo.view import DemoView, captions, news, plain
from chiron.config.read import ConfigError
from chiron.config.scenario import load_scenario
from chiron.config.serve import load_serve
from chiron.store.directory import lock
from chiron.telemetry.run_data import DecisionPoint
from chiron.telemetry.store import load_result
from chiron.workload.load import load_trace

pytest.importorskip("httptools")
psutil = pytest.importorskip("psutil")

DATA = Path(__file__).parents[2] / "src" / "chiron" / "data" / "demo"


# -- the story -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedded", [True, False])
def test_the_gateway_keeps_the_promises_that_the_scenario_makes(tmp_path: Path, embedded: bool) -> None:
    write_config(tmp_path, embedded=embedded, port=0)
    config, scenario = load_serve(tmp_path / "chiron.toml"), load_scenario(DATA / "scenario.toml")
    assert dict(config.classes) == dict(scenario.classes)
    (model,) = config.models
    (kind,) = model.kinds
    assert kind.engine == ("openvino" if embedded else "emulated")
    assert (model.min_instances, model.max_instances) == (1, instances_max())
    assert kind.profile == str((tmp_path / "pace.json").resolve())
    assert config.server.loopback
    assert config.data == tmp_path / "data"


def test_chat_keeps_the_burst_of_the_real_trace() -> None:
    plan = demo_plan(full_length_s(), seed=1)
    sent_s = plan.workload.arrival_s[plan.single]
    real_s = load_trace("azure-2023-code", start_s=2550, duration_s=full_length_s()).arrival_s
    for times_s in (sent_s, real_s):
        burst, calm = (((times_s >= a) & (times_s < b)).sum() / (b - a) for a, b in ((25, 50), (60, 100)))
        assert burst > 3 * calm
    assert len(sent_s) < len(real_s) * 2
    assert plan.digest == demo_plan(full_length_s(), seed=1).digest != demo_plan(full_length_s(), seed=2).digest


def test_a_shorter_demo_has_a_batch_job_in_proportion() -> None:
    whole, half = (demo_plan(full_length_s() * share, seed=1) for share in (1.0, 0.5))
    (job,), (short,) = whole.jobs, half.jobs
    assert len(short.rows) == len(job.rows) / 2
    assert short.window_s == max(60.0, job.window_s / 2)
    assert 0 < len(half.single) < len(whole.single)
    assert half.last_s == pytest.approx(full_length_s() / 2, rel=0.1)


def test_what_is_said_fits_a_terminal_of_eighty_columns() -> None:
    for line in (about_engines(True), about_engines(False), about_traffic(demo_plan(full_length_s(), seed=1))):
        assert len(line) <= 80, line
    assert "noise" in about_engines(True)
    assert "invented" in about_engines(True)


def test_no_directory_is_emptied_that_no_demo_wrote(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "data" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        prepare(out)
    (out / "chiron.toml").write_text("")
    held = lock(out / "data")
    with pytest.raises(ConfigError, match="another demo"):
        prepare(out)
    assert (out / "data" / "precious").exists()
    os.close(held)
    prepare(out)
    assert not (out / "data").exists()


# -- what is shown ---------------------------------------------------------------------------------------------------


def status(**changes: Any) -> dict[str, Any]:
    instance = {"state": "ready", "max_batch_size": 17, "running_interactive": 3, "running_batch": 4}
    model = {
        "name": "demo",
        "instances": [instance],
        "planned": {"mixed": 2},
        "queue": {"interactive": 0, "batch": 9, "batch_held": 1},
        "classes": [],
    }
    decision = {"numbers": {}, "subject": "demo", "reason": "interactive_load", "before": 1, "after": 2}
    decisions = [
        {**decision, "t_s": 5.0, "kind": "fleet", "after": 1},
        {**decision, "t_s": 10.0, "kind": "fleet"},
        {**decision, "t_s": 11.0, "kind": "batch_size"},
    ]
    return {
        "now_s": 12.0, "models": [model], "decisions": decisions, "batches": [], "evictions": 8, "policy": "chiron",
    } | changes  # fmt: skip


def test_without_a_terminal_there_are_lines_and_each_decision_once() -> None:
    out = io.StringIO()
    with DemoView(Console(file=out), []) as view:
        for elapsed_s in (0.0, 1.0, 6.0):
            view.show(status(), elapsed_s, 60.0, stopping=False)
    text = out.getvalue()
    assert text.count("demo: 1 → 2 instances: interactive load needs this many") == 1
    assert text.count("max batch sizes 17; 8 evictions") == 2
    assert "\x1b" not in text


def test_news_are_changes_of_the_fleet_only() -> None:
    assert news(status(), -1.0) == ["0:10 demo: 1 → 2 instances: interactive load needs this many"]
    assert news(status(), 10.0) == []
    assert "running 3 interactive + 4 batch, waiting 0 + 10" in plain(status())


def test_captions_are_cut_to_the_width_and_say_what_goes_on() -> None:
    for elapsed_s, stopping, said in ((5.0, False, "ctrl-C"), (61.0, False, "last requests"), (5.0, True, "stopping")):
        lines = captions(["x" * 200], elapsed_s, 60.0, stopping, 7, 60)
        assert said in lines[0].plain
        assert all(line.cell_len <= 60 for line in lines)


# -- the verdict -----------------------------------------------------------------------------------------------------


def figures(**job: Any) -> dict[str, Any]:
    spread = {"p50": 0.1, "p99": 0.25}
    chat = {"requests": 200, "finished": 199, "attainment": 0.985, "ttft_s": spread, "itl_s": spread}
    done = {
        "requests": 60, "results": 60, "doubled": 0, "status": "completed", "error": "", "submitted_s": 5.0,
        "ended_s": 65.0, "window_s": 100.0,
    }  # fmt: skip
    return {"classes": {"chat": chat, "jobs": chat}, "jobs": [done | job]}


def test_the_verdict_is_what_was_measured() -> None:
    table = result_factory.requests(
        [{}, {"cls": 1, "evictions": 2, "deadline_s": 1800.0}, {"cls": 1, "evictions": 1, "outcome": 4}]
    )
    decision = DecisionPoint(
        t_s=10.0, kind="fleet", subject="demo", before=1, after=3, reason="interactive_load", numbers={}
    )
    sizes = [
        DecisionPoint(t_s=t, kind="batch_size", subject="m#1", before=1, after=n, reason="below_slo", numbers={})
        for t, n in ((1.0, 8), (2.0, 32), (3.0, 16))
    ]
    result = replace(
        result_factory.small(),
        requests=table,
        summary=result_factory.summary_of(table, gpu_seconds=100.0, sim_s=50.0),
        decisions=(*sizes, decision, replace(decision, t_s=90.0, before=3, after=2)),
    )
    chat, batch, evictions, fleet, cap = verdict_lines(figures(), result, 4)
    assert "199 of 200" in chat
    assert "98.5" in chat
    assert "TTFT p50 0.10 p99 0.25 s (SLO 10)" in chat
    assert batch == "batch: 60 result lines for 60 items, 0 doubled; done in 60 s, 40 s before its deadline"
    assert "2 batch items made room for chat, 3 times; 1 of them resumed and finished" in evictions
    assert fleet == "instances: 1 → 3 → 2; 100 instance-seconds, 50% of a fixed fleet of 4 (200)"
    assert cap == "max batch size: 8 to 32, median 16, changed 3 times"


def test_the_verdict_does_not_praise_a_job_that_failed_or_was_late() -> None:
    late = verdict_lines(figures(ended_s=125.0), result_factory.small(), 4)[1]
    assert "20 s late" in late
    cancelled = verdict_lines(figures(status="cancelled", results=12), result_factory.small(), 4)[1]
    assert "12 result lines for 60 items" in cancelled
    assert "the job is cancelled" in cancelled
    assert "deadline" not in cancelled


def test_a_machine_that_was_busy_with_other_work_is_said() -> None:
    assert len(machine_lines(0.3, (10.0, 100.0), (20.0, 200.0))) == 1
    assert len(machine_lines(0.3, (10.0, 100.0), (10.0, 100.0))) == 1
    assert "97% busy" in machine_lines(0.3, (10.0, 100.0), (107.0, 200.0))[1]
    busy_s, total_s = busy_and_total_s()
    assert 0 <= busy_s <= total_s


# -- the whole -------------------------------------------------------------------------------------------------------


@contextmanager
def running_demo(out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Emulated engines; whatever is left at the end is killed."""
    command = [sys.executable, "-m", "chiron", "demo", "--engine", "emulated", "--out", str(out), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed_ctrl_c
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for left in of_demo(out):
            left.kill()
        assert process.stdout is not None
        process.stdout.close()


def heed_ctrl_c() -> None:
    """As in a terminal: what runs in the background, tests included, may have been told to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def of_demo(out: Path) -> list[Any]:
    """Processes that work in the demo's directory: supervisors, the gateway, engines."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(out) in " ".join(process.cmdline()) or process.cwd().startswith(str(out)):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def eventually(holds: Any, timeout_s: float = 120.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until_s, "timed out"
        time.sleep(0.05)


def engine_runs(out: Path) -> bool:
    for process in of_demo(out):
        with suppress(psutil.Error):  # It may be gone by now.
            if "chiron.engines.serve.emulated" in process.cmdline():
                return True
    return False


@pytest.mark.alone
@pytest.mark.slow
def test_a_short_demo_runs_to_its_verdict_and_leaves_what_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running_demo(out, "--duration", "20s") as process:
        text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    for said in (
        "Engines: emulated", "Traffic: ", "1 ready of 1 planned", "result lines for", "0 doubled",
        "before its deadline", "instance-seconds", "max batch size", "cores used", "chiron.toml", "endpoints = ",
    ):  # fmt: skip
        assert said in text, text
    assert "warning: job" not in text
    eventually(lambda: not of_demo(out))
    saved = load_result(out / "data" / "result.chiron")
    client = load_result(out / "client.chiron")
    assert saved.summary["finished"] >= client.summary["finished"] > 0
    assert (out / "data" / "events.jsonl").stat().st_size > 0
    if (out / "report.html").exists():
        page = (out / "report.html").read_text(encoding="utf-8")
        assert "live demo" in page
        assert f"chiron demo --engine emulated --out {out} --duration 20s" in page
    told = CliRunner().invoke(app, ["explain", str(out / "data" / "result.chiron")])
    assert told.exit_code == 0, told.output


@pytest.mark.slow
def test_ctrl_c_ends_a_demo_with_what_was_measured_and_leaves_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running_demo(out) as process:
        eventually(lambda: engine_runs(out) and re.search(r"in_progress", (out / "gateway.log").read_text()))
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert "stopped early" in text
    eventually(lambda: not of_demo(out))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_while_it_starts_a_demo_leaves_nothing_running(tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    with running_demo(out) as process:
        eventually(lambda: bool([p for p in of_demo(out) if p.pid != process.pid]))
        process.send_signal(number)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), text
        eventually(lambda: not of_demo(out))
    assert "Traceback" not in text


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_demo_leaves_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running_demo(out) as process:
        eventually(lambda: engine_runs(out))
        process.kill()
        process.wait()
        eventually(lambda: not of_demo(out))
