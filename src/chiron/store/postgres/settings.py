"""Settings of the store on PostgreSQL."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

TlsMode = Literal["disable", "prefer", "require", "verify-ca", "verify-full"]
TLS_MODES = ("disable", "prefer", "require", "verify-ca", "verify-full")


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresSettings:
    url: str = field(repr=False)
    """``postgresql://USER@HOST:PORT/DATABASE``; a password in it works, but belongs into ``password_env`` or
    ``password_file``."""
    password_env: str = ""
    """Environment variable that holds the password."""
    password_file: str = ""
    """File whose first line is the password; read anew for each connection, so that it can be changed."""
    tls: TlsMode = "prefer"
    """As libpq's ``sslmode``: ``verify-full`` checks the server's certificate and name, ``prefer`` encrypts if the
    server can, which is only right on one machine or in a trusted network."""
    tls_root_cert: str = ""
    """File of the certificates that sign the server's, for ``verify-ca`` and ``verify-full``; empty: libpq's own."""
    schema: str = "chiron"
    """The tables' schema. Several gateways with the same schema share their work; others do not see it."""
    connections_max: int = 4
    """Connections that read; two more write and listen."""
    connect_timeout_s: float = 5.0
    statement_timeout_s: float = 60.0
    """A statement that takes longer is given up, by the server."""
    lease_s: float = 30.0
    """Items leased by a gateway that has not been heard of for so long are leased to others."""
    reconnect_max_s: float = 5.0
    """The longest pause between two tries to reconnect."""
    file_bytes_max: int = 2 << 30
    """A larger upload is refused: files are stored in the database. At the 8 MB/s of a busy small
    machine that takes four minutes."""
    database_bytes_max: int = 1 << 40
    """Uploads and new batches are refused (``StoreFull``) while the database is larger."""
    retention_s: float = 30 * 86_400.0
    """``sweep`` removes batches that ended, and uploads unused, this long ago. ``inf`` keeps them for ever."""
    operations_max: int = 1_000
    """Operations of callers in flight at a time; further callers wait."""
    group_max: int = 256
    """Operations committed in one transaction."""
    block_bytes: int = 256 << 10
    """Files and results are read in blocks of about this size: what a slow reader holds in memory."""
    check_first_bytes_max: int = 64 << 20
    """A file or an output up to this size is checked from end to end before its first byte is given out, once per
    start; a larger one while it is given out, which then breaks off where it is damaged."""

    def __post_init__(self) -> None:
        if not re.match(r"postgres(ql)?://[^\s]+$", self.url):
            raise ValueError("url: must be postgresql://USER@HOST:PORT/DATABASE")  # It may hold a password: not shown.
        if self.password_env and self.password_file:
            raise ValueError("password_env: give it or password_file, not both")
        if self.tls not in TLS_MODES:
            raise ValueError(f"tls: {self.tls!r} must be one of {', '.join(TLS_MODES)}")
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", self.schema):
            raise ValueError(f"schema: {self.schema!r} must be 1 to 63 of a-z, 0-9 and '_', not beginning with a digit")
        for name in ("connect_timeout_s", "statement_timeout_s", "reconnect_max_s"):
            if not 0 < getattr(self, name) <= 3600:
                raise ValueError(
                    f"{name.removesuffix('_s')}: {getattr(self, name)!r} must be above 0 and at most an hour"
                )
        if not 1 <= self.lease_s <= 3600:
            raise ValueError(f"lease: {self.lease_s!r} must be between 1 second and an hour")
        if not self.retention_s >= 0 or not self.check_first_bytes_max >= 0:
            raise ValueError("retention and check_first_bytes_max: must be 0 or more")
        for name in ("operations_max", "group_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r} must be 1 or more")
        if not 1 <= self.connections_max <= 100:
            raise ValueError(f"connections_max: {self.connections_max!r} must be between 1 and 100")
        if self.block_bytes < 4096:
            raise ValueError(f"block_bytes: {self.block_bytes!r} must be 4096 or more")
        for name in ("file_bytes_max", "database_bytes_max"):
            if getattr(self, name) < 1 << 20:
                raise ValueError(f"{name}: {getattr(self, name)!r} must be at least 1 MiB")
