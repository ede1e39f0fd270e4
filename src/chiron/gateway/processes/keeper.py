"""The first process of a gateway of several: it keeps the others running.

It reserves the port, makes the brain and the relays by forking, and makes each again that has ended, after a pause that
doubles while it ends soon after its start. It has one thread and no loop, and knows neither store nor control plane, so
that there is next to nothing in it that could fail. All modules are loaded before it forks, so a process is up in some
milliseconds; nothing of one process is inherited by another.

Each process has a socket to the keeper. It says there, line by line, that it is ``alive`` (once a second; one that says
nothing for long hangs, and is killed), the brain also that it is ``open`` (relays may come) and ``ready`` (all is
served), and, where it is one of several gateways', ``until`` when it may lead: if it is there still by then, it is
stopped, and is killed. A brain that ends before it was ready the first time is not started again: it has said why on
the terminal. The keeper sends the number of the signal that asks the gateway to stop, and to the brain ``alone`` once
all relays have ended; these let their requests end also if there is no brain any more. When the keeper is gone, by
whatever way, the sockets close, and the processes end.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from secrets import token_hex

from chiron.core.backoff import doubled_s
from chiron.gateway.processes.fence import OVER, machine_s
from chiron.gateway.processes.reserved import Port
from chiron.gateway.processes.start import RelayStart

log = logging.getLogger("chiron.keeper")

RunRelay = Callable[[socket.socket, RelayStart], int]
"""Is a relay, until it is over; returns its exit status."""
LOOK_S = 1.0
"""Between two looks at the processes."""
QUIET_MAX = 30
"""Looks at a process that says nothing, though it should once a second, until it is taken to hang."""
AGAIN_MIN_S, AGAIN_MAX_S = 0.1, 10.0
STEADY_S = 3.0
"""A process that ends later than this after its start has worked."""
AGAIN = 76
"""Exit status of a process that is to be started anew, at once: it has read another config."""
LINGER_S = 5.0
"""How long relays may take to end once the brain has stopped."""
_BLOCK_BYTES = 4096
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Process:
    """One that is to run: as it is now, and what is known of those before it."""

    name: str
    due_s: float = inf
    """When it is to be started."""
    pid: int = 0
    """0: it does not run."""
    socket: socket.socket | None = None
    starts: int = 0
    began_s: float = 0.0
    failures: int = 0
    """That followed one another."""
    quiet: int = 0
    until_s: float = 0.0
    """As it said; 0: for ever."""
    overdue: bool = False
    """It was killed because it was there still by then."""
    heard: bytes = b""
    """Of a line that is not complete."""
    said: set[bytes] = field(default_factory=set)
    """Since its start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What a brain gets from the keeper."""

    socket: socket.socket
    number: int
    """1: no other brain was before it."""
    nonce: str
    """The keeper's: drawn at its start."""


