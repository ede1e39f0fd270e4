"""Whose instances are: what a gateway leaves behind somewhere is known as its own by whoever replaces it."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from secrets import token_hex

from chiron.gateway.settings import ServeConfig
from chiron.store.postgres.settings import PostgresSettings

log = logging.getLogger("chiron.gateway")

FILE = "gateway-id"
_ID = re.compile(r"[0-9a-f]{32}")


def owner_of(config: ServeConfig) -> str:
    """The same for all gateways of one schema of a database, or of one data directory; empty: it cannot be known."""
    if isinstance(config.store, PostgresSettings):
        return f"{config.store.url.rpartition('@')[2]} {config.store.schema}"  # Without user and password.
    try:
        return _kept(config.data / FILE)
    except OSError as error:
        log.warning("%s: %s: what this gateway leaves on Ray will be nobody's", config.data / FILE, error.strerror)
        return ""


def _kept(path: Path) -> str:
    """Written in one step: two brains of one gateway may come at the same time."""
    try:
        if _ID.fullmatch(found := path.read_text(errors="replace").strip()):
            return found
        path.unlink()
    except FileNotFoundError:
        pass
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(token_hex(16) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(beside, path)
    except FileExistsError:  # Another one was quicker.
        pass
    finally:
        beside.unlink()
    return path.read_text().strip()
