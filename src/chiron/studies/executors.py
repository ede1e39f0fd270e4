"""Who simulates the trials of a study: one port, and its two implementations.

``InProcess`` simulates one after the other, here. ``Workers`` are processes that read trials on stdin and write what
came out on stdout: ``chiron.studies.worker`` runs one at a time on this machine, and ``chiron.studies.ray_worker``
hands many to a Ray cluster. None of them is believed to live: a trial whose process died ends with an error in words.

Between a worker and us: a length of eight bytes and a pickled ``(number, setup, with bound)`` there, and lines of JSON
back, the first of which says how many trials the worker takes at a time.
"""

from __future__ import annotations

import json
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from chiron.core.errors import InputError
from chiron.sim.many import default_jobs
from chiron.studies.trial import Outcome, Trial, simulated

START_WITHIN_S = 120.0
"""A worker that has not said hello by then is given up: a Ray cluster may take a while to answer."""
END_WITHIN_S = 60.0
STOP_WITHIN_S = 5.0
"""Between a worker's last word and its end."""
LINE_BYTES_MAX = 16 * 1024 * 1024
STDERR_SHOWN = 2000
SLOTS_MAX = 4096


class ExecutorError(InputError):
    """Nothing can be simulated there. The message says why."""


class Executor(Protocol):
    """Simulates trials, in any order."""

    def run(self, trials: Iterable[Trial]) -> Generator[tuple[int, Outcome], None, None]:
        """(number, outcome) of each, as they end. Takes a trial from ``trials`` only when there is room for it."""

    def close(self) -> None:
        """End what was started for it."""


class InProcess:
    """One at a time, in this process."""

    def run(self, trials: Iterable[Trial]) -> Generator[tuple[int, Outcome], None, None]:
        for number, each in enumerate(trials):
            yield number, attempted(each)

    def close(self) -> None:
        """Nothing was started."""


def attempted(each: Trial) -> Outcome:
    try:
        return Outcome(summary=simulated(each.setup, with_bound=each.with_bound))
    except Exception as error:  # A bug in one policy must not cost the results of the others; it is reported.
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome(error=words, details=traceback.format_exc())


@dataclass(eq=False, kw_only=True)
class _Worker:
    process: subprocess.Popen[bytes]
    stderr: IO[bytes]
    listener: threading.Thread | None = None
    slots: int = 0
    """Trials that it takes at a time; 0: it has not said hello."""
    running: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    worker: _Worker
    line: dict[str, Any] | None
    """None: it has ended."""


class Workers:
    """Processes that simulate. Nothing is started before there is a trial."""

    def __init__(self, command: Sequence[str], *, count: int, each_alone: bool = True) -> None:
        """``each_alone``: a worker that dies is started again; otherwise its death ends the study."""
        self._command = list(command)
        self._count = count
        self._each_alone = each_alone
        self._workers: list[_Worker] = []
        self._news: queue.SimpleQueue[_Said] = queue.SimpleQueue()

    def run(self, trials: Iterable[Trial]) -> Generator[tuple[int, Outcome], None, None]:
        waiting = enumerate(trials)
        upcoming = next(waiting, None)
        running = 0
        while upcoming is not None or running:
            while upcoming is not None and (worker := self._free()) is not None:
                number, each = upcoming
                worker.running.add(number)
                running += 1
                _send(worker, number, each)
                upcoming = next(waiting, None)
            for number, outcome in self._heard():
                running -= 1
                yield number, outcome

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            _ended(worker)
        self._workers.clear()

    def _free(self) -> _Worker | None:
        """A worker with room; more are started while there may be more."""
        for worker in self._workers:
            if len(worker.running) < worker.slots:
                return worker
        if len(self._workers) < self._count and not any(worker.slots == 0 for worker in self._workers):
            for _ in range(self._count - len(self._workers)):
                self._start()
        return None

    def _start(self) -> None:
        stderr = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the worker.
        try:
            # A session of its own: a terminal's Ctrl-C is for us, who end the workers in good order.
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
            )
        except OSError as error:
            stderr.close()
            raise ExecutorError(f"cannot run {self._command[0]!r}: {error.strerror or error}") from None
        worker = _Worker(process=process, stderr=stderr)
        self._workers.append(worker)
        worker.listener = threading.Thread(target=_listen, args=(worker, self._news), daemon=True)
        worker.listener.start()

    def _heard(self) -> Iterator[tuple[int, Outcome]]:
        """Wait for what a worker says next."""
        starting = any(worker.slots == 0 for worker in self._workers)
        try:
            said = self._news.get(timeout=START_WITHIN_S if starting else None)
        except queue.Empty:
            raise ExecutorError(f"no worker has started within {START_WITHIN_S:g} s") from None
        worker, line = said.worker, said.line
        if line is None:
            yield from self._died(worker)
        elif "slots" in line:
            worker.slots = min(max(1, int(line["slots"])), SLOTS_MAX)
        elif "fatal" in line:
            raise ExecutorError(str(line["fatal"]))
        elif (number := line.get("number")) in worker.running:
            worker.running.discard(number)
            yield number, _outcome(line)

    def _died(self, worker: _Worker) -> Iterator[tuple[int, Outcome]]:
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        how, details = _ended(worker)
        if not self._each_alone or worker.slots == 0:
            last = details.splitlines()[-1] if details else ""
            raise ExecutorError(f"the worker {how}{': ' + last if last else ''}")
        for number in sorted(worker.running):
            yield number, Outcome(error=f"the process {how}", details=details)


