"""Where on Ray a gateway has had instances, in its data directory and in the store that several share: what it left
where the config names nothing any more would otherwise run for ever."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger("chiron.fleet")

FILE = "ray-places.json"
NAME = "ray-places"
"""In the store."""
PLACES_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Place:
    """A namespace of a cluster."""

    address: str
    namespace: str
    python: str

    @property
    def options(self) -> str:
        """Of ``chiron ray``, where they are not the defaults."""
        given = {"--address": (self.address, "auto"), "--namespace": (self.namespace, "chiron")}
        given["--python"] = (self.python, "")
        return "".join(f"{option} {value} " for option, (value, usual) in given.items() if value != usual)


def read_places(path: Path) -> set[Place]:
    """Empty if there are none, or they cannot be read, which is said."""
    try:
        return from_bytes(path.read_bytes(), str(path))
    except FileNotFoundError:
        return set()
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error)
        return set()


def from_bytes(data: bytes, where: str) -> set[Place]:
    """Empty if they cannot be read, which is said."""
    try:
        found = {Place(**{key: str(each[key]) for key in Place.__slots__}) for each in json.loads(data)}
    except (ValueError, LookupError, TypeError) as error:
        log.warning("%s cannot be read: %s", where, error)
        return set()
    return set(sorted(found)[:PLACES_MAX])


def to_bytes(places: Iterable[Place]) -> bytes:
    return json.dumps([asdict(each) for each in sorted(places)]).encode()


def write_places(path: Path, places: Iterable[Place]) -> None:
    """In one step."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(to_bytes(places))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)
