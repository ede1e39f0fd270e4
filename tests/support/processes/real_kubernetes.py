"""A real control plane on this machine: etcd, kube-apiserver, kube-controller-manager, kube-scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from chiron.fleet.kubernetes.access import from_kubeconfig
from chiron.fleet.kubernetes.client import Client, KubernetesError

TOKEN = "admintok"
CONTROLLERS = "deployment,replicaset,statefulset,garbagecollector,namespace,disruption,persistentvolume-binder"


def kubeconfig(path: Path, url: str, token: str = "") -> Path:
    """JSON is YAML."""
    path.write_text(
        json.dumps(
            {
                "clusters": [{"name": "c", "cluster": {"server": url, "insecure-skip-tls-verify": True}}],
                "users": [{"name": "u", "user": {"token": token} if token else {}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ControlPlane:
    """Its processes, by name of the program."""

    def __init__(self, programs: Path, directory: Path) -> None:
        self.programs = programs
        self.directory = directory
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.etcd_port, self.peer_port, self.port = free_port(), free_port(), free_port()
        self.url = f"https://127.0.0.1:{self.port}"

    async def start(self, name: str, *arguments: str) -> None:
        log = (self.directory / f"{name}.log").open("ab")
        with log:
            self.processes[name] = await asyncio.create_subprocess_exec(
                str(self.programs / name),
                *arguments,
                cwd=self.directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def start_api(self) -> None:
        await self.start(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--secure-port={self.port}",
            *("--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--cert-dir=certs"),
            *("--service-cluster-ip-range=10.0.0.0/24", "--token-auth-file=tokens.csv", "--authorization-mode=RBAC"),
            *("--service-account-key-file=sa.pub", "--service-account-signing-key-file=sa.key"),
            *("--service-account-issuer=https://127.0.0.1", "--disable-admission-plugins=ServiceAccount"),
        )

    async def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    async def until_ready(self, config: Path) -> None:
        client = Client(from_kubeconfig(config))
        try:
            async with asyncio.timeout(180.0):
                while True:
                    with contextlib.suppress(KubernetesError):
                        await client.get("/api/v1/namespaces/default")
                        return
                    await asyncio.sleep(0.1)
        finally:
            await client.close()


@contextlib.asynccontextmanager
async def control_plane(
    programs: Path, directory: Path, *, manager: Sequence[str] = ()
) -> AsyncIterator[tuple[ControlPlane, Path]]:
    """And the path of a kubeconfig for an administrator. ``manager``: more arguments of the controller manager."""
    plane = ControlPlane(programs, directory)
    subprocess.run(["openssl", "genrsa", "-out", "sa.key", "2048"], cwd=directory, check=True, capture_output=True)
    subprocess.run(
        ["openssl", "rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"], cwd=directory, check=True, capture_output=True
    )
    (directory / "tokens.csv").write_text(f'{TOKEN},admin,1,"system:masters"\nchirontok,chiron,2\n')
    config = kubeconfig(directory / "admin.kubeconfig", plane.url, TOKEN)
    etcd, peer = f"http://127.0.0.1:{plane.etcd_port}", f"http://127.0.0.1:{plane.peer_port}"
    try:
        await plane.start(
            "etcd",
            *("--data-dir", "etcd", "--listen-client-urls", etcd, "--advertise-client-urls", etcd),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"default={peer}", "--unsafe-no-fsync", "--log-level", "error"),
        )
        await plane.start_api()
        await plane.until_ready(config)
        common = (f"--kubeconfig={config}", "--leader-elect=false", "--port=0", "--secure-port=0")
        own = ("--cert-dir=kcm", f"--controllers={CONTROLLERS}", *manager)
        await plane.start("kube-controller-manager", *common, *own)
        await plane.start("kube-scheduler", *common, "--cert-dir=ks")
        yield plane, config
    finally:
        for name in list(plane.processes)[::-1]:
            await plane.kill(name)
