"""Asks a Ray cluster by way of an agent: a process of its own, ended and started again whenever it is late."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chiron.fleet.process import supervisor
from chiron.fleet.ray import agent
from chiron.fleet.ray.cluster import PHASES, Answer, Node, Question, RayError, Seen

ANSWER_BYTES_MAX = 32 * 1024 * 1024
_HOST = re.compile(r"[\w.:-]{0,255}", re.ASCII)
_STDERR_KEPT = 2000
"""Last characters of what an agent prints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    connect_timeout_s: float = 60.0
    """Longest that joining the cluster may take."""
    answer_timeout_s: float = 20.0
    """Longest that an answer may take."""


class AgentClient:
    """Implements ``RayCluster``. One question at a time."""

    def __init__(self, address: str, namespace: str, python: str = "", settings: AgentSettings | None = None) -> None:
        self.ray_version = ""
        """Of the agent's Ray; empty until it is connected."""
        self._command = (*(python or sys.executable, agent.__file__, "--address", address, "--namespace", namespace),)
        self._settings = settings or AgentSettings()
        self._supervisor = Path(supervisor.__file__).read_text(encoding="utf-8")
        self._process: Process | None = None
        self._printed = ""
        self._reading: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the agent; None: there is none now."""
        return self._process.pid if self._process is not None else None

    async def ask(self, question: Question) -> Answer:
        if self._process is None:
            await self._connect()
        said = await self._exchange(_message(question, self._supervisor), self._settings.answer_timeout_s)
        try:
            return _answer(said)
        except (KeyError, TypeError, ValueError) as error:
            raise RayError(f"the agent's answer cannot be read: {type(error).__name__}: {error}") from None

    async def close(self) -> None:
        await self._end()

    async def _connect(self) -> None:
        try:
            # In a session of its own: a terminal's Ctrl-C is for the gateway, which may still have questions.
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=PIPE, stdout=PIPE, stderr=PIPE, limit=ANSWER_BYTES_MAX, start_new_session=True
            )
        except OSError as error:
            raise RayError(f"cannot run {self._command[0]!r}: {error.strerror or error}") from None
        self._printed = ""
        self._reading = asyncio.get_running_loop().create_task(self._read_stderr(self._process))
        said = await self._exchange(b"", self._settings.connect_timeout_s)
        self.ray_version = str(said.get("ray", ""))

    async def _exchange(self, line: bytes, timeout_s: float) -> Mapping[str, Any]:
        """Send a line and read one. The agent is ended unless that went well."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        sound = False
        try:
            async with asyncio.timeout(timeout_s):
                process.stdin.write(line)
                await process.stdin.drain()
                answer = await process.stdout.readline()
            if not answer:
                raise RayError(await self._how_it_ended(process))
            said = json.loads(answer)
            if not isinstance(said, Mapping):
                raise RayError("the agent's answer is no table")
            if "error" in said:
                raise RayError(str(said["error"]))
            sound = True
            return said
        except TimeoutError:
            raise RayError(f"Ray has not answered within {timeout_s:g} s") from None
        except ConnectionError:
            raise RayError(await self._how_it_ended(process)) from None
        except ValueError as error:  # Not JSON, or a line without end.
            raise RayError(f"the agent's answer cannot be read: {error}") from None
        finally:
            if not sound:
                await self._end()

    async def _how_it_ended(self, process: Process) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.answer_timeout_s):
                await process.wait()
        last = [line.strip() for line in self._printed.splitlines() if line.strip()]
        return f"the agent has ended (status {process.returncode}){': ' + last[-1][:300] if last else ''}"

    async def _read_stderr(self, process: Process) -> None:
        assert process.stderr is not None
        while block := await process.stderr.read(65536):
            self._printed = (self._printed + block.decode(errors="replace"))[-_STDERR_KEPT:]

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait((self._reading,))


def _message(question: Question, supervisor_text: str) -> bytes:
    orders = [{**asdict(order), "holder": question.holder, "supervisor": supervisor_text} for order in question.start]
    values = {
        "start": orders,
        "stop": dict(question.stop),
        "force": question.force,
        "hold": sorted(question.hold),
        "free": sorted(question.free),
        "holder": question.holder,
    }
    return json.dumps(values).encode() + b"\n"


def _answer(said: Mapping[str, Any]) -> Answer:
    nodes = (Node(address=str(node["address"]), resources=_amounts(node["resources"])) for node in said["nodes"])
    return Answer(instances=tuple(_seen(each) for each in said["instances"]), nodes=tuple(nodes))


def _amounts(resources: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(amount) for name, amount in resources.items()}


def _seen(each: Mapping[str, Any]) -> Seen:
    if each["phase"] not in PHASES:
        raise ValueError(f"phase {each['phase']!r}")
    port = int(each["port"])
    if not 0 <= port <= 65_535:
        raise ValueError(f"port {port}")
    if not _HOST.fullmatch(str(each["host"])):
        raise ValueError(f"host {str(each['host'])[:80]!r}")
    return Seen(
        name=str(each["name"]),
        phase=each["phase"],
        why=str(each["why"]),
        host=str(each["host"]),
        port=port,
        holder=str(each["holder"]),
        stopping=bool(each["stopping"]),
    )
