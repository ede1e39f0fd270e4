"""``chiron top``: the screen fits whatever terminal there is, and failures are said in a line."""

from __future__ import annotations

import copy
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from chiron.cli import app
from chiron.cli.top.command import Screen, StatusError, fetcher, follow
from chiron.cli.top.view import bar, one_line, plain_lines, screen, sparkline, tell
from chiron.config.read import ConfigError
from chiron.gateway.reporting.status import StatusSources, status
from live_plane_factory import WALL_S, LivePlane

KEY = "sk-admin"


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """The status of a gateway in the middle of a rush."""
    live = LivePlane()
    live.rush(15.0, per_s=25.0)
    around = StatusSources(url="http://127.0.0.1:8000", version="0.1.0", wall_origin_s=WALL_S)
    made = json.loads(json.dumps(status(live.plane.snapshot(), live.journal, around)))
    made["batches"] = [
        {
            "id": "batch_0123456789",
            "model": "m0",
            "status": state,
            "total": 700_000,
            "completed": 345_021,
            "failed": 3,
            "running": 50,
            "items_per_s": 431.2,
            "eta_s": 823.0,
            "deadline_in_s": 1749.0,
        }
        for state in ("in_progress", "completed")
    ]
    return made


@contextmanager
def gateway(answers: list[tuple[int, bytes]]) -> Iterator[str]:
    """Answers in turn, the last one for ever; 401 without the key."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = answers.pop(0) if len(answers) > 1 else answers[0]
            if self.headers["Authorization"] != f"Bearer {KEY}":
                code, body = 401, b"{}"
            if self.path != "/chiron/status":
                code, body = 404, b"{}"
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("width", "height"), [(100, 30), (80, 24), (60, 15), (200, 60), (20, 5)])
@pytest.mark.parametrize("instances", [0, 1, 4, 60])
@pytest.mark.parametrize("models", [1, 3])
def test_the_screen_fits(told: dict[str, Any], width: int, height: int, instances: int, models: int) -> None:
    told = copy.deepcopy(told)
    (model,) = told["models"]
    model["instances"] = [{**model["instances"][0], "id": number} for number in range(instances)]
    told["models"] = [model] * models
    lines = screen(told, width, height, note="no status for 5 s")
    assert len(lines) <= height
    assert max(line.cell_len for line in lines) <= width


def test_why_nothing_serves_a_model_is_on_the_screen(told: dict[str, Any]) -> None:
    (model,) = told["models"]
    outage = "No instance of 'm0' can serve this now: its endpoint does not answer (cannot connect)."
    down = told | {"models": [model | {"outage": outage, "instances": []}]}
    assert f"requests are refused (503): {outage}" in plain_lines(screen(down, 120, 30))
    assert "refused" not in plain_lines(screen(told, 120, 30))


def test_why_batches_do_not_go_on_is_on_the_screen(told: dict[str, Any]) -> None:
    runner = {"paused": "results cannot be written: full", "failing_models": ["a"], "unserved": {"b": 1200}}
    text = plain_lines(screen(told | {"batch_runner": runner}, 100, 30))
    assert "batches are paused: results cannot be written: full" in text
    assert "all attempts at batch work fail for a" in text
    assert "1,200 batch items wait for b, not in the config" in text


@pytest.mark.parametrize(("width", "height"), [(100, 30), (80, 24)])
def test_everything_that_matters_is_on_the_screen(told: dict[str, Any], width: int, height: int) -> None:
    text = plain_lines(screen(told, width, height))
    waiting = f"waiting {told['models'][0]['queue']['interactive']} interactive"
    for part in ("policy chiron", "http://127.0.0.1:8000", "IBP", "run/cap", waiting, "TTFT p99"):
        assert part in text
    assert "in SLO" in text
    assert "345,024/700,000" in text
    assert "left 13:43 of 29:09" in text
    assert "1 → 2 instances: interactive load needs this many" in text
    assert "are paused" not in text
    for instance in told["models"][0]["instances"]:
        running = instance["running_interactive"] + instance["running_batch"]
        assert f"{running}/{instance['max_batch_size']}" in text


def test_how_often_a_cascade_asks_its_large_model_is_on_the_screen(told: dict[str, Any]) -> None:
    cascades = {"cascades": [{"name": "chat", "requests": 1200, "escalated_share": 0.31}]}
    said = "cascade chat: 31% of 1,200 escalated"
    assert said in plain_lines(screen(told | cascades, 160, 30))
    assert said in one_line(told | cascades)


@pytest.mark.parametrize(("took_s", "said"), [(None, ""), (42.0, ", others took 42 s")])
def test_a_start_is_measured_against_those_that_were(told: dict[str, Any], took_s: float | None, said: str) -> None:
    told = copy.deepcopy(told)
    (model,) = told["models"]
    model["cold_start_s"] = took_s
    model["instances"] = [{**model["instances"][0], "state": "starting", "age_s": 3.0}]
    assert f"starting for 3 s{said}\n" in plain_lines(screen(told, 100, 30))


def test_sixty_instances_are_summed_up_not_cut_off(told: dict[str, Any]) -> None:
    told = copy.deepcopy(told)
    (model,) = told["models"]
    model["instances"] = [
        {**model["instances"][0], "id": n, "running_interactive": 2, "running_batch": 1} for n in range(60)
    ]
    text = plain_lines(screen(told, 100, 30))
    shown = text.count("3/16")
    assert 3 <= shown < 60
    assert f"and {60 - shown} more, running {3 * (60 - shown)} requests" in text
    assert "decisions" in text


def test_bars_show_any_work_and_never_more_than_their_width() -> None:
    for interactive in range(18):
        for batch in range(18):
            for cap in (1, 9, 16):
                drawn = bar(interactive, batch, cap, 16, 20).plain
                assert len(drawn) == 21
                if interactive + batch <= 16:
                    assert ("█" in drawn) == (interactive > 0)
                    assert ("▒" in drawn) == (batch > 0)
    assert bar(8, 4, 16, 16, 16).plain == "█" * 8 + "▒" * 4 + "·" * 4 + " "
    assert bar(1, 0, 8, 16, 16).plain == "█" + "·" * 7 + "│" + " " * 8


def test_sparklines_keep_peaks_and_mark_what_is_over_the_limit() -> None:
    assert sparkline([0, 1, 8, 0, 0, 4], 6, 8).plain == " ▂█  ▅"
    assert sparkline([0, 8, 0, 0, 0, 4], 3, 8).plain == "█ ▅"
    drawn = sparkline([0.5, 2.0], 2, 1.0, limit=1.0)
    assert [str(span.style) for span in drawn.spans] == ["cyan", "red"]
    assert sparkline([], 5, 1.0).plain == sparkline([1.0], 0, 1.0).plain == ""
    assert sparkline([0, 0], 2, 0).plain == "  "


def test_only_the_last_batch_size_of_an_instance_is_told_and_fleet_decisions_stay(told: dict[str, Any]) -> None:
    told = copy.deepcopy(told)
    sizes = [
        {
            "t_s": 10.0 + n,
            "at": "",
            "kind": "batch_size",
            "subject": "m0#1",
            "before": n,
            "after": n + 1,
            "reason": "itl_below_slo",
            "numbers": {"itl_s": 0.02, "itl_slo_s": 0.05},
        }
        for n in range(50)
    ]
    told["decisions"] = [*told["decisions"][:1], *sizes]
    text = plain_lines(screen(told, 100, 30))
    assert text.count("max batch size") == 1
    assert "m0#1: max batch size 49 → 50: ITL leaves room below its SLO (20 of 50 ms)" in text
    assert "1 → 2 instances" in text


@pytest.mark.parametrize(
    ("decision", "words"),
    [
        (
            {"kind": "role", "subject": "m0", "before": 3, "after": 3, "reason": "split"}
            | {"numbers": {"interactive": 1.0, "mixed": 2.0, "batch": 0.0}},
            "m0: roles now 1 interactive, 2 mixed: split",
        ),
        (
            {"kind": "reject", "subject": "17", "before": 1, "after": 0, "reason": "too_long", "numbers": {}},
            "request 17 refused: too long",
        ),
        (
            {"kind": "batch_size", "subject": "m0#1", "before": 8, "after": 4, "reason": "x"}
            | {"numbers": {"itl_s": None}},
            "m0#1: max batch size 8 → 4: x",
        ),
        (
            {"kind": "migrate", "subject": "m0#1", "before": 1, "after": 2, "reason": "balance", "numbers": {}},
            "m0#1: migrate 1 → 2: balance",
        ),
    ],
)
def test_decisions_are_told_in_words(decision: dict[str, Any], words: str) -> None:
    assert tell(decision) == words


def test_without_a_terminal_it_is_a_line(told: dict[str, Any]) -> None:
    line = one_line(told)
    assert "\n" not in line
    assert line.startswith("0:16 m0: 2 ready of 2 planned, running ")
    assert "batch_0123456789 345,024 of 700,000" in line
    out = io.StringIO()
    with Screen(Console(file=out, width=40)) as view:
        view.show(told)
        view.show(told, "no status")
    assert out.getvalue() == line + "\nno status\n"


def test_top_prints_the_screen_once_or_json(told: dict[str, Any]) -> None:
    with gateway([(200, json.dumps(told).encode())]) as url:
        once = CliRunner().invoke(app, ["top", "--url", url, "--key", KEY, "--once"])
        by_env = CliRunner().invoke(app, ["top", "--url", url, "--json"], env={"CHIRON_ADMIN_KEY": KEY})
    assert once.exit_code == 0, once.output
    assert "policy chiron" in once.output
    assert json.loads(by_env.output) == told


@pytest.mark.parametrize(
    ("answer", "key", "complaint"),
    [
        ((200, b"{}"), "wrong", "needs the admin key (--key or CHIRON_ADMIN_KEY); it answered 401"),
        ((404, b""), KEY, "is not there (404): is this a Chiron gateway?"),
        ((200, b"<html>"), KEY, "something that is not a status: is this a Chiron gateway?"),
        ((200, b'{"models": []}'), KEY, "something that is not a status"),
        ((302, b""), KEY, "answered 302"),
    ],
)
def test_a_wrong_answer_is_one_line_and_exit_status_2(answer: tuple[int, bytes], key: str, complaint: str) -> None:
    with gateway([answer]) as url:
        done = CliRunner().invoke(app, ["top", "--url", url, "--key", key])
    assert done.exit_code == 2
    assert done.output.startswith("error: ")
    assert complaint in done.output
    assert key not in done.output.replace("CHIRON_ADMIN_KEY", "")


def test_nobody_at_the_address_and_an_address_that_is_none() -> None:
    nobody = CliRunner().invoke(app, ["top", "--url", "http://127.0.0.1:1"])
    assert (nobody.exit_code, nobody.output.count("\n")) == (2, 1)
    assert "does not answer: Connection refused; is `chiron serve` running there? (--url)" in nobody.output
    for url in ("localhost:8000", "ftp://x", "http://"):
        with pytest.raises(ConfigError, match=r"--url .*: expected the gateway's address"):
            fetcher(url)


def test_while_it_runs_an_outage_is_noted_and_a_refusal_ends_it(told: dict[str, Any]) -> None:
    body = json.dumps(told).encode()
    out = io.StringIO()
    console = Console(file=out, width=100, height=30, force_terminal=True)
    with gateway([(200, body), (503, b""), (200, body), (403, b"")]) as url:
        fetch = fetcher(url, KEY)
        with pytest.raises(StatusError, match="needs the admin key") as refusal:
            follow(fetch, fetch(), console, 0.01)
    assert refusal.value.final
    shown = out.getvalue()
    assert shown.count("no status for 0 s, trying again") == 1
    assert "answered 503" in shown
    assert shown.count("decisions") == 3


def test_engines_that_do_not_start_and_endpoints_that_do_not_answer_are_said_with_their_reasons(
    told: dict[str, Any],
) -> None:
    status = copy.deepcopy(told)
    model = status["models"][0]
    assert (model["starts"], model["endpoints"]) == ([], [])
    fine = {"kind": "m0/good", "state": "ok", "failures": 0, "failures_total": 9, "next_start_in_s": 0.0, "reason": "x"}
    bad = {
        "kind": "m0/vllm",
        "state": "crash-looping",
        "failures": 7,
        "failures_total": 7,
        "next_start_in_s": 42.0,
        "reason": "it exited with status 1; last lines of /data/logs/m0-3.log:\nloading\nout of memory",
    }
    model["starts"] = [fine, bad]
    model["endpoints"] = [
        {"kind": "m0/gpu", "url": "http://127.0.0.1:8001", "state": "failed", "reason": "connection refused"},
        {"kind": "m0/gpu", "url": "http://127.0.0.1:8002", "state": "bound", "reason": ""},
    ]
    shown = plain_lines(screen(status, 160, 50))
    line = "vllm is crash-looping, 7 failures in a row, next start in 42 s: it exited with status 1: out of memory"
    assert line in shown
    assert "endpoint http://127.0.0.1:8001 failed: connection refused" in shown
    assert "good is" not in shown
    assert "gpu:8002" not in shown
    assert len(screen(status, 60, 24)) <= 24


def test_the_header_says_who_leads_and_what_relays_did_without(told: dict[str, Any]) -> None:
    assert "brain" not in screen(told, 300, 40)[0].plain
    told = copy.deepcopy(told)
    leader = {"gateway": "", "address": "", "term": 1, "leads_s": 9.0, "settling": False}
    told["leader"] = leader | {"relays_missing": 0, "fallback_placements": 0, "expired_requests": 0}
    told["relays"] = [{}, {}]
    assert " · brain, term 1, 2 relays" in screen(told, 300, 40)[0].plain
    told["leader"] |= {"gateway": "gw-1", "settling": True, "relays_missing": 2}
    told["leader"] |= {"fallback_placements": 12, "expired_requests": 3}
    assert (
        " · gw-1 leads, term 1, 2 relays · takes over, places nothing yet · 2 relays missing"
        " · relays alone placed 12, gave up 3"
    ) in screen(told, 300, 40)[0].plain
