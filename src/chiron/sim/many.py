"""Many simulations on several cores.

Each run is a process of its own (``child_main``) that reads a pickled task on stdin and writes pickled messages on
stdout. So a run that dies, of memory or of a bug, takes none of the others with it; nothing is forked
from a process with threads; and a caller's script needs no ``if __name__ == "__main__"``. Starting one costs the
imports, about half a second. One job at a time runs in this process instead.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from chiron.sim.run import simulate
from chiron.sim.setup import Setup
from chiron.telemetry.result import Result

Progress = Callable[[int, float], None]
"""Called with the number of the run and the fraction of its requests that have ended."""


PROGRESS_STEP = 0.002
"""A child tells of progress in steps of at least this fraction."""
STOP_WITHIN_S = 5.0
"""A child that was asked to stop and has not after this long is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One simulation to do."""

    setup: Setup
    events: Path | None = None
    """Where to write the event log, one JSON object a line."""

    @property
    def name(self) -> str:
        """For messages: policy and seed."""
        return f"{self.setup.label or self.setup.policy}, seed {self.setup.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a run ended: with a result, or with an error in words."""

    index: int
    run: Run
    result: Result | None = None
    error: str = ""
    """One line; empty with a result."""
    details: str = ""
    """The traceback, if there is one."""


def default_jobs() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_many(
    runs: Sequence[Run], *, jobs: int | None = None, progress: Progress | None = None
) -> Generator[Done, None, None]:
    """Each run's end, as they end. At most ``jobs`` at a time (default: the cores).

    Closing the iterator, or an exception such as ctrl-C in the caller, stops the runs still going.
    """
    jobs = min(default_jobs() if jobs is None else jobs, len(runs))
    assert jobs >= 1 or not runs, "jobs must be 1 or more"
    if jobs <= 1:
        for index, run in enumerate(runs):
            yield _run_here(index, run, progress)
        return
    yield from _run_in_processes(runs, jobs, progress)


def _simulate(run: Run, progress: Callable[[float], None] | None) -> Result:
    with ExitStack() as stack:
        events = stack.enter_context(run.events.open("w", encoding="utf-8")) if run.events else None
        return simulate(run.setup, progress=progress, events=events)


def _run_here(index: int, run: Run, progress: Progress | None) -> Done:
    report = None if progress is None else lambda fraction: progress(index, fraction)
    try:
        return Done(index=index, run=run, result=_simulate(run, report))
    except Exception as error:  # A bug in one policy must not cost the results of the others; it is reported.
        return Done(index=index, run=run, error=_in_a_line(error), details=traceback.format_exc())


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _run_in_processes(runs: Sequence[Run], jobs: int, progress: Progress | None) -> Generator[Done, None, None]:
    # A thread per job feeds a child, reads its messages and hands them to this generator through one queue.
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    news: queue.SimpleQueue[tuple[int, float] | Done] = queue.SimpleQueue()
    children: dict[int, subprocess.Popen[bytes]] = {}
    stop = threading.Event()
    for index in range(len(runs)):
        waiting.put(index)

    def work() -> None:
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            news.put(_run_in_child(index, runs[index], children, stop, lambda i, f: news.put((i, f))))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    try:
        left = len(runs)
        while left:
            message = news.get()
            if isinstance(message, Done):
                left -= 1
                yield message
            elif progress is not None:
                progress(*message)
    finally:
        stop.set()
        for child in list(children.values()):
            child.terminate()
        for thread in threads:
            thread.join(timeout=STOP_WITHIN_S)
        for child in list(children.values()):
            child.kill()


def _run_in_child(
    index: int, run: Run, children: dict[int, subprocess.Popen[bytes]], stop: threading.Event, progress: Progress
) -> Done:
    with tempfile.TemporaryFile() as stderr:
        # A session of its own: ctrl-C reaches the parent, which ends its children in good order.
        child = subprocess.Popen(
            [sys.executable, "-c", "from chiron.sim.many import child_main; child_main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        children[index] = child
        if stop.is_set():  # Asked for between the last look and the start.
            child.terminate()
        done = _listen(index, run, child, progress)
        if child.wait() and done is None:
            stderr.seek(0)
            details = stderr.read().decode(errors="replace").strip()
            error = f"the process {_how_it_ended(child.returncode)}"
            done = Done(index=index, run=run, error=error, details=details)
        del children[index]
        return done or Done(index=index, run=run, error="the process ended without a result")


def _listen(index: int, run: Run, child: subprocess.Popen[bytes], progress: Progress) -> Done | None:
    """Send the task, then read messages until the pipe closes."""
    assert child.stdin is not None
    assert child.stdout is not None
    done: Done | None = None
    with child.stdout, suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        with child.stdin:
            pickle.dump(run, child.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        while True:
            kind, *rest = pickle.load(child.stdout)
            if kind == "progress":
                progress(index, rest[0])
            elif kind == "result":
                done = Done(index=index, run=run, result=rest[0])
            else:
                done = Done(index=index, run=run, error=rest[0], details=rest[1])
    return done


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit status {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def child_main() -> None:
    """The other end: one task from stdin, its messages to stdout."""
    # An orderly end on SIGTERM, so that an event log is closed after a whole line.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Messages keep the real stdout; whatever prints goes to stderr.
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        _answer(pickle.load(sys.stdin.buffer), answer)


def _answer(run: Run, answer: IO[bytes]) -> None:
    told = 0.0

    def send(*message: Any) -> None:
        pickle.dump(message, answer, protocol=pickle.HIGHEST_PROTOCOL)
        answer.flush()

    def progress(_: int, fraction: float) -> None:
        nonlocal told
        if fraction >= told + PROGRESS_STEP:
            told = fraction
            send("progress", fraction)

    done = _run_here(0, run, progress)
    if done.result is not None:
        send("result", done.result)
    else:
        send("error", done.error, done.details)
