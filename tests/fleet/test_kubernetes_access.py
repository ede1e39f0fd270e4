"""Credentials: a pod's own, whose token is replaced while the gateway runs, or a kubeconfig; errors name the file."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from chiron.config.read import ConfigError
from chiron.config.serve import parse_serve
from chiron.fleet.kubernetes.access import AccessError, find_access, from_kubeconfig, in_cluster
from chiron.fleet.kubernetes.client import ApiError, Client
from chiron.fleet.kubernetes.testing.api import FakeKubernetes

PODS = "/api/v1/namespaces/default/pods"


def config(path: Path, *, cluster: dict[str, Any] | None = None, user: dict[str, Any] | None = None) -> Path:
    said = {
        "clusters": [{"name": "c", "cluster": cluster or {"server": "https://example.com:6443"}}],
        "users": [{"name": "u", "user": user or {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "llm"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(said))
    return path


def test_a_token_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    async def story() -> None:
        async with FakeKubernetes(token="new") as api:
            (tmp_path / "token").write_text("old\n")
            path = config(tmp_path / "k", cluster={"server": api.url}, user={"tokenFile": "token"})
            client = Client(from_kubeconfig(path))
            with pytest.raises(ApiError, match="401 Unauthorized"):
                await client.get(PODS)
            (tmp_path / "token").write_text("new\n")
            assert (await client.get(PODS))["items"] == []
            await client.close()

    asyncio.run(story())


def test_a_pod_uses_its_service_account_and_a_name_in_the_config_comes_first(tmp_path: Path) -> None:
    assert in_cluster({}, tmp_path) is None, "outside"
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    assert in_cluster(environ, tmp_path) is None, "without a token"
    (tmp_path / "token").write_text("t")
    with pytest.raises(AccessError, match="service account cannot be read"):
        in_cluster(environ, tmp_path)
    authority = Path(ssl.get_default_verify_paths().openssl_cafile)
    if authority.is_file():
        (tmp_path / "ca.crt").write_bytes(authority.read_bytes())
        (tmp_path / "namespace").write_text("llm\n")
        access = in_cluster(environ, tmp_path)
        assert access is not None
        assert (access.url, access.namespace, access.headers()) == (
            "https://[fd00::1]:443",
            "llm",
            {"authorization": "Bearer t"},
        )
    path = config(tmp_path / "k", user={"token": "secret"})
    found = find_access({"KUBECONFIG": str(path)})
    assert (found.url, found.namespace) == ("https://example.com:6443", "llm")
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"user": {"exec": {"command": "aws"}}}, "has exec; Chiron needs a token or a certificate"),
        ({"cluster": {"server": "example.com"}}, "it must be https://HOST:PORT"),
        (
            {"cluster": {"server": "https://example.com", "certificate-authority-data": "%"}},
            "certificate-authority cannot be read",
        ),
        (
            {"cluster": {"server": "https://example.com", "certificate-authority-data": "eA=="}},
            "certificates cannot be used",
        ),
        ({"user": {"client-certificate": "a", "client-key": "b"}}, "client-certificate cannot be read"),
    ],
)
def test_what_a_kubeconfig_lacks_is_said_with_its_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(AccessError, match=words):
        from_kubeconfig(config(tmp_path / "k", **change))
    with pytest.raises(AccessError, match="there is no 'y'"):
        from_kubeconfig(config(tmp_path / "k"), "y")
    with pytest.raises(AccessError, match="cannot be read"):
        from_kubeconfig(tmp_path / "missing")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("kubernetes = { namespace = 'n' }", "give one of deployment, statefulset and leaderworkerset"),
        ("kubernetes = { deployment = 'a', statefulset = 'b' }", "give one of"),
        ("kubernetes = { deployment = 'Not a name' }", "it must be a Kubernetes name"),
        ("kubernetes = { deployment = 'a', port = 0 }", "1 to 65535"),
        ("kubernetes = { deployment = 'a', replicas = 3 }", "unknown key"),
        ("kubernetes = { deployment = 'a' }\nendpoints = ['http://127.0.0.1:1']", "not two of them"),
        ("kubernetes = { deployment = 'a' }\nargs = ['-x']", "belongs to engines that Chiron starts"),
    ],
)
def test_what_a_config_gets_wrong_is_said_with_its_path(keys: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_serve(f"[models.m]\nengine = 'openai'\n{keys}\n", directory=tmp_path)
