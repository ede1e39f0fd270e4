"""A process that simulates trials one at a time (``chiron.studies.executors`` says what it reads and writes)."""

from __future__ import annotations

import json
import os
import pickle
import queue
import sys
import threading
from typing import IO, Any

from chiron.studies.executors import attempted
from chiron.studies.trial import Trial


def main() -> None:
    # Answers keep the real stdout; whatever prints goes to stderr.
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(sys.stdin.buffer, tasks), daemon=True).start()
        _say(answer, {"slots": 1})
        while True:
            _say(answer, done(tasks.get()))


def done(data: bytes) -> dict[str, Any]:
    """The line about one task."""
    number, setup, with_bound = pickle.loads(data)
    outcome = attempted(Trial(setup=setup, name="", with_bound=with_bound, key=""))
    if outcome.summary is not None:
        return {"number": number, "summary": dict(outcome.summary)}
    return {"number": number, "error": outcome.error, "details": outcome.details}


def _read(source: IO[bytes], tasks: queue.SimpleQueue[bytes]) -> None:
    """Until nobody is there any more, not even in the middle of a simulation whose result nobody wants."""
    while len(head := source.read(16)) == 16:
        tasks.put(source.read(int.from_bytes(head[8:], "big")))
    os._exit(0)


def _say(answer: IO[bytes], line: dict[str, Any]) -> None:
    answer.write(json.dumps(line).encode() + b"\n")
    answer.flush()
