"""ChironModel resources are read as the file's own models are: strictly, and one that is wrong stops no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from chiron.config.chiron_models import (
    CLASS_KEYS,
    KIND_KEYS,
    MODEL_KEYS,
    OTHER_KEYS,
    POLICY_KEYS,
    WORKLOAD_KEYS,
    ResourceReader,
)
from chiron.fleet.kubernetes.source import KubernetesSource
from chiron.gateway.chiron_models.objects import ModelResource, Reading
from chiron.gateway.chiron_models.status import FIELDS
from kubernetes_site import CRD
from yaml_loader import LOADER

KIND = {"engine": "vllm", "deployment": "a"}
FILE = """
[kubernetes]
[models.own]
engine = "vllm"
kubernetes = { deployment = "own" }
"""


def resource(name: str, *, created: int = 0, generation: int = 1, **spec: Any) -> ModelResource:
    return ModelResource(
        name=name,
        namespace="llm",
        uid=name,
        generation=generation,
        created=f"2026-01-01T00:00:{created:02d}Z",
        spec={"kinds": [{"engine": "vllm", "deployment": name}], **spec},
    )


def read(*resources: ModelResource, text: str = "[kubernetes]\n", before: tuple[ModelResource, ...] = ()) -> Reading:
    return ResourceReader(text, directory=Path("/nowhere")).read(resources, before)


def test_a_resource_is_a_model_as_if_it_stood_in_the_file() -> None:
    kinds = [
        {"engine": "vllm", "name": "big", "deployment": "a", "port": 9000, "gpu": "h100", "gpus": 4, "maxNumSeqs": 64},
        {"engine": "sglang", "statefulSet": "b", "pricePerGpuHour": 2.5, "startTimeout": "20m", "scaler": "external"},
    ]
    classes = [{"name": "fast", "ttft": "500ms", "itl": "30ms"}, {"name": "night", "deadline": "12h"}]
    found = read(
        resource("m", model="org/m.1", aliases=["x"], minInstances=0, maxInstances=7, kinds=kinds, classes=classes)
    )
    assert found.refused == {}
    (model,) = found.config.models
    assert (model.name, model.aliases, model.min_instances, model.max_instances) == ("org/m.1", ("x",), 0, 7)
    assert (model.classes, model.default_class, model.batch_class) == (("fast", "night"), "fast", "night")
    assert found.config.classes["fast"].itl_s == 0.03
    first, second = (kind.source for kind in model.kinds)
    assert isinstance(first, KubernetesSource)
    assert isinstance(second, KubernetesSource)
    assert (first.name, first.namespace, first.port) == ("a", "llm", 9000)
    assert (second.workload, second.start_timeout_s, second.scaler) == ("statefulset", 1200.0, "external")
    assert [kind.kind.price_per_gpu_hour for kind in model.kinds] == [0.0, 2.5]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"kinds": []}, "spec.kinds: must be a list of 1 to 16 objects"),
        ({"kinds": [{"engine": "vlm", "deployment": "a"}]}, "spec.kinds[0]: engine is 'vlm'; did you mean 'vllm'?"),
        ({"kinds": [{"engine": "vllm"}]}, "spec.kinds[0]: give one of deployment, statefulSet and leaderWorkerSet"),
        ({"kinds": [KIND, {**KIND, "name": "b"}]}, "spec.kinds[1].deployment: 'a' is of this one already"),
        ({"kinds": [KIND, {**KIND, "deployment": "b"}]}, "give each a name"),
        ({"kinds": [{**KIND, "port": 0}]}, "spec.kinds[0]: port is 0; it must be 1 to 65535"),
        ({"kinds": [{**KIND, "maxNumSeqs": 0}]}, "spec.kinds[0]: maxNumSeqs is 0; it must be 1 or more"),
        ({"kinds": [{**KIND, "startTimeout": "soon"}]}, "spec.kinds[0].startTimeout: duration 'soon': expected"),
        ({"kinds": [{**KIND, "namespace": "kube-system"}]}, "spec.kinds[0].namespace: unknown field"),
        ({"kinds": [{**KIND, "command": ["sh"]}]}, "spec.kinds[0].command: unknown field"),
        ({"minInstances": 9, "maxInstances": 2}, "spec: minInstances is 9; it must be at most maxInstances (2)"),
        ({"minInstance": 1}, "spec.minInstance: unknown field (value 1); did you mean 'minInstances'"),
        ({"classes": [{"name": "no"}]}, "spec.classes[0]: there is no class 'no' yet; allowed: chat, batch"),
        ({"classes": [{"name": "c", "itl": "x"}]}, "spec.classes[0].itl: duration 'x': expected"),
        ({"classes": [{"name": "c", "ttft": 1}], "batchClass": "c"}, "spec.batchClass: 'c' must be a class of kind"),
        ({"policy": {"name": "nope"}}, "spec.policy.name: unknown policy 'nope'; allowed: chiron"),
        ({"policy": {"name": "chiron", "settings": {"hold": "x"}}}, "spec.policy.settings.hold: duration 'x'"),
        ({"policy": {"name": "chiron", "settings": {"policy": [1]}}}, "spec.policy.settings.policy: no setting"),
        ({"policy": {"name": "chiron", "settings": {"stages": {"policy": [1]}}}}, "unknown stage policy [1]"),
        ({"model": 3}, "spec.model: 3 must be text"),
    ],
)
def test_one_that_cannot_be_is_refused_with_field_value_and_what_is_allowed(spec: dict[str, Any], why: str) -> None:
    found = read(resource("bad", **spec), resource("good", created=9), text=FILE)
    assert why in found.refused["bad"]
    assert [model.name for model in found.config.models] == ["own", "good"]


def test_a_cascade_of_the_file_stays_as_it_is() -> None:
    """Its classes are the interactive ones of its parts: it is not given all of the file's."""
    text = FILE + '[models.large]\nengine = "vllm"\nkubernetes = { deployment = "large" }\n'
    text += '[models.chat]\ncascade = { first = "own", then = "large" }\naliases = ["gpt"]\n'
    for resources in ((), (resource("good"), resource("bad", model="gpt"))):
        found = read(*resources, text=text)
        (chat,) = found.config.cascades
        assert (chat.classes, chat.batch_class) == (("chat",), "")
        assert set(found.refused) == {"bad"} & {each.name for each in resources}


