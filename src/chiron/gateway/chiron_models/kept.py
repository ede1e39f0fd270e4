"""The resources that are in force, in the data directory: for relays and the next brain, and for a gateway that starts
while the API server is away.

Of several gateways the one that leads says which these are, in the store; the others have a copy of that."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from chiron.gateway.chiron_models.objects import ModelResource, as_object, read_resource

log = logging.getLogger("chiron.gateway")

FILE = "chiron-models.json"
FILE_MAX_BYTES = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What the file says."""

    resources: tuple[ModelResource, ...]
    changed_s: float
    """When a brain made way for these, Unix time; 0: none did."""
    pause_s: float
    """How long that one had served at least."""


def content_of(resources: Sequence[ModelResource], *, changed_s: float = 0.0, pause_s: float = 0.0) -> bytes:
    """Of the file."""
    said = {"resources": [as_object(each) for each in resources], "changed_s": changed_s, "pause_s": pause_s}
    return orjson.dumps(said)


def write_kept(path: Path, content: bytes) -> None:
    """In one step: others read it at any time. Raises OSError."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_kept(path: Path) -> tuple[ModelResource, ...] | None:
    """None: there are none, or they cannot be read, which is said."""
    kept = read_record(path)
    return kept.resources if kept is not None else None


def read_record(path: Path) -> Kept | None:
    """As ``read_kept``, with when they came into force."""
    try:
        with path.open("rb") as file:
            return read_content(file.read(FILE_MAX_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read: %s", path, error)
        return None


def read_content(content: bytes) -> Kept:
    """Raises ValueError."""
    try:
        said = orjson.loads(content)
        resources = tuple(read_resource(item) for item in said["resources"])
        if any(each.flaw for each in resources):
            raise ValueError(next(each.flaw for each in resources if each.flaw))
        times = {key: float(said.get(key, 0.0)) for key in ("changed_s", "pause_s")}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"these are no ChironModels: {error}") from None
    return Kept(resources=resources, **times)
