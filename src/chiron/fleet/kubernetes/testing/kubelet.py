"""A stand-in for the kubelet: it runs the pods of one node as processes of this machine, each at an address of its own.

It speaks to an API server over HTTP as a kubelet does, so it serves a real one as well as ``FakeKubernetes``. It knows
what Chiron's tests need of a pod: command, arguments and environment (with ``status.podIP``), a readiness probe by HTTP
or TCP, preStop hooks that run a command, termination with grace, restarts with a growing pause, and images that do not
exist (names that begin with ``missing/``). Addresses are of the loopback network, 127.0.0.0/8, and containers see the
whole machine: nothing is isolated.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import re
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import SystemRandom
from typing import Any, Protocol

from chiron.fleet.kubernetes.client import ApiError, Client, KubernetesError
from chiron.fleet.kubernetes.testing.controllers import GPU
from chiron.fleet.kubernetes.watch import Watch
from chiron.net.client import NetError, Origin

MISSING = "missing/"
RESTART_MAX_S = 5.0
_VARIABLE = re.compile(r"\$\((\w+)\)")


class Container(Protocol):
    """One that runs."""

    async def ended(self) -> int:
        """Its exit code."""

    async def stop(self, grace_s: float) -> None:
        """Ask it to end, then make it."""


Run = Callable[[Mapping[str, Any], str], Awaitable[Container]]
"""Starts the container of a pod (its object) at an address."""


class ProcessContainer:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ended(self) -> int:
        return await self.process.wait()

    async def stop(self, grace_s: float) -> None:
        """As a kubelet does: its first process is asked to end, and in the end none is left."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()

    def kill(self) -> None:
        """All its processes, at once."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def run_process(logs: Path | None = None) -> Run:
    """Starts a pod's first container as a process; what it prints goes to a file of the pod's name in ``logs``."""

    async def run(pod: Mapping[str, Any], address: str) -> Container:
        container = pod["spec"]["containers"][0]
        env = dict(_environment(container, address))
        words = [*container.get("command", ()), *container.get("args", ())]
        words = [_VARIABLE.sub(lambda match: env.get(match[1], match[0]), word) for word in words]
        with contextlib.ExitStack() as stack:
            out: Any = subprocess.DEVNULL
            if logs is not None:
                out = stack.enter_context((logs / f"{pod['metadata']['name']}.log").open("ab"))
            process = await asyncio.create_subprocess_exec(
                *words, env={**os.environ, **env}, stdout=out, stderr=out, start_new_session=True
            )
        return ProcessContainer(process)

    return run


def _environment(container: Mapping[str, Any], address: str) -> Iterator[tuple[str, str]]:
    for each in container.get("env", ()):
        path = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        yield each["name"], address if path == "status.podIP" else str(each.get("value", ""))


class Kubelet:
    """Of one node. ``run`` until cancelled, then ``close``."""

    def __init__(
        self,
        client: Client,
        node: str,
        *,
        run: Run,
        gpus: int = 8,
        restart_s: float = 0.2,
        heartbeat_s: float = 10.0,
    ) -> None:
        """``restart_s``: pause before the first restart of a container; doubled with each one."""
        self.containers: dict[str, Container] = {}
        """Running ones, by name of the pod."""
        self._client = client
        self._node = node
        self._run = run
        self._gpus = gpus
        self._restart_s = restart_s
        self._heartbeat_s = heartbeat_s
        self._pods: dict[str, Mapping[str, Any]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._deleted: dict[str, asyncio.Event] = {}
        random = SystemRandom()
        self._network = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        self._hosts = iter(range(1, 255))

    async def run(self) -> None:
        watch = Watch(
            self._client,
            "/api/v1/pods",
            {"fieldSelector": f"spec.nodeName={self._node}"},
            changed=self._changed,
            gone=self._gone,
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._be_ready())
            tasks.create_task(watch.run())

    async def close(self) -> None:
        """Kill what runs; nothing is told to the API server."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(container.stop(0.0) for container in list(self.containers.values())))
        self.containers.clear()

    async def _be_ready(self) -> None:
        capacity = {"cpu": "64", "memory": "512Gi", "pods": "110", GPU: str(self._gpus)}
        while True:
            condition = {
                "type": "Ready",
                "status": "True",
                "reason": "KubeletReady",
                "lastHeartbeatTime": _now(),
                "lastTransitionTime": _now(),
            }
            status = {"capacity": capacity, "allocatable": capacity, "conditions": [condition]}
            with contextlib.suppress(KubernetesError):
                with contextlib.suppress(ApiError):  # It may be there.
                    head = {"name": self._node, "labels": {"kubernetes.io/hostname": self._node}}
                    node = {"apiVersion": "v1", "kind": "Node", "metadata": head}
                    await self._client.post("/api/v1/nodes", node)
                await self._client.patch(f"/api/v1/nodes/{self._node}/status", {"status": status})
                await self._client.patch(f"/api/v1/nodes/{self._node}", {"spec": {"taints": None}})
            await asyncio.sleep(self._heartbeat_s)

    def _changed(self, pod: Mapping[str, Any]) -> None:
        uid = pod["metadata"]["uid"]
        self._pods[uid] = pod
        if uid not in self._tasks:
            self._deleted[uid] = asyncio.Event()
            self._tasks[uid] = asyncio.get_running_loop().create_task(self._serve(uid))
        if pod["metadata"].get("deletionTimestamp"):
            self._deleted[uid].set()

    def _gone(self, uid: str) -> None:
        """Deleted by force."""
        if uid in self._deleted:
            self._deleted[uid].set()

    async def _serve(self, uid: str) -> None:
        """One pod from its start to its deletion."""
        pod = self._pods[uid]
        try:
            living = asyncio.ensure_future(self._live(pod))
            deleted = asyncio.ensure_future(self._deleted[uid].wait())
            try:
                await asyncio.wait((living, deleted), return_when=asyncio.FIRST_COMPLETED)
                if not deleted.done():
                    await living
                living.cancel()  # It is not started again.
                await asyncio.gather(living, return_exceptions=True)
                await self._end(self._pods[uid])
            finally:
                for task in (living, deleted):
                    task.cancel()
                await asyncio.gather(living, deleted, return_exceptions=True)
            await self._confirm(pod)
        finally:
            for known in (self._tasks, self._deleted, self._pods):
                known.pop(uid, None)

    async def _live(self, pod: Mapping[str, Any]) -> None:
        """Start its container, and again whenever it ends."""
        image = str(pod["spec"]["containers"][0].get("image", ""))
        if image.startswith(MISSING):
            waiting = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{image}"'}
            await self._tell(pod, "", "Pending", {"waiting": waiting}, restarts=0)
            await asyncio.Event().wait()
        address = f"{self._network}.{next(self._hosts)}"
        restarts = 0
        last: Mapping[str, Any] = {}
        while True:
            container = await self._start(pod, address)
            name = pod["metadata"]["name"]
            self.containers[name] = container
            told = asyncio.ensure_future(self._tell_until_ready(pod, address, restarts, last))
            try:
                code = await container.ended()
            finally:
                told.cancel()
                await asyncio.gather(told, return_exceptions=True)
            self.containers.pop(name, None)
            reason = "OOMKilled" if code == OUT_OF_MEMORY else "Error"
            last = {"terminated": {"exitCode": code if code >= 0 else 128 - code, "reason": reason}}
            pause_s = min(RESTART_MAX_S, self._restart_s * 2.0**restarts)
            waiting = {"reason": "CrashLoopBackOff", "message": f"back-off {pause_s:g}s restarting failed container"}
            await self._tell(pod, address, "Running", {"waiting": waiting}, restarts=restarts, last=last)
            await asyncio.sleep(pause_s)
            restarts += 1

    async def _start(self, pod: Mapping[str, Any], address: str) -> Container:
        """Its container; one that is not waited for any more is stopped once it has started."""
        starting = asyncio.ensure_future(self._run(pod, address))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            await (await starting).stop(0.0)
            raise

    async def _tell_until_ready(
        self, pod: Mapping[str, Any], address: str, restarts: int, last: Mapping[str, Any]
    ) -> None:
        running = {"running": {"startedAt": _now()}}
        container = pod["spec"]["containers"][0]
        probe = container.get("readinessProbe", {})
        ports = {each.get("name"): each["containerPort"] for each in container.get("ports", ())}
        for kind, passes in (("httpGet", _until_answers), ("tcpSocket", _until_connects)):
            if (asked := probe.get(kind)) is not None:
                await self._tell(pod, address, "Running", running, restarts=restarts, last=last)
                await passes(address, ports.get(asked["port"], asked["port"]), str(asked.get("path", "/")))
        await self._tell(pod, address, "Running", running, restarts=restarts, last=last, ready=True)

    async def _end(self, pod: Mapping[str, Any]) -> None:
        meta = pod["metadata"]
        container = self.containers.get(meta["name"])
        if container is None:
            return
        seconds = meta.get("deletionGracePeriodSeconds")
        grace_s = float(pod["spec"].get("terminationGracePeriodSeconds", 30) if seconds is None else seconds)
        until_s = asyncio.get_running_loop().time() + grace_s
        hook = pod["spec"]["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec")
        if hook is not None:
            await _run_hook(hook["command"], grace_s)
        await container.stop(max(0.0, until_s - asyncio.get_running_loop().time()))
        self.containers.pop(meta["name"], None)

    async def _confirm(self, pod: Mapping[str, Any]) -> None:
        """It has ended: its object may go."""
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        while True:
            try:
                await self._client.delete(_path(pod), body)
                return
            except ApiError:
                return
            except KubernetesError:
                await asyncio.sleep(0.1)

    async def _tell(
        self,
        pod: Mapping[str, Any],
        address: str,
        phase: str,
        state: Mapping[str, Any],
        *,
        restarts: int,
        last: Mapping[str, Any] | None = None,
        ready: bool = False,
    ) -> None:
        """Its status, until the API server has taken it."""
        container = pod["spec"]["containers"][0]
        status = {
            "name": container["name"],
            "image": container.get("image", ""),
            "imageID": "none",
            "state": state,
            "ready": ready,
            "restartCount": restarts,
            "containerID": f"process://{restarts}",
            "lastState": last or {},
        }
        conditions = [
            {"type": name, "status": "True" if good else "False", "lastTransitionTime": _now()}
            for name, good in (
                ("Initialized", True),
                ("PodScheduled", True),
                ("ContainersReady", ready),
                ("Ready", ready),
            )
        ]
        told: dict[str, Any] = {"phase": phase, "conditions": conditions, "containerStatuses": [status]}
        if address:
            told |= {"podIP": address, "podIPs": [{"ip": address}]}
        while True:
            try:
                await self._client.patch(f"{_path(pod)}/status", {"status": told})
                return
            except ApiError:
                return  # It is gone.
            except KubernetesError:
                await asyncio.sleep(0.1)


OUT_OF_MEMORY = 137
"""Exit code that stands for a kill by the kernel for want of memory."""


async def _run_hook(command: Sequence[str], timeout_s: float) -> None:
    process = await asyncio.create_subprocess_exec(*command)
    try:
        async with asyncio.timeout(timeout_s):
            await process.wait()
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _until_answers(host: str, port: int, path: str) -> None:
    origin = Origin(f"http://{host}:{port}", keepalive=False)
    try:
        while True:
            with contextlib.suppress(NetError):
                if (await origin.fetch("GET", path)).status == 200:
                    return
            await asyncio.sleep(0.05)
    finally:
        await origin.close()


async def _until_connects(host: str, port: int, path: str) -> None:
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
            return
        await asyncio.sleep(0.05)


def _path(pod: Mapping[str, Any]) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
