"""What cannot work is said in one line that names the setting; what is damaged is never served."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chiron.store.port import StoreCorrupt, StoreDamaged, StoreError, StoreFull, StoreUnavailable
from postgres_server import Server, postgres_server, why_not
from store_calls import LIMITS, MODEL, check, content, lines_of, result, start, submit, upload
from store_sites import PostgresSite, postgres_site

Place = Callable[[], PostgresSite]


def opened(site: PostgresSite) -> None:
    async def run() -> None:
        async with site.gateway():
            pass

    asyncio.run(run())


REFUSED: list[tuple[str, dict[str, Any], type[StoreError], str]] = [
    ("a wrong password", {"password_file": "", "password_env": "CHIRON_TEST_WRONG"}, StoreError, "password_file"),
    ("no such variable", {"password_file": "", "password_env": "CHIRON_TEST_NONE"}, StoreError, "no variable"),
    ("no such file", {"password_file": "/nowhere/password"}, StoreError, "/nowhere/password: No such file"),
    ("no such database", {"url": "postgresql://chiron@127.0.0.1:{port}/none"}, StoreError, "does not exist"),
    ("no TLS", {"tls": "require"}, StoreError, "store.tls"),
    ("nobody there", {"url": "postgresql://chiron@127.0.0.1:1/postgres"}, StoreUnavailable, "refused"),
    ("nonsense", {"url": "postgresql://chiron@127.0.0.1:port/postgres"}, StoreError, "port"),
]


@pytest.mark.parametrize(
    ("settings", "kind", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_a_server_that_cannot_be_used_is_refused(
    settings: dict[str, Any],
    kind: type[StoreError],
    said: str,
    postgres_place: Place,
    postgres: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CHIRON_TEST_WRONG", "not the password")
    site = postgres_place()
    settings = {key: value.format(port=postgres.port) for key, value in settings.items()}
    site.settings = replace(site.settings, **settings)
    with pytest.raises(StoreError, match=said) as error:
        opened(site)
    assert type(error.value) is kind
    assert "not the password" not in str(error.value)
    assert os.environ["CHIRON_TEST_WRONG"]


def change(site: PostgresSite, sql: str) -> None:
    from chiron.store.postgres.connection import connect

    db = connect(site.settings, "test")
    db.raw.execute(sql.encode())
    db.close()


def test_tables_of_a_newer_version_are_refused(postgres_place: Place) -> None:
    from chiron.store.jobs.rows import write_row
    from chiron.store.postgres.connection import connect
    from chiron.store.sums import COLUMNS

    site = postgres_place()
    opened(site)
    db = connect(site.settings, "test")
    write_row(db, "meta", dict(zip(COLUMNS["meta"], (1, 99, 0, None, None, 0.0), strict=True)))
    db.close()
    with pytest.raises(StoreError, match="schema 99, this version of Chiron reads up to 1"):
        opened(site)


@pytest.mark.slow
def test_tables_of_something_else_are_refused(postgres_place: Place) -> None:
    site = postgres_place()
    opened(site)
    change(site, "DROP TABLE holders")
    with pytest.raises(StoreCorrupt, match="not those of a store"):
        opened(site)


@pytest.mark.slow
def test_many_that_start_at_once_make_the_tables_once(postgres_place: Place) -> None:
    site = postgres_place()

    async def run() -> None:
        stores = [site.make(f"{number}") for number in range(4)]
        await asyncio.gather(*(store.open() for store in stores))
        await upload(stores[0], b"x")
        assert len(await stores[3].list_files(None)) == 1
        for store in stores:
            await store.close()

    asyncio.run(run())


DAMAGED = [
    ("UPDATE files SET filename = 'other' WHERE batch_id IS NULL", "row in the database is damaged"),
    ("UPDATE blocks SET data = set_byte(data, 5, 0)", "no longer what was uploaded"),
    ("UPDATE blocks SET data = substring(data FROM 1 FOR 100)", "ends after 100 of"),
    ("DELETE FROM blocks", "content is gone"),
    ("UPDATE results SET line = 'x' WHERE key % 4 = 2", "line 3, of request 3 of the input, is damaged"),
    ("DELETE FROM results WHERE key % 4 = 2", "where 4 with"),
    ("UPDATE batches SET completed = 3", "row in the database is damaged"),
    ("UPDATE learned SET data = 'x'", "learned as 'control' is damaged"),
]


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        case if "set_byte" in case[0] or "line" in case[0] else pytest.param(*case, marks=pytest.mark.slow)
        for case in DAMAGED
    ],
)
def test_what_was_changed_behind_our_back_is_not_served(sql: str, said: str, postgres_place: Place) -> None:
    site = postgres_place()

    async def run() -> None:
        async with site.gateway() as store:
            batch = await start(site, store, 4)
            await store.finish([result(item) for item in await store.lease(MODEL, 4)], site.now_s)
            await store.save_learned("control", b"step times")
            batch = await store.get_batch(batch.id, None)
        change(site, sql)
        async with site.gateway() as store:

            async def read_all() -> None:
                await content(store, batch.input_file_id)
                await content(store, batch.output_file_id)
                await store.get_batch(batch.id, None)
                await store.load_learned("control")

            with pytest.raises(StoreDamaged, match=said):
                await read_all()
            assert store.report()["damage"]

    asyncio.run(run())


def test_an_item_whose_input_is_damaged_ends_with_that_reason(postgres_place: Place) -> None:
    site = postgres_place()

    async def run() -> None:
        async with site.gateway() as store:
            await start(site, store, 3)
            size = len(lines_of(1))
            change(site, f"UPDATE blocks SET data = set_byte(data, {size + 5}, 0)")
            damage = [bool(item.damage) for item in await store.lease(MODEL, 3)]
            assert damage == [False, True, False]
            change(site, "DELETE FROM blocks")
            lost = await submit(site, store, lines_of(2))
            await store.validate(lost.id, check, LIMITS)
            change(site, f"DELETE FROM blocks WHERE id = '{lost.input_file_id}'")
            assert await store.lease(MODEL, 3) == []
            assert (await store.get_batch(lost.id, None)).errors[0].code == "input_file_missing"

    asyncio.run(run())


def test_a_database_without_room_and_a_file_that_is_too_large_are_refused(postgres_place: Place) -> None:
    import psycopg

    from chiron.store.port import TooLarge
    from chiron.store.postgres.connection import store_error

    site = postgres_place()
    site.settings = replace(site.settings, file_bytes_max=1 << 20, database_bytes_max=1 << 40)

    async def run() -> None:
        async with site.gateway() as store:
            incoming = await store.begin_file("batch", "x", "", 1 << 30)
            with pytest.raises(TooLarge, match=r"store\.file_bytes_max"):
                await incoming.write(bytes((1 << 20) + 1))
            await incoming.abort()
        site.settings = replace(site.settings, database_bytes_max=1 << 20)
        async with site.gateway() as store:
            with pytest.raises(StoreFull, match=r"store\.database_bytes_max is 1 MiB"):
                await store.begin_file("batch", "x", "", 1 << 30)

    asyncio.run(run())
    assert isinstance(store_error(psycopg.errors.DiskFull("could not extend file"), site.settings), StoreFull)
    assert isinstance(store_error(psycopg.errors.AdminShutdown("bye"), site.settings), StoreUnavailable)
    assert isinstance(store_error(psycopg.errors.DataCorrupted("page"), site.settings), StoreDamaged)


@pytest.mark.slow
def test_a_server_with_tls_is_checked(tmp_path: Path) -> None:
    from chiron.store.postgres.look import look

    if why := why_not():
        pytest.skip(why)
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=db -keyout {key} -out {certificate}"
    words = [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(words, check=True, capture_output=True)
    with postgres_server() as server:
        server.stop()
        server.use_tls(certificate, key)
        server.start()
        sound = postgres_site(server, "tls", tmp_path, tls="verify-full", tls_root_cert=str(certificate))
        opened(sound)
        assert look(sound.settings).encrypted
        assert look(replace(sound.settings, tls="require", tls_root_cert="")).encrypted
        assert not look(replace(sound.settings, tls="disable", tls_root_cert="")).encrypted
        assert look(sound.settings).schema == 1
        other = tmp_path / "other.pem"
        words[words.index(str(certificate))] = str(other)
        subprocess.run(words, check=True, capture_output=True)
        with pytest.raises(StoreError, match=r"certificate verify failed.*store\.tls"):
            opened(postgres_site(server, "tls", tmp_path, tls="verify-full", tls_root_cert=str(other)))
        named = sound.settings.url.replace("127.0.0.1", "localhost")
        with pytest.raises(StoreError, match="localhost"):
            opened(postgres_site(server, "tls", tmp_path, url=named, tls="verify-full", tls_root_cert=str(certificate)))
