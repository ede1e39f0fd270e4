"""The resources that are in force, in the data directory: for relays and the next brain, and for a gateway that starts
while the API server is away."""

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


def write_kept(path: Path, resources: Sequence[ModelResource], *, changed_s: float = 0.0, pause_s: float = 0.0) -> None:
    """In one step: others read it at any time. Raises OSError."""
    content = {"resources": [as_object(each) for each in resources], "changed_s": changed_s, "pause_s": pause_s}
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(orjson.dumps(content))
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
            said = orjson.loads(file.read(FILE_MAX_BYTES))
        resources = tuple(read_resource(item) for item in said["resources"])
        if any(each.flaw for each in resources):
            raise ValueError(next(each.flaw for each in resources if each.flaw))
        times = {key: float(said.get(key, 0.0)) for key in ("changed_s", "pause_s")}
        return Kept(resources=resources, **times)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read: %s", path, error)
        return None