def local_workers(jobs: int | None) -> Executor:
    """Processes on this machine; default: as many as there are cores."""
    count = default_jobs() if jobs is None else jobs
    if count == 1:
        return InProcess()
    return Workers([sys.executable, "-c", "from chiron.studies.worker import main; main()"], count=count)


def ray_workers(address: str, python: str = "") -> Executor:
    """A Ray cluster, asked by a Python that has its Ray."""
    program = Path(__file__).with_name("ray_worker.py")
    package = Path(__file__).parents[1]
    command = [python or sys.executable, str(program), "--address", address, "--package", str(package)]
    return Workers(command, count=1, each_alone=False)


def _send(worker: _Worker, number: int, each: Trial) -> None:
    data = pickle.dumps((number, each.setup, each.with_bound), protocol=pickle.HIGHEST_PROTOCOL)
    pipe = worker.process.stdin
    assert pipe is not None
    # If it is gone, its end is on its way to us.
    with suppress(OSError):
        pipe.write(number.to_bytes(8, "big") + len(data).to_bytes(8, "big") + data)
        pipe.flush()


def _listen(worker: _Worker, news: queue.SimpleQueue[_Said]) -> None:
    pipe = worker.process.stdout
    assert pipe is not None
    with pipe, suppress(OSError, ValueError):
        while line := pipe.readline(LINE_BYTES_MAX):
            told = json.loads(line)
            if isinstance(told, dict):
                news.put(_Said(worker=worker, line=told))
    news.put(_Said(worker=worker, line=None))


def _ended(worker: _Worker) -> tuple[str, str]:
    """How a process ended, and what it printed last."""
    try:
        how = _how_it_ended(worker.process.wait(timeout=STOP_WITHIN_S))
    except subprocess.TimeoutExpired:  # It is there, and says what nobody can read.
        worker.process.kill()
        worker.process.wait()
        how = "said what cannot be read"
    with worker.stderr:
        worker.stderr.seek(0)
        details = worker.stderr.read().decode(errors="replace").strip()[-STDERR_SHOWN:]
    if worker.process.stdin is not None:
        with suppress(OSError):
            worker.process.stdin.close()
    if worker.listener is not None:
        worker.listener.join(timeout=END_WITHIN_S)
    return how, details


def _outcome(line: dict[str, Any]) -> Outcome:
    summary = line.get("summary")
    if isinstance(summary, dict):
        return Outcome(summary=summary)
    return Outcome(
        error=str(line.get("error", "it said neither result nor error")), details=str(line.get("details", ""))
    )


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit status {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
