"""Several gateways on one PostgreSQL: no item is leased twice, and what one leaves behind another runs."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

pytest.importorskip("psycopg")

from chiron.store.port import Conflict, ItemSpec, LineError, StoreError
from chiron.store.postgres.names import NAME
from chiron.store.postgres.store import PostgresStore
from store_calls import LIMITS, MODEL, check, content, indices, keys, lines_of, result, start, submit
from store_sites import PostgresSite, end_lease

Place = Callable[[], PostgresSite]


def test_two_gateways_lease_from_one_job_without_doubling_an_item(postgres_place: Place) -> None:
    site = postgres_place()

    async def run() -> None:
        async with site.gateway("a") as a, site.gateway("b") as b:
            batch = await start(site, a, 300)

            async def work(store: object) -> list[int]:
                done: list[int] = []
                while leased := await store.lease(MODEL, 17):  # type: ignore[attr-defined]
                    await store.finish([result(item) for item in leased], site.now_s)  # type: ignore[attr-defined]
                    done += indices(leased)
                return done

            done = await asyncio.gather(work(a), work(b), work(a), work(b))
            while rest := await a.lease(MODEL, 300):  # Skipped, because the other was leasing them just then.
                await a.finish([result(item) for item in rest], site.now_s)
                done.append(indices(rest))
            assert sorted(index for part in done for index in part) == list(range(300))
            batch = await b.get_batch(batch.id, None)
            assert (batch.status, batch.completed) == ("completed", 300)
            assert (await content(b, batch.output_file_id)).count(b"\n") == 300

    asyncio.run(run())


def test_what_a_dead_gateway_leased_is_leased_by_the_other(postgres_place: Place) -> None:
    site = postgres_place()
    site.settings = replace(site.settings, lease_s=3600.0)

    async def run() -> None:
        dead = site.make("dead")
        await dead.open()
        batch = await start(site, dead, 10)
        leased = await dead.lease(MODEL, 6)
        upload = await dead.begin_file("batch", "half", "", 1 << 30)
        await upload.write(bytes(2 << 20))
        await dead.finish([result(leased[0])], site.now_s)
        async with site.gateway("lives") as lives:
            assert indices(await lives.lease(MODEL, 10)) == [6, 7, 8, 9]
            await lives.expire(site.now_s)
            assert await lives.lease(MODEL, 10) == [], "it is alive"
            await end_lease(lives, "dead")
            await lives.expire(site.now_s)
            again = await lives.lease(MODEL, 10)
            assert indices(again) == [1, 2, 3, 4, 5]
            assert [item.attempts for item in again] == [0] * 5
            await lives.finish([result(item, text="lives") for item in again], site.now_s)
            for _ in range(3):
                await lives.expire(site.now_s)  # Chores are run beside it.
            left = await lives._threads.read(lambda db: db.execute("SELECT count(*) AS n FROM blocks").fetchone()["n"])
            assert left == 1, "what the dead gateway uploaded by half is gone; the batch's input is there"
            # It was only slow: its results come too late, and count for nothing.
            await dead.finish([result(item, text="dead") for item in leased], site.now_s)
            await dead.release(keys(leased), True)
            (work,) = [work.items for work in await lives.pending()] or [0]
            assert work == 0
            batch_now = await lives.get_batch(batch.id, None)
            assert (batch_now.completed, batch_now.failed) == (6, 0)
            with pytest.raises(StoreError, match="send it again"):
                await upload.write(bytes(2 << 20))
        await dead.close()

    asyncio.run(run())


@pytest.mark.slow
def test_a_gateway_that_starts_again_knows_that_its_last_process_is_over(postgres_place: Place) -> None:
    site = postgres_place()
    site.settings = replace(site.settings, lease_s=3600.0)

    async def run() -> None:
        killed = site.make("a")
        await killed.open()
        await start(site, killed, 5)
        assert len(await killed.lease(MODEL, 5)) == 5
        async with site.gateway("b") as other, site.gateway("a") as again:
            assert len(await other.lease(MODEL, 3)) + len(await again.lease(MODEL, 3)) == 5
        await killed.close()

    asyncio.run(run())


def test_two_gateways_of_one_name_both_go_on(
    postgres_place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a data directory was copied. The second one takes the first one for its own last process."""
    site = postgres_place()
    site.settings = replace(site.settings, lease_s=3600.0)
    directories = [tmp_path / "first", tmp_path / "copy"]

    def name_of(directory: Path) -> str:
        return (directory / NAME).read_text()

    async def run() -> None:
        first, second = (PostgresStore(each, wall=lambda: site.now_s, settings=site.settings) for each in directories)
        await first.open()
        shutil.copytree(directories[0], directories[1])
        batch = await start(site, first, 10)
        lost = await first.lease(MODEL, 4)
        await second.open()
        kept = await second.lease(MODEL, 6)
        assert indices(kept) == [0, 1, 2, 3, 4, 5]
        await first.finish([result(item, text="first") for item in lost], site.now_s)
        rest = await first.lease(MODEL, 10)
        assert indices(rest) == [6, 7, 8, 9], "nobody takes what the other has"
        await second.finish([result(item) for item in kept], site.now_s)
        await first.finish([result(item) for item in rest], site.now_s)
        assert (await first.get_batch(batch.id, None)).status == "completed"
        assert (await content(first, (await first.get_batch(batch.id, None)).output_file_id)).count(b"\n") == 10
        await first.close()
        await second.close()

    with caplog.at_level(logging.ERROR, "chiron.store"):
        asyncio.run(run())
    (said,) = [record.message for record in caplog.records]
    old, new = name_of(directories[1]).strip(), name_of(directories[0]).strip()
    assert old != new
    assert said == f"another gateway runs as {old}: was its directory copied? This one goes on as {new}"


