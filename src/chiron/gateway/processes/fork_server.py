"""A process that makes relays by forking.

It is forked itself before the gateway has a loop, threads, engines or files of its own, so that nothing of these is
inherited by a relay; all modules are loaded by then, and a relay is up in some milliseconds. It has one thread and no
loop: it reads which relay to make or to kill, and reaps those that have ended. When the gateway is gone, by whatever
way, its socket closes; so do those of the relays, which end, and what has not ended in time is killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayStart:
    """What a relay is started with, besides the config."""

    port: int
    """Which all relays listen on."""
    api_path: str
    """Unix socket of the brain's own HTTP server."""
    relays: int
    """How many share the limits of clients' connections."""


RunRelay = Callable[[socket.socket, RelayStart], int]
"""Is a relay, until it is over; returns its exit status."""
REAP_S = 0.2
LINGER_S = 5.0
"""How long relays may take to end once the gateway is gone."""
_BLOCK_BYTES = 65536
_SOCKETS_MAX = 64


class ForkServer:
    """The gateway's end. Make it while there is one thread and no loop."""

    def __init__(self, run: RunRelay) -> None:
        ours, theirs = socket.socketpair()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # Else what waits there is written twice.
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _serve(theirs, run)
        theirs.close()
        self._socket = ours

    def spawn(self, name: str, brain: socket.socket, start: RelayStart) -> None:
        """Make a relay that speaks to the other end of ``brain``. Raises OSError if the fork server is gone."""
        socket.send_fds(self._socket, [_line(name, asdict(start))], [brain.fileno()])

    def kill(self, name: str) -> None:
        """Unless it has ended: also one that is stopped, which would keep its share of the port's connections."""
        with suppress(OSError):  # The fork server is gone.
            self._socket.sendall(_line(name, None))

    def close(self) -> None:
        """Once all relays have been told to end: wait until they have."""
        self._socket.close()
        os.waitpid(self.pid, 0)


def _line(name: str, start: dict[str, Any] | None) -> bytes:
    """What the fork server reads: the relay's name, and what to make it with (null: kill it)."""
    return json.dumps([name, start]).encode() + b"\n"


def _serve(gateway: socket.socket, run: RunRelay) -> None:
    """The fork server's whole life; does not return."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # The gateway says when it is over.
    lines, sockets, children, api_path = b"", list[int](), dict[str, int](), ""
    while True:
        _reap(children)
        if not select.select([gateway], [], [], REAP_S)[0]:
            continue
        try:
            data, received, _, _ = socket.recv_fds(gateway, _BLOCK_BYTES, _SOCKETS_MAX)
        except OSError:
            data, received = b"", []
        if not data:
            break
        lines += data
        sockets += received
        while b"\n" in lines:
            line, _, lines = lines.partition(b"\n")
            name, said = json.loads(line)
            if said is None:
                _kill(children, name)
                continue
            brain, start = socket.socket(fileno=sockets.pop(0)), RelayStart(**said)
            api_path = start.api_path
            pid = os.fork()
            if pid == 0:
                gateway.close()
                os._exit(run(brain, start))
            brain.close()
            children[name] = pid
    _end(children)
    with suppress(OSError):  # A gateway that stopped has removed it.
        os.unlink(api_path)
        os.rmdir(os.path.dirname(api_path))
    os._exit(0)


def _reap(children: dict[str, int]) -> None:
    for name, pid in list(children.items()):
        if os.waitpid(pid, os.WNOHANG)[0]:
            del children[name]


def _kill(children: dict[str, int], name: str) -> None:
    """A child that has not been reaped keeps its number: nobody else is hit."""
    if (pid := children.pop(name, None)) is not None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _end(children: dict[str, int]) -> None:
    until_s = time.monotonic() + LINGER_S
    while children and time.monotonic() < until_s:
        _reap(children)
        time.sleep(0.01)
    for name in list(children):
        _kill(children, name)
