"""A grouped event log: read, it is the same events as a log with a line each."""

from __future__ import annotations

import json
from binascii import b2a_base64
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
from typer.testing import CliRunner

from chiron.cli import app
from chiron.core.types import Decision, Instance, InstanceKind, Request
from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter
from chiron.gateway.reporting.journal import ROWS, LiveJournal
from chiron.telemetry.errors import LogError
from chiron.telemetry.event_log import read_event_log
from chiron.telemetry.packed_events import END, EVENT, FIXED
from live_plane_factory import CHAT, MODEL, NIGHT

KIND = InstanceKind(name="k", gpu="g", gpus=1, price_per_gpu_hour=1.0, kv_capacity_tokens=1000, max_num_seqs=8)


def written(path: Path, *, grouped: bool, requests: int = 40, name: str = "r{}", queue_max: int = 1000) -> LiveJournal:
    """Requests that came, and half of them ended, with a decision among them."""
    settings = EventLogSettings(path=path, grouped=grouped, queue_max=queue_max, flush_s=3600.0)
    journal = LiveJournal(writer=EventWriter(settings, wall_origin_s=0.0))
    for id in range(requests):
        payload = SimpleNamespace(request_id=name.format(id), key_name="k", prompt_tokens=0)
        request = Request(id, MODEL, (CHAT, NIGHT)[id % 2], 0.1 * id, 10, payload)
        journal.event(0.1 * id, "arrival", request, None)
        if id == 7:
            journal.decided(0.75, Decision(kind="fleet", subject=MODEL, before=1, after=2, reason="x"))
        if id % 2:
            request.dispatch_s, request.first_token_s, request.finish_s = 0.1 * id, 0.1 * id + 1, 0.1 * id + 3
            request.outcome, request.tokens_done = "finished", id
            journal.event(0.1 * id, "dispatch", request, None)
            journal.event(0.1 * id + 1, "first_token", request, None)
            journal.ended(request)
    journal.close()
    return journal


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_it_reads_like_a_log_with_a_line_each_and_is_half_as_large(tmp_path: Path) -> None:
    for grouped in (False, True):
        written(tmp_path / f"{grouped}", grouped=grouped)
    each, group = (list(read_event_log(tmp_path / f"{grouped}"))[1:] for grouped in (False, True))
    assert group == each
    assert [list(event) for event in group] == [list(event) for event in each]
    assert (tmp_path / "True").stat().st_size < 0.6 * (tmp_path / "False").stat().st_size
    events = [line["event"] for line in lines(tmp_path / "True")]
    assert (events[:3], set(events[3:])) == (["log", "packed", "decision"], {"packed"})
    assert lines(tmp_path / "True")[0]["version"] == 3


@pytest.mark.parametrize("rows_between", [1, 2, 3, 4, 6, 32])
@pytest.mark.parametrize("names", [1, 31])
def test_it_is_no_larger_than_with_a_line_each_however_little_happens(
    rows_between: int, names: int, tmp_path: Path
) -> None:
    """Something that stands by itself comes after so many rows."""
    for grouped in (False, True):
        settings = EventLogSettings(path=tmp_path / f"{grouped}", grouped=grouped, flush_s=3600.0)
        journal = LiveJournal(writer=EventWriter(settings, wall_origin_s=0.0))
        rows = 0
        for id in range(40):
            payload = SimpleNamespace(request_id=f"req-0123abcd-{id:x}", key_name=f"key {id % names}")
            request = Request(id, f"model {id % min(names, 8)}", CHAT, 0.1 * id, 300, payload)
            request.dispatch_s = request.first_token_s = 0.1 * id
            request.outcome, request.finish_s = "finished", 0.1 * id + 1
            instance = Instance(7, request.model, KIND, "mixed", 0.0)
            for step in ("arrival", "first_token", "ended"):
                if step == "ended":
                    journal.ended(request)
                else:
                    journal.event(0.1 * id, step, request, instance if step == "first_token" else None)
                if step == "arrival":
                    journal.event(0.1 * id, "dispatch", request, instance)
                rows += 1
                if rows % rows_between == 0:
                    journal.settle()
        journal.close()
    each, group = (list(read_event_log(tmp_path / f"{grouped}"))[1:] for grouped in (False, True))
    assert group == each
    assert (tmp_path / "True").stat().st_size <= (tmp_path / "False").stat().st_size