def test_a_dead_gateway_is_not_alive_for_a_day_because_the_servers_clock_was_set_back(postgres_place: Place) -> None:
    site = postgres_place()
    site.settings = replace(site.settings, lease_s=3600.0)

    async def run() -> None:
        dead = site.make("dead")
        await dead.open()
        await start(site, dead, 3)
        await dead.lease(MODEL, 3)
        async with site.gateway("lives") as lives:
            await lives.expire(site.now_s)
            assert await lives.lease(MODEL, 3) == [], "it is alive"
            await end_lease(lives, "dead", "1 day")
            await end_lease(lives, "lives", "1 day")
            await lives.expire(site.now_s)
            assert indices(await lives.lease(MODEL, 3)) == [0, 1, 2]
        await dead.close()

    asyncio.run(run())


@pytest.mark.slow
def test_others_hear_of_new_work_at_once(postgres_place: Place) -> None:
    site = postgres_place()

    async def run() -> None:
        async with site.gateway("a") as a, site.gateway("b") as b:
            heard = asyncio.Event()
            b.on_news(heard.set)
            async with asyncio.timeout(60):
                while not heard.is_set():  # Again where it did not listen yet.
                    batch = await submit(site, a, lines_of(3))
                    await a.validate(batch.id, check, LIMITS)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(heard.wait(), 0.5)

    asyncio.run(run())


@pytest.mark.slow
def test_what_a_dead_gateway_was_validating_is_validated_by_the_other(postgres_place: Place) -> None:
    site = postgres_place()
    site.settings = replace(site.settings, lease_s=3600.0)
    reached, go_on = Event(), Event()

    def stuck(line: bytes) -> ItemSpec | LineError:
        reached.set()
        assert go_on.wait(60)
        return check(line)

    async def run() -> None:
        async with site.gateway("dies") as dies, site.gateway("lives") as lives:
            batch = await submit(site, dies, lines_of(700))
            assert await lives.unvalidated() == [batch]
            task = asyncio.create_task(dies.validate(batch.id, stuck, LIMITS))
            await asyncio.to_thread(lambda: reached.wait(60))
            assert await lives.unvalidated() == []
            with pytest.raises(Conflict, match="by another gateway"):
                await lives.validate(batch.id, check, LIMITS)
            await end_lease(lives, "dies")
            await lives.expire(site.now_s)
            assert await lives.unvalidated() == [batch]
            done = await lives.validate(batch.id, check, LIMITS)
            assert (done.status, done.total) == ("in_progress", 700)
            leased = await lives.lease(MODEL, 5)
            await lives.finish([result(item) for item in leased], site.now_s)
            go_on.set()
            late = await task
            assert (late.status, late.completed) == ("in_progress", 5), "what came too late changes nothing"

    asyncio.run(run())
