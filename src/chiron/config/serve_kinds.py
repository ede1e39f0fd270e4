"""From the tables of a model to what the gateway starts and the control plane counts.

What an engine usually is, and how it is started, stands in its row of ``engines.rows``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from chiron.config.read import ConfigError, construct
from chiron.config.serve_sections import ServeInstanceSection, ServeModelSection, SourceName
from chiron.core.types import InstanceKind
from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_store import load_profile
from chiron.engines.rows import ENGINES, EngineRow, Word
from chiron.fleet.endpoints import EndpointsSource
from chiron.fleet.process.fleet import ProcessSource
from chiron.fleet.union import Source
from chiron.gateway.settings import KindSettings

KV_CAPACITY_GUESS = 262_144
"""Tokens of KV of an engine that has not told yet: some 16 GB of an 8B model's, on the large side, so that no prompt
is refused before the engine's metrics have been read."""
UNBOUNDED = 1_000_000
"""Instances of a kind that nothing but the model's own bound limits."""
_OF_OUR_COMMANDS = re.compile(r"\{(\w+)\}")
_OF_USERS = re.compile(r"\{(model|model_path|max_num_seqs)\}")


def instance_bounds(section: ServeModelSection, kinds: Sequence[KindSettings], path: str) -> tuple[int, int]:
    """The least and the most instances of a model, with the defaults filled in."""
    endpoints = sum(kind.source.standing for kind in kinds)
    started = [kind for kind in kinds if kind.source.instances_max is None]
    room = max((ENGINES[kind.engine].max_instances for kind in started), default=0)
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
    row = ENGINES[section.engine]
    profile = _profile(section, row, path, directory)
    kind = _instance_kind(section, row, model, profile)
    api_key = _secret(section.api_key_file, f"{path}.api_key_file", directory)
    given = Given(section=section, row=row, kind=kind, model=model, path=path, directory=directory, api_key=api_key)
    source = _SOURCES[section.source](given)
    divided = section.source == "process" and row.context_per_seq > 0
    return construct(
        KindSettings,
        path,
        {
            "kind": _bounded(kind, section, source, path),
            "engine": section.engine,
            "source": source,
            "served_model_name": section.served_model_name,
            "api_key": api_key,
            "kv_capacity_known": bool(section.kv_capacity_tokens or profile or divided),
            "context_tokens": section.context_tokens,
            "profile": _profile_name(section.profile or section.pace, directory),
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What is known of a kind when its source is made."""

    section: ServeInstanceSection
    row: EngineRow
    kind: InstanceKind
    model: str
    path: str
    directory: Path
    api_key: str = field(repr=False)


def _process(given: Given) -> ProcessSource:
    section, row, kind = given.section, given.row, given.kind
    values = {
        "command": _command(given),
        "env": dict(section.env),
        "health_path": row.health_path,
        "start_timeout_s": section.start_timeout_s,
        "stop_timeout_s": section.stop_timeout_s,
        "gpus": kind.gpus if row.uses_gpus and kind.gpu != "cpu" else 0,
        "log_bytes_max": section.log_bytes_max,
    }
    return construct(ProcessSource, given.path, values)


def _endpoints(given: Given) -> EndpointsSource:
    headers = {"authorization": f"Bearer {given.api_key}"} if given.api_key else {}
    urls = _origins(given.section.endpoints, f"{given.path}.endpoints")
    values = {"urls": urls, "health_path": given.row.health_path, "headers": headers}
    return construct(EndpointsSource, given.path, values)


_SOURCES: Mapping[SourceName, Callable[[Given], Source]] = {"process": _process, "endpoints": _endpoints}


def _instance_kind(section: ServeInstanceSection, row: EngineRow, model: str, profile: Profile | None) -> InstanceKind:
    seqs = section.max_num_seqs or (profile.max_num_seqs if profile else row.max_num_seqs)
    guess = seqs * row.context_per_seq or KV_CAPACITY_GUESS
    price = profile.price_per_gpu_hour if profile else 0.0
    return InstanceKind(
        name=f"{model}/{section.name or section.engine}",
        gpu=section.gpu or (profile.gpu if profile else row.gpu),
        gpus=section.gpus or (profile.tp if profile else 1),
        price_per_gpu_hour=price if section.price_per_gpu_hour is None else section.price_per_gpu_hour,
        kv_capacity_tokens=section.kv_capacity_tokens or (profile.kv_capacity_tokens if profile else guess),
        max_num_seqs=seqs,
        max_num_batched_tokens=section.max_num_batched_tokens
        or (profile.max_num_batched_tokens if profile else row.max_num_batched_tokens),
        max_instances=section.max_instances or UNBOUNDED,
    )


def _bounded(kind: InstanceKind, section: ServeInstanceSection, source: Source, path: str) -> InstanceKind:
    """No more instances than the source can have."""
    most = source.instances_max
    if most is None:
        return kind
    if section.max_instances is not None and section.max_instances > most:
        raise ConfigError(f"{path}.max_instances: {section.max_instances}; there are {source.summary}")
    return replace(kind, max_instances=section.max_instances or most)


def _profile(section: ServeInstanceSection, row: EngineRow, path: str, directory: Path) -> Profile | None:
    """The profile that an engine has its timing from. One that is only paced keeps KV and limits of its own, so its
    profile is only read to find mistakes early."""
    for key in ("profile", "pace"):
        if getattr(section, key) and row.profile_key != key:
            owners = " or ".join(repr(each.name) for each in ENGINES.values() if each.profile_key == key)
            raise ConfigError(f"{path}.{key}: {getattr(section, key)!r}; it belongs to engine = {owners}")
    if row.profile_key == "profile" and not section.profile and section.source == "process":
        raise ConfigError(
            f"{path}: profile is missing; {row.name} engines have the timing of one (chiron profile list)"
        )
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


def _command(given: Given) -> tuple[str, ...]:
    """The engine's own command line, or the user's; ``{port}`` stays for the fleet."""
    section, row, path = given.section, given.row, given.path
    command: tuple[Word, ...] = section.command or row.command
    if not command:
        raise ConfigError(
            f"{path}: endpoints or command is missing; Chiron does not know how to start {section.engine}"
        )
    values = _values(given)
    if not values["model_path"] and any("{model_path}" in part for word in command for part in _parts(word)):
        raise ConfigError(f"{path}: endpoints, command or model_path is missing; give one of them")
    if not section.command and row.model_default and section.model_path and not Path(values["model_path"]).exists():
        raise ConfigError(f"{path}.model_path: {section.model_path!r}: there is no such file (a GGUF file)")
    known = _OF_USERS if section.command else _OF_OUR_COMMANDS
    words = [*_filled(command, values, known), *_filled(section.args, values, _OF_USERS)]
    if not row.announces_port and not any("{port}" in word for word in words):
        raise ConfigError(f"{path}.command: {' '.join(words)!r} must hold {{port}}, which stands for a free port")
    return tuple(words)


def _values(given: Given) -> Mapping[str, str]:
    """What stands for the names in a command; empty: not known."""
    section, kind, directory = given.section, given.kind, given.directory
    default = "" if section.command else given.row.model_default
    return {
        "python": sys.executable,
        "port": "{port}",
        "model": section.served_model_name or given.model,
        "model_path": _model_path(section, directory) or default,
        "max_num_seqs": str(kind.max_num_seqs),
        "max_num_batched_tokens": str(kind.max_num_batched_tokens),
        "kv_capacity_tokens": str(kind.kv_capacity_tokens) if section.kv_capacity_tokens or section.profile else "",
        "context_per_seq": str(max(1, kind.kv_capacity_tokens // kind.max_num_seqs)),
        "threads": str(section.threads or ""),
        "profile": _profile_name(section.profile, directory),
        "pace": _profile_name(section.pace, directory),
    }


def _filled(words: Sequence[Word], values: Mapping[str, str], known: re.Pattern[str]) -> Iterator[str]:
    for word in words:
        parts = _parts(word)
        if isinstance(word, str) or all(values[name] for part in parts for name in known.findall(part)):
            yield from (known.sub(lambda match: values[match[1]], part) for part in parts)


def _parts(word: Word) -> tuple[str, ...]:
    return (word,) if isinstance(word, str) else word


def _model_path(section: ServeInstanceSection, directory: Path) -> str:
    """A path beside the config file made absolute; a hub name as it is."""
    own = (directory / section.model_path).expanduser()
    return str(own.resolve()) if section.model_path and own.exists() else section.model_path
