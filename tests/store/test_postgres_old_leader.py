"""A leader that does not know that it is over writes nothing any more, and holds up nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, Any
from zlib import crc32

import pytest

from chiron.store.port import StoreError
from store_calls import MODEL, content, indices, result, start
from store_sites import PostgresSite

if TYPE_CHECKING:
    from chiron.store.postgres.store import PostgresStore

Place = Callable[[], PostgresSite]


async def lead(site: PostgresSite, holder: str) -> PostgresStore:
    """Take the lead from whoever has it; the store of this leader, not yet open."""
    from chiron.store.lease import Leads
    from chiron.store.postgres.lease import PostgresLease
    from chiron.store.postgres.store import PostgresStore

    async with AsyncExitStack() as stack:
        lease = PostgresLease(site.settings, name="brain", holder=holder, lease_s=3600.0)
        stack.push_async_callback(lease.close)
        before = await lease.holder()
        if before is not None:
            old = PostgresLease(site.settings, name="brain", holder=before.holder, lease_s=3600.0)
            stack.push_async_callback(old.close)
            await old.release()
        held = await lease.try_take()
        assert held is not None
        leads = Leads(name="brain", holder=holder, token=held.token)
    return PostgresStore(site.directory, wall=lambda: site.now_s, settings=site.settings, leads=leads)


def test_what_it_leased_is_free_at_once_and_what_it_writes_is_refused(postgres_place: Place) -> None:
    site = postgres_place()
    site.settings = replace(site.settings, lease_s=3600.0)

    async def run() -> None:
        old = await lead(site, "a")
        await old.open()
        batch = await start(site, old, 10)
        leased = await old.lease(MODEL, 6)
        await old.finish([result(leased[0])], site.now_s)
        new = await lead(site, "b")
        await new.open()
        for _ in range(3):  # Cut off first, and then refused.
            with pytest.raises(StoreError):
                await old.finish([result(item) for item in leased], site.now_s)
            with pytest.raises(StoreError):
                await old.lease(MODEL, 1)
        assert (await new.get_batch(batch.id, None)).completed == 1
        mine = await new.lease(MODEL, 10)
        assert sorted(indices(mine)) == list(range(1, 10))
        await new.finish([result(item) for item in mine], site.now_s)
        batch = await new.get_batch(batch.id, None)
        assert (batch.status, batch.completed) == ("completed", 10)
        assert (await content(new, batch.output_file_id)).count(b"\n") == 10
        await old.close()
        await new.close()
        with pytest.raises(StoreError, match="another gateway leads"):
            await old.open()

    asyncio.run(run())


def test_a_new_leader_renews_its_lease_while_it_waits_for_its_turn(postgres_place: Place) -> None:
    """As while it frees what the one before had of a batch with millions of lines."""
    site = postgres_place()
    site.settings = replace(site.settings, lease_s=3600.0)

    async def run() -> None:
        from chiron.store.postgres.connection import connect
        from chiron.store.postgres.lease import PostgresLease
        from chiron.store.postgres.writer import TURN_LOCK

        new = await lead(site, "b")
        lease = PostgresLease(site.settings, name="brain", holder="b", lease_s=3600.0)
        other = connect(site.settings, "other")
        turn = TURN_LOCK ^ crc32(site.settings.schema.encode())
        other.execute("BEGIN")
        other.execute("SELECT pg_advisory_xact_lock(?)", (turn,))
        opening = asyncio.create_task(new.open())
        async with asyncio.timeout(60):
            while not other.execute("SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'advisory'").fetchall():
                await asyncio.sleep(0.02)
        assert await lease.renew()
        other.execute("COMMIT")
        await opening
        other.close()
        await lease.close()
        await new.close()

    asyncio.run(run())


def test_one_that_is_stopped_in_the_middle_of_a_commit_holds_up_nobody(postgres_place: Place) -> None:
    site = postgres_place()
    # The server itself would cut it off only after half of this.
    site.settings = replace(site.settings, lease_s=3600.0)

    async def run() -> None:
        old = await lead(site, "a")
        await old.open()
        inside, wakes = Event(), Event()

        def stopped(transaction: Any) -> None:
            inside.set()
            wakes.wait(60)

        writing = asyncio.wrap_future(old._threads.opened.writer.submit(stopped))
        await asyncio.to_thread(inside.wait, 60)
        new = await lead(site, "b")
        async with asyncio.timeout(60):
            await new.open()
        wakes.set()
        with pytest.raises(StoreError):
            await writing
        await old.close()
        await new.close()

    asyncio.run(run())
