"""What any batch store must do with the items of batches: who gets which, and how they end."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from chiron.store.port import Ended, Item, NotFound
from store_calls import (
    ENDPOINT,
    LIMITS,
    MODEL,
    Case,
    Site,
    check,
    content,
    indices,
    keys,
    line_of,
    lines,
    result,
    results,
    start,
    submit,
)


async def earliest_deadline_comes_first(site: Site) -> None:
    async with site.store() as store:
        late = await start(site, store, 3, window_s=900)
        early = await start(site, store, 3, window_s=300)
        same = await start(site, store, 3, window_s=300)
        assert [work.batch_id for work in await store.pending()] == [early.id, same.id, late.id]
        assert await store.lease("another-model", 9) == []
        assert await store.lease(MODEL, 0) == []
        assert keys(await store.lease(MODEL, 4)) == [(early.id, 0), (early.id, 1), (early.id, 2), (same.id, 0)]
        assert keys(await store.lease(MODEL, 4, before_deadline_s=late.expires_s)) == [(same.id, 1), (same.id, 2)]
        assert keys(await store.lease(MODEL, 4)) == [(late.id, 0), (late.id, 1), (late.id, 2)]
        assert await store.lease(MODEL, 4) == []
        assert await store.pending() == []


async def batches_can_be_left_out(site: Site) -> None:
    async with site.store() as store:
        late = await start(site, store, 2, window_s=900)
        early = await start(site, store, 2, window_s=300)
        assert keys(await store.lease(MODEL, 9, besides=[early.id])) == [(late.id, 0), (late.id, 1)]
        assert await store.lease(MODEL, 9, besides=[early.id, late.id]) == []
        assert keys(await store.lease(MODEL, 9, besides=[late.id])) == [(early.id, 0), (early.id, 1)]


async def a_lease_is_bounded_in_bytes(site: Site) -> None:
    size = len(line_of("id-1"))
    async with site.store() as store:
        early = await start(site, store, 4, window_s=300)
        late = await start(site, store, 9)
        leased = await store.lease(MODEL, 9, bytes_max=2 * size + 1)
        assert keys(leased) == [(early.id, index) for index in range(3)]
        assert await store.lease(MODEL, 9, bytes_max=0) == []
        await store.release(keys(leased), False)
        assert indices(await store.lease(MODEL, 9, bytes_max=1)) == [0]
        assert indices(await store.lease(MODEL, 2, bytes_max=9 * size)) == [1, 2]
        assert keys(await store.lease(MODEL, 9, bytes_max=2 * size)) == [(early.id, 3), (late.id, 0)]
        assert indices(await store.lease(MODEL, 9)) == list(range(1, 9))


async def an_item_says_what_to_run(site: Site) -> None:
    async with site.store() as store:
        batch = await start(site, store, 2, owner="me")
        item = (await store.lease(MODEL, 2))[1]
        assert item == Item(
            batch_id=batch.id,
            index=1,
            custom_id="id-1",
            model=MODEL,
            endpoint=ENDPOINT,
            body=line_of("id-1"),
            deadline_s=batch.expires_s,
            attempts=0,
            owner="me",
        )


async def models_of_one_file_are_leased_apart(site: Site) -> None:
    data = b"".join(line_of(f"{index}", "ab"[index % 2]) + b"\n" for index in range(10))
    async with site.store() as store:
        batch = await submit(site, store, data)
        batch = await store.validate(batch.id, check, LIMITS)
        assert batch.model is None
        assert [(work.model, work.items) for work in await store.pending()] == [("a", 5), ("b", 5)]
        leased = await store.lease("b", 9)
        assert indices(leased) == [1, 3, 5, 7, 9]
        await store.finish([result(item) for item in leased], site.now_s)
        assert (await store.get_batch(batch.id, None)).status == "in_progress"
        await store.finish([result(item) for item in await store.lease("a", 9)], site.now_s)
        assert (await store.get_batch(batch.id, None)).status == "completed"


async def the_last_result_completes_a_batch(site: Site) -> None:
    async with site.store() as store:
        batch = await start(site, store, 600)
        leased = await store.lease(MODEL, 600)
        ended = [result(item, ok=item.index % 5 > 0) for item in reversed(leased)]
        site.now_s += 7
        for place in range(0, 600, 100):
            await store.finish(ended[place : place + 100], site.now_s)
            batch = await store.get_batch(batch.id, None)
            assert batch.completed + batch.failed == place + 100
        assert (batch.status, batch.completed, batch.failed) == ("completed", 480, 120)
        assert (batch.completed_s, batch.finalizing_s, batch.recent) == (site.now_s, site.now_s, ())
        output = await lines(store, batch.output_file_id)
        errors = await lines(store, batch.error_file_id)
        assert [line["index"] for line in output] == [index for index in range(600) if index % 5]
        assert [line["index"] for line in errors] == list(range(0, 600, 5))
        for file_id in (batch.output_file_id, batch.error_file_id):
            file = await store.get_file(file_id or "", "")
            assert file.bytes == len(await content(store, file_id))
            assert (file.purpose, file.batch_id) == ("batch_output", batch.id)
    async with site.store() as store:
        assert await store.get_batch(batch.id, None) == batch
        assert await lines(store, batch.output_file_id) == output


async def files_without_lines_are_not_made(site: Site) -> None:
    async with site.store() as store:
        for ok in (True, False):
            batch = await start(site, store, 2)
            await store.finish([result(item, ok) for item in await store.lease(MODEL, 2)], site.now_s)
            batch = await store.get_batch(batch.id, None)
            assert (batch.output_file_id is None, batch.error_file_id is None) == (not ok, ok)


async def a_second_result_is_ignored(site: Site) -> None:
    async with site.store() as store:
        batch = await start(site, store, 3)
        first, second, third = await store.lease(MODEL, 3)
        await store.finish([result(first), result(first, ok=False), result(second)], site.now_s)
        await store.finish([result(first, ok=False, text="late"), result(second, text="late")], site.now_s)
        unknown = Ended(batch_id=batch.id, index=99, ok=True, line=b"{}")
        await store.finish([unknown, replace(unknown, batch_id="batch_none", index=0)], site.now_s)
        batch = await store.get_batch(batch.id, None)
        assert (batch.completed, batch.failed, batch.status) == (2, 0, "in_progress")
        await store.finish([result(third)], site.now_s)
        await store.finish([result(third, ok=False)], site.now_s)
        batch = await store.get_batch(batch.id, None)
        assert (batch.completed, batch.failed, batch.error_file_id) == (3, 0, None)
        assert [line["text"] for line in await lines(store, batch.output_file_id)] == ["", "", ""]


async def released_items_are_leased_again_first(site: Site) -> None:
    async with site.store() as store:
        batch = await start(site, store, 6)
        leased = await store.lease(MODEL, 4)
        await store.release(keys(leased[1:3]), True)
        await store.release([(batch.id, 99), ("batch_none", 0), (batch.id, 5)], True)
        (work,) = await store.pending()
        assert (work.items, work.input_bytes) == (4, 4 * len(line_of("id-1")))
        again = await store.lease(MODEL, 3)
        assert [(item.index, item.attempts) for item in again] == [(1, 1), (2, 1), (4, 0)]
        await store.release(keys(again[:1]), False)
        await store.release(keys(again[:1]), True)  # It is nobody's by now.
        assert [(item.index, item.attempts) for item in await store.lease(MODEL, 3)] == [(1, 1), (5, 0)]
    async with site.store() as store:
        assert [item.attempts for item in await store.lease(MODEL, 9)] == [0, 1, 1, 0, 0, 0]


async def leases_end_with_the_process(site: Site) -> None:
    async with site.store() as store:
        batch = await start(site, store, 1000)
        leased = await store.lease(MODEL, 300)
        await store.finish([result(item) for item in leased if item.index % 3 == 0], site.now_s)
    async with site.store() as store:
        (work,) = await store.pending()
        assert work.items == 900
        again = await store.lease(MODEL, 1000)
        assert indices(again) == [index for index in range(1000) if index >= 300 or index % 3]
        await store.finish([result(item) for item in again], site.now_s)
        assert (await store.get_batch(batch.id, None)).status == "completed"


async def a_lease_that_nobody_waits_for_is_given_back(site: Site) -> None:
    async with site.store() as store:
        await start(site, store, 100)
        for turns in range(6):
            task = asyncio.create_task(store.lease(MODEL, 10))
            for _ in range(turns):
                await asyncio.to_thread(lambda: None)
            task.cancel()
            outcome = (await asyncio.gather(task, return_exceptions=True))[0]
            if not isinstance(outcome, asyncio.CancelledError):
                assert not isinstance(outcome, BaseException)
                await store.release(keys(outcome), False)
        async with asyncio.timeout(60):
            while sum(work.items for work in await store.pending()) < 100:
                pass
        found = indices(await store.lease(MODEL, 200))
        assert found == list(range(100)), found


async def many_callers_at_once_lose_nothing(site: Site) -> None:
    async with site.store() as store:
        batch = await start(site, store, 400)

        async def work() -> list[int]:
            done = []
            while leased := await store.lease(MODEL, 3):
                await asyncio.gather(*(store.finish([result(item)], site.now_s) for item in leased))
                done += indices(leased)
            return done

        done = await asyncio.gather(*(work() for _ in range(20)))
        assert sorted(index for part in done for index in part) == list(range(400))
        batch = await store.get_batch(batch.id, None)
        assert (batch.status, batch.completed) == ("completed", 400)


async def partial_results_can_be_read(site: Site) -> None:
    async with site.store() as store:
        batch = await start(site, store, 10)
        leased = await store.lease(MODEL, 6)
        assert await results(store, batch.id, True) == []
        await store.finish([result(leased[4]), result(leased[2]), result(leased[3], ok=False)], site.now_s)
        assert await results(store, batch.id, True) == [2, 4]
        assert await results(store, batch.id, False) == [3]
        with pytest.raises(NotFound):
            await results(store, "batch_none", True)


CASES: list[Case] = [
    earliest_deadline_comes_first,
    batches_can_be_left_out,
    a_lease_is_bounded_in_bytes,
    an_item_says_what_to_run,
    models_of_one_file_are_leased_apart,
    the_last_result_completes_a_batch,
    files_without_lines_are_not_made,
    a_second_result_is_ignored,
    released_items_are_leased_again_first,
    leases_end_with_the_process,
    a_lease_that_nobody_waits_for_is_given_back,
    many_callers_at_once_lose_nothing,
    partial_results_can_be_read,
]
