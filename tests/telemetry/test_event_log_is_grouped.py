"""A grouped event log: read, it is the same events as a log with a line each."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest

from chiron.core.types import Decision, Request
from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter
from chiron.gateway.reporting.journal import TOGETHER, LiveJournal
from chiron.telemetry.errors import LogError
from chiron.telemetry.event_log import read_event_log
from live_plane_factory import CHAT, MODEL, NIGHT


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
    assert (events[:3], set(events[3:])) == (["log", "group", "decision"], {"group"})
    assert lines(tmp_path / "True")[0]["version"] == 2


def test_one_that_no_row_can_hold_costs_no_other(tmp_path: Path) -> None:
    settings = EventLogSettings(path=tmp_path / "log", grouped=True)
    journal = LiveJournal(writer=EventWriter(settings, wall_origin_s=0.0))
    for name in ("a", "\ud800", "b"):
        journal.event(1.0, "arrival", Request(1, MODEL, CHAT, 1.0, 10, SimpleNamespace(request_id=name)), None)
    journal.close()
    assert [e["request"] for e in read_event_log(tmp_path / "log") if e["event"] == "arrival"] == ["a", "b"]
    assert journal.dropped_lines == 1


def test_the_queue_is_counted_in_events(tmp_path: Path) -> None:
    settings = EventLogSettings(path=tmp_path / "log", grouped=True, queue_max=100, flush_s=3600.0)
    journal = LiveJournal(writer=EventWriter(settings, wall_origin_s=0.0))
    for id in range(3 * TOGETHER):
        journal.event(float(id), "arrival", Request(id, MODEL, CHAT, 1.0, 10), None)
    assert journal.dropped_lines == 3 * TOGETHER - 100
    journal.close()
    assert [e["request"] for e in read_event_log(tmp_path / "log") if e["event"] == "arrival"] == [
        str(id) for id in range(100)
    ]


def test_a_damaged_group_is_named_and_passed_over_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    written(path, grouped=True)
    whole, data = list(read_event_log(path)), bytearray(path.read_bytes())
    second = data.index(b"\n") + 1
    rows = lines(path)[1]["rows"]
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
