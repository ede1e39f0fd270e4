"""The manifests that ship are valid for current Kubernetes, and their config is one that Chiron reads."""

from __future__ import annotations

import asyncio
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

import chiron
from chiron.config.serve import parse_serve
from chiron.fleet.kubernetes.source import KubernetesSource
from kubernetes_site import PROGRAMS, cluster
from yaml_loader import LOADER

DIRECTORY = Path(chiron.__file__).parent / "data" / "deploy" / "kubernetes"


def documents(name: str) -> list[dict[str, object]]:
    return list(yaml.load_all((DIRECTORY / name).read_text(), LOADER))


@pytest.mark.parametrize("version", ["1.28", "1.34", "1.37"])
def test_every_object_is_valid(version: str) -> None:
    found = [item for path in sorted(DIRECTORY.glob("*.yaml")) for item in documents(path.name)]
    assert len(found) > 8
    for item in found:
        kubernetes_validate.validate(item, version, strict=True)


def test_the_config_scales_the_deployment_that_the_role_allows(tmp_path: Path) -> None:
    by_kind = {str(item["kind"]): item for item in documents("chiron.yaml")}
    (engine,) = documents("vllm.yaml")
    config = parse_serve(by_kind["ConfigMap"]["data"]["chiron.toml"], directory=tmp_path)  # type: ignore[index]
    (kind,) = config.models[0].kinds
    assert isinstance(kind.source, KubernetesSource)
    assert kind.source.name == engine["metadata"]["name"]  # type: ignore[index]
    rules = by_kind["Role"]["rules"]
    named = {name for rule in rules for name in rule.get("resourceNames", ())}  # type: ignore[attr-defined]
    assert named == {kind.source.name}


PATHS = {
    "ServiceAccount": "/api/v1/namespaces/default/serviceaccounts",
    "ConfigMap": "/api/v1/namespaces/default/configmaps",
    "PersistentVolumeClaim": "/api/v1/namespaces/default/persistentvolumeclaims",
    "Service": "/api/v1/namespaces/default/services",
    "Deployment": "/apis/apps/v1/namespaces/default/deployments",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings",
}


@pytest.mark.kubernetes
@pytest.mark.skipif(not PROGRAMS, reason="CHIRON_TEST_KUBERNETES names no programs")
def test_a_real_api_server_takes_every_object(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster("real", tmp_path, nodes=0) as here:
            for item in (*documents("chiron.yaml"), *documents("vllm.yaml")):
                kind = str(item["kind"])
                if kind == "PodDisruptionBudget":  # policy/v1 is newer than that server.
                    continue
                made = await here.client.post(PATHS[kind], item)
                assert made["metadata"]["uid"]
                if kind == "Deployment":
                    assert made["spec"]["replicas"] == 1

    asyncio.run(run())
