"""The chart on a cluster of this machine: its gateways run as processes, with what their pods would give them."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiron.fleet.kubernetes.testing.kubelet import Container, ProcessContainer, run_process
from kubernetes_site import Cluster
from real_kubernetes import kubeconfig
from render_manifests import CHART

CORE = "/api/v1/namespaces/default"
GATEWAY_PORT = 8080
PROGRAM = """
import json, os, sys
import uvloop
from chiron.cli import main

connect = uvloop.Loop.create_connection

async def create_connection(self, factory, host=None, port=None, **more):
    if host is not None and host.endswith(".svc"):
        with open(os.environ["NAMES"]) as names:
            address = json.load(names).get(host)
        if address is None:
            raise OSError(f"{host}: no such name")
        host = address
    return await connect(self, factory, host, port, **more)

uvloop.Loop.create_connection = create_connection
sys.exit(main())
"""
"""``chiron``, with a resolver that knows the cluster's names. The processes of a gateway are forks of this one."""


def chart(directory: Path) -> Path:
    """A copy that takes any version of Kubernetes: the real one of the tests is 1.20."""
    copied = directory / "chart" / "chiron"
    shutil.copytree(CHART, copied)
    about = copied / "Chart.yaml"
    about.write_text(about.read_text().replace('kubeVersion: ">=1.22.0-0"\n', ""))
    return copied


def disk(name: str) -> dict[str, Any]:
    """A volume that a claim can have."""
    spec = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": "/nowhere"}}
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec}


class Node:
    """Runs pods of the gateway's image with what their volumes and their service account give them."""

    def __init__(self, directory: Path) -> None:
        self.here: Cluster | None = None
        self._directory = directory
        self._others = run_process(directory)
        self._names = directory / "names.json"
        self.tell_names({})

    def tell_names(self, names: Mapping[str, str]) -> None:
        """Addresses, by name."""
        new = self._names.with_suffix(".new")
        new.write_text(json.dumps(names))
        new.replace(self._names)

    async def run(self, pod: Mapping[str, Any], address: str) -> Container:
        container = pod["spec"]["containers"][0]
        if not container["image"].startswith("chiron:"):
            return await self._others(pod, address)
        assert self.here is not None
        assert self.here.plane is not None
        name, account = pod["metadata"]["name"], pod["spec"]["serviceAccountName"]
        folders = {volume["name"]: self._folder(pod, volume) for volume in pod["spec"]["volumes"]}
        mounts = {mount["mountPath"]: str(folders[mount["name"]]) for mount in container["volumeMounts"]}
        for volume in pod["spec"]["volumes"]:
            for key, data in (await self._files(volume)).items():
                (folders[volume["name"]] / key).write_bytes(_of_here(data.decode(), mounts).encode())
        wanted = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        token = await self.here.client.post(f"{CORE}/serviceaccounts/{account}/token", wanted)
        access = kubeconfig(folders["tmp"] / "kubeconfig", self.here.plane.url, token["status"]["token"])
        words = [_of_here(word, mounts).replace("$(POD_NAME)", name) for word in container["args"]]
        own = ["--host", address]  # All pods have this machine's network.
        if any(port["name"] == "gateways" for port in container["ports"]):
            own += ["--set", f"gateways.listen={address}:{_port(container, 'gateways')}"]
        with (self._directory / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", PROGRAM, *words, *own),
                env={**os.environ, "KUBECONFIG": str(access), "NAMES": str(self._names)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return ProcessContainer(process)

    def _folder(self, pod: Mapping[str, Any], volume: Mapping[str, Any]) -> Path:
        claim = volume.get("persistentVolumeClaim", {}).get("claimName", pod["metadata"]["name"])
        folder = self._directory / "volumes" / claim / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    async def _files(self, volume: Mapping[str, Any]) -> dict[str, bytes]:
        """Of a ConfigMap or a Secret."""
        assert self.here is not None
        if name := volume.get("configMap", {}).get("name"):
            found = (await self.here.client.get(f"{CORE}/configmaps/{name}"))["data"]
            return {key: text.encode() for key, text in found.items()}
        if name := volume.get("secret", {}).get("secretName"):
            found = (await self.here.client.get(f"{CORE}/secrets/{name}"))["data"]
            return {key: base64.b64decode(text) for key, text in found.items()}
        return {}


def _of_here(text: str, mounts: Mapping[str, str]) -> str:
    """With the folders of this machine in place of those of the container."""
    longest_first = "|".join(map(re.escape, sorted(mounts, key=len, reverse=True)))
    return re.sub(rf"(?<![\w/])({longest_first})(?=/|$)", lambda found: mounts[found[1]], text)


def _port(container: Mapping[str, Any], name: str) -> int:
    return next(int(port["containerPort"]) for port in container["ports"] if port["name"] == name)
