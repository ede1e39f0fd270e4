"""Runs one engine and makes sure that none of its processes outlives its gateway.

``python -m chiron.fleet.process.supervisor [--grace-s S] [--log FILE --log-bytes-max N] -- COMMAND...``

Between the gateway and each engine stands a supervisor. Its standard input is a pipe whose other end the gateway holds:
however the gateway ends, kill -9 included, the kernel closes that pipe, and the supervisor ends the engine. Orphans of
the engine come to the supervisor too (it is their subreaper), so that "everything has ended" is a fact that ``waitpid``
tells rather than a guess. If the supervisor itself is killed, the kernel kills the engine (its parent-death signal).
Both of these are Linux's; elsewhere the engine's process group is what is ended.

What it says on standard output, a line each: ``pid N`` once the engine runs, ``ready N`` when the engine has printed
``chiron-engine ready port=N``, ``exit STATUS`` when it has ended (128 plus the signal's number if by a signal), ``error
TEXT`` if it could not be started. Its own exit status is the engine's. What the engine prints goes to the log, at most
``N`` bytes and as many again in ``FILE.1``, or without a log to standard error.

Standard library only, one thread, and no import of the rest: a supervisor is up in some 30 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

READY_LINE = b"chiron-engine ready port="
NOT_STARTED = 127
"""Exit status when the command could not be run at all, as of a shell."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_BLOCK_BYTES = 65536
_LINE_BYTES_MAX = 4096
"""A line longer than this is not searched for the ready line."""
_KILL_PERIOD_S = 0.02
"""First pause between SIGKILLs: each round reaches the processes that the last one made orphans of."""
_KILL_PERIOD_MAX_S = 1.0
"""The pause grows to this, for a process that the kernel cannot end yet."""
_LAST_BLOCKS = 64
"""Blocks of output still read when everything has ended: more than a pipe holds."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="chiron.fleet.process.supervisor", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--grace-s", type=float, default=10.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--log", help="file for what the engine prints (default: standard error)")
    parser.add_argument("--log-bytes-max", type=int, default=8 * 1024 * 1024, help="size at which the log is rotated")
    parser.add_argument("command", nargs="+", help="the engine's command, after --")
    options = parser.parse_args(arguments)
    write = Log(options.log, options.log_bytes_max).write if options.log else _write_to_stderr
    return keep(options.command, grace_s=options.grace_s, write=write)


def keep(command: Sequence[str], *, grace_s: float, write: Callable[[bytes], None]) -> int:
    """Run ``command`` until it ends or is no longer wanted; then end all processes that are left of it."""
    woken = _wake_on_signals()
    asked_to_stop = _stop_on_signals()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    write(f"supervisor {os.getpid()}: start at {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n".encode())
    try:
        engine = _start(command)
    except OSError as error:
        reason = f"cannot run {command[0]!r}: {error.strerror or error}"
        write(f"{reason}\n".encode())
        _say(f"error {reason}")
        return NOT_STARTED
    _say(f"pid {engine.pid}")
    assert engine.stdout is not None
    output = engine.stdout.fileno()
    os.set_blocking(output, False)
    port = ReadyLine()
    selector = selectors.DefaultSelector()
    selector.register(output, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    with contextlib.suppress(PermissionError):  # A plain file or /dev/null: then nothing ties it to a parent.
        selector.register(0, selectors.EVENT_READ)

    unwanted = False
    status: int | None = None
    kill_at_s: float | None = None
    kill_period_s = _KILL_PERIOD_S
    while True:
        wait_s = None if kill_at_s is None else max(0.0, kill_at_s - time.monotonic())
        for key, _ in selector.select(wait_s):
            block = _read(key.fd)
            if block is None:
                continue
            if key.fd == output and block:
                write(block)
                if (number := port.feed(block)) is not None:
                    _say(f"ready {number}")
            elif not block:
                selector.unregister(key.fd)
                unwanted = unwanted or key.fd == 0
        ended, alone = _reap(engine.pid)
        if ended is not None and status is None:
            status = engine.returncode = ended
            _copy_rest(output, write)  # The log is complete when the end is reported.
            _say(f"exit {status}")
        if status is not None and alone:
            break
        if kill_at_s is None and (unwanted or asked_to_stop() or status is not None):
            kill_at_s = time.monotonic() + grace_s
            _signal(engine.pid, signal.SIGTERM)
        elif kill_at_s is not None and time.monotonic() >= kill_at_s:
            _signal(engine.pid, signal.SIGKILL)
            kill_at_s = time.monotonic() + kill_period_s
            kill_period_s = min(2.0 * kill_period_s, _KILL_PERIOD_MAX_S)
    _copy_rest(output, write)
    return status


class Log:
    """A file of at most ``bytes_max``; full, it becomes ``PATH.1`` and a new one is begun."""

    def __init__(self, path: str, bytes_max: int) -> None:
        self._path = path
        self._bytes_max = max(1, bytes_max)
        self._bytes = 0
        self._file: int | None = None

    def write(self, block: bytes) -> None:
        """A full disk or a missing directory loses output; it must not end the engine."""
        with contextlib.suppress(OSError):
            while block:
                file = self._open() if self._file is None else self._file
                written = os.write(file, block[: max(0, self._bytes_max - self._bytes)])
                self._bytes += written
                block = block[written:]
                if self._bytes >= self._bytes_max:
                    self._rotate(file)

    def _open(self) -> int:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._bytes = os.fstat(self._file).st_size
        return self._file

    def _rotate(self, file: int) -> None:
        self._file = None
        os.close(file)
        os.replace(self._path, f"{self._path}.1")


class ReadyLine:
    """Finds the ready line in output that comes in any pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._found = False

    def feed(self, block: bytes) -> int | None:
        """The port, once."""
        if self._found:
            return None
        *lines, rest = (self._rest + block).split(b"\n")
        self._rest = rest[:_LINE_BYTES_MAX]
        for line in lines:
            digits = line.strip().removeprefix(READY_LINE)
            if line.lstrip().startswith(READY_LINE) and digits.isdigit() and 0 < int(digits) < 65536:
                self._found = True
                return int(digits)
        return None


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """In a session of its own: its group can be signalled as one, and a terminal's Ctrl-C does not reach it."""
    supervisor = os.getpid()

    def die_with_supervisor() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:  # It died before the line above could count.
            os._exit(NOT_STARTED)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_supervisor,
    )


