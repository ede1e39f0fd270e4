"""Every ChironModel in the documents is one that the definition allows and that a gateway would accept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from chiron.config.chiron_models import ResourceReader
from chiron.gateway.chiron_models.objects import read_resource
from kubernetes_site import CRD
from yaml_loader import LOADER

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = [
    pytest.param(item, id=f"{page.name}-{item['metadata']['name']}")
    for page in sorted(DOCS.glob("*.md"))
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    if "kind: ChironModel" in block
    for item in yaml.load_all(block, LOADER)
]


def strict(schema: Any) -> Any:
    """No other fields than those that are named."""
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    closed = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    return found | ({"additionalProperties": False} if closed else {})


def test_there_are_some() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("item", EXAMPLES)
def test_it_is_accepted(item: dict[str, Any]) -> None:
    schema = yaml.load(CRD.read_text(), LOADER)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    jsonschema.validate({"spec": item["spec"]}, strict(schema))
    head = {"uid": "u", "resourceVersion": "1", **item["metadata"]}
    reading = ResourceReader("[kubernetes]\n", directory=DOCS).read([read_resource({**item, "metadata": head})])
    assert reading.refused == {}
    assert [model.name for model in reading.config.models] == [item["metadata"]["name"]]
