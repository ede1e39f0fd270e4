"""``chiron doctor`` before pods: is the API server there, are the workloads, and which ChironModels would be served?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from chiron.cli.doctor.checks import Check
from chiron.cli.doctor.kubernetes import kubernetes_checks
from chiron.config.serve import load_serve
from chiron.fleet.kubernetes.testing.api import FakeKubernetes, Refusal
from kubernetes_site import chiron_model, workload
from real_kubernetes import kubeconfig


def checks(directory: Path, prepare: Callable[[FakeKubernetes], None]) -> dict[str, Check]:
    """By what they are about."""

    async def main() -> dict[str, Check]:
        async with FakeKubernetes() as fake:
            prepare(fake)
            access = kubeconfig(directory / "kubeconfig", fake.url)
            config = directory / "chiron.toml"
            source = f'{{ deployment = "own", kubeconfig = "{access}" }}'
            models = f'[models.own]\nengine = "vllm"\nkubernetes = {source}\n'
            config.write_text(f'[kubernetes]\nkubeconfig = "{access}"\n{models}')
            found = await asyncio.to_thread(lambda: list(kubernetes_checks(load_serve(config), directory)))
            return {each.what: each for each in found}

    return asyncio.run(main())


def test_it_says_which_models_would_be_served_and_what_their_workloads_are(tmp_path: Path) -> None:
    def prepare(fake: FakeKubernetes) -> None:
        for name in ("own", "a"):
            fake.apply(workload(name=name, replicas=2))
        for name in ("own", "mute"):  # Which the config may name, and a ChironModel may not.
            fake.apply({**workload(name=name, replicas=2), "metadata": {"name": name, "labels": {}}})
        fake.apply(chiron_model("m", "mute"))
        for item in (chiron_model("a", "a"), chiron_model("b", "b"), chiron_model("bad", "c", minInstances=9)):
            fake.apply(item)

    found = checks(tmp_path, prepare)
    assert {what: each.state for what, each in found.items()} == {
        "ChironModels": "ok",
        "ChironModel bad": "warn",
        "Deployment own": "ok",
        "Deployment a": "ok",
        "Deployment b": "fail",
        "Deployment mute": "fail",
    }
    assert found["ChironModels"].found == "of namespace default: a, b, m"
    assert found["Deployment mute"].next == "kubectl label deployment mute chiron-serving.io/scale=allowed"
    assert "minInstances is 9" in found["ChironModel bad"].found
    assert found["Deployment a"].found.startswith("2 replicas asked for")
    assert "create it" in found["Deployment b"].next


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    def without_definition(fake: FakeKubernetes) -> None:
        gone = Refusal(404, "NotFound", "the server could not find the requested resource")
        fake.interfere = lambda method, path: gone if "chironmodels" in path else None

    def without_rights(fake: FakeKubernetes) -> None:
        fake.interfere = lambda method, path: Refusal(403, "Forbidden", "no")

    assert "install their definition" in checks(tmp_path, without_definition)["ChironModels"].next
    found = checks(tmp_path, without_rights)
    assert {each.state for each in found.values()} == {"fail"}
    assert all("rights" in each.next for each in found.values())
