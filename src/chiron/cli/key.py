"""``chiron key``: an API key for clients, its hash for the config."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from chiron.config.read import ConfigError
from chiron.gateway.relay.keys import ADMIN, hash_secret, new_secret


def key(
    name: Annotated[
        str, typer.Option("--name", help="Names the key in logs and metrics; owns its files and batches.")
    ] = "default",
    admin: Annotated[bool, typer.Option("--admin", help="A key for the admin routes instead.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the key into this new file (mode 0600), and do not show it."),
    ] = None,
) -> None:
    """Make an API key: show it once, and print the lines to add to the config.

    The key goes to stderr, the TOML with its hash to stdout, so that it can be appended to a config. Only the hash
    is stored; the key cannot be recovered from it.

    Examples:

    - `chiron key --name team-a >> chiron.toml`

    - `chiron key --name team-b --out team-b.key >> chiron.toml`
    """
    if not name or name == ADMIN:
        raise ConfigError(f"--name {name!r}: must not be empty, nor {ADMIN!r} (use --admin)")
    secret = new_secret()
    if out is None:
        typer.echo(f"API key, shown only this once: {secret}", err=True)
    else:
        _write(out, secret)
        typer.echo(f"API key written to {out}", err=True)
    hashed = hash_secret(secret.encode())
    if admin:
        # A key outside of a table must come before the first table of a TOML file.
        typer.echo("Put this line at the top of the config:", err=True)
        typer.echo(f'admin_key_hash = "{hashed}"')
    else:
        typer.echo(f'\n[[keys]]\nname = {json.dumps(name)}\nhash = "{hashed}"')


def _write(path: Path, secret: str) -> None:
    """Only the owner may read it, from the first moment on; an existing file is never overwritten."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"--out {path}: exists already, and is not overwritten") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(secret + "\n")
