"""``chiron store``: the store of batch jobs moved elsewhere."""

from __future__ import annotations

import asyncio
import time
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from chiron.cli.common.extras import needs, require_extras
from chiron.config.read import ConfigError

app = typer.Typer(help="Move the store of batch jobs.", no_args_is_help=True)


@app.callback()
def store() -> None:
    """Commands for the store of batch jobs."""


@app.command()
def migrate(
    from_: Annotated[Path, typer.Option("--from", metavar="DATA_DIR", help="The gateway's data directory.")],
    to: Annotated[str, typer.Option("--to", metavar="URL", help="postgresql://USER@HOST:PORT/DATABASE.")],
    password_env: Annotated[str, typer.Option("--password-env", help="Variable that holds the password.")] = "",
    password_file: Annotated[str, typer.Option("--password-file", help="File that holds the password.")] = "",
    tls: Annotated[str, typer.Option("--tls", help="As store.tls.")] = "prefer",
    tls_root_cert: Annotated[str, typer.Option("--tls-root-cert", help="As store.tls_root_cert.")] = "",
    schema: Annotated[str, typer.Option("--schema", help="As store.schema.")] = "chiron",
) -> None:
    """Move batches, open ones too, from SQLite in a data directory into PostgreSQL.

    Stop the gateway first. Everything is read back and compared; then the old store is marked as moved, and nothing in
    it is deleted. If it is interrupted, run it again: it goes on where it was.

    Example:

    - `chiron store migrate --from chiron-data --to postgresql://chiron@db/chiron --password-file password`
    """
    require_extras(["serve", "postgres"])
    with needs("postgres"):
        from chiron.store.migrate import migrate as move
        from chiron.store.port import StoreError, StoreLocked
        from chiron.store.postgres.settings import PostgresSettings
    try:
        settings = PostgresSettings(
            url=to,
            password_env=password_env,
            password_file=password_file,
            tls=tls,  # type: ignore[arg-type]
            tls_root_cert=tls_root_cert,
            schema=schema,
            retention_s=inf,
        )
    except ValueError as error:
        key, _, why = str(error).partition(": ")
        raise ConfigError(f"--{'to' if key == 'url' else key.replace('_', '-')}: {why}") from None
    began_s = time.monotonic()
    try:
        moved = asyncio.run(move(from_, settings, wall=time.time, tell=lambda line: typer.echo(line, err=True)))
    except StoreLocked as error:
        raise ConfigError(f"--from: {error}; stop the gateway first") from None
    except StoreError as error:
        raise ConfigError(str(error)) from None
    typer.echo(
        f"moved {moved.files} files ({moved.bytes / 1e6:,.1f} MB), {moved.batches} batches ({moved.open_batches} open),"
        f" {moved.items} items and {moved.results} results in {time.monotonic() - began_s:.1f} s; all was read back"
    )
    if moved.damaged:
        typer.echo(f"{moved.damaged} files were damaged before, and are as they were", err=True)
    typer.echo("next: name the same database in the config (store.url), and start the gateway", err=True)
