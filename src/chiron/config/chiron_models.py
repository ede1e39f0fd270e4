"""Models of the serve config from ``ChironModel`` resources.

A resource is read as if its model stood in the file: its fields are keys of ``[models.NAME]``, in the API's spelling
(``minInstances`` for ``min_instances``). What all models share has to be said alike: a class of one name is one class,
and there is one policy. Where two resources, or one and the file, want what only one can have, the file has it, then
what is in force as it is, then the older one; the other is refused, and stops nobody.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiron.config.read import ConfigError, keys_of, read_record, suggest
from chiron.config.serve import DEFAULT_CLASSES, parse_table, read_table
from chiron.config.serve_cascades import is_cascade
from chiron.core.specs import RequestClass
from chiron.gateway.chiron_models.objects import RESOURCES_MAX, ModelResource, Reading
from chiron.gateway.settings import KubernetesModelsSettings

log = logging.getLogger(__name__)

KINDS_MAX = 16
MODEL_KEYS = {
    "aliases": "aliases",
    "minInstances": "min_instances",
    "maxInstances": "max_instances",
    "defaultClass": "default_class",
    "batchClass": "batch_class",
}
"""Fields of a spec that are keys of a model."""
KIND_KEYS = {
    "name": "name",
    "engine": "engine",
    "servedModelName": "served_model_name",
    "maxNumSeqs": "max_num_seqs",
    "maxNumBatchedTokens": "max_num_batched_tokens",
    "kvCapacityTokens": "kv_capacity_tokens",
    "contextTokens": "context_tokens",
    "gpu": "gpu",
    "gpus": "gpus",
    "pricePerGpuHour": "price_per_gpu_hour",
    "maxInstances": "max_instances",
    "startTimeout": "start_timeout",
}
"""Fields of a kind that are keys of an instance."""
WORKLOAD_KEYS = {
    "deployment": "deployment",
    "statefulSet": "statefulset",
    "leaderWorkerSet": "leaderworkerset",
    "port": "port",
    "scaler": "scaler",
    "yield": "yield",
}
"""Fields of a kind that are keys of its ``kubernetes`` table. Not the namespace: a resource speaks for its own only."""
OTHER_KEYS = ("model", "classes", "policy", "kinds")
CLASS_KEYS = ("name", "kind", "ttft", "itl", "deadline", "weight")
POLICY_KEYS = ("name", "settings")
_SPELLING = {ours: theirs for keys in (MODEL_KEYS, KIND_KEYS, WORKLOAD_KEYS) for theirs, ours in keys.items()}
_KEY = re.compile(rf"(?<![\w'\"])({'|'.join(sorted(_SPELLING, key=len, reverse=True))})(?![\w'\"])")
_OF_ONE_KIND = re.compile(rf"^spec\.(?=({'|'.join({*KIND_KEYS, *WORKLOAD_KEYS} - {*MODEL_KEYS})})\b)")


@dataclass(slots=True)
class _Taken:
    """What the models so far have, each with whose it is."""

    names: dict[str, str] = field(default_factory=dict)
    workloads: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """By kind, name and namespace; without one it may be any."""
    classes: dict[str, RequestClass] = field(default_factory=dict)
    class_owners: dict[str, str] = field(default_factory=dict)
    policy: tuple[Mapping[str, Any], str] | None = None


class ResourceReader:
    """Implements ``Reader``."""

    def __init__(self, text: str, *, directory: Path, policy: str | None = None) -> None:
        """``text``: of the config file, overrides included; ``policy``: the command line's, which all others yield to.
        Raises ConfigError for a file that is wrong by itself."""
        self._text = text
        self._directory = directory
        self._policy = policy
        self._base = read_table(text)
        own = parse_table(self._base, text, directory=directory, policy=policy)
        self._limits = own.kubernetes or KubernetesModelsSettings()
        given = self._base.get("classes") or {}
        self._classes = {
            name: read_record(RequestClass, entry, f"classes.{name}", name=name) for name, entry in given.items()
        } or dict(DEFAULT_CLASSES)

    def read(self, resources: Sequence[ModelResource], before: Sequence[ModelResource] = ()) -> Reading:
        earlier = {each.name: each for each in before}
        in_force = {each.wanted for each in before}
        table, taken = self._start()
        accepted: list[ModelResource] = []
        refused: dict[str, str] = {}
        served: dict[str, ModelResource] = {}
        ordered = sorted(resources, key=lambda each: (each.wanted not in in_force, each.created, each.name))
        for i, resource in enumerate(ordered):
            try:
                if i >= RESOURCES_MAX:
                    raise ConfigError(f"spec: there are {i} others; at most {RESOURCES_MAX} are read")
                if resource.flaw:
                    raise ConfigError(resource.flaw)
                table = self._added(table, taken, resource)
                accepted.append(resource)
                served[resource.uid] = resource
            except ConfigError as error:
                refused[resource.uid] = str(error)
                last = earlier.get(resource.name)
                if last is None or last.wanted == resource.wanted:
                    continue
                try:
                    table = self._added(table, taken, last)
                    accepted.append(last)
                    served[resource.uid] = last
                    refused[resource.uid] += f"; generation {last.generation} stays in force"
                except ConfigError:
                    continue
        config = parse_table(table, self._text, directory=self._directory, policy=self._policy)
        return Reading(config=config, accepted=tuple(accepted), refused=refused, in_force=served)

    def _start(self) -> tuple[dict[str, Any], _Taken]:
        """The file's own models. Those that serve all classes serve all of the file's."""
        taken = _Taken()
        if self._base.get("classes") or self._base.get("models"):
            taken.classes.update(self._classes)
            taken.class_owners.update(dict.fromkeys(self._classes, "the config file"))
        models = {}
        for name, entry in (self._base.get("models") or {}).items():
            # A cascade's classes are those of its parts, interactive ones.
            models[name] = dict(entry) if is_cascade(entry) else {"classes": list(self._classes), **entry}
            for each in (name, *entry.get("aliases", ())):
                taken.names[each] = "the config file"
            for instance in entry.get("instances") or [entry]:
                source = instance.get("kubernetes") or entry.get("kubernetes") or {}
                for key in ("deployment", "statefulset", "leaderworkerset"):
                    if source.get(key):
                        taken.workloads[key, source[key], source.get("namespace", "")] = "the config file"
        if "policy" in self._base or "policies" in self._base:
            taken.policy = ({"name": self._base.get("policy", "chiron"), "settings": None}, "the config file")
        return {**self._base, "models": models, "classes": _tables(taken.classes.values())}, taken

    def _added(self, table: Mapping[str, Any], taken: _Taken, resource: ModelResource) -> dict[str, Any]:
        """The table with one more model. Raises ConfigError, and has changed nothing then."""
        try:
            return self._with(table, taken, resource)
        except ConfigError:
            raise
        except Exception as error:  # What nobody has thought of must not stop the other models.
            log.exception("ChironModel %s is refused", resource.name)
            raise ConfigError(f"spec: it cannot be read: {type(error).__name__}: {error}") from None

    def _with(self, table: Mapping[str, Any], taken: _Taken, resource: ModelResource) -> dict[str, Any]:
        spec, whose = resource.spec, f"ChironModel {resource.name}"
        _only(spec, [*MODEL_KEYS, *OTHER_KEYS], "spec")
        name = spec.get("model", resource.name)
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"spec.model: {name!r} must be text, not empty")
        entry = {ours: spec[theirs] for theirs, ours in MODEL_KEYS.items() if theirs in spec}
        entry["instances"] = [
            self._kind(kind, f"spec.kinds[{i}]", resource) for i, kind in enumerate(_kinds(spec.get("kinds")))
        ]
        classes = _classes(spec.get("classes"), taken, self._classes)
        entry["classes"] = [each.name for each in classes]
        _within(entry, classes, taken, self._limits)
        policy = _policy(spec.get("policy"), taken)
        workloads = [(key, each) for kind in entry["instances"] for key, each in _workload(kind["kubernetes"])]
        shared = {**taken.classes, **{each.name: each for each in classes}}
        alone = {
            **{key: value for key, value in table.items() if key not in ("models", "classes")},
            "models": {name: entry},
            "classes": _tables(shared.values()),
            **_policy_tables(policy),
        }
        try:
            (usual,) = parse_table(alone, self._text, directory=self._directory, policy=self._policy).models
            if usual.max_instances > self._limits.max_instances:  # Of an engine's row: the resource says nothing.
                entry["max_instances"] = self._limits.max_instances
                parse_table(alone, self._text, directory=self._directory, policy=self._policy)
        except ConfigError as error:
            raise ConfigError(_spelled(str(error), name, policy)) from None
        for i, each in enumerate([name, *entry.get("aliases", ())]):
            if each in taken.names:
                where = f"spec.aliases[{i - 1}]" if i else "spec.model"
                raise ConfigError(f"{where}: {each!r} is a model of {taken.names[each]} already")
        for i, workload in enumerate(workloads):
            same = [each for each in ((*workload, resource.namespace), (*workload, "")) if each in taken.workloads]
            if same or workload in workloads[:i]:
                owner = taken.workloads[same[0]] if same else "this one"
                raise ConfigError(
                    f"spec.kinds[{i}].{_SPELLING[workload[0]]}: {workload[1]!r} is of {owner} already; one model has it"
                )
        taken.names.update(dict.fromkeys([name, *entry.get("aliases", ())], whose))
        taken.workloads.update(dict.fromkeys([(*each, resource.namespace) for each in workloads], whose))
        for each in classes:
            taken.class_owners.setdefault(each.name, whose)
        taken.classes = shared
        if policy is not None and taken.policy is None:
            taken.policy = (policy, whose)
        return {**alone, "models": {**table["models"], name: entry}}

    def _kind(self, kind: object, path: str, resource: ModelResource) -> dict[str, Any]:
        if not isinstance(kind, Mapping):
            raise ConfigError(f"{path}: {kind!r} must be an object with engine and deployment")
        _only(kind, [*KIND_KEYS, *WORKLOAD_KEYS], path)
        entry = {ours: kind[theirs] for theirs, ours in KIND_KEYS.items() if theirs in kind}
        access = self._base.get("kubernetes") or {}
        return entry | {
            "kubernetes": {
                **{ours: kind[theirs] for theirs, ours in WORKLOAD_KEYS.items() if theirs in kind},
                **{key: access[key] for key in ("kubeconfig", "context") if key in access},
                "namespace": resource.namespace,
                "opt_in": True,
            }
        }


def _within(
    entry: Mapping[str, Any], classes: Sequence[RequestClass], taken: _Taken, limits: KubernetesModelsSettings
) -> None:
    """What one resource may ask for, whatever the others do."""
    for said, key, most in (
        ("maxInstances", "max_instances", limits.max_instances),
        ("minInstances", "min_instances", limits.min_instances),
    ):
        if isinstance(entry.get(key), int) and entry[key] > most:
            raise ConfigError(f"spec.{said}: {entry[key]}; at most {most} (kubernetes.{key} of the gateway's config)")
    for each in classes:
        if each.name not in taken.classes and each.weight > limits.weight:
            raise ConfigError(
                f"spec.classes: weight of {each.name!r} is {each.weight:g}; at most {limits.weight:g} "
                "(kubernetes.weight of the gateway's config)"
            )


def _kinds(kinds: object) -> list[Any]:
    if not isinstance(kinds, list) or not 1 <= len(kinds) <= KINDS_MAX:
        raise ConfigError(f"spec.kinds: must be a list of 1 to {KINDS_MAX} objects, such as engine and deployment")
    return kinds


def _workload(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, table[key]) for key in ("deployment", "statefulset", "leaderworkerset") if table.get(key)]


def _classes(entries: object, taken: _Taken, usual: Mapping[str, RequestClass]) -> list[RequestClass]:
    """Of one model; default: ``usual``. A name alone stands for a class that there is."""
    if entries is None:
        return [_agreed(each, taken, "spec.classes: missing, so") for each in usual.values()]
    if not isinstance(entries, list) or not entries:
        raise ConfigError("spec.classes: must be a list of objects with name, ttft, itl or deadline")
    found: list[RequestClass] = []
    for i, entry in enumerate(entries):
        path = f"spec.classes[{i}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"]:
            raise ConfigError(f"{path}: must be an object with a name")
        _only(entry, CLASS_KEYS, path)
        name, rest = entry["name"], {key: value for key, value in entry.items() if key != "name"}
        if any(each.name == name for each in found):
            raise ConfigError(f"{path}.name: {name!r} is there twice")
        if rest:
            slos = [key for key in ("ttft", "itl") if key in rest]
            kind = "batch" if "deadline" in rest and not slos else "interactive"
            made = read_record(RequestClass, {"kind": kind, **rest}, path, name=name)
            found.append(_agreed(made, taken, f"{path}:"))
            continue
        known = {**usual, **taken.classes}
        if name not in known:
            raise ConfigError(f"{path}: there is no class {name!r} yet; {suggest(name, known)}")
        found.append(known[name])
    return found


def _agreed(made: RequestClass, taken: _Taken, path: str) -> RequestClass:
    known = taken.classes.get(made.name, made)
    if known != made:
        raise ConfigError(
            f"{path} class {made.name!r} has other SLOs in {taken.class_owners[made.name]}: a class is the same for "
            "all models; give this one another name, or only the name"
        )
    return known


def _policy(entry: object, taken: _Taken) -> Mapping[str, Any] | None:
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ConfigError("spec.policy: must be an object with a name, such as chiron")
    _only(entry, POLICY_KEYS, "spec.policy")
    settings = entry.get("settings") or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"spec.policy.settings: {settings!r} must be an object")
    if "policy" in settings:
        raise ConfigError("spec.policy.settings.policy: no setting; spec.policy.name says which policy it is")
    wanted = {"name": entry["name"], "settings": dict(settings)}
    said, whose = taken.policy or (wanted, "")
    if wanted["name"] != said["name"] or (settings and wanted["settings"] != said["settings"]):
        raise ConfigError(
            f"spec.policy: {wanted['name']!r} with these settings; {whose} says {said['name']!r}, and all models of a "
            "gateway have one policy: leave it out here"
        )
    return wanted


def _policy_tables(policy: Mapping[str, Any] | None) -> dict[str, Any]:
    if policy is None:
        return {}
    label = policy["name"]
    return {"policy": label, **({"policies": {label: policy["settings"]}} if policy["settings"] else {})}


def _tables(classes: Any) -> dict[str, dict[str, Any]]:
    """Of classes, as the file has them."""
    keys = [key for key in keys_of(RequestClass) if key not in ("name", "kind")]
    plain = RequestClass(name="plain", kind="interactive")
    return {
        each.name: {
            "kind": each.kind,
            **{
                key: getattr(each, attribute)
                for key in keys
                if getattr(each, attribute := key if key == "weight" else f"{key}_s") != getattr(plain, attribute)
            },
        }
        for each in classes
    }


def _only(table: Mapping[str, Any], allowed: Sequence[str], path: str) -> None:
    for key, value in table.items():
        if key not in allowed:
            raise ConfigError(f"{path}.{key}: unknown field (value {value!r}); {suggest(str(key), allowed)}")


def _spelled(message: str, name: str, policy: Mapping[str, Any] | None) -> str:
    """An error about a key of the file, as one about the field of the resource."""
    label = policy["name"] if policy is not None else ""
    for ours, theirs in (
        (f'models."{name}"', "spec"),
        (f"models.{name}", "spec"),
        ("spec.instances", "spec.kinds"),
        (".kubernetes", ""),
        (f"policies.{label}", "spec.policy.settings"),
        ("policy: unknown policy", "spec.policy.name: unknown policy"),
    ):
        message = message.replace(ours, theirs)
    return _OF_ONE_KIND.sub("spec.kinds[0].", _KEY.sub(lambda match: _SPELLING[match[1]], message))
