"""The serve config: one TOML file, of which three lines are enough. docs/config.md explains each key.

``load_serve`` reads it into ``gateway.settings.ServeConfig``. Unknown keys, wrong types and values out of range are a
``ConfigError`` that names file, path, value and what is allowed; secrets are never in it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chiron.config.overrides import Override, apply_overrides, override_text
from chiron.config.policies import PolicyChoice, check_can_be_made, read_policies
from chiron.config.read import ConfigError, construct, keys_of, named_tables, read_record, read_text, suggest
from chiron.config.serve_cascades import ServeCascadeSection, cascade_settings, is_cascade, read_cascade
from chiron.config.serve_kinds import instance_bounds, kind_settings
from chiron.config.serve_sections import ServeModelSection
from chiron.core.types import RequestClass
from chiron.fleet.endpoints import EndpointsSource
from chiron.fleet.process.fleet import ProcessSource
from chiron.fleet.ray.source import RaySource
from chiron.fleet.settings import FleetSettings, SleeperSettings
from chiron.gateway.relay.keys import ADMIN, Key
from chiron.gateway.relay.uplink.joining import StaySettings
from chiron.gateway.settings import (
    BatchSettings,
    GatewaysSettings,
    KindSettings,
    KubernetesModelsSettings,
    LimitSettings,
    ModelSettings,
    ServeConfig,
    ServerSettings,
    TelemetrySettings,
)
from chiron.policies.registry import POLICIES
from chiron.policies.stages.registry import STAGE_POLICIES
from chiron.store.postgres.settings import PostgresSettings
from chiron.store.settings import StoreSettings

DEFAULT_CLASSES = {
    "chat": RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.1),
    "batch": RequestClass(name="batch", kind="batch", deadline_s=86_400.0),
}
"""Classes and SLOs when the file has no ``[classes]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFile:
    """The tables of the file, read one by one but not yet against each other."""

    models: Mapping[str, ServeModelSection]
    cascades: Mapping[str, ServeCascadeSection]
    """Those of the tables of models for which other models answer."""
    classes: Mapping[str, RequestClass]
    policy: str = "chiron"
    """A policy (``chiron policies``), or the label of one of the ``[policies]`` tables."""
    stage_policy: str = ""
    """Replicas of the stages of pipelines: ``stage-hpa``, ``stage-balance`` or ``stage-petals``, with its defaults;
    empty: as ``stages`` of the policy's table says, and without it they stay at their minimum."""
    policies: Mapping[str, PolicyChoice] = field(default_factory=dict)
    """Settings of policies, by label, as in scenario files."""
    server: ServerSettings = field(default_factory=ServerSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    store: StoreSettings | PostgresSettings = field(default_factory=StoreSettings)
    """Where batches are kept: SQLite in the data directory, or with ``store.url``, or ``store = "postgresql://..."``,
    PostgreSQL."""
    gateways: GatewaysSettings | None = None
    """One of several gateways, of which one leads; needs PostgreSQL. Without the table this one is alone."""
    relays: StaySettings = field(default_factory=StaySettings)
    """What relays do while there is no brain; with ``server.workers`` above 1 or ``[gateways]``."""
    fleet: FleetSettings = field(default_factory=FleetSettings)
    sleepers: SleeperSettings = field(default_factory=SleeperSettings)
    """Host memory in which engines that Chiron starts can sleep; models say with ``sleeper_gb`` that theirs do."""
    kubernetes: KubernetesModelsSettings | None = None
    """Models are read from the ChironModel resources of a namespace, too. Without the table there are those of the
    file only."""
    devices: tuple[str, ...] = ()
    """GPU numbers that Chiron hands out to the engines it starts, as ``CUDA_VISIBLE_DEVICES``; empty: it sets none."""
    gpus: Mapping[str, int] = field(default_factory=dict)
    """GPUs of each type that exist, for all models together; a type not named is unlimited."""
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    keys: tuple[Key, ...] = ()
    """API keys; without any, everybody who reaches the port may use every model."""
    admin_key_hash: str = ""
    """Hash of the key for the admin routes (``chiron key``)."""
    override: tuple[Override, ...] = ()
    """Applied in order, before anything is read."""


def load_serve(source: str | Path, overrides: Sequence[str] = (), policy: str | None = None) -> ServeConfig:
    """The config in a file. ``overrides`` are ``path=value``; ``policy`` replaces the file's. Raises ConfigError."""
    path = Path(source)
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; name the config in it")
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; `chiron init {path}` writes one")
    text = "".join([read_text(path), *map(override_text, overrides)])
    return parse_serve(text, directory=path.absolute().parent, file=str(source), policy=policy)


def parse_serve(text: str, *, directory: Path, file: str = "config", policy: str | None = None) -> ServeConfig:
    """The config in TOML text. Its relative paths are relative to ``directory``; errors name ``file``."""
    try:
        return parse_table(read_table(text), text, directory=directory, policy=policy)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def read_table(text: str) -> dict[str, Any]:
    """TOML text with its overrides applied. Raises ConfigError and TOMLDecodeError."""
    table = tomllib.loads(text)
    apply_overrides(table)
    return table


def parse_table(table: Mapping[str, Any], text: str, *, directory: Path, policy: str | None = None) -> ServeConfig:
    """``text``: what is to be kept as the config's. Raises ConfigError."""
    return _combine(_read_file(table), text, directory, policy)


def _read_file(table: Mapping[str, Any]) -> ServeFile:
    allowed = [key for key in keys_of(ServeFile) if key != "cascades"]
    for key, value in table.items():
        if key not in allowed:
            raise ConfigError(f"{key}: unknown key (value {value!r}); {suggest(key, allowed)}")
    classes = {
        name: read_record(RequestClass, entry, f"classes.{name}", name=name)
        for name, entry in named_tables(table, "classes", allowed=keys_of(RequestClass)).items()
    }
    keys = (*ServeModelSection.keys(), *keys_of(ServeCascadeSection))
    models = named_tables(table, "models", "kubernetes" not in table, allowed=keys)
    given = {
        "models": {
            name: ServeModelSection.from_table(entry, _path_of(name))
            for name, entry in models.items()
            if not is_cascade(entry)
        },
        "cascades": {name: read_cascade(entry, _path_of(name)) for name, entry in models.items() if is_cascade(entry)},
        "classes": classes or DEFAULT_CLASSES,
        "policies": read_policies(table),
        "keys": _read_keys(table.get("keys", [])),
        "store": _read_store(table.get("store", {})),
        "gateways": _read_gateways(table["gateways"]) if "gateways" in table else None,
    }
    return read_record(ServeFile, {key: value for key, value in table.items() if key not in given}, "", **given)


def _read_store(entry: object) -> StoreSettings | PostgresSettings:
    """How long things are kept is said once, in [batch]. Values are not shown where they may hold a password."""
    if isinstance(entry, str):
        entry = {"url": entry}
    retention_s = StoreSettings().retention_s
    if not isinstance(entry, Mapping):
        raise ConfigError("store: must be postgresql://USER@HOST/DATABASE, or a table")
    known = dict.fromkeys([*keys_of(PostgresSettings), *keys_of(StoreSettings)])
    for key in entry:
        if key not in known:
            raise ConfigError(f"store.{key}: unknown key; {suggest(key, known)}")
    if "url" in entry:
        if not isinstance(entry["url"], str):
            raise ConfigError("store.url: must be text, postgresql://USER@HOST/DATABASE")
        for key in entry:
            if key in keys_of(StoreSettings) and key not in keys_of(PostgresSettings):
                raise ConfigError(f"store.{key}: is for SQLite, and store.url says PostgreSQL: remove one of them")
        return read_record(PostgresSettings, entry, "store", retention_s=retention_s)
    for key in entry:
        if key in keys_of(PostgresSettings) and key not in keys_of(StoreSettings):
            raise ConfigError(f"store.{key}: is for PostgreSQL: set store.url as well, or remove it")
    return read_record(StoreSettings, entry, "store", retention_s=retention_s)


def _read_gateways(entry: object) -> GatewaysSettings:
    if not isinstance(entry, Mapping):
        raise ConfigError("gateways: must be a table with certificate, key and ca")
    return read_record(GatewaysSettings, entry, "gateways")


def _check_gateways(gateways: GatewaysSettings | None, file: ServeFile, models: Sequence[ModelSettings]) -> None:
    if gateways is None:
        return
    if not isinstance(file.store, PostgresSettings):
        raise ConfigError(
            "gateways: needs a store that all of them share: set store.url = 'postgresql://USER@HOST/DATABASE'"
        )
    for model in models:
        for kind in model.kinds:
            if isinstance(kind.source, ProcessSource):
                raise ConfigError(
                    f"gateways: {kind.kind.name!r} of model {model.name!r} is started by the gateway that leads, where "
                    "others cannot reach it, and ends with it: use endpoints, kubernetes or ray, or remove [gateways]"
                )
            if isinstance(kind.source, RaySource) and kind.source.on_stop == "remove":
                raise ConfigError(
                    f"gateways: {kind.kind.name!r} of model {model.name!r} says ray.on_stop = 'remove', and a gateway "
                    "that stops leaves what runs to the next one: use 'keep', or remove [gateways]"
                )


def _check_sleepers(sleepers: SleeperSettings, models: Sequence[ModelSettings]) -> None:
    """Each that may sleep has room, and the room is for somebody."""
    sources = {kind.kind.name: kind.source for model in models for kind in model.kinds}
    sleep = {name: each.sleep for name, each in sources.items() if isinstance(each, ProcessSource) and each.sleep}
    for name, each in sleep.items():
        if each.gb > sleepers.host_memory_gb:
            raise ConfigError(
                f"sleeper_gb of {name!r}: {each.gb:g}; it must be at most sleepers.host_memory_gb "
                f"({sleepers.host_memory_gb:g})"
            )
    if sleepers.host_memory_gb > 0 and not sleep:
        raise ConfigError(
            f"sleepers.host_memory_gb: {sleepers.host_memory_gb:g}; no model says what a sleeper takes of it "
            "(sleeper_gb), so none sleeps: add that, or remove [sleepers]"
        )


def _check_followed(file: ServeFile, models: Sequence[ModelSettings]) -> None:
    """Each change of a ChironModel is taken up by another brain, and processes end with the one that started them."""
    if file.kubernetes is None:
        return
    for model in models:
        for kind in model.kinds:
            if isinstance(kind.source, ProcessSource):
                raise ConfigError(
                    f"kubernetes: {kind.kind.name!r} of model {model.name!r} would be started again with each change "
                    "of a ChironModel: use endpoints, kubernetes or ray, or remove [kubernetes]"
                )


def _resolve_gateways(gateways: GatewaysSettings | None, directory: Path) -> GatewaysSettings | None:
    if gateways is None:
        return None
    return replace(
        gateways,
        certificate=_resolve(gateways.certificate, directory),
        key=_resolve(gateways.key, directory),
        ca=_resolve(gateways.ca, directory),
        kubeconfig=_resolve(gateways.kubeconfig, directory),
    )


def _resolve_kubernetes(
    kubernetes: KubernetesModelsSettings | None, directory: Path
) -> KubernetesModelsSettings | None:
    if kubernetes is None:
        return None
    return replace(kubernetes, kubeconfig=_resolve(kubernetes.kubeconfig, directory))


def _resolve_store(
    store: StoreSettings | PostgresSettings, retention_s: float, directory: Path
) -> StoreSettings | PostgresSettings:
    if isinstance(store, StoreSettings):
        return replace(store, retention_s=retention_s)
    return replace(
        store,
        retention_s=retention_s,
        password_file=_resolve(store.password_file, directory),
        tls_root_cert=_resolve(store.tls_root_cert, directory),
    )


def _read_keys(entries: object) -> tuple[Key, ...]:
    if not isinstance(entries, list):
        raise ConfigError("keys: must be tables, [[keys]]")
    return tuple(_read_key(entry, f"keys[{i}]") for i, entry in enumerate(entries))


def _read_key(entry: object, path: str) -> Key:
    """One API key. Values are not shown in errors about unknown keys and hashes: they may be the secret itself."""
    allowed = [key for key in keys_of(Key) if key != "admin"]
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{path}: must be a table with name and hash")
    for key in entry:
        if key not in allowed:
            raise ConfigError(f"{path}.{key}: unknown key; {suggest(key, allowed)}")
    name, hash_ = entry.get("name"), entry.get("hash")
    if not isinstance(name, str) or not name or name == ADMIN:
        raise ConfigError(f"{path}.name: {name!r} must be text, not empty and not {ADMIN!r}")
    if not isinstance(hash_, str):
        raise ConfigError(f"{path}.hash: missing, or not text; `chiron key --name {name}` makes one")
    return read_record(Key, entry, path, admin=False)


def _combine(file: ServeFile, text: str, directory: Path, policy: str | None) -> ServeConfig:
    """Everything that concerns more than one table."""
    for gpu, count in file.gpus.items():
        if count < 1:
            raise ConfigError(f"gpus.{gpu}: {count}: must be 1 or more")
    if len(set(file.devices)) != len(file.devices):
        raise ConfigError(f"devices: {list(file.devices)!r}: each device once")
    models = tuple(_model(name, section, file.classes, directory) for name, section in file.models.items())
    cascades = tuple(
        cascade_settings(name, section, models, file.classes, _path_of(name)) for name, section in file.cascades.items()
    )
    if file.kubernetes is None:  # What these name may come and go with the resources.
        _check_gpus(file.gpus, models)
    _check_names((*models, *cascades))
    _check_devices(models, file.devices)
    _check_keys(file, (*models, *cascades))
    server = replace(
        file.server,
        tls_cert=_resolve(file.server.tls_cert, directory),
        tls_key=_resolve(file.server.tls_key, directory),
    )
    if not server.loopback and not file.keys and not server.open_without_keys:
        raise ConfigError(
            f"server.host: {server.host!r} can be reached from other machines, and there are no API keys: add [[keys]] "
            "(`chiron key` makes one), or set server.open_without_keys = true if everybody may use the models"
        )
    _check_no_loop(models, server)
    _check_sleepers(file.sleepers, models)
    _check_gateways(file.gateways, file, models)
    _check_followed(file, models)
    choice = check_can_be_made(_choose_policy(file, policy), "policy", live=True)
    choice = _choose_stage_policy(file, choice)
    data = Path(_resolve(server.data, directory))
    log = file.telemetry.event_log
    return construct(
        ServeConfig,
        "",
        {
            "data": data,
            "event_log": None if log == "off" else Path(_resolve(log, directory)) if log else data / "events.jsonl",
            "input_log": Path(_resolve(file.telemetry.input_log, directory)) if file.telemetry.input_log else None,
            "server": server,
            "limits": file.limits,
            "batch": file.batch,
            "telemetry": file.telemetry,
            "store": _resolve_store(file.store, file.batch.retention_s, directory),
            "gateways": _resolve_gateways(file.gateways, directory),
            "relays": file.relays,
            "kubernetes": _resolve_kubernetes(file.kubernetes, directory),
            "fleet": file.fleet,
            "sleepers": file.sleepers,
            "devices": file.devices,
            "gpus": file.gpus,
            "classes": file.classes,
            "models": models,
            "cascades": cascades,
            "policy": choice.policy,
            "policy_settings": choice.settings,
            "policy_label": policy or file.policy,
            "stage_policy": choice.stages,
            "stage_settings": choice.stage_settings,
            "keys": file.keys,
            "admin_key_hash": file.admin_key_hash,
            "text": text,
        },
    )


def _path_of(model: str) -> str:
    return f'models."{model}"' if "." in model else f"models.{model}"


def _resolve(path: str, directory: Path) -> str:
    return str((directory / Path(path).expanduser()).absolute()) if path else ""


def _model(
    name: str, section: ServeModelSection, classes: Mapping[str, RequestClass], directory: Path
) -> ModelSettings:
    path = _path_of(name)
    if not name.strip():
        raise ConfigError("models: a model needs a name")
    served = section.classes or tuple(classes)
    for i, each in enumerate(served):
        _require_name(f"{path}.classes[{i}]", each, classes)
    kinds: list[KindSettings] = []
    for i, instance in enumerate(section.instances):
        where = path if len(section.instances) == 1 else f"{path}.instances[{i}]"
        kind = kind_settings(instance, name, where, directory)
        if any(kind.kind.name == other.kind.name for other in kinds):
            raise ConfigError(f"{where}: another kind of this model is {kind.kind.name!r} too; give each a name")
        kinds.append(kind)
    least, most = instance_bounds(section, kinds, path)
    return ModelSettings(
        name=name,
        kinds=tuple(kinds),
        classes=served,
        default_class=_pick(section.default_class, "interactive", served, classes, f"{path}.default_class")
        or served[0],
        batch_class=_pick(section.batch_class, "batch", served, classes, f"{path}.batch_class"),
        min_instances=least,
        max_instances=most,
        aliases=section.aliases,
    )


def _pick(wanted: str, kind: str, served: Sequence[str], classes: Mapping[str, RequestClass], path: str) -> str:
    """The named class, which must be of that kind and served; else the first such; else none."""
    fitting = [name for name in served if classes[name].kind == kind]
    if not wanted:
        return fitting[0] if fitting else ""
    if wanted not in fitting:
        raise ConfigError(
            f"{path}: {wanted!r} must be a class of kind {kind!r} of this model; {suggest(wanted, fitting)}"
        )
    return wanted


def _check_names(models: Sequence[ModelSettings]) -> None:
    owners: dict[str, str] = {}
    for model in models:
        for name in (model.name, *model.aliases):
            if name in owners:
                raise ConfigError(f"models: {name!r} names both {owners[name]!r} and {model.name!r}")
            owners[name] = model.name


def _check_gpus(gpus: Mapping[str, int], models: Sequence[ModelSettings]) -> None:
    """A limit on a type that no instance has would limit nothing, and its author would not know."""
    types = dict.fromkeys(kind.kind.gpu for model in models for kind in model.kinds)
    for gpu in gpus:
        if gpu not in types:
            raise ConfigError(f"gpus.{gpu}: no instance has GPUs of this type; {suggest(gpu, types)}")


def _check_devices(models: Sequence[ModelSettings], devices: Sequence[str]) -> None:
    for model in models:
        for kind in model.kinds:
            gpus = kind.source.gpus
            if devices and gpus > len(devices):
                raise ConfigError(f"devices: {list(devices)!r}: an instance of {kind.kind.name!r} needs {gpus}")


def _check_no_loop(models: Sequence[ModelSettings], server: ServerSettings) -> None:
    """An endpoint at the gateway's own address would send every request round and round."""
    own = {
        f"http{'s' if server.tls else ''}://{host}:{server.port}" for host in (server.host, "127.0.0.1", "localhost")
    }
    for model in models:
        sources = [kind.source for kind in model.kinds]
        for url in (url for source in sources if isinstance(source, EndpointsSource) for url in source.urls):
            if url in own:
                raise ConfigError(f"models: the endpoint {url} is where Chiron itself listens; set another server.port")


def _check_keys(file: ServeFile, models: Sequence[ModelSettings]) -> None:
    """Keys name what exists, and no two are the same."""
    names = [model.name for model in models]
    seen: dict[str, int] = {}
    for i, key in enumerate(file.keys):
        if file.kubernetes is None:
            for j, model in enumerate(key.models):
                _require_name(f"keys[{i}].models[{j}]", model, names)
            for j, cls in enumerate(key.classes):
                _require_name(f"keys[{i}].classes[{j}]", cls, file.classes)
        for what in (f"name {key.name!r}", key.hash):
            if what in seen:
                raise ConfigError(f"keys[{i}]: has the {'name' if what != key.hash else 'hash'} of keys[{seen[what]}]")
            seen[what] = i
    if file.admin_key_hash and not re.fullmatch(r"sha256:[0-9a-f]{64}", file.admin_key_hash):
        raise ConfigError("admin_key_hash: must be 'sha256:' and 64 hexadecimal digits; `chiron key --admin` makes one")
    if file.admin_key_hash in seen:
        raise ConfigError(
            f"admin_key_hash: is the hash of keys[{seen[file.admin_key_hash]}]; the admin needs another key"
        )


def _choose_policy(file: ServeFile, policy: str | None) -> PolicyChoice:
    label = policy or file.policy
    if label in file.policies:
        return file.policies[label]
    if label in POLICIES:
        return PolicyChoice(policy=label, settings=POLICIES[label].settings())
    where = "--policy" if policy else "policy"
    raise ConfigError(
        f"{where}: unknown policy {label!r}; {suggest(label, dict.fromkeys([*file.policies, *POLICIES]))}"
    )


def _choose_stage_policy(file: ServeFile, choice: PolicyChoice) -> PolicyChoice:
    """The top-level key, or ``stages`` of the policy's own table, where it has settings."""
    name = file.stage_policy
    if not name:
        return choice
    if name not in STAGE_POLICIES:
        raise ConfigError(f"stage_policy: unknown policy {name!r}; {suggest(name, STAGE_POLICIES)}")
    if choice.stages:
        raise ConfigError(f"stage_policy: {name!r}, but the table of the policy has stages as well; give one of them")
    return replace(choice, stages=name)


def _require_name(path: str, name: str, known: Sequence[str] | Mapping[str, object]) -> None:
    if name not in known:
        raise ConfigError(f"{path}: unknown name {name!r}; {suggest(name, known)}")
