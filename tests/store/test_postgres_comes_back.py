"""Connections and servers that are lost: nothing is lost or doubled, and the store says that it is away."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, TypeVar

import pytest

from chiron.store.port import Ended, StoreUnavailable
from cutting_proxy import CuttingProxy, When
from postgres_server import Server, postgres_server, why_not
from store_calls import LIMITS, MODEL, check, content, create, indices, keys, lines_of, result, start, submit, upload
from store_sites import PostgresSite, end_lease, postgres_site

if TYPE_CHECKING:
    from chiron.store.postgres.store import PostgresStore

T = TypeVar("T")
Place = Callable[[], PostgresSite]


@pytest.fixture
def cut_off(postgres_place: Place, postgres: Server) -> Iterator[tuple[PostgresSite, CuttingProxy]]:
    """A place whose connections can be cut."""
    site = postgres_place()
    proxy = CuttingProxy(postgres.port)
    url = site.settings.url.replace(f":{postgres.port}/", f":{proxy.port}/")
    # So long a lease needs no renewal: no COMMIT but those that the test makes.
    site.settings = replace(site.settings, url=url, reconnect_max_s=0.2, lease_s=600.0)
    yield site, proxy
    proxy.close()


async def back(store: PostgresStore) -> None:
    async with asyncio.timeout(60):
        while store.unavailable:
            await asyncio.sleep(0.01)


async def away(store: PostgresStore) -> None:
    async with asyncio.timeout(60):
        while not store.unavailable:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_whose_answer_is_lost_counts_once(when: When, cut_off: tuple[PostgresSite, CuttingProxy]) -> None:
    site, proxy = cut_off

    async def run() -> None:
        async with site.gateway() as store:
            batch = await start(site, store, 10)
            file = await upload(store, lines_of(2))
            proxy.cut(when)
            made = await create(site, store, file)
            assert proxy.was_cut.is_set()
            assert [each.id for each in await store.list_batches(None)] == [made.id, batch.id]
            proxy.cut(when)
            leased = await store.lease(MODEL, 4)
            assert proxy.was_cut.is_set()
            assert indices(leased) == [0, 1, 2, 3]
            proxy.cut(when)
            await store.finish([result(item) for item in leased], site.now_s)
            assert proxy.was_cut.is_set()
            assert (await store.get_batch(batch.id, None)).completed == 4
            assert indices(await store.lease(MODEL, 100)) == [4, 5, 6, 7, 8, 9]
            assert store.unavailable == ""

    asyncio.run(run())


@pytest.mark.parametrize("by", ["this gateway", "another one"])
def test_what_was_leased_just_before_the_server_went_is_leased_again(
    by: str, cut_off: tuple[PostgresSite, CuttingProxy], postgres: Server
) -> None:
    """The lease counts, its bodies cannot be read, and to give it back there is no server. With its next lease it gives
    it back, or at the next round of what has expired, if it leases no more."""
    site, proxy = cut_off
    other_site = replace(site, settings=replace(site.settings, url=postgres.url))

    async def run() -> None:
        async with site.gateway() as store, other_site.gateway("other") as other:
            await start(site, store, 6)
            await store.pending()  # So all that was asked before is committed.
            owed = store._threads.opened.owed
            proxy.cut("answered", down=True)
            with pytest.raises(StoreUnavailable):
                await store.lease(MODEL, 4)
            assert proxy.was_cut.is_set()
            await away(store)
            async with asyncio.timeout(60):
                while not owed:  # Asked for while the server is away, it is not given back.
                    await asyncio.sleep(0.01)
            proxy.mend()
            await back(store)
            if by == "another one":
                assert indices(await other.lease(MODEL, 9)) == [4, 5]
                await store.expire(site.now_s)
                assert indices(await other.lease(MODEL, 9)) == [0, 1, 2, 3]
            else:
                assert indices(await store.lease(MODEL, 9)) == [0, 1, 2, 3, 4, 5]

    asyncio.run(run())


def test_a_commit_of_a_gateway_that_was_given_up_meanwhile_is_not_made_twice(
    cut_off: tuple[PostgresSite, CuttingProxy], postgres: Server
) -> None:
    site, proxy = cut_off
    other_site = replace(site, settings=replace(site.settings, url=postgres.url))

    async def run() -> None:
        async with site.gateway() as store, other_site.gateway("other") as other:
            file = await upload(store, lines_of(2))
            proxy.cut("after", down=True)
            making = asyncio.create_task(create(site, store, file))
            await asyncio.to_thread(proxy.was_cut.wait, 60)
            await end_lease(other, "one")
            await other.expire(site.now_s)
            proxy.mend()
            with pytest.raises(StoreUnavailable, match="not known"):
                await making
            (made,) = await other.list_batches(None)
            await back(store)
            assert await store.list_batches(None) == [made]
            assert (await store.validate(made.id, check, LIMITS)).status == "in_progress", "it goes on as a new holder"

    asyncio.run(run())


def test_a_server_that_hangs_is_given_up(cut_off: tuple[PostgresSite, CuttingProxy]) -> None:
    from psycopg import OperationalError

    from chiron.store.postgres.connection import Patience, connect, is_lost, patience_of, store_error

    site, proxy = cut_off
    long_s = site.settings.statement_timeout_s + site.settings.connect_timeout_s
    asked_s = time.monotonic()
    assert patience_of(site.settings).is_over(asked_s - long_s)
    assert not patience_of(site.settings).is_over(asked_s)
    db = connect(site.settings, "test", Patience(0.2))
    proxy.hold()
    with pytest.raises(OperationalError, match="the server has not answered for") as error:
        db.execute("SELECT 1")
    assert is_lost(db.raw)
    assert isinstance(store_error(error.value, site.settings), StoreUnavailable)


def test_a_store_that_is_to_be_closed_waits_no_longer_than_it_is_told(
    cut_off: tuple[PostgresSite, CuttingProxy],
) -> None:
    site, proxy = cut_off
    patient = replace(site, settings=replace(site.settings, statement_timeout_s=600.0))

    async def run() -> None:
        async with patient.gateway() as store:
            file = await upload(store, lines_of(2))
            proxy.hold()
            making = asyncio.create_task(create(site, store, file))
            reading = asyncio.create_task(store.list_batches(None))
            await asyncio.sleep(0)
            store.hurry(0.2)
            async with asyncio.timeout(60):
                await store.close()
                found = await asyncio.gather(making, reading, return_exceptions=True)
            assert all(isinstance(each, StoreUnavailable) for each in found), found

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize(("when", "down"), [("before", False), ("after", False), ("answered", True)])
def test_a_batch_comes_to_its_end_wherever_connections_are_cut(
    when: When, down: bool, cut_off: tuple[PostgresSite, CuttingProxy]
) -> None:
    site, proxy = cut_off

    async def run() -> None:
        async with site.gateway() as store:

            async def again(call: Callable[[], Awaitable[T]]) -> T:
                async with asyncio.timeout(60):
                    while True:
                        try:
                            return await call()
                        except StoreUnavailable:
                            proxy.mend()
                            await asyncio.sleep(0.01)

            for commits_before in range(12):
                batch = await submit(site, store, lines_of(700))
                proxy.cut(when, of="", commits_before=commits_before, down=down)
                accepted = await again(lambda batch=batch: store.validate(batch.id, check, LIMITS))  # type: ignore[misc]
                assert (accepted.status, accepted.total) == ("in_progress", 700)
                leased = await again(lambda: store.lease(MODEL, 600))
                await again(lambda leased=leased: store.release(keys(leased[:100]), failed_attempt=False))  # type: ignore[misc]
                await again(
                    lambda leased=leased: store.finish([result(item) for item in leased[100:]], site.now_s)  # type: ignore[misc]
                )
                rest = await again(lambda: store.lease(MODEL, 1000))
                await again(lambda rest=rest: store.finish([result(item) for item in rest], site.now_s))  # type: ignore[misc]
                proxy.mend()
                done = await again(lambda batch=batch: store.get_batch(batch.id, None))  # type: ignore[misc]
                assert (done.status, done.completed) == ("completed", 700), commits_before
                assert await again(store.unvalidated) == []
                # How many more commits there are depends on what has to wait for the writer, and is committed together.
                assert proxy.was_cut.is_set() or commits_before >= 6

    asyncio.run(run())


async def end_connections(by: PostgresStore) -> None:
    """All but its own."""
    await by._threads.change(
        lambda db: db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name LIKE 'chiron %' AND pid != pg_backend_pid()"
        ).fetchall()
    )


@pytest.mark.slow
def test_connections_that_the_server_ends_are_made_anew(postgres_place: Place) -> None:
    site = postgres_place()
    site.settings = replace(site.settings, lease_s=600.0)  # So no renewal finds it out in between.

    async def run() -> None:
        async with site.gateway() as store, site.gateway("other") as other:
            batch = await start(site, store, 5)
            await end_connections(other)
            assert await store.get_batch(batch.id, None) == batch, "a reader asks again"
            async with asyncio.timeout(60):
                while True:
                    try:
                        leased = await store.lease(MODEL, 9)
                        break
                    except StoreUnavailable:
                        await asyncio.sleep(0.02)
            assert indices(leased) == [0, 1, 2, 3, 4]
            await store.finish([result(item) for item in leased], site.now_s)
            assert (await store.get_batch(batch.id, None)).status == "completed"

    asyncio.run(run())


def test_a_file_is_read_over_connections_that_the_server_has_ended(postgres_place: Place) -> None:
    """Each reader finds it out by itself, whatever it is asked first."""
    site = postgres_place()
    site.settings = replace(site.settings, lease_s=600.0)

    async def run() -> None:
        async with site.gateway() as store, site.gateway("other") as other:
            batch = await start(site, store, 2)
            await store.finish([result(item) for item in await store.lease(MODEL, 2)], site.now_s)
            done = await store.get_batch(batch.id, None)
            readers = site.settings.connections_max
            await asyncio.gather(*(store.get_batch(batch.id, None) for _ in range(8 * readers)))
            whole = await content(store, done.output_file_id)
            await end_connections(other)
            for _ in range(readers):
                assert await content(store, done.output_file_id) == whole

    asyncio.run(run())


@pytest.mark.slow
def test_a_server_that_is_away_is_told_and_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if why := why_not():
        pytest.skip(why)

    async def run(server: Server) -> None:
        site = postgres_site(server, "chiron", tmp_path, reconnect_max_s=0.5, lease_s=600.0)
        async with site.gateway() as store:
            batch = await start(site, store, 5)
            leased = await store.lease(MODEL, 2)
            await asyncio.to_thread(lambda: server.stop(signal.SIGKILL))
            for _ in range(2):
                with pytest.raises(StoreUnavailable):
                    await store.get_batch(batch.id, None)  # The first one finds it out.
            with pytest.raises(StoreUnavailable):
                await store.begin_file("batch", "x", "", 100)
            async with asyncio.timeout(60):
                while not store.unavailable:
                    await asyncio.sleep(0.02)
            assert "127.0.0.1" in str(store.report()["unavailable"])
            assert server.password not in str(store.report())
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(60):
                while store.unavailable:
                    await asyncio.sleep(0.02)
            assert await store.get_batch(batch.id, None) == batch
            assert indices(await store.lease(MODEL, 9)) == [2, 3, 4], "what it leased it still has"
            await store.finish([result(item) for item in leased], site.now_s)
            assert (await store.get_batch(batch.id, None)).completed == 2
        said = [record.message for record in caplog.records if record.name == "chiron.store"]
        assert any("not served" in line for line in said)
        assert any("served again" in line for line in said)

    with caplog.at_level(logging.INFO, "chiron.store"), postgres_server() as server:
        asyncio.run(run(server))


@pytest.mark.slow
def test_a_server_that_is_killed_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Killed with -9 in the middle of writes and restarted, ten times, with everything on the disk as in production."""
    if why := why_not():
        pytest.skip(why)
    random = Random("postgres:kill")
    total = 1500
    kept: dict[int, bytes] = {}

    async def run(server: Server) -> None:
        site = postgres_site(server, "chiron", tmp_path, reconnect_max_s=0.2, lease_s=600.0)
        async with site.gateway() as store:
            ended = asyncio.Event()

            async def again(call: Callable[[], object]) -> object:
                while True:
                    try:
                        return await call()  # type: ignore[misc]
                    except StoreUnavailable:
                        await asyncio.sleep(0.05)

            batch = await submit(site, store, lines_of(total))
            validation = asyncio.create_task(again(lambda: store.validate(batch.id, check, LIMITS)))  # type: ignore[arg-type]

            async def work() -> None:
                while not ended.is_set():
                    leased = await again(lambda: store.lease(MODEL, random.randrange(1, 20)))
                    for item in leased:  # type: ignore[attr-defined]
                        line = json.dumps({"index": item.index, "token": random.random()}).encode()
                        one = Ended(batch_id=item.batch_id, index=item.index, ok=True, line=line)
                        assert item.index not in kept, "leased again though its result was acknowledged"
                        await again(lambda one=one: store.finish([one], site.now_s))  # type: ignore[misc]
                        kept[item.index] = line
                    if not leased:
                        await asyncio.sleep(0.01)

            workers = [asyncio.create_task(work()) for _ in range(8)]
            for kill in range(10):
                async with asyncio.timeout(120):
                    while len(kept) < kill * 100:
                        await asyncio.sleep(0.01)
                await asyncio.sleep(random.uniform(0.0, 0.2))
                await asyncio.to_thread(lambda: server.stop(signal.SIGKILL))
                await asyncio.to_thread(server.start)
            async with asyncio.timeout(300):
                await validation
                while len(kept) < total:
                    await asyncio.sleep(0.05)
            ended.set()
            await asyncio.gather(*workers)
            done = await store.get_batch(batch.id, None)
            assert (done.status, done.completed, done.failed) == ("completed", total, 0)
            lines = (await content(store, done.output_file_id)).splitlines()
            assert lines == [kept[index] for index in range(total)]

    with postgres_server(settings=()) as server:
        asyncio.run(run(server))
