"""What was learned, as files beside the database: it changes often, and can be done without.

A file is a checksum and the data. A new one is whole on the disk before it takes the place of the old one.
"""

from __future__ import annotations

import os
from pathlib import Path

from chiron.store.directory import disk_error, sync_directory
from chiron.store.learned import learned_sum
from chiron.store.port import StoreDamaged

_PREFIX, _PART = "learned.", ".part"


def save_learned(directory: Path, name: str, data: bytes) -> None:
    """Raises StoreFull and StoreError; what was there is then still there."""
    path = directory / (_PREFIX + name)
    part = path.with_name(path.name + _PART)
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(b"%08x\n" % learned_sum(name, data))
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
        part.rename(path)
        sync_directory(directory)
    except OSError as error:
        raise disk_error(error, path) from error


def load_learned(directory: Path, name: str) -> bytes | None:
    """Raises StoreDamaged and StoreError."""
    path = directory / (_PREFIX + name)
    try:
        head, _, data = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise disk_error(error, path) from error
    if head != b"%08x" % learned_sum(name, data):
        raise StoreDamaged(f"{path}: what was learned is damaged on the disk")
    return data


def learned_names(directory: Path) -> list[str]:
    paths = directory.glob(f"{_PREFIX}*")
    return sorted(path.name.removeprefix(_PREFIX) for path in paths if path.suffix != _PART)
