"""The mark of a store that was moved elsewhere: no gateway takes up its batches a second time."""

from __future__ import annotations

import json
import os
from pathlib import Path

from chiron.store.directory import sync_directory
from chiron.store.port import StoreError

NAME = "moved.json"


def mark_moved(directory: Path, to: str, schema: str, now_s: float) -> None:
    """Raises OSError."""
    path = directory / NAME
    part = path.with_name(f"{NAME}.part")
    with open(part, "w") as stream:
        json.dump({"to": to, "schema": schema, "at_s": now_s}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    part.chmod(0o600)
    part.rename(path)
    sync_directory(directory)


def require_not_moved(directory: Path) -> None:
    """Raises StoreError."""
    path = directory / NAME
    try:
        told = json.loads(path.read_bytes())
        to = f"{told['to']}, schema {told['schema']}"
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        to = "another store"
    raise StoreError(
        f"{directory}: its batches were moved to {to}: set store.url in the config; to use this copy again, and run "
        f"what was open in it a second time, remove {path}"
    )
