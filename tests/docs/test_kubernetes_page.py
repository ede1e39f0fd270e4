"""The examples of docs/kubernetes.md: the config is read, and the ScaledObject finds its number at a gateway."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from chiron.config.serve import parse_serve
from chiron.fleet.kubernetes.source import KubernetesSource
from chiron.gateway.relay.keys import hash_secret
from live_gateway import until
from scripted_engine import ScriptedEngine, before

PAGE = Path(__file__).parents[2] / "docs" / "kubernetes.md"
SECTION = PAGE.read_text().split("## With KEDA or an HPA")[1].split("\n## ")[0]


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)


def scaled_object() -> tuple[dict[str, Any], dict[str, Any]]:
    scaled, authentication = yaml.safe_load_all(examples("yaml")[0])
    return scaled, authentication


def test_the_scaled_object_and_the_config_are_about_the_same_deployment_and_bounds(tmp_path: Path) -> None:
    scaled, authentication = scaled_object()
    (model,) = parse_serve(examples("toml")[0], directory=tmp_path).models
    source = model.kinds[0].source
    assert isinstance(source, KubernetesSource)
    spec = scaled["spec"]
    assert (source.name, source.namespace) == (spec["scaleTargetRef"]["name"], scaled["metadata"]["namespace"])
    assert source.scaler == "external"
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (model.min_instances, model.max_instances)
    assert spec["triggers"][0]["authenticationRef"]["name"] == authentication["metadata"]["name"]


def test_the_trigger_finds_its_number(tmp_path: Path) -> None:
    scaled, _ = scaled_object()
    (trigger,) = scaled["spec"]["triggers"]
    assert (trigger["type"], trigger["metadata"]["authMode"], trigger["metadata"]["targetValue"]) == (
        "metrics-api",
        "bearer",
        "1",
    )
    target = urlsplit(trigger["metadata"]["url"])

    async def main() -> None:
        key, alias = f"admin_key_hash={hash_secret(b'root')}", 'aliases = ["llama-3.1-8b"]'
        often = '[policies.often]\npolicy = "chiron"\ntick = "250ms"\n'
        changes = [key, "policy=often"]
        async with before(tmp_path, ScriptedEngine(), model=alias, extra=often, changes=changes) as (service, client):
            await until(lambda: service.journal.plans, "the policy has decided")
            headers = {"authorization": "Bearer root"}
            answer = await client.fetch("GET", f"{target.path}?{target.query}", headers=headers)
            assert answer.status == 200, "KEDA reads no other"
            number = json.loads(answer.body)[trigger["metadata"]["valueLocation"]]
            assert (type(number), number) == (int, 1)
            assert set(trigger["metadata"]) == {"url", "valueLocation", "targetValue", "authMode"}
            assert "metricType" not in trigger, "the number is of replicas: AverageValue, as by default"
            assert (await client.fetch("GET", f"{target.path}?{target.query}")).status == 401

    asyncio.run(main())
