"""Finds engine processes by a mark in their environment, as the last resort against leftovers.

The supervisor ends an engine however its gateway ended. What is left is the case in which somebody kills gateway and
supervisor at once: children of the engine may then run on and hold a GPU. So every process of an engine inherits a mark
that names the gateway it belongs to, and the next gateway on the machine ends those whose gateway is gone. A mark holds
for one process namespace: a gateway in a container is not mistaken for a dead one by the host.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import psutil

MARK_VARIABLE = "CHIRON_ENGINE_OF"


def owner_mark() -> str:
    """Names this process. What follows after a slash names an instance of it."""
    return f"{_namespace()}:{os.getpid()}:{_start_of(os.getpid())}"


def kill_orphans() -> list[int]:
    """End every engine process of this user whose gateway is gone; their process ids."""
    namespace = _namespace()

    def is_orphan(mark: str) -> bool:
        owner = mark.partition("/")[0].split(":")
        if len(owner) != 3 or owner[0] != namespace or not owner[1].isdigit():
            return False
        try:
            return _start_of(int(owner[1])) != owner[2]
        except psutil.NoSuchProcess:
            return True
        except (OSError, psutil.Error):
            return False

    return kill_marked(is_orphan)


def kill_marked(is_wanted: Callable[[str], bool]) -> list[int]:
    """SIGKILL to every process whose mark is wanted, until no new one appears; their process ids."""
    killed: list[int] = []
    while True:
        found = [process for process in psutil.process_iter() if _is_marked(process, is_wanted)]
        fresh = [process for process in found if process.pid not in killed]
        for process in fresh:
            with contextlib.suppress(psutil.Error):
                process.kill()
            killed.append(process.pid)
        if not fresh:
            return killed


def _is_marked(process: psutil.Process, is_wanted: Callable[[str], bool]) -> bool:
    """False for processes of other users, whose environment cannot be read, and for this process."""
    if process.pid == os.getpid():
        return False
    try:
        mark = process.environ().get(MARK_VARIABLE)
    except (psutil.Error, OSError):
        return False
    return mark is not None and is_wanted(mark)


def _start_of(pid: int) -> str:
    """Tells a process from a later one of the same number. On Linux in ticks since the machine's start, which do not
    move when the wall clock is set: a living gateway must not look like a dead one. Raises NoSuchProcess."""
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return f"{psutil.Process(pid).create_time():.1f}"
    try:
        return stat.read_bytes().rpartition(b")")[2].split()[19].decode()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None


def _namespace() -> str:
    """Of process ids; empty where there are none."""
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return ""
