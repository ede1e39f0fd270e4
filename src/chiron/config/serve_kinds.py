"""From the tables of a model to what the gateway starts and the control plane counts.

What differs between engines is a row here: their usual limits, and how to start them. ``engines.rows`` holds the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from chiron.config.read import ConfigError, construct
from chiron.config.serve_sections import ServeInstanceSection, ServeModelSection
from chiron.core.types import InstanceKind
from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_store import load_profile
from chiron.engines.rows import ENGINES
from chiron.gateway.settings import KindSettings

KV_CAPACITY_GUESS = 262_144
"""Tokens of KV of an engine that has not told yet: some 16 GB of an 8B model's, on the large side, so that no prompt
is refused before the engine's metrics have been read."""
MAX_INSTANCES_STARTED = 4
MAX_INSTANCES_EMULATED = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDefaults:
    """What an engine usually is, where the file does not say."""

    gpu: str = "gpu"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    context_per_seq: int = 0
    """KV tokens of each sequence slot, for engines that divide their KV; 0: they share it."""
    command: tuple[str, ...] = ()
    """How to start it, if it is not one of ours."""


_DEFAULTS = {
    "vllm": EngineDefaults(
        command=(
            *("vllm", "serve", "{model_path}", "--host", "127.0.0.1", "--port", "{port}"),
            *("--served-model-name", "{model}", "--max-num-seqs", "{max_num_seqs}"),
        )
    ),
    "sglang": EngineDefaults(
        command=(
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", "{model_path}", "--host", "127.0.0.1"),
            *("--port", "{port}", "--served-model-name", "{model}", "--max-running-requests", "{max_num_seqs}"),
            "--enable-metrics",
        )
    ),
    "tgi": EngineDefaults(max_num_seqs=128),
    "llamacpp": EngineDefaults(gpu="cpu", max_num_seqs=8, context_per_seq=2048),
    "openvino": EngineDefaults(gpu="cpu", max_num_seqs=64, max_num_batched_tokens=512),
}


def instance_bounds(section: ServeModelSection, path: str) -> tuple[int, int]:
    """The least and the most instances of a model, with the defaults filled in."""
    endpoints = sum(len(each.endpoints) for each in section.instances)
    started = [each for each in section.instances if not each.endpoints]
    emulated = any(each.engine == "emulated" for each in started)
    room = 0 if not started else MAX_INSTANCES_EMULATED if emulated else MAX_INSTANCES_STARTED
    most = section.max_instances if section.max_instances is not None else endpoints + room
    if not started and most > endpoints:
        raise ConfigError(
            f"{path}.max_instances: {most}; there are {endpoints} endpoints, and Chiron starts no engines here"
        )
    least = section.min_instances
    if least is None:
        least = min(most, 1 if started else endpoints)
    if least > most:
        raise ConfigError(f"{path}.min_instances: {least}; it must be 0 to max_instances ({most})")
    return least, most


def kind_settings(section: ServeInstanceSection, model: str, path: str, directory: Path) -> KindSettings:
    """One kind of instance of a model. Raises ConfigError for what cannot be started or reached."""
    profile = _profile(section, path, directory)
    defaults = _DEFAULTS.get(section.engine, EngineDefaults())
    kind = _instance_kind(section, model, path, profile, defaults)
    return construct(
        KindSettings,
        path,
        {
            "kind": kind,
            "engine": "openai" if section.engine == "command" else section.engine,
            "endpoints": _origins(section.endpoints, f"{path}.endpoints"),
            "command": () if section.endpoints else _command(section, kind, model, path, directory, defaults),
            "env": dict(section.env),
            "start_timeout_s": section.start_timeout_s,
            "stop_timeout_s": section.stop_timeout_s,
            "log_bytes_max": section.log_bytes_max,
            "served_model_name": section.served_model_name,
            "api_key": _secret(section.api_key_file, f"{path}.api_key_file", directory),
            "kv_capacity_known": section.kv_capacity_tokens is not None or profile is not None or _divided(section),
            "context_tokens": section.context_tokens,
            "profile": _profile_name(section.profile or section.pace, directory),
        },
    )


def _instance_kind(
    section: ServeInstanceSection, model: str, path: str, profile: Profile | None, defaults: EngineDefaults
) -> InstanceKind:
    seqs = section.max_num_seqs or (profile.max_num_seqs if profile else defaults.max_num_seqs)
    guess = seqs * defaults.context_per_seq or KV_CAPACITY_GUESS
    price = profile.price_per_gpu_hour if profile else 0.0
    most = section.max_instances or (len(section.endpoints) if section.endpoints else 1_000_000)
    if section.endpoints and most > len(section.endpoints):
        raise ConfigError(f"{path}.max_instances: {most}; there are {len(section.endpoints)} endpoints")
    return InstanceKind(
        name=f"{model}/{section.name or section.engine}",
        gpu=section.gpu or (profile.gpu if profile else defaults.gpu),
        gpus=section.gpus or (profile.tp if profile else 1),
        price_per_gpu_hour=price if section.price_per_gpu_hour is None else section.price_per_gpu_hour,
        kv_capacity_tokens=section.kv_capacity_tokens or (profile.kv_capacity_tokens if profile else guess),
        max_num_seqs=seqs,
        max_num_batched_tokens=section.max_num_batched_tokens
        or (profile.max_num_batched_tokens if profile else defaults.max_num_batched_tokens),
        max_instances=most,
    )


