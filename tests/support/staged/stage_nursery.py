"""Stages that are forked from one process which has torch already: real processes, without seconds for each start.

    python stage_nursery.py

reads the arguments of one stage a line; all end when its input does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from staged_processes import ENVIRONMENT


@dataclass(frozen=True, slots=True)
class Forked:
    pid: int
    address: str


class StageNursery:
    """The process that forks them."""

    def __enter__(self) -> StageNursery:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def start(self, *arguments: str) -> Forked:
        """One stage, when it is ready."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(" ".join(arguments) + "\n")
        process.stdin.flush()
        found: dict[str, int] = {}
        for line in process.stdout:
            if said := re.search(r"(pid|port)=(\d+)$", line.strip()):
                found[said[1]] = int(said[2])
            if len(found) == 2:
                return Forked(found["pid"], f"127.0.0.1:{found['port']}")
        raise AssertionError(f"no stage of {arguments}")


def main() -> None:
    import chiron.engines.staged.service  # noqa: F401  # For torch, which takes the time.
    from chiron.engines.staged import stage

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for them.
    pids = []
    while line := sys.stdin.readline():
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            stage.main(line.split())
            os._exit(0)
        pids.append(pid)
        print(f"pid={pid}", flush=True)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
