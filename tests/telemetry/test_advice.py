"""``chiron advice``: what an event log in advise mode says that would have been done, and saved."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chiron.cli import app
from chiron.core.types import Decision, Instance, InstanceKind, ModelSpec, RequestClass
from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter
from chiron.gateway.reporting.journal import LiveJournal
from chiron.telemetry.advice import log_facts, read_advice
from chiron.telemetry.errors import LogError
from chiron.telemetry.event_log import read_event_log
from live_plane_factory import CHAT, LivePlane
from scripted_engine import ScriptedEngine, before

KIND = InstanceKind(name="k", gpu="g", gpus=2, price_per_gpu_hour=1.5, kv_capacity_tokens=1, max_num_seqs=1)
CLASSES = [
    RequestClass(name="chat", kind="interactive", ttft_s=1.0, itl_s=0.1),
    RequestClass(name="batch", kind="batch", deadline_s=60.0),
]
FACTS = log_facts([ModelSpec(name="m", kinds=(KIND,))], CLASSES, advise=True)


def head(run: str = "monday", **facts: Any) -> dict[str, Any]:
    return {"t": 0.0, "event": "log", "run": run, "at": run, **FACTS, **facts}


def instance(t_s: float, name: str, number: int) -> dict[str, Any]:
    return {"t": t_s, "event": name, "instance": number, "model": "m", "role": "mixed"}


def decided(t_s: float, before: int, after: int, reason: str = "interactive_load") -> dict[str, Any]:
    about = {"event": "decision", "kind": "fleet", "subject": "m", "numbers": {}}
    return {"t": t_s, **about, "before": before, "after": after, "reason": reason}


def ended(t_s: float, cls: str = "chat", outcome: str = "finished", **times: float) -> dict[str, Any]:
    return {"t": t_s, "event": "ended", "model": "m", "class": cls, "outcome": outcome, "instance": 1, **times}


LOG = [
    head(),
    *(instance(0.0, "created", n) for n in (1, 2, 3)),
    *(instance(10.0, "ready", n) for n in (1, 2, 3)),
    ended(20.0, ttft_s=9.0),  # Nothing is advised yet.
    decided(100.0, 3, 1, "load_fell"),  # 100 s: 3 ran, 1 was advised.
    ended(150.0, ttft_s=0.5, itl_s=0.05),
    ended(160.0, ttft_s=0.5, itl_s=0.5),
    ended(170.0, outcome="cancelled", ttft_s=9.0),
    ended(180.0, cls="batch", ttft_s=9.0),
    instance(190.0, "draining", 3),
    decided(200.0, 1, 5),  # 50 s: 3 ran, 5 were advised.
    ended(210.0, outcome="shed"),
    head(),  # The next file of the same run.
    instance(250.0, "gone", 3),  # 50 s: 2 ran, 5 were advised.
    {"t": 300.0, "event": "drain"},
    head("tuesday", advise=False),  # Not in advise mode.
    decided(1000.0, 1, 9),
    head("wednesday"),
    instance(0.0, "ready", 1),
    decided(10.0, 2, 1),  # 100 s: 1 ran, 1 was advised.
    ended(110.0, ttft_s=0.5),
]


def test_what_ran_is_set_beside_what_was_advised_over_all_runs_in_advise_mode() -> None:
    (found,) = read_advice(LOG)
    assert (found.model, found.seconds) == ("m", 300.0)
    assert found.ran_mean == pytest.approx((100 * 3 + 50 * 3 + 50 * 2 + 100) / 300)
    assert found.advised_mean == pytest.approx((100 * 1 + 100 * 5 + 100) / 300)
    assert (found.ran_most, found.advised_most) == (3, 5)
    assert (found.short_s, found.spare_s) == (100.0, 100.0)
    assert (found.when_short.met, found.when_short.missed) == (0, 1)
    assert (found.otherwise.met, found.otherwise.missed) == (2, 1)
    assert (found.changes, dict(found.reasons)) == (3, {"interactive_load": 2, "load_fell": 1})
    assert found.saved == pytest.approx(1 - 700 / 650)
    assert found.saved_cost == pytest.approx((650 - 700) / 3600 * 3.0)


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ([head(advise=False), decided(1.0, 1, 2), ended(5.0)], "not written by chiron serve --advise"),
        ([decided(1.0, 1, 2)], "not written by chiron serve --advise"),
        ([head(), instance(1.0, "ready", 1), ended(5.0)], "nothing has been decided"),
    ],
)
def test_a_log_without_advice_says_why(log: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(LogError, match=why):
        read_advice(log)


def test_the_command_says_it_in_words_and_as_json(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in LOG))
    said = CliRunner().invoke(app, ["advice", str(file)]).output
    for words in (
        "m: 5 min with advice",
        "7.7% more instance-hours",
        "More were advised than ran for 2 min: 0.0% of requests met their SLOs then, 66.7% of requests met",
        "The advice changed 3 times:",
        "fewer instances have been enough for a while now (1)",
    ):
        assert words in said
    (found,) = json.loads(CliRunner().invoke(app, ["advice", str(file), "--json"]).output)
    assert found["ran_most"] == 3


def test_a_short_trial_is_told_in_seconds_and_small_figures(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    log = [head(), instance(0.0, "ready", 1), decided(1.0, 1, 2), ended(37.0)]
    file.write_text("".join(json.dumps(event) + "\n" for event in log))
    said = CliRunner().invoke(app, ["advice", str(file)]).output
    for words in ("m: 36 s with advice", "0.010", "0.020", "The advice changed once:"):
        assert words in said


def test_advice_that_agrees_with_what_runs_is_advice(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    plane = LivePlane(file, advise=True)
    plane.submit(CHAT, 100.0)
    plane.clock.run_until(120.0)
    plane.journal.close()
    (found,) = read_advice(read_event_log(file))
    assert (found.ran_mean, found.advised_mean, found.changes) == (1.0, 1.0, 0)
    said = CliRunner().invoke(app, ["advice", str(file)]).output
    assert "The advice never changed." in said


def test_of_a_run_whose_first_file_is_gone_the_rest_counts_from_where_it_stood() -> None:
    standing = {"m": {"ready": [1, 2, 3], "advised": 1}}
    log = [
        head(at="later", standing=standing) | {"t": 500.0},
        ended(510.0, ttft_s=0.5),
        instance(550.0, "gone", 3),
        head(at="later still", standing={"m": {"ready": [1, 2], "advised": 1}}) | {"t": 560.0},
        {"t": 600.0, "event": "drain"},
        ended(600.0, ttft_s=9.0),
    ]
    (found,) = read_advice(log)
    assert (found.seconds, found.ran_mean, found.advised_mean, found.changes) == (100.0, 2.5, 1.0, 0)
    assert (found.short_s, found.otherwise.met, found.otherwise.missed) == (0.0, 1, 1)


def test_one_that_does_not_say_where_it_stood_is_left_out() -> None:
    cut = [head(at="later") | {"t": 500.0}, decided(510.0, 3, 1), instance(520.0, "ready", 4), ended(600.0)]
    with pytest.raises(LogError, match="files with which its runs began are gone"):
        read_advice(cut)
    (found,) = read_advice([*cut, head("tuesday"), instance(0.0, "ready", 1), decided(10.0, 1, 1), ended(60.0)])
    assert (found.seconds, found.ran_mean) == (50.0, 1.0)


@pytest.mark.parametrize("grouped", [False, True])
def test_rotated_files_say_where_a_run_stands(tmp_path: Path, grouped: bool) -> None:
    file = tmp_path / "events.jsonl"
    settings = EventLogSettings(path=file, flush_s=0.01, rotate_bytes=4096, rotate_keep=1, grouped=grouped)
    writer = EventWriter(settings, wall_origin_s=0.0, facts=FACTS)
    journal = LiveJournal(writer=writer)
    for number in (1, 2, 3):
        about = Instance(number, "m", KIND, "mixed", 0.0)
        journal.event(1.0, "ready", None, about)
        journal.event(2.0, "gone" if number == 2 else "draining", None, about)
    journal.decided(3.0, Decision(kind="fleet", subject="m", before=2, after=5, reason="interactive_load"))
    for second in range(4, 1000):
        journal.note(float(second), "drain", {})
    journal.event(1100.0, "created", None, Instance(4, "m", KIND, "mixed", 0.0))
    journal.close()
    events = list(read_event_log(file))
    assert events[0]["t"] > 3.0, "what became ready is gone"
    assert {json.dumps(each["standing"]) for each in events if each["event"] == "log"} == {
        json.dumps({"m": {"ready": [1, 3], "advised": 5}})
    }
    (found,) = read_advice(events)
    assert (found.ran_mean, found.advised_mean, found.seconds) == (2.0, 5.0, 1100.0 - events[0]["t"])


def test_a_gateway_writes_what_the_command_needs(tmp_path: Path) -> None:
    async def main() -> None:
        async with before(tmp_path, ScriptedEngine()) as (service, _):
            log = service.config.event_log
            assert log is not None
            line = json.loads(log.read_text().splitlines()[0])
            assert line["advise"] is False
            assert line["models"]["m"]["price_per_hour"] == 0.0
            interactive = {each.name for each in service.config.classes.values() if each.interactive}
            assert set(line["models"]["m"]["classes"]) == interactive

    asyncio.run(main())
