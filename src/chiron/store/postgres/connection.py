"""Connections to PostgreSQL, and what its errors mean.

Transactions are ours: connections commit each statement by itself unless we say BEGIN. ``?`` stands for a value, as in
SQLite; text columns that may hold any character are ``bytea``, since PostgreSQL's text has no NUL.

A pooler between us and the server must give each connection a session of its own: settings, prepared statements, locks
and what is listened for belong to a session, and with a pooler that changes sessions between transactions others would
get them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg import Cursor
from psycopg import sql as quoting
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from chiron.store.port import StoreCorrupt, StoreDamaged, StoreError, StoreFull, StoreUnavailable
from chiron.store.postgres.settings import PostgresSettings

if TYPE_CHECKING:
    from psycopg.abc import PQGen

T = TypeVar("T")

SERVER_MIN: Final = 130_000
LOOKS_FOR_SHARING: Final = 5
"""Connections that look whether a pooler gives them the session of one that is open. Idle ones show it at once."""
ROWS_PER_PAGE: Final = 512
_AS_BYTES: Final = frozenset({"custom_id"})
_COPIED: Final = {
    "items": {"custom_id": "bytea"},
    "results": {"line": "bytea"},
}
"""Tables that get many rows at once, with their columns that are not ``int8``."""
_CONTROL: Final = frozenset({"BEGIN", "COMMIT", "ROLLBACK", "BEGIN READ ONLY"})
"""To prepare these would save nothing."""
_KEYS: Final = {"work": ("batch", "lane")}
"""Primary keys that are not the first column."""


class Row:
    """Implements ``sums.Row``."""

    __slots__ = ("_places", "_values")

    def __init__(self, places: dict[str, int], values: list[Any]) -> None:
        self._places = places
        self._values = values

    def __getitem__(self, name: str | int) -> Any:
        return self._values[self._places[name] if isinstance(name, str) else name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)


def _make_rows(cursor: Cursor[Any]) -> Callable[[Sequence[Any]], Row]:
    described = cursor.description or ()
    places = {column.name: place for place, column in enumerate(described)}
    as_bytes = [place for name, place in places.items() if name in _AS_BYTES]

    def make(values: Sequence[Any]) -> Row:
        row = list(values)
        for place in as_bytes:
            if row[place] is not None:
                row[place] = row[place].decode(errors="replace")
        return Row(places, row)

    return make


class Patience:
    """How long connections wait for a server that says nothing. May be changed while they do, by any thread."""

    def __init__(self, answer_max_s: float) -> None:
        self.until_s = inf
        """By ``time.monotonic``: from then on they wait for nothing."""
        self._answer_max_s = answer_max_s

    def is_over(self, heard_s: float) -> bool:
        """Whether too much time has passed since then."""
        now_s = time.monotonic()
        return now_s - heard_s > self._answer_max_s or now_s > self.until_s


class _RawConnection(psycopg.Connection[Row]):
    """The server's own limit of a statement does not help if the server hangs: nothing would ever come, or fail.
    Derived because that is how psycopg lets its wait be changed."""

    patience = Patience(inf)

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        return super().wait(self._limited(gen), *args, **kwargs)

    def _limited(self, gen: PQGen[T]) -> PQGen[T]:
        """The same, but an error if nothing could be sent or received for as long as its patience lasts. psycopg says
        several times a second that it still waits."""
        heard_s = time.monotonic()
        try:
            state = next(gen)
            while True:
                ready = yield state
                if ready:
                    heard_s = time.monotonic()
                elif self.patience.is_over(heard_s):
                    self.close()
                    waited_s = time.monotonic() - heard_s
                    raise psycopg.OperationalError(f"the server has not answered for {waited_s:.0f} s")
                state = gen.send(ready)
        except StopIteration as end:
            found: T = end.value
            return found


class Connection:
    """Implements ``jobs.database.Database``. Whichever thread has it uses it alone."""

    keeps_copies = False  # PostgreSQL has checksums of its own, backups and replicas.

    def __init__(self, raw: psycopg.Connection[Row]) -> None:
        self.raw = raw

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> psycopg.Cursor[Row]:
        return self.raw.execute(_translated(sql), values, binary=True, prepare=False if sql in _CONTROL else None)

    def insert_rows(self, table: str, names: Sequence[str], rows: Collection[Sequence[Any]], replace: bool) -> None:
        if not rows:
            return
        if table not in _COPIED:
            for row in rows:
                self.execute(_insert(table, tuple(names), replace), row)
            return
        if replace:
            self.execute(f"DELETE FROM {table} WHERE key = ANY(?)", ([row[0] for row in rows],))
        types = [_COPIED[table].get(name, "int8") for name in names]
        as_bytes = [place for place, name in enumerate(names) if name in _AS_BYTES]
        with self.raw.cursor(binary=True).copy(_copy(table, tuple(names))) as copy:
            copy.set_types(types)
            for row in rows:
                values = list(row)
                for place in as_bytes:
                    values[place] = values[place].encode()
                copy.write_row(values)

    def page(self, sql: str, values: Sequence[Any], block_bytes: int) -> psycopg.Cursor[Row]:
        # A plain query would send all of its rows.
        return self.execute(
            "SELECT * FROM (SELECT part.*, sum(coalesce(octet_length(line), 256)) OVER (ORDER BY key) AS bytes_so_far,"
            f" coalesce(octet_length(line), 256) AS bytes_here FROM ({sql} LIMIT {ROWS_PER_PAGE}) AS part) AS counted"
            " WHERE bytes_so_far - bytes_here < ? ORDER BY key",
            (*values, block_bytes),
        )

    def close(self) -> None:
        self.raw.close()


@lru_cache(maxsize=512)
def _translated(sql: str) -> bytes:
    return sql.replace("%", "%%").replace("?", "%s").encode()


@lru_cache(maxsize=64)
def _insert(table: str, names: tuple[str, ...], replace: bool) -> str:
    columns = ", ".join(f'"{name}"' for name in names)
    text = f"INSERT INTO {table}({columns}) VALUES({', '.join('?' * len(names))})"
    if not replace:
        return text
    key = _KEYS.get(table, names[:1])
    changes = ", ".join(f'"{name}" = excluded."{name}"' for name in names if name not in key)
    return f"{text} ON CONFLICT ({', '.join(key)}) DO UPDATE SET {changes}"


@lru_cache(maxsize=64)
def _copy(table: str, names: tuple[str, ...]) -> bytes:
    columns = ", ".join(f'"{name}"' for name in names)
    return f"COPY {table}({columns}) FROM STDIN (FORMAT BINARY)".encode()


def where(settings: PostgresSettings) -> str:
    """The server and database in words, without the password."""
    told = conninfo_to_dict(settings.url)
    host = told.get("host") or "local socket"
    port = f":{told['port']}" if told.get("port") else ""
    return f"postgresql://{host}{port}/{told.get('dbname') or told.get('user') or ''}"


def connect(settings: PostgresSettings, name: str, patience: Patience | None = None) -> Connection:
    """Raises StoreUnavailable if the server cannot be reached for now, StoreError if it never will with these settings.
    ``name``: what for, as the server's ``pg_stat_activity`` shows it."""
    try:
        conninfo = make_conninfo(settings.url, **_parameters(settings, name))
    except psycopg.Error as error:
        raise StoreError(f"store.url: {_first_line(error)}") from None
    raw = _open(conninfo, settings)
    try:
        if raw.info.server_version < SERVER_MIN:
            found = raw.info.parameter_status("server_version") or raw.info.server_version
            raise StoreError(f"{where(settings)}: PostgreSQL {found} is too old: {SERVER_MIN // 10_000} is needed")
        if patience is not None:
            raw.patience = patience
        _require_own_session(raw, conninfo, settings)
        raw.execute(_session_settings(settings))
    except psycopg.Error as error:
        raw.close()
        raise store_error(error, settings) from error
    except BaseException:
        raw.close()
        raise
    return Connection(raw)


