"""A ``ChironModel`` as the API server has it, and what was made of those of a namespace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from chiron.fleet.kubernetes.pods import UID
from chiron.fleet.kubernetes.source import NAME

if TYPE_CHECKING:
    from chiron.gateway.settings import ServeConfig

GROUP = "chiron-serving.io"
VERSION = "v1alpha1"
KIND = "ChironModel"
PLURAL = "chironmodels"
RESOURCES_MAX = 500
"""In one namespace: more models than one brain is meant for."""
SPEC_MAX_BYTES = 256 * 1024


def path_of(namespace: str) -> str:
    """Where those of a namespace are."""
    return f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResource:
    """What somebody wants."""

    name: str
    namespace: str
    uid: str
    generation: int
    """Grows with each change of the spec."""
    created: str
    """RFC 3339. Where two want the same, the older one has it."""
    spec: Mapping[str, Any]
    flaw: str = ""
    """Why its spec was not kept, and is empty here; empty: it was."""

    @property
    def wanted(self) -> tuple[str, bytes]:
        """What two versions must have in common for nothing to be done."""
        return self.name, orjson.dumps(self.spec, option=orjson.OPT_SORT_KEYS) + self.flaw.encode()


def read_resource(item: Mapping[str, Any]) -> ModelResource:
    """Raises ValueError for an object that is none."""
    head, spec = item.get("metadata"), item.get("spec")
    if not isinstance(head, Mapping) or not isinstance(spec, Mapping):
        raise ValueError("a ChironModel without metadata or spec")
    name, namespace, uid = (str(head.get(key) or "") for key in ("name", "namespace", "uid"))
    if not NAME.fullmatch(name) or not NAME.fullmatch(namespace) or not UID.fullmatch(uid):
        raise ValueError(f"a ChironModel with name {name[:80]!r}, namespace {namespace[:80]!r}, uid {uid[:80]!r}")
    generation = head.get("generation")
    resource = ModelResource(
        name=name,
        namespace=namespace,
        uid=uid,
        generation=generation if isinstance(generation, int) else 0,
        created=str(head.get("creationTimestamp") or "")[:40],
        spec=spec,
    )
    flaw = _flaw(resource)
    return replace(resource, spec={}, flaw=flaw) if flaw else resource


def _flaw(resource: ModelResource) -> str:
    try:
        spec_bytes = len(resource.wanted[1])
    except TypeError as error:
        return f"spec: it cannot be kept: {error}"
    if spec_bytes > SPEC_MAX_BYTES:
        return f"spec: it has {spec_bytes} bytes; at most {SPEC_MAX_BYTES} are read"
    return ""


def as_object(resource: ModelResource) -> dict[str, Any]:
    """As it was read."""
    return {
        "metadata": {
            "name": resource.name,
            "namespace": resource.namespace,
            "uid": resource.uid,
            "generation": resource.generation,
            "creationTimestamp": resource.created,
        },
        "spec": resource.spec,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What became of the resources of a namespace."""

    config: ServeConfig
    """The gateway's, with their models."""
    accepted: tuple[ModelResource, ...] = ()
    """Those in force; of one that was changed to what cannot be, its last version that could."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """By uid, why: field, value and what is allowed."""
    in_force: Mapping[str, ModelResource] = field(default_factory=dict)
    """By uid of what is there now, the version of it that is accepted: the same, or an earlier one."""


class Reader(Protocol):
    """The gateway's own config, to which resources add models."""

    def read(self, resources: Sequence[ModelResource], before: Sequence[ModelResource] = ()) -> Reading:
        """``before``: versions that were accepted. Nothing that resources say raises."""