def test_what_only_one_can_have_has_the_file_then_the_older_one() -> None:
    chat, slow = {"name": "talk", "ttft": "1s"}, {"name": "talk", "ttft": "9s"}
    found = read(
        resource("younger", created=3, model="one"),
        resource("older", created=1, model="one"),
        resource("own", created=0),
        resource("takes", created=4, aliases=["own"]),
        resource("steals", created=5, kinds=[{"engine": "vllm", "deployment": "older"}]),
        resource("a", created=6, classes=[chat], policy={"name": "llumnix"}),
        resource("b", created=7, classes=[slow]),
        resource("c", created=8, classes=[{"name": "talk"}], policy={"name": "chiron"}),
        resource("d", created=9, classes=[{"name": "talk"}], policy={"name": "llumnix"}),
        text=FILE,
    )
    assert {name: why.split(":")[0] for name, why in found.refused.items()} == {
        "own": "spec.model",
        "younger": "spec.model",
        "takes": "spec.aliases[0]",
        "steals": "spec.kinds[0].deployment",
        "b": "spec.classes[0]",
        "c": "spec.policy",
    }
    assert "ChironModel older" in found.refused["steals"]
    assert [model.name for model in found.config.models] == ["own", "one", "a", "d"]
    assert found.config.policy == "llumnix"
    assert found.config.models[0].classes == ("chat", "batch"), "other models' classes are none of the file's model"


def test_nobody_takes_what_is_in_force_by_a_change() -> None:
    talk, slower = ([{"name": "talk", "ttft": ttft}] for ttft in ("1s", "9s"))
    before = [resource("a", created=1, classes=talk), resource("b", created=2, classes=talk)]
    for change in ({"classes": slower}, {"aliases": ["b"]}, {"policy": {"name": "static"}}):
        wanted = {"classes": talk, **change}
        others = (
            [resource("b", created=2, classes=talk, policy={"name": "chiron"})] if "policy" in change else before[1:]
        )
        found = read(resource("a", created=1, **wanted), *others, before=[before[0], *others])
        assert "generation" in found.refused["a"], change
        assert [(each.name, each.spec) for each in found.accepted] == [
            (each.name, each.spec) for each in (*others, before[0])
        ]


def test_one_that_was_made_again_wrongly_stays_as_it_was() -> None:
    before = resource("a", created=1)
    found = read(replace(resource("a", created=2, minInstances=9, maxInstances=1), uid="new"), before=[before])
    assert found.accepted == (before,)


class Broken(dict[str, Any]):
    """What nobody has thought of."""

    def get(self, key: str, default: object = None) -> Any:
        raise TypeError(f"no {key}")