def _open(conninfo: str, settings: PostgresSettings) -> _RawConnection:
    try:
        raw = _RawConnection.connect(conninfo, autocommit=True, row_factory=_make_rows)
    except psycopg.Error as error:
        raise _connect_error(error, settings) from None
    raw.patience = patience_of(settings)
    return raw


def patience_of(settings: PostgresSettings) -> Patience:
    """The server's own limit of a statement comes first, while it works."""
    return Patience(settings.statement_timeout_s + settings.connect_timeout_s)


def _require_own_session(raw: _RawConnection, conninfo: str, settings: PostgresSettings) -> None:
    """Raises StoreError if a pooler gives the session of an open connection to another one."""
    mine = _session(raw)
    if mine == raw.info.backend_pid:
        return  # The server itself: a pooler has numbers of its own.
    for _ in range(LOOKS_FOR_SHARING):
        other = _open(conninfo, settings)
        try:
            shared = _session(other) == mine
        finally:
            other.close()
        if shared:
            raise StoreError(
                f"{where(settings)}: a connection pooler shares sessions among its clients (pool_mode transaction or "
                "statement); name the server itself in store.url, or a pooler with pool_mode session"
            )


def _session(raw: _RawConnection) -> int:
    row = raw.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    return int(row[0])


def _session_settings(settings: PostgresSettings) -> quoting.Composed:
    """Said after connecting: poolers refuse them as parameters of a connection, or drop them."""
    values: dict[str, str | int] = {
        "client_encoding": "UTF8",
        "statement_timeout": round(1000 * settings.statement_timeout_s),
        # Whoever stalls in a transaction holds up all others.
        "idle_in_transaction_session_timeout": round(1000 * max(5.0, settings.lease_s / 2)),
        "synchronous_commit": "on",
        "lock_timeout": 0,
        # All we ask for is found by an index; without statistics, as on a new database, the planner would not know.
        **dict.fromkeys(("enable_seqscan", "enable_hashjoin", "enable_bitmapscan", "jit"), "off"),
    }
    said = [quoting.SQL("SET search_path = {}").format(quoting.Identifier(settings.schema))]
    said += [
        quoting.SQL("SET {} = {}").format(quoting.Identifier(name), quoting.Literal(value))
        for name, value in values.items()
    ]
    return quoting.SQL("; ").join(said)


