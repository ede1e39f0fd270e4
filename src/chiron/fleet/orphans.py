"""Finds engine processes by a mark in their environment, as the last resort against leftovers.

The keeper ends an engine however its gateway ended. What is left is the case in which somebody kills gateway and
keeper at once: children of the engine may then run on and hold a GPU. So every process of an engine inherits a mark
that names the gateway it belongs to, and the next gateway on the machine ends those whose gateway is gone. A mark
holds for one process namespace: a gateway in a container is not mistaken for a dead one by the host.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import psutil

MARK_VARIABLE = "CHIRON_ENGINE_OF"

_START_TOLERANCE_S = 2.0
"""Start times are told apart from a process that got the same number later; the wall clock may be set between."""


def owner_mark() -> str:
    """Names this process. What follows after a slash names an instance of it."""
    return f"{_namespace()}:{os.getpid()}:{psutil.Process().create_time():.1f}"


def kill_orphans() -> list[int]:
    """End every engine process of this user whose gateway is gone; their process ids."""
    namespace = _namespace()

    def is_orphan(mark: str) -> bool:
        owner = mark.partition("/")[0].split(":")
        if len(owner) != 3 or owner[0] != namespace or not owner[1].isdigit():
            return False
        try:
            started_s = float(owner[2])
            return bool(abs(psutil.Process(int(owner[1])).create_time() - started_s) > _START_TOLERANCE_S)
        except psutil.NoSuchProcess:
            return True
        except (ValueError, psutil.Error):
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


def _namespace() -> str:
    """Of process ids; empty where there are none."""
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return ""
