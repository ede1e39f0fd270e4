"""A full disk of the server: said in the server's words, and nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chiron.store.port import StoreFull
from postgres_server import PASSWORD, USER, Server, as_user, postgres_server, why_not
from store_calls import MODEL, content, indices, keys, result, start, upload
from store_sites import PostgresSite, postgres_site

DISK_BYTES = 160 << 20


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be made here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(file: Path) -> None:
    place = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(place, bytes(4096))
    except OSError:
        os.close(place)


def use_disk(server: Server, disk: Path) -> None:
    """For tables; the server's log of changes stays where it is."""
    import psycopg

    tables = disk / "tables"
    tables.mkdir()
    if own := as_user():
        os.chown(tables, own["user"], own["group"])  # type: ignore[arg-type]
    with psycopg.connect(server.url, password=PASSWORD, autocommit=True) as db:
        db.execute(f"CREATE TABLESPACE small LOCATION '{tables}'".encode())
        db.execute(f"ALTER ROLE {USER} SET default_tablespace = small".encode())


async def full_and_not(site: PostgresSite, disk: Path) -> None:
    async with site.gateway() as store:
        batch = await start(site, store, 400)
        leased = await store.lease(MODEL, 200)
        await asyncio.to_thread(fill, disk / "junk")

        async def finish_one_by_one() -> None:
            for item in leased:
                await store.finish([result(item, text="y" * 20_000)], site.now_s)

        with pytest.raises(StoreFull, match="no room on the server"):
            await finish_one_by_one()
        with pytest.raises(StoreFull, match="no room on the server"):
            await upload(store, bytes(8 << 20))
        done = (await store.get_batch(batch.id, None)).completed
        assert (done < 200, store.unavailable) == (True, "")
        (disk / "junk").unlink()
        await store.finish([result(item) for item in leased], site.now_s)
        again = await store.lease(MODEL, 400)
        assert indices(again) == list(range(200, 400)), "what was leased still is"
        await store.release(keys(again[:1]), False)
        await store.finish([result(item) for item in again[1:]], site.now_s)
        await store.finish([result(item) for item in await store.lease(MODEL, 9)], site.now_s)
        ended = await store.get_batch(batch.id, None)
        assert (ended.status, ended.completed) == ("completed", 400)
        assert (await content(store, ended.output_file_id)).count(b"\n") == 400


@pytest.mark.slow
def test_a_full_disk_of_the_server_is_said_and_loses_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    if why := why_not():
        pytest.skip(why)
    directory = tmp_path_factory.mktemp("full")
    with postgres_server(settings=()) as server, small_disk(server.directory / "disk") as disk:
        use_disk(server, disk)
        site = postgres_site(server, "full", directory, lease_s=600.0)
        asyncio.run(full_and_not(site, disk))
        server.stop()
    shutil.rmtree(directory)