def test_a_fault_of_the_reader_refuses_one_and_stops_no_other() -> None:
    found = read(replace(resource("bad"), spec=Broken()), resource("good"))
    assert found.refused == {"bad": "spec: it cannot be read: TypeError: no model"}
    assert [each.name for each in found.accepted] == ["good"]


def test_a_workload_of_another_namespace_is_another_one() -> None:
    for namespace, refused in (("other", []), ("llm", ["a"]), ("", ["a"])):
        source = f'{{ deployment = "a", namespace = "{namespace}" }}' if namespace else '{ deployment = "a" }'
        text = f'[kubernetes]\n[models.own]\nengine = "vllm"\nkubernetes = {source}\n'
        assert list(read(resource("a"), text=text).refused) == refused


def test_the_usual_classes_can_have_other_slos_unless_a_model_relies_on_them() -> None:
    chat = [{"name": "chat", "ttft": "1s"}]
    assert read(resource("a", classes=chat)).config.classes["chat"].ttft_s == 1.0
    found = read(resource("a", classes=chat), resource("b", created=1))
    assert "spec.classes: missing, so class 'chat' has other SLOs in ChironModel a" in found.refused["b"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"maxInstances": 101},
            "spec.maxInstances: 101; at most 100 (kubernetes.max_instances of the gateway's config)",
        ),
        ({"minInstances": 17, "maxInstances": 20}, "spec.minInstances: 17; at most 16 (kubernetes.min_instances"),
        ({"classes": [{"name": "x", "ttft": "1s", "weight": 11}]}, "spec.classes: weight of 'x' is 11; at most 10"),
        ({"maxInstances": 100, "minInstances": 16, "classes": [{"name": "x", "ttft": "1s", "weight": 10}]}, ""),
    ],
)
def test_one_resource_may_not_ask_for_more_than_the_gateway_allows(spec: dict[str, Any], message: str) -> None:
    refused = read(resource("m", **spec)).refused
    assert refused.get("m", "").startswith(message)
    assert bool(refused) == bool(message)
    text = "[kubernetes]\nmax_instances = 200\nmin_instances = 20\nweight = 100\n"
    assert not read(resource("m", **spec), text=text).refused


def test_one_that_says_nothing_of_how_many_there_may_be_gets_no_more_than_the_gateway_allows() -> None:
    silent = resource("m"), resource("e", created=1, kinds=[{"engine": "emulated", "deployment": "e"}])

    def most(text: str) -> list[int]:
        return [model.max_instances for model in read(*silent, text=text).config.models]

    assert most("[kubernetes]\n") == [4, 50]
    assert most("[kubernetes]\nmax_instances = 20\n") == [4, 20]
    assert most("[kubernetes]\nmax_instances = 2\nmin_instances = 2\n") == [2, 2]
    refused = read(resource("m", minInstances=3), text="[kubernetes]\nmax_instances = 2\n").refused["m"]
    assert refused == "spec: minInstances is 3; it must be at most maxInstances (2)"


def test_one_that_was_changed_to_what_cannot_be_stays_as_it_was() -> None:
    last = resource("m", maxInstances=5)
    found = read(resource("m", generation=2, maxInstances=0), before=(last,))
    assert found.accepted == (last,)
    assert found.config.models[0].max_instances == 5
    assert found.refused["m"].endswith("; generation 1 stays in force")
    assert found.in_force == {"m": last}
    gone = read(before=(last,))
    assert (gone.accepted, gone.config.models) == ((), ())


def test_the_definition_has_the_fields_that_are_read_and_explains_each() -> None:
    definition = yaml.load(CRD.read_text(), LOADER)
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec, status = (schema["properties"][key]["properties"] for key in ("spec", "status"))
    assert set(spec) == {*MODEL_KEYS, *OTHER_KEYS}
    assert set(spec["kinds"]["items"]["properties"]) == {*KIND_KEYS, *WORKLOAD_KEYS}
    assert set(spec["classes"]["items"]["properties"]) == set(CLASS_KEYS)
    assert set(spec["policy"]["properties"]) == set(POLICY_KEYS)
    assert set(status) == {*FIELDS, "conditions"}

    def undescribed(node: dict[str, Any], path: str) -> list[str]:
        own = [] if node.get("description", "").endswith(".") else [path]
        inner = {**node.get("properties", {}), **node.get("items", {}).get("properties", {})}
        return own + [each for key, value in inner.items() for each in undescribed(value, f"{path}.{key}")]

    assert undescribed(schema, "") == [".metadata"], "of which the API server has its own explanation"