DATA = Path(__file__).parent.parent / "data"


@pytest.mark.parametrize("version", [1, 2])
def test_logs_of_earlier_versions_are_read_as_before(version: int, tmp_path: Path) -> None:
    """Both files are as the version of then wrote them, of the same events."""
    written(tmp_path / "now", grouped=True, requests=12)
    head, *now = read_event_log(tmp_path / "now")
    assert list(read_event_log(DATA / f"events_v{version}.jsonl")) == [{**head, "version": version}, *now]


def test_a_stored_log_of_this_version_says_what_it_said() -> None:
    """Every outcome, reasons, evictions, an arrival that is placed at once. Neither the order of columns nor the names
    of outcomes are in the file, so a change of either needs a new version."""
    (_, *packed), (_, *each) = (read_event_log(DATA / f"events_v3{kind}.jsonl") for kind in ("", "_lines"))
    assert packed == each


def test_its_events_are_printed_as_a_line_each_and_what_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    written(path, grouped=True)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"reason":"x"', b'"reason":"y"'))
    told = CliRunner().invoke(app, ["explain", str(path), "--events"])
    assert told.exit_code == 0, told.output
    path.write_bytes(data)
    assert [json.loads(line) for line in told.stdout.splitlines()] == [
        event for event in read_event_log(path) if event["event"] != "decision"
    ]
    assert "line 3 is damaged" in told.stderr


def test_models_keys_reasons_and_instances_are_named_however_many_there_are(tmp_path: Path) -> None:
    for grouped in (False, True):
        settings = EventLogSettings(path=tmp_path / f"{grouped}", grouped=grouped, flush_s=3600.0)
        journal = LiveJournal(writer=EventWriter(settings, wall_origin_s=0.0))
        for id in range(3 * ROWS):
            request = Request(
                id, f"m{id % 70}", CHAT, 1.0, 10, SimpleNamespace(request_id=f"r{id}", key_name=f"k{id % 90}")
            )
            instance = Instance(2**40 + id, request.model, KIND, "mixed", 0.0)
            journal.event(1.0 * id, "arrival", request, None)
            if id % 4 == 3:  # The others are dispatched the moment they come.
                journal.event(1.0 * id, "arrival", Request(9999 + id, "other", CHAT, 1.0, 10), None)
            journal.event(1.0 * id + (id % 4 == 2), "dispatch", request, instance)
            journal.event(1.0 * id, "something new", request, None)
            request.refused_because, request.outcome, request.finish_s = f"why {id % 3}"[: 9 * (id % 2)], "shed", 1e3
            journal.ended(request)
        journal.close()
    each, group = (list(read_event_log(tmp_path / f"{grouped}"))[1:] for grouped in (False, True))
    assert group == each


def test_one_that_no_row_can_hold_costs_no_other_and_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = EventLogSettings(path=tmp_path / "log", grouped=True)
    journal = LiveJournal(writer=EventWriter(settings, wall_origin_s=0.0))
    for name in ("a", "\ud800", "b"):
        journal.event(1.0, "arrival", Request(1, MODEL, CHAT, 1.0, 10, SimpleNamespace(request_id=name)), None)
    journal.close()
    assert [e["request"] for e in read_event_log(tmp_path / "log") if e["event"] == "arrival"] == ["a", "b"]
    assert journal.dropped_lines == 1
    told = [record.getMessage() for record in caplog.records]
    assert told == ["1 of 3 events could not be written: the names of their requests are no text"]


