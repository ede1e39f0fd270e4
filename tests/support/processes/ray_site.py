"""A real Ray cluster for tests, with logical GPUs. All its processes end with it, by their process ids."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from ray_nodes import ATTEMPTS, TOO_BUSY

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (extra ray)")
PROGRAM = Path(__file__).with_name("ray_nodes.py")
_MARK = "CHIRON_TEST_RAY"
PATIENCE = {
    # A node whose machine stalls is not lost; one whose processes end is noticed by its connections all the same.
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_failure_threshold": "60",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of the cluster, and of who speaks with it."""


class RealRay:
    """A head without GPUs, and nodes with some."""

    def __init__(self, directory: str) -> None:
        self.mark = uuid.uuid4().hex
        """In the environment of all its processes, its engines included."""
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Ray's own folder is one of ours, short enough for its sockets.
            env=os.environ | PATIENCE | {_MARK: self.mark, "RAY_TMPDIR": directory},
        )
        self.address = ""

    def start(self) -> None:
        """Wait until its head runs."""
        self.address = str(self._answer())

    def add(self, gpus: int) -> int:
        """The number of a new node."""
        return int(self._ask({"add": gpus}))

    def lose(self, node: int) -> None:
        """As when its machine is switched off."""
        self._ask({"lose": node})

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        end_marked(self.mark)  # Engines, and what a kill has left behind.

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Those with this word in their command."""
        return [process for process in marked(self.mark) if not word or word in _words(process)]

    def _ask(self, what: object) -> object:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> object:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            if status == TOO_BUSY:
                pytest.skip(f"Ray could not start a node on this machine in {ATTEMPTS} attempts of half a minute")
            raise AssertionError(f"the cluster has ended with status {status}")
        return json.loads(line)


@contextlib.contextmanager
def real_ray() -> Iterator[RealRay]:
    directory = tempfile.mkdtemp(prefix="ray-")
    ray = RealRay(directory)
    try:
        ray.start()
        yield ray
    finally:
        ray.close()
        shutil.rmtree(directory, ignore_errors=True)


def marked(mark: str) -> list[psutil.Process]:
    """All processes with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_marked(mark: str) -> None:
    while left := marked(mark):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