def _divided(section: ServeInstanceSection) -> bool:
    defaults = _DEFAULTS.get(section.engine)
    return not section.endpoints and defaults is not None and defaults.context_per_seq > 0


def _profile(section: ServeInstanceSection, path: str, directory: Path) -> Profile | None:
    """The profile of an emulated engine. A paced engine keeps KV and limits of its own, so its profile is only read to
    find mistakes early."""
    for key, engine in (("profile", "emulated"), ("pace", "openvino")):
        if getattr(section, key) and section.engine != engine:
            raise ConfigError(f"{path}.{key}: {getattr(section, key)!r}; it belongs to engine = {engine!r}")
    if section.engine == "emulated" and not section.profile and not section.endpoints:
        raise ConfigError(f"{path}: profile is missing; an emulated engine has the timing of one (chiron profile list)")
    if not section.profile and not section.pace:
        return None
    try:
        profile = load_profile(_profile_name(section.profile or section.pace, directory))
    except ProfileError as error:
        raise ConfigError(f"{path}.{'profile' if section.profile else 'pace'}: {error}") from None
    return profile if section.profile else None


def _profile_name(name: str, directory: Path) -> str:
    """A profile beside the config file by its absolute path, any other by its name."""
    return str((directory / name).resolve()) if name and (directory / name).is_file() else name


def _origins(urls: Sequence[str], path: str) -> tuple[str, ...]:
    """Each endpoint once: one that is named twice would be given twice its batch size."""
    found: dict[str, int] = {}
    for i, url in enumerate(urls):
        origin = _origin(url, f"{path}[{i}]")
        if origin in found:
            raise ConfigError(f"{path}[{i}]: {url!r} is {path}[{found[origin]}] again; name each endpoint once")
        found[origin] = i
    return tuple(found)


def _origin(url: str, path: str) -> str:
    """Scheme, host and port of an endpoint. The ``/v1`` that people copy with it is taken off."""
    what = "'http://HOST:PORT' (a trailing /v1 is ignored)"
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{path}: {url!r}: {error}; it must be {what}") from None
    if parts.username or parts.password:
        # The URL is not shown: it holds a password.
        raise ConfigError(f"{path}: holds a user name or password; use api_key_file, and {what} here")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"{path}: {url!r} must be {what}")
    if parts.path.rstrip("/") not in ("", "/v1"):
        raise ConfigError(f"{path}: {url!r} has the path {parts.path!r}; it must be {what}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "")


def _secret(file: str, path: str, directory: Path) -> str:
    if not file:
        return ""
    try:
        secret = (directory / file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {file!r} cannot be read: {error}") from None
    if not secret or "\n" in secret:
        raise ConfigError(f"{path}: {file!r} must hold one line, the key")
    return secret


def _command(
    section: ServeInstanceSection,
    kind: InstanceKind,
    model: str,
    path: str,
    directory: Path,
    defaults: EngineDefaults,
) -> tuple[str, ...]:
    command = section.command or _own_command(section, kind, directory, path) or defaults.command
    if not command:
        raise ConfigError(
            f"{path}: endpoints or command is missing; Chiron does not know how to start {section.engine}"
        )
    values = {
        "{model}": section.served_model_name or model,
        "{model_path}": _model_path(section, directory),
        "{max_num_seqs}": str(kind.max_num_seqs),
    }
    if any("{model_path}" in part for part in command) and not section.model_path:
        raise ConfigError(f"{path}: endpoints, command or model_path is missing; give one of them")
    words = []
    for part in (*command, *section.args):
        for name, value in values.items():
            part = part.replace(name, value)
        words.append(part)
    if not ENGINES.get(section.engine, ENGINES["openai"]).serve_module and not any("{port}" in word for word in words):
        raise ConfigError(f"{path}.command: {' '.join(words)!r} must hold {{port}}, which stands for a free port")
    return tuple(words)


def _own_command(section: ServeInstanceSection, kind: InstanceKind, directory: Path, path: str) -> tuple[str, ...]:
    """How to start an engine that Chiron ships."""
    row = ENGINES.get(section.engine)
    if row is None or not row.serve_module:
        return ()
    command = [sys.executable, "-m", row.serve_module, "--port", "0", "--max-num-seqs", str(kind.max_num_seqs)]
    if section.engine == "emulated":
        command += ["--profile", _profile_name(section.profile, directory)]
        command += ["--kv-capacity-tokens", str(kind.kv_capacity_tokens)]
    else:
        given = _model_path(section, directory)
        if given and not Path(given).exists():
            raise ConfigError(f"{path}.model_path: {section.model_path!r}: there is no such file (a GGUF file)")
        command += ["--model", given or "toy"]
    if section.engine == "openvino":
        command += ["--max-num-batched-tokens", str(kind.max_num_batched_tokens)]
        if section.kv_capacity_tokens is not None:
            command += ["--kv-capacity-tokens", str(section.kv_capacity_tokens)]
    if section.engine == "llamacpp":
        # Its KV is divided among its slots.
        command += ["--ctx-per-seq", str(max(1, kind.kv_capacity_tokens // kind.max_num_seqs))]
    command += ["--served-model-name", "{model}"]
    if section.threads is not None:
        command += ["--threads", str(section.threads)]
    if section.pace:
        command += ["--pace", _profile_name(section.pace, directory)]
    return tuple(command)


def _model_path(section: ServeInstanceSection, directory: Path) -> str:
    """A path beside the config file made absolute; a hub name as it is."""
    own = (directory / section.model_path).expanduser()
    return str(own.resolve()) if section.model_path and own.exists() else section.model_path
