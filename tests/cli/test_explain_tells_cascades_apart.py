"""Both calls of a cascade's request have its name in an event log: each is told of its own model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chiron.cli.explain.source import load_history


@pytest.mark.parametrize("ends_late", [False, True])
def test_a_call_that_was_passed_over_is_not_told_as_running(tmp_path: Path, ends_late: bool) -> None:
    of = {"request": "r", "class": "chat", "input_tokens": 1, "key": ""}
    end = {"t": 2.0, "event": "ended", "model": "small", "outcome": "cancelled"} | of
    again = {"t": 2.0, "event": "arrival", "model": "large"} | of
    events = [
        {"t": 0.0, "event": "log"},
        {"t": 1.0, "event": "arrival", "model": "small"} | of,
        {"t": 1.0, "event": "dispatch", "request": "r", "instance": 1},
        *((again, end) if ends_late else (end, again)),
        {"t": 3.0, "event": "dispatch", "request": "r", "instance": 2},
        {"t": 4.0, "event": "first_token", "request": "r", "instance": 2},
    ]
    log = tmp_path / "events.jsonl"
    log.write_text("".join(json.dumps(each) + "\n" for each in events))
    history = load_history(log)
    told = {(model, t): list(history.state(model, t))[-1] for model in ("small", "large") for t in (1.5, 2.5, 3.5, 4.5)}
    running, waiting, idle = (
        "Work: running 1 chat; waiting none.",
        "Work: running none; waiting 1 chat.",
        "Work: running none; waiting none.",
    )
    assert [told["small", t] for t in (1.5, 2.5, 3.5, 4.5)] == [running, idle, idle, idle]
    assert [told["large", t] for t in (1.5, 2.5, 3.5, 4.5)] == [idle, waiting, running, running]
