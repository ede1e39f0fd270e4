"""What a gateway is called at the server, so that its next process knows what the last one had."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Final
from uuid import uuid4

from chiron.store.directory import disk_error

NAME: Final = "gateway-name"
_NAME_FORM: Final = re.compile(r"[A-Za-z0-9._-]{13,80}")


def name_of(directory: Path) -> str:
    """The name of the gateway that has this directory, the same at each start: so its next process knows at once that
    the last one is over. Raises StoreError."""
    path = directory / NAME
    try:
        known = path.read_text().strip()
    except FileNotFoundError:
        known = ""
    except OSError as error:
        raise disk_error(error, path) from error
    return known if _NAME_FORM.fullmatch(known) else new_name(directory)


def new_name(directory: Path) -> str:
    """It is that of the directory from now on."""
    name, path = unique_name(socket.gethostname()), directory / NAME
    try:
        part = path.with_name(f"{NAME}.part")
        part.write_text(f"{name}\n")
        part.rename(path)
    except OSError as error:
        raise disk_error(error, path) from error
    return name


def unique_name(like: str) -> str:
    return f"{like[:60]}-{uuid4().hex[:12]}"
