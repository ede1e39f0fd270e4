"""A process that makes relays by forking.

It is forked itself before the gateway has a loop, threads, engines or files of its own, so that nothing of these is
inherited by a relay; all modules are loaded by then, and a relay is up in some milliseconds. It has one thread and no
loop: it reads which relay to make, and reaps those that have ended. When the gateway is gone, by whatever way, its
socket closes; so do those of the relays, which end, and what has not ended in time is killed.
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

    def spawn(self, brain: socket.socket, start: RelayStart) -> None:
        """Make a relay that speaks to the other end of ``brain``. Raises OSError if the fork server is gone."""
        socket.send_fds(self._socket, [json.dumps(asdict(start)).encode() + b"\n"], [brain.fileno()])

    def close(self) -> None:
        """Once all relays have been told to end: wait until they have."""
        self._socket.close()
        os.waitpid(self.pid, 0)


def _serve(gateway: socket.socket, run: RunRelay) -> None:
    """The fork server's whole life; does not return."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # The gateway says when it is over.
    lines, sockets, children, api_path = b"", list[int](), set[int](), ""
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
            brain, start = socket.socket(fileno=sockets.pop(0)), RelayStart(**json.loads(line))
            api_path = start.api_path
            pid = os.fork()
            if pid == 0:
                gateway.close()
                os._exit(run(brain, start))
            brain.close()
            children.add(pid)
    _end(children)
    with suppress(OSError):  # A gateway that stopped has removed it.
        os.unlink(api_path)
        os.rmdir(os.path.dirname(api_path))
    os._exit(0)


def _reap(children: set[int]) -> None:
    for pid in list(children):
        if os.waitpid(pid, os.WNOHANG)[0]:
            children.discard(pid)


def _end(children: set[int]) -> None:
    until_s = time.monotonic() + LINGER_S
    while children and time.monotonic() < until_s:
        _reap(children)
        time.sleep(0.01)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