def _reap(engine: int) -> tuple[int | None, bool]:
    """Collect what has ended: the engine's exit status if it is among them, and whether nothing is left."""
    status: int | None = None
    try:
        while True:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return status, False
            if pid == engine:
                code = os.waitstatus_to_exitcode(wait_status)
                status = code if code >= 0 else 128 - code
    except ChildProcessError:
        pass
    try:
        os.killpg(engine, 0)
    except OSError:
        return status, True
    return status, False


def _signal(engine: int, number: signal.Signals) -> None:
    """To the engine's group, and to its descendants that left the group."""
    with contextlib.suppress(OSError):
        os.killpg(engine, number)
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if os.getpgid(pid) != engine:
                os.kill(pid, number)


def _descendants(ancestor: int) -> list[int]:
    """Every process below ``ancestor``, by /proc; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in names:
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                # The fields after the command's name, which stands in brackets and may hold anything.
                parent = int(stat.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found = list(children.get(ancestor, ()))
    for pid in found:
        found += children.get(pid, ())
    return found


def _wake_on_signals() -> int:
    """The reading end of a pipe into which every handled signal writes."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    return reading


def _stop_on_signals() -> Callable[[], bool]:
    """Whether SIGTERM, SIGINT or SIGHUP has come."""
    heard: list[int] = []

    def hear(number: int, _frame: FrameType | None) -> None:
        heard.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, hear)
    return lambda: bool(heard)


def _prctl(option: int, value: int) -> None:
    """Best effort: only Linux has it."""
    if sys.platform == "linux":
        _LIBC.prctl(option, value, 0, 0, 0)


_LIBC = ctypes.CDLL(None, use_errno=True)


def _read(fd: int) -> bytes | None:
    """What is there; empty at the end, None when nothing is there yet."""
    try:
        return os.read(fd, _BLOCK_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _copy_rest(output: int, write: Callable[[bytes], None]) -> None:
    for _ in range(_LAST_BLOCKS):
        block = _read(output)
        if not block:
            return
        write(block)


def _say(line: str) -> None:
    """To the process that started the supervisor; it may be gone."""
    with contextlib.suppress(OSError):
        os.write(1, line.encode() + b"\n")


def _write_to_stderr(block: bytes) -> None:
    with contextlib.suppress(OSError):
        while block:
            block = block[os.write(2, block) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
