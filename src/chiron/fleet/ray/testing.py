"""A Ray cluster in memory, for tests without Ray: nodes are names with resources, engines are processes of this
machine.

    ray = MemoryRay({"node-1": {"CPU": 4, "GPU": 1}}, directory)
    fleet = RayFleet(sources, environment, connect=ray.connect)

It answers as the agent does with the real one, and is held to the same tests.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chiron.fleet.process import orphans
from chiron.fleet.process.engine_process import EngineProcess, tail
from chiron.fleet.ray.cluster import (
    LEASE_S,
    Answer,
    Node,
    Order,
    Phase,
    Question,
    RayCluster,
    RayError,
    Seen,
    read_name,
)
from chiron.fleet.ray.source import RaySource

HOST = "127.0.0.1"


@dataclass(kw_only=True)
class _Placed:
    """One instance: its order, its nodes, and the processes there."""

    order: Order
    nodes: list[str] = field(default_factory=list)
    processes: list[EngineProcess] = field(default_factory=list)
    begun: bool = False
    port: int = 0
    gone: str = ""
    holder: str = ""
    held_s: float = 0.0
    stopping: bool = False


class MemoryRay:
    """The cluster; several clients may share it."""

    def __init__(self, nodes: Mapping[str, Mapping[str, float]], directory: Path, lease_s: float = LEASE_S) -> None:
        """``directory``: for what engines print."""
        self._lease_s = lease_s
        self.nodes = {name: dict(resources) for name, resources in nodes.items()}
        self.answers = True
        """False: the head is away; what runs goes on."""
        self.instances: dict[str, _Placed] = {}
        self._directory = directory
        self._tasks: set[asyncio.Task[None]] = set()

    def connect(self, source: RaySource) -> RayCluster:
        return _Client(self, source.namespace)

    def add_node(self, name: str, resources: Mapping[str, float]) -> None:
        self.nodes[name] = dict(resources)

    def lose_node(self, name: str) -> None:
        """With all that runs there."""
        del self.nodes[name]
        for placed in self.instances.values():
            if name in placed.nodes:
                self._kill(placed, f"The actor died because its node {name} is dead.")

    def lose_actor(self, name: str) -> None:
        self._kill(self.instances[name], "The actor is dead because it was killed by `ray.kill`.")

    def engine_pids(self, name: str) -> list[int]:
        return [process.pid for process in self.instances[name].processes if process.pid is not None]

    async def close(self) -> None:
        """End all that runs."""
        for placed in self.instances.values():
            await asyncio.gather(*(process.stop() for process in placed.processes))
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    def _kill(self, placed: _Placed, why: str) -> None:
        placed.gone = why
        for process in placed.processes:
            self._background(process)

    def _background(self, process: EngineProcess) -> None:
        task = asyncio.get_running_loop().create_task(process.stop())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- one question ------------------------------------------------------------------------------------------------

    async def ask(self, namespace: str, question: Question) -> Answer:
        if not self.answers:
            raise RayError("the head is away")
        for order in question.start:
            if order.name not in self.instances and order.name not in question.stop:
                self.instances[order.name] = _Placed(order=order)
        for placed in self.instances.values():
            self._place(placed)
        now_s = asyncio.get_running_loop().time()
        for name in question.hold & self.instances.keys():
            self._claim(self.instances[name], question.holder, now_s)
        for name in question.free & self.instances.keys():
            self.instances[name].holder = ""
        for order in question.start:
            known = self.instances.get(order.name)
            if known is not None and known.nodes and not known.begun and known.holder == question.holder:
                await self._begin(known, order)
        for name in question.stop.keys() & self.instances.keys():
            placed = self.instances[name]
            taken = now_s - placed.held_s < self._lease_s and placed.holder not in ("", question.holder)
            if question.force or not taken:
                self._stop(name)
        mine = {
            name: placed
            for name, placed in self.instances.items()
            if (read := read_name(name)) is not None and read.namespace == namespace
        }
        nodes = tuple(Node(address=name, resources=dict(each)) for name, each in self.nodes.items())
        return Answer(instances=tuple(self._seen(name, placed, now_s) for name, placed in mine.items()), nodes=nodes)

    def _free(self, node: str) -> dict[str, float]:
        left = dict(self.nodes[node])
        for placed in self.instances.values():
            for name, amount in placed.order.resources.items() if node in placed.nodes else ():
                left[name] = left.get(name, 0.0) - amount
        return left

    def _place(self, placed: _Placed) -> None:
        """On different nodes, all at once or not at all."""
        if placed.nodes or placed.gone:
            return
        needs = placed.order.resources
        fitting = [node for node in self.nodes if all(self._free(node).get(name, 0.0) >= needs[name] for name in needs)]
        if len(fitting) >= placed.order.nodes:
            placed.nodes = fitting[: placed.order.nodes]

    def _claim(self, placed: _Placed, holder: str, now_s: float) -> None:
        if placed.nodes and (placed.holder in ("", holder) or now_s - placed.held_s >= self._lease_s):
            placed.holder, placed.held_s = holder, now_s

    async def _begin(self, placed: _Placed, order: Order) -> None:
        placed.begun = True
        port, leader_port = _free_port(), _free_port()
        values = {"python": sys.executable, "host": HOST, "port": str(port), "leader": HOST}
        values |= {"leader_port": str(leader_port), "nodes": str(order.nodes)}
        if any("{port}" in word for word in order.command):
            placed.port = port
        self._directory.mkdir(parents=True, exist_ok=True)
        for rank in range(order.nodes):
            words = [*order.command, *(order.follower_args if rank else ())]
            placed.processes.append(
                await EngineProcess.start(
                    [_filled(word, {**values, "rank": str(rank)}) for word in words],
                    env={**os.environ, **order.env},
                    stop_timeout_s=order.grace_s,
                    log=self._log(order.name, rank),
                    log_bytes_max=order.log_bytes_max,
                    mark=f"{orphans.owner_mark()}/{id(self):x}.{order.name}",
                )
            )

    def _stop(self, name: str) -> None:
        placed = self.instances[name]
        if not placed.stopping:
            placed.stopping = True
            for process in placed.processes:
                self._background(process)
        if all(process.exit for process in placed.processes):
            del self.instances[name]

    def _log(self, name: str, rank: int) -> Path:
        return self._directory / f"{name.replace(':', '_')}-{rank}.log"

    def _seen(self, name: str, placed: _Placed, now_s: float) -> Seen:
        leader = placed.processes[0] if placed.processes else None
        port = placed.port or (leader.port if leader is not None else None) or 0
        ended = next((rank for rank, process in enumerate(placed.processes) if process.exit), None)
        phase: Phase = "ready" if port else "starting" if placed.begun else "idle" if placed.nodes else "pending"
        why = "" if placed.nodes else self._why_pending(placed.order)
        if placed.gone:
            phase, why = "gone", placed.gone
        elif ended is not None:
            phase = "ended"
            why = f"{placed.processes[ended].exit}; last lines:\n{tail(self._log(name, ended), 8)}"
        return Seen(
            name=name,
            phase=phase,
            why=why,
            host=HOST,
            port=port,
            holder=placed.holder if now_s - placed.held_s < self._lease_s else "",
            stopping=placed.stopping,
        )

    def _why_pending(self, order: Order) -> str:
        needs = ", ".join(f"{key} {value:g}" for key, value in sorted(order.resources.items()))
        large = [
            name for name, own in self.nodes.items() if all(own.get(k, 0.0) >= v for k, v in order.resources.items())
        ]
        if len(large) < order.nodes:
            return f"no node of the cluster is large enough: it needs {needs}"
        return f"no node has room now: it needs {needs}"


class _Client:
    """Implements ``RayCluster``."""

    def __init__(self, ray: MemoryRay, namespace: str) -> None:
        self._ray = ray
        self._namespace = namespace

    async def ask(self, question: Question) -> Answer:
        return await self._ray.ask(self._namespace, question)

    async def close(self) -> None:
        """What runs in the cluster goes on."""


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