class Keeper:
    """Make it while there is one thread and no loop."""

    def __init__(
        self,
        *,
        relay: RunRelay,
        start: RelayStart,
        port: Port,
        stopping: Sequence[signal.Signals],
        grace_s: float = 0.0,
        quiet_max: int = QUIET_MAX,
    ) -> None:
        """``stopping``: signals that ask for an end; ``grace_s``: how long relays then let requests end."""
        self.status = 0
        """The exit status, once all is over."""
        self.start = start
        self._relay = relay
        self._port = port
        self._stopping = stopping
        self._grace_s = grace_s
        self._relays_until_s = inf
        """How long relays may take, once a signal has come."""
        self._quiet_max = quiet_max
        self._nonce = token_hex(8)
        self._brain = Process("the brain")
        self._relays = [Process(f"relay {number + 1}") for number in range(start.relays)]
        self._stopped_by: list[int] = []
        self._served = False
        """A brain was ready."""

    def run(self) -> Seat | None:
        """Returns a seat in each process that is to be a brain, and None in this one once all is over."""
        gc.freeze()  # What has been loaded is shared by all processes, as long as nobody writes to it.
        signals: list[int] = []
        with _heard_signals(self._stopping, signals) as woken:
            self._brain.due_s = looked_s = time.monotonic()
            while not self._is_over():
                for process in self._processes:
                    if process.due_s <= time.monotonic() and (end := self._fork(process)) is not None:
                        if process is self._brain:
                            return Seat(socket=end, number=process.starts, nonce=self._nonce)
                        os._exit(self._relay(end, self.start))
                self._wait(woken)
                while signals:
                    self._hear_signal(signals.pop(0))
                if (now_s := time.monotonic()) - looked_s >= LOOK_S:
                    # Looks that this process makes up for after a stall say nothing: it has yet to read.
                    self._look(late=now_s - looked_s >= 2 * LOOK_S)
                    looked_s = now_s
            self._end()
        return None

    @property
    def _processes(self) -> list[Process]:
        return [self._brain, *self._relays]

    def _is_over(self) -> bool:
        """The brain has ended for good, and so have relays that let requests end."""
        if self._brain.pid or self._brain.due_s < inf:
            return False
        relays_end = self._stopped_by and any(relay.pid for relay in self._relays)
        return not relays_end or time.monotonic() >= self._relays_until_s

    # -- making one --------------------------------------------------------------------------------------------

    def _fork(self, process: Process) -> socket.socket | None:
        """In the new process: its end of the socket. None: this is the keeper still."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()  # Else what waits there is written twice.
        process.due_s, process.began_s, process.quiet, process.heard = inf, time.monotonic(), 0, b""
        process.said.clear()
        process.until_s, process.overdue = 0.0, False
        process.starts += 1
        try:
            pid, ours, theirs = _forked()
        except OSError as error:
            if not self._served:
                raise
            process.starts -= 1
            self._start_again(process, f"could not be started ({error})")  # What runs goes on.
            return None
        if pid == 0:
            ours.close()
            self._become_child()
            return theirs
        theirs.close()
        ours.setblocking(False)
        process.pid, process.socket = pid, ours
        return None

    def _become_child(self) -> None:
        """Nothing of the keeper's is left here: who has another's socket would keep it from closing."""
        if sys.platform == "linux":  # So that a process that is stopped sees its socket close, too.
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in self._stopping:
            # The terminal's ctrl-C and a service manager's SIGTERM reach every process; the keeper says what to do.
            # Not ignored, which engines would inherit.
            signal.signal(number, _not_for_us)
        self._port.close()
        for each in self._processes:
            if each.socket is not None:
                each.socket.close()

    # -- what happens ------------------------------------------------------------------------------------------

    def _wait(self, woken: socket.socket) -> None:
        """Until something happens, or is due."""
        sockets = {each.socket: each for each in self._processes if each.socket is not None}
        due_s = min(each.due_s for each in self._processes) - time.monotonic()
        for ready in select.select([woken, *sockets], [], [], min(LOOK_S, max(0.0, due_s)))[0]:
            if ready is woken:
                woken.recv(_BLOCK_BYTES)
            else:
                self._read(sockets[ready])
        self._reap()

    def _reap(self) -> None:
        """All that have ended: as the first process of a container this one inherits others, whose parents are gone."""
        by_pid = {each.pid: each for each in self._processes if each.pid}
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = found
                if pid in by_pid:
                    self._ended(by_pid[pid], os.waitstatus_to_exitcode(status))

    def _read(self, process: Process) -> None:
        assert process.socket is not None
        try:
            data = process.socket.recv(_BLOCK_BYTES)
        except OSError:
            data = b""
        if not data:  # It ends, or is about to.
            process.socket.close()
            process.socket = None
            return
        *lines, process.heard = (process.heard + data).split(b"\n")
        process.heard = process.heard[-_BLOCK_BYTES:]
        for line in lines:
            if line in (b"open", b"ready"):
                process.said.add(line)
            if line.startswith(b"until "):  # By another thread than that which may hang.
                with suppress(ValueError):  # Cut off, where the keeper was stopped for long.
                    process.until_s = float(line[6:])
            else:
                process.quiet = 0
        if process is self._brain and b"open" in process.said and not self._stopped_by:
            for relay in self._relays:
                if not relay.starts:
                    relay.due_s = time.monotonic()
        self._served |= process is self._brain and b"ready" in process.said

    def _ended(self, process: Process, status: int) -> None:
        """It was reaped. Negative: the number of the signal that killed it."""
        process.pid = 0
        if process.socket is not None:
            process.socket.close()
            process.socket = None
        if status == AGAIN and not self._stopped_by:  # Also before it has served: what it read has changed meanwhile.
            process.due_s = time.monotonic()
            return
        if process is self._brain and (self._stopped_by or not self._served):
            # One that was told to stop, and whose lease ended before it had handed over, has stopped: it decides
            # nothing more, its store refuses what it had to write, and relays let their requests end without it.
            over = bool(self._stopped_by) and (process.overdue or status == OVER)
            self.status = 0 if over else status if status >= 0 else 128 - status
            return
        if self._stopped_by:
            self._tell_alone()
            return
        self._start_again(process, f"has ended ({_why(status)})")

    def _start_again(self, process: Process, why: str) -> None:
        lived_s = time.monotonic() - process.began_s
        process.failures = 0 if lived_s >= STEADY_S else process.failures + 1
        pause_s = doubled_s(AGAIN_MIN_S, AGAIN_MAX_S, max(0, process.failures - 1))
        process.due_s = time.monotonic() + pause_s
        log.error("%s %s; another is started in %.1f s", process.name, why, pause_s)

    def _look(self, *, late: bool) -> None:
        for process in self._processes:
            if not process.pid:
                continue
            if self._has_led_too_long(process):
                log.error("%s (process %d) has led for longer than it may and is killed", process.name, process.pid)
                process.overdue = True
                os.kill(process.pid, signal.SIGKILL)
                continue
            process.quiet += not late
            if process.quiet > self._quiet_max:
                log.error(
                    "%s (process %d) has said nothing for %d s: killed", process.name, process.pid, self._quiet_max
                )
                os.kill(process.pid, signal.SIGKILL)  # Not reaped yet, so nobody else has its number.

    def _has_led_too_long(self, process: Process) -> bool:
        """Also by what it has said since this process last read: it may have stalled, and the brain may not."""
        now_s = machine_s()
        while 0.0 < process.until_s < now_s and process.socket is not None:
            if not select.select([process.socket], [], [], 0)[0]:
                return True
            self._read(process)
        return 0.0 < process.until_s < now_s

    # -- the end -----------------------------------------------------------------------------------------------

    def _hear_signal(self, number: int) -> None:
        if self._stopped_by and number == signal.SIGHUP:
            return  # A terminal that closes says so more than once: its shell does as well.
        if self._stopped_by:
            for process in self._processes:
                if process.pid:
                    os.kill(process.pid, signal.SIGKILL)
            self.start.clear()
            os._exit(128 + number)
        self._stopped_by.append(number)
        self._relays_until_s = time.monotonic() + self._grace_s + LINGER_S
        if self._brain.pid == 0:  # One was to be started.
            self._brain.due_s = inf
        for process in self._processes:
            _send(process, b"%d\n" % number)
        for relay in self._relays:
            relay.due_s = inf
        self._tell_alone()

    def _tell_alone(self) -> None:
        if not any(relay.pid for relay in self._relays):
            _send(self._brain, b"alone\n")

    def _end(self) -> None:
        """Relays that have not stopped by now see their sockets close."""
        for relay in self._relays:
            relay.due_s = inf
            if relay.socket is not None:
                relay.socket.close()
                relay.socket = None
        until_s = time.monotonic() + LINGER_S
        while any(relay.pid for relay in self._relays) and time.monotonic() < until_s:
            for relay in self._relays:
                if relay.pid and os.waitpid(relay.pid, os.WNOHANG)[0]:
                    relay.pid = 0
            time.sleep(0.01)
        for relay in self._relays:
            if relay.pid:
                os.kill(relay.pid, signal.SIGKILL)
                os.waitpid(relay.pid, 0)
        self._port.close()
        self.start.clear()


def _forked() -> tuple[int, socket.socket, socket.socket]:
    """As ``os.fork``, and both ends of a socket. Raises OSError, in this process alone."""
    ours, theirs = socket.socketpair()
    try:
        return os.fork(), ours, theirs
    except OSError:
        ours.close()
        theirs.close()
        raise


def _send(process: Process, line: bytes) -> None:
    if process.socket is not None:
        with suppress(OSError):  # It is gone, or does not read.
            process.socket.send(line)


def _not_for_us(_number: int, _frame: object) -> None:
    """Of a signal that the keeper hears."""


def _why(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


@contextmanager
def _heard_signals(stopping: Sequence[signal.Signals], heard: list[int]) -> Iterator[socket.socket]:
    """Signals are ``heard``, and the socket can be read after each, also after the end of a child. Nothing is done in a
    handler: it may run in the middle of a fork."""
    read, write = socket.socketpair()
    read.setblocking(False)
    write.setblocking(False)
    before = {number: signal.getsignal(number) for number in (signal.SIGCHLD, *stopping)}
    for number in stopping:
        signal.signal(number, lambda number, _frame: heard.append(number))
    signal.signal(signal.SIGCHLD, _not_for_us)
    wakeup = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    owner = os.getpid()
    try:
        yield read
    finally:
        if os.getpid() == owner:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
        read.close()
        write.close()