def _parameters(settings: PostgresSettings, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "application_name": f"chiron {name}",
        "connect_timeout": max(1, round(settings.connect_timeout_s)),
        "sslmode": settings.tls,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": round(1000 * max(10.0, settings.lease_s)),
    }
    if settings.tls_root_cert:
        found["sslrootcert"] = settings.tls_root_cert
    password = _password(settings)
    if password is not None:
        found["password"] = password
    return found


def _password(settings: PostgresSettings) -> str | None:
    if settings.password_env:
        found = os.environ.get(settings.password_env)
        if found is None:
            raise StoreError(f"store.password_env: the environment has no variable {settings.password_env!r}")
        return found
    if settings.password_file:
        try:
            return Path(settings.password_file).read_text().partition("\n")[0]
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise StoreError(f"store.password_file: {settings.password_file}: {why}") from None
    return None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_HOPELESS: Final = (
    ("password", "store.password_env or store.password_file gives the password"),
    ("authentication", "check the user, the password and the server's pg_hba.conf"),
    ("pg_hba.conf", "the server's pg_hba.conf must let this user in, from here"),
    ("role", "create the role, or name another in store.url"),
    ("does not exist", "create it, or name another in store.url"),
    ("permission denied", "grant it to the user"),
    ("certificate", "check store.tls and store.tls_root_cert"),
    ("SSL", "check store.tls"),
    ("invalid", "check store.url"),
)
"""What a refused connection says that waiting does not mend, and what to do about it."""


def _connect_error(error: psycopg.Error, settings: PostgresSettings) -> StoreError:
    said = _first_line(error)
    transient = ("starting up", "shutting down", "recovery mode", "not yet accepting")
    for words, hint in _HOPELESS:
        if words in said and not any(each in said for each in transient) and "No such file" not in said:
            return StoreError(f"{where(settings)}: {said}; {hint}")
    return StoreUnavailable(f"{where(settings)}: {said}")


def store_error(error: psycopg.Error, settings: PostgresSettings) -> StoreError:
    """What an error of PostgreSQL means to callers."""
    at, said, state = where(settings), _first_line(error), error.sqlstate or ""
    if state in ("53100", "53200", "54000"):
        return StoreFull(f"{at}: no room on the server ({said})")
    if state.startswith(("08", "57P")) or state in ("25006", "53300", "53400") or (not state and _is_lost(error)):
        return StoreUnavailable(f"{at}: {said}")
    if state in ("XX001", "XX002"):
        return StoreDamaged(f"{at}: the server's data is damaged ({said})")
    if state in ("42P01", "42703"):
        return StoreCorrupt(f"{at}: its tables are not those of a store ({said})")
    if state == "57014":
        return StoreUnavailable(f"{at}: a statement took longer than store.statement_timeout")
    return StoreError(f"{at}: {said}")


def _is_lost(error: psycopg.Error) -> bool:
    return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)


def is_lost(raw: psycopg.Connection[Row]) -> bool:
    """Whether the connection is gone, or in a state in which nothing can be done with it."""
    return raw.closed or raw.broken