def test_the_queue_is_counted_in_events(tmp_path: Path) -> None:
    settings = EventLogSettings(path=tmp_path / "log", grouped=True, queue_max=101, flush_s=3600.0)
    journal = LiveJournal(writer=EventWriter(settings, wall_origin_s=0.0))
    for id in range(ROWS):
        request = Request(id, MODEL, CHAT, 1.0, 10)
        journal.event(float(id), "arrival", request, None)
        request.outcome, request.finish_s = "cancelled", float(id)
        journal.ended(request)
    assert journal.dropped_lines == 2 * ROWS - 101
    journal.close()
    seen = [e["request"] for e in read_event_log(tmp_path / "log") if e["event"] in ("arrival", "ended")]
    assert seen == [str(number // 2) for number in range(101)]


def test_a_damaged_group_is_named_and_passed_over_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    written(path, grouped=True)
    whole, data = list(read_event_log(path)), bytearray(path.read_bytes())
    second = data.index(b"\n") + 1
    rows = lines(path)[1]["requests"]
    data[second + 40] ^= 1
    path.write_bytes(data)
    damage: list[str] = []
    assert list(read_event_log(path, damaged=damage.append)) == [whole[0], *whole[1 + len(rows) :]]
    assert damage == [f"{path}: line 2 is damaged: it does not fit its checksum"]


@pytest.mark.parametrize(
    "rows", ["{}", "[3]", "[[]]", '[[1.0,"arrival"]]', '[["x","dispatch","r",1]]', '[[1.0,"dispatch","r",1,2]]']
)
def test_rows_that_are_none_are_refused_with_their_line(rows: str, tmp_path: Path) -> None:
    body = f'{{"t":1.0,"event":"group","rows":{rows}'.encode()
    (tmp_path / "log").write_bytes(b'%b,"sum":"%08x"}\n' % (body, crc32(body)))
    with pytest.raises(LogError, match=r"log: line 1 is a group with .*, which is no row of an event"):
        list(read_event_log(tmp_path / "log"))


GOOD = json.dumps(
    {
        "requests": ["r"],
        "of": [["m", "c"]],
        "keys": ["k"],
        "events": list(FIXED),
        "reasons": [],
        "rows": b2a_base64(EVENT.pack(1.0, 1.0, 5, -1, 0, 0, 0), newline=False).decode(),
        "ends": "",
    }
)


def row(t: float = 1.0, arrival_s: float = 1.0, of: int = 0, key: int = 0, event: int = 0) -> dict[str, str]:
    return {"rows": b2a_base64(EVENT.pack(t, arrival_s, 5, -1, of, key, event), newline=False).decode()}


def end(outcome: int = 0, reason: int = -1) -> dict[str, str]:
    packed = END.pack(1.0, 1.0, 1.0, 1.0, 1.0, 5, 0, 0, reason, outcome)
    return row(event=1) | {"ends": b2a_base64(packed, newline=False).decode()}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"rows": 3}, "rows is 3; it must be text in base64"),
        ({"rows": "?"}, "rows is no base64"),
        ({"rows": "AAAA"}, "rows has 3 bytes; it must be a multiple of"),
        ({"rows": ""}, "1 requests for 0 rows"),
        ({"requests": [3]}, r"requests is \[3\]; it must be a list of texts"),
        ({"of": [["m"]]}, "of is .*; it must be a list of models with classes"),
        ({"keys": None}, "keys is None"),
        ({"events": ["arrival"]}, "they begin with arrival, ended"),
        (row(event=1), "0 ends for 1 rows"),
        (row(t=nan), "a row of nan s"),
        (row(arrival_s=inf), "of a request of inf s"),
        (row(of=1), r"of is 1; it must lie in 0\.\.0"),
        (row(of=-1), "of is -1"),
        (row(key=7), "key is 7"),
        (row(event=5), "event is 5"),
        (end(outcome=9), "outcome is 9"),
        (end(reason=0), "reason is 0"),
    ],
)
def test_a_packed_group_that_is_none_is_refused_with_its_line(wrong: dict[str, Any], why: str, tmp_path: Path) -> None:
    for about in ({}, wrong):
        body = json.dumps({"t": 1.0, "event": "packed", **json.loads(GOOD), **about}).encode()[:-1]
        (tmp_path / "log").write_bytes(b'%b,"sum":"%08x"}\n' % (body, crc32(body)))
        if not about:
            assert [event["event"] for event in read_event_log(tmp_path / "log")] == ["arrival"]
    with pytest.raises(LogError, match=f"log: line 1 is a group that is none: .*{why}"):
        list(read_event_log(tmp_path / "log"))
