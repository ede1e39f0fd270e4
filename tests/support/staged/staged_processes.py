"""Stages and heads as processes, which end with the test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

CHIRON = (sys.executable, "-c", "import sys; from chiron.cli import main; sys.exit(main())")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
START_S = 240.0


def chiron(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHIRON, *arguments], capture_output=True, text=True, timeout=START_S, env=ENVIRONMENT)


class StageProcess:
    """``chiron stages ...``; the block begins when it is ready."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [*CHIRON, "stages", *arguments], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
        )
        self.port = 0

    def __enter__(self) -> StageProcess:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"ready port=(\d+)", line):
                self.port = int(found[1])
                return self
        self.__exit__(None, None, None)
        raise AssertionError(f"it ended with {self.process.returncode} before it was ready")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def pid_at(address: str) -> int:
    """The process that listens there."""
    import psutil

    port = int(address.rpartition(":")[2])
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            assert connection.pid is not None
            return int(connection.pid)
    raise AssertionError(f"nobody listens at {address}")
