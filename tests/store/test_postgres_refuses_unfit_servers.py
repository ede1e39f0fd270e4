"""A server that is too old, or poolers before it: they do, or the start ends with one line that says what to do."""

from __future__ import annotations

import asyncio
import pwd
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from chiron.store.port import StoreError, StoreUnavailable
from fault_site import wait_for
from ports import free_port
from posing_proxy import Pose, PosingProxy
from postgres_server import PASSWORD, USER, Server, as_user
from store_calls import MODEL, result, start
from store_sites import PostgresSite

Place = Callable[[], PostgresSite]


async def serves(site: PostgresSite) -> None:
    """A batch, from one connection's work to another's news."""
    async with site.gateway() as store:
        heard = asyncio.Event()
        store.on_news(heard.set)
        batch = await start(site, store, 30)
        while leased := await store.lease(MODEL, 10):
            await store.finish([result(item) for item in leased], site.now_s)
        assert (await store.get_batch(batch.id, None)).completed == 30
        settings = await store._threads.read(
            lambda db: db.execute(
                "SELECT current_setting('statement_timeout') AS statement, current_setting('enable_seqscan') AS scans,"
                " current_setting('idle_in_transaction_session_timeout') AS idle"
            ).fetchone()
        )
        assert [*settings] == ["1min", "off", "15s"]


def behind(site: PostgresSite, server_port: int, port: int) -> PostgresSite:
    url = site.settings.url.replace(f":{server_port}/", f":{port}/")
    assert url != site.settings.url
    site.settings = replace(site.settings, url=url)
    return site


@pytest.mark.parametrize(
    ("pose", "said"),
    [
        (Pose(), ""),
        (Pose(version="12.22 (Debian 12.22-1)"), r"PostgreSQL 12\.22 \(Debian 12\.22-1\) is too old: 13 is needed"),
        (Pose(pools=True), ""),
        (Pose(shares=True), "a connection pooler shares sessions among its clients"),
    ],
    ids=["the server itself", "too old", "a pooler with sessions of its own", "a pooler that shares sessions"],
)
def test_what_a_server_says_it_is(pose: Pose, said: str, postgres_place: Place, postgres: Server) -> None:
    proxy = PosingProxy(postgres.port, pose)
    site = behind(postgres_place(), postgres.port, proxy.port)
    try:
        if not said:
            asyncio.run(serves(site))
            return
        with pytest.raises(StoreError, match=said) as error:
            asyncio.run(serves(site))
        assert not isinstance(error.value, StoreUnavailable), "waiting does not mend it"
    finally:
        proxy.close()


@contextmanager
def pooler(directory: Path, server: Server, mode: str) -> Iterator[int]:
    """PgBouncer as Debian has it, but for ``pool_mode``; its port."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed (Debian: apt-get install pgbouncer)")
    port = free_port()
    users, config = directory / "users", directory / "pgbouncer.ini"
    users.write_text(f'"{USER}" "{PASSWORD}"\n')
    config.write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {users}\npool_mode = {mode}\n"
    )
    own = as_user()
    for path in (directory, users, config):
        if own:
            shutil.chown(path, pwd.getpwuid(own["user"]).pw_uid)  # type: ignore[arg-type]
    process = subprocess.Popen([program, str(config)], stderr=subprocess.DEVNULL, **own)  # type: ignore[call-overload]
    try:
        wait_for(lambda: _listens(port), "PgBouncer listens")
        yield port
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["session", "transaction", "statement"])
def test_pgbouncer_serves_with_sessions_and_is_refused_without(
    mode: str, postgres_place: Place, postgres: Server
) -> None:
    # Not below a directory of pytest's: only who runs the tests may go through it.
    with TemporaryDirectory(prefix="chiron-pgbouncer-") as directory, pooler(Path(directory), postgres, mode) as port:
        site = behind(postgres_place(), postgres.port, port)
        if mode == "session":
            asyncio.run(serves(site))
            return
        with pytest.raises(StoreError, match="pool_mode session"):
            asyncio.run(serves(site))
