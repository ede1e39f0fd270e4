"""One engine process, seen from the fleet: started under a supervisor, watched, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar

from chiron.fleet.process import orphans, supervisor

_T = TypeVar("_T")

_SUPERVISOR_MARGIN_S = 3.0
"""Beyond the grace that the supervisor gives the engine, before the supervisor itself is killed."""
_TAIL_BYTES = 4096


class EngineExitedError(Exception):
    """The engine's process has ended; the message says how."""


class EngineProcess:
    """``pid`` and ``port`` are None until known; ``exit`` is empty while it runs."""

    def __init__(self, process: Process, *, stop_timeout_s: float, mark: str) -> None:
        self.pid: int | None = None
        self.port: int | None = None
        """As printed in the ready line."""
        self.exit = ""
        """How it ended, for people."""
        self.announced = asyncio.Event()
        """Set with ``port``."""
        self.exited = asyncio.Event()
        """Set with ``exit``."""
        self._process = process
        self._stop_timeout_s = stop_timeout_s
        self._mark = mark
        self._listening = asyncio.get_running_loop().create_task(self._listen())

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stop_timeout_s: float,
        log: Path,
        log_bytes_max: int,
        mark: str,
    ) -> EngineProcess:
        """Start ``command`` with ``env`` and nothing else of the environment. Raises OSError if the machine cannot."""
        process = await asyncio.create_subprocess_exec(
            # Isolated and without site-packages: a quick start, and nothing of the user's can break it.
            *(sys.executable, "-I", "-S", supervisor.__file__),
            *("--grace-s", str(stop_timeout_s), "--log", str(log), "--log-bytes-max", str(log_bytes_max)),
            *("--", *command),
            env={**env, orphans.MARK_VARIABLE: mark},
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            start_new_session=True,
        )
        return cls(process, stop_timeout_s=stop_timeout_s, mark=mark)

    @property
    def supervisor_pid(self) -> int:
        """Parent of everything that the engine consists of."""
        return self._process.pid

    async def unless_exited(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of ``work``; raises EngineExitedError as soon as the process ends before that."""
        working = asyncio.ensure_future(work)
        exiting = asyncio.ensure_future(self.exited.wait())
        try:
            await asyncio.wait((working, exiting), return_when=asyncio.FIRST_COMPLETED)
            if not self.exited.is_set():
                return working.result()
            raise EngineExitedError(self.exit)
        finally:
            working.cancel()
            exiting.cancel()
            await asyncio.gather(working, exiting, return_exceptions=True)

    async def stop(self) -> None:
        """SIGTERM, the grace, SIGKILL, to all that the engine started; returns when nothing of it is left."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        ending = asyncio.ensure_future(self._process.wait())
        _, late = await asyncio.wait((ending,), timeout=self._stop_timeout_s + _SUPERVISOR_MARGIN_S)
        if late:
            await self._kill()
            await ending
        await self._listening

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            word, _, rest = line.decode(errors="replace").rstrip("\n").partition(" ")
            if word == "pid":
                self.pid = int(rest)
            elif word == "ready":
                self.port = int(rest)
                self.announced.set()
            elif word == "exit":
                self._ended(exit_text(int(rest)))
            elif word == "error":
                self._ended(rest)
        if not self.exit:
            self._ended("its supervisor was killed")
            await self._kill()

    def _ended(self, how: str) -> None:
        self.exit = how
        self.exited.set()

    async def _kill(self) -> None:
        """Without the supervisor's help: the group, and whatever carries this instance's mark."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        if self.pid is not None:
            with contextlib.suppress(OSError):
                os.killpg(self.pid, Signals.SIGKILL)
        await asyncio.to_thread(orphans.kill_marked, lambda mark: mark == self._mark)


def exit_text(status: int) -> str:
    """A shell's exit status in words."""
    if status <= 128:
        return f"it exited with status {status}"
    try:
        return f"it was killed by {Signals(status - 128).name}"
    except ValueError:
        return f"it exited with status {status}"


def tail(log: Path, lines: int) -> str:
    """The last lines of a log; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
