"""Ports on the loopback for servers that tests start, stop and start again."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

PORTS = 8000


def free_port() -> int:
    """A port that is free, and that nobody takes while its server is away: it is below those that the kernel gives
    away, and locked against other processes of the tests for as long as this one lives."""
    locks = Path(tempfile.gettempdir()) / f"chiron-test-ports-{os.getuid()}"
    locks.mkdir(exist_ok=True)
    given_away = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(given_away - PORTS, given_away), PORTS):
        lock = os.open(locks / str(port), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            os.close(lock)
        else:
            return port
    raise AssertionError(f"none of {PORTS} ports is free")
