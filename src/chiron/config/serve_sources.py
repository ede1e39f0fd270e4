"""What instances of a kind come from, out of its table: a process with its command line, endpoints, pods, or
actors on Ray.

Another source is a member of ``fleet.union``, its keys in ``serve_sections``, and a function here that reads them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from chiron.config.read import ConfigError, construct
from chiron.config.serve_sections import ServeInstanceSection, SourceName
from chiron.config.serve_stages import stages_argument
from chiron.core.types import InstanceKind
from chiron.engines.rows import ENGINES, EngineRow, SleepRoutes, Word
from chiron.fleet.endpoints import EndpointsSource
from chiron.fleet.kubernetes.source import WORKLOADS, KubernetesSource
from chiron.fleet.process.fleet import TOKEN_BUDGET, ProcessSource
from chiron.fleet.process.sleepers import SleepSource
from chiron.fleet.ray.source import RaySource
from chiron.fleet.union import Source

_OF_OUR_COMMANDS = re.compile(r"\{(\w+)\}")
_OF_USERS = re.compile(r"\{(model|model_path|max_num_seqs)\}")


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
    routes = row.sleep if section.sleeper_gb is not None else None
    command = _command(given)
    if routes is not None and not section.command:
        command = (*command, *routes.args)
    values = {
        "command": command,
        "env": {**(routes.env if routes is not None else {}), **section.env},
        "sleep": _sleep(given, routes),
        "health_path": row.health_path,
        "start_timeout_s": section.start_timeout_s,
        "stop_timeout_s": section.stop_timeout_s,
        "gpus": kind.gpus if row.uses_gpus and kind.gpu != "cpu" else 0,
        "log_bytes_max": section.log_bytes_max,
    }
    return construct(ProcessSource, given.path, values)


def _sleep(given: Given, routes: SleepRoutes | None) -> SleepSource | None:
    if routes is None:
        return None
    values = {
        "gb": given.section.sleeper_gb,
        "sleep_path": routes.sleep,
        "wake_path": routes.wake,
        "asleep_path": routes.asleep,
    }
    return construct(SleepSource, given.path, values)


def _endpoints(given: Given) -> EndpointsSource:
    urls = _origins(given.section.endpoints, f"{given.path}.endpoints")
    values = {"urls": urls, "health_path": given.row.health_path, "headers": _headers(given)}
    return construct(EndpointsSource, given.path, values)


def _kubernetes(given: Given) -> KubernetesSource:
    section, table = given.section, given.section.kubernetes
    assert table is not None
    workload = next(name for name in WORKLOADS if getattr(table, name))
    own = (given.directory / table.kubeconfig).expanduser() if table.kubeconfig else None
    values = {
        "workload": workload,
        "name": getattr(table, workload),
        "namespace": table.namespace,
        "port": table.port,
        "health_path": given.row.health_path,
        "headers": _headers(given),
        "kubeconfig": str(own.resolve()) if own is not None else "",
        "context": table.context,
        "start_timeout_s": section.start_timeout_s,
        "yield_s": table.yield_s,
        "scaler": table.scaler,
        "opt_in": table.opt_in,
    }
    return construct(KubernetesSource, f"{given.path}.kubernetes", values)


def _ray(given: Given) -> RaySource:
    section, row, kind, table = given.section, given.row, given.kind, given.section.ray
    assert table is not None
    own = kind.gpus if row.uses_gpus and kind.gpu != "cpu" else 0
    gpus = float(own if table.gpus is None else table.gpus)
    if table.nodes > 1 and gpus % table.nodes:
        raise ConfigError(f"{given.path}.ray.gpus: {gpus:g}; they must divide into {table.nodes} nodes")
    command = _command(given)
    if not section.command:
        command = _reachable(command)
    values = {
        "command": command,
        "follower_args": table.follower_args,
        "env": dict(section.env),
        "address": table.address,
        "namespace": table.namespace,
        "python": str(given.directory / Path(table.python).expanduser()) if "/" in table.python else table.python,
        "nodes": table.nodes,
        "resources": {
            **table.resources,
            "CPU": table.cpus,
            "GPU": gpus / table.nodes,
            "memory": table.memory,
        },
        "health_path": row.health_path,
        "start_timeout_s": section.start_timeout_s,
        "stop_timeout_s": section.stop_timeout_s,
        "log_bytes_max": section.log_bytes_max,
        "absent_after_s": table.absent_after_s,
        "on_stop": table.on_stop,
    }
    return construct(RaySource, f"{given.path}.ray", values)


def _reachable(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command of a row, so that the engine listens at its node's address: the last ``--host`` counts."""
    if "--host" in command:
        place = command.index("--host") + 1
        return (*command[:place], "{host}", *command[place + 1 :])
    return (*command, "--host", "{host}")


def _headers(given: Given) -> Mapping[str, str]:
    return {"authorization": f"Bearer {given.api_key}"} if given.api_key else {}


_READERS: Mapping[SourceName, Callable[[Given], Source]] = {
    "process": _process,
    "endpoints": _endpoints,
    "kubernetes": _kubernetes,
    "ray": _ray,
}


def read_source(given: Given) -> Source:
    """Raises ConfigError for what cannot be started or reached."""
    return _READERS[given.section.source](given)


def profile_name(name: str, directory: Path) -> str:
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


def read_secret(file: str, path: str, directory: Path) -> str:
    if not file:
        return ""
    try:
        secret = (directory / file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {file!r} cannot be read: {error}") from None
    if not secret or "\n" in secret:
        raise ConfigError(f"{path}: {file!r} must contain one line, the key")
    return secret


def _command(given: Given) -> tuple[str, ...]:
    """The engine's own command line, or the user's. For the fleet stay ``{port}`` and a process's token budget."""
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
    if section.threads and row.announces_port and not section.command and "{threads}" not in str(row.command):
        owners = " or ".join(repr(each.name) for each in ENGINES.values() if "{threads}" in str(each.command))
        raise ConfigError(f"{path}.threads: {section.threads}; it belongs to engine = {owners}")
    known = _OF_USERS if section.command else _OF_OUR_COMMANDS
    words = [*_filled(command, values, known), *_filled(section.args, values, _OF_USERS)]
    if not row.announces_port and not any("{port}" in word for word in words):
        raise ConfigError(f"{path}.command: {' '.join(words)!r} must contain {{port}}, which stands for a free port")
    return tuple(words)


def _values(given: Given) -> Mapping[str, str]:
    """What stands for the names in a command; empty: not known."""
    section, kind, directory = given.section, given.kind, given.directory
    default = "" if section.command else given.row.model_default
    return {
        "python": "{python}" if section.source == "ray" else sys.executable,
        "port": "{port}",
        "model": section.served_model_name or given.model,
        "model_path": _model_path(section, directory) or default,
        "max_num_seqs": str(kind.max_num_seqs),
        "max_num_batched_tokens": TOKEN_BUDGET if section.source == "process" else str(kind.max_num_batched_tokens),
        "kv_capacity_tokens": str(kind.kv_capacity_tokens) if section.kv_capacity_tokens or section.profile else "",
        "context_per_seq": str(max(1, kind.kv_capacity_tokens // kind.max_num_seqs)),
        "threads": str(section.threads or ""),
        "profile": profile_name(section.profile, directory),
        "pace": profile_name(section.pace, directory),
        "stages": stages_argument(section),
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
