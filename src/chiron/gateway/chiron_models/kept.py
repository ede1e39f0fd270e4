"""The resources that are in force, in the data directory: for relays and the next brain, and for a gateway that starts
while the API server is away."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import orjson

from chiron.gateway.chiron_models.objects import ModelResource, as_object, read_resource

log = logging.getLogger("chiron.gateway")

FILE = "chiron-models.json"
FILE_MAX_BYTES = 128 << 20


def write_kept(path: Path, resources: Sequence[ModelResource]) -> None:
    """In one step: others read it at any time. Raises OSError."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(orjson.dumps({"resources": [as_object(each) for each in resources]}))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_kept(path: Path) -> tuple[ModelResource, ...] | None:
    """None: there are none, or they cannot be read, which is said."""
    try:
        with path.open("rb") as file:
            said = orjson.loads(file.read(FILE_MAX_BYTES))
        return tuple(read_resource(item) for item in said["resources"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read: %s", path, error)
        return None
