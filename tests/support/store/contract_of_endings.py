"""What any batch store must do at the end: of batches, of files, of what was learned, and of itself."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from random import Random

import pytest

from chiron.store.learned import LEARNED_BYTES_MAX
from chiron.store.port import Conflict, Item, NotFound, StoreClosed, Swept, TokenUsage
from store_calls import (
    ENDPOINT,
    LIMITS,
    MODEL,
    Case,
    Site,
    check,
    content,
    create,
    indices,
    keys,
    lines,
    lines_of,
    result,
    results,
    start,
    submit,
    upload,
)


async def what_never_ran_expires_with_a_line(site: Site) -> None:
    async with site.store() as store:
        batch = await start(site, store, 20, window_s=60)
        other = await start(site, store, 1, window_s=61)
        leased = await store.lease(MODEL, 6)
        await store.finish([result(leased[0]), result(leased[1], ok=False)], site.now_s)
        assert await store.expire(batch.expires_s - 1) == []
        assert await store.expire(batch.expires_s) == [batch.id]
        assert await store.expire(batch.expires_s) == []
        batch = await store.get_batch(batch.id, None)
        assert (batch.status, batch.finalizing_s) == ("finalizing", batch.expires_s)
        assert [work.batch_id for work in await store.pending()] == [other.id]
        assert keys(await store.lease(MODEL, 20)) == [(other.id, 0)]
        await store.finish([result(leased[2])], batch.expires_s)
        await store.release(keys(leased[3:5]), True)
        assert (await store.get_batch(batch.id, None)).status == "finalizing"
        await store.finish([result(leased[5])], batch.expires_s + 2)
        batch = await store.get_batch(batch.id, None)
        assert (batch.status, batch.expired_s) == ("expired", batch.expires_s + 2)
        assert (batch.completed, batch.failed, batch.total) == (3, 17, 20)
        await store.finish([result(leased[3])], batch.expires_s + 3)
        assert await store.get_batch(batch.id, None) == batch
        assert [line["index"] for line in await lines(store, batch.output_file_id)] == [0, 2, 5]
        errors = await lines(store, batch.error_file_id)
        assert errors[0]["index"] == 1
        expired = [index for index in range(20) if index not in (0, 1, 2, 5)]
        assert [line["custom_id"] for line in errors[1:]] == [f"id-{index}" for index in expired]
        assert {line["error"]["code"] for line in errors[1:]} == {"batch_expired"}
        assert len({line["id"] for line in errors[1:]}) == 16
        file = await store.get_file(batch.error_file_id or "", None)
        assert file.bytes == len(await content(store, batch.error_file_id))


async def a_batch_whose_last_lease_is_released_ends_at_the_next_look(site: Site) -> None:
    async with site.store() as store:
        batches = [await start(site, store, 2, window_s=60) for _ in range(2)]
        leased = await store.lease(MODEL, 4)
        assert (await store.cancel_batch(batches[0].id, site.now_s)).status == "cancelling"
        assert await store.expire(site.now_s + 60) == [batches[1].id]
        await store.release(keys(leased), False)
        assert await store.expire(site.now_s + 61) == []
        statuses = [(await store.get_batch(batch.id, None)).status for batch in batches]
        assert statuses == ["cancelled", "expired"]


async def a_batch_that_all_ends_after_the_deadline_is_complete(site: Site) -> None:
    async with site.store() as store:
        batch = await start(site, store, 2, window_s=60)
        leased = await store.lease(MODEL, 2)
        await store.expire(site.now_s + 60)
        await store.finish([result(item) for item in leased], site.now_s + 61)
        batch = await store.get_batch(batch.id, None)
        assert (batch.status, batch.error_file_id) == ("completed", None)


async def a_process_that_dies_while_a_batch_winds_down_is_no_reason_to_wait(site: Site) -> None:
    async with site.store() as store:
        batches = [await start(site, store, 2, window_s=60) for _ in range(2)]
        await store.lease(MODEL, 4)
        await store.cancel_batch(batches[0].id, site.now_s)
        await store.expire(site.now_s + 60)
    async with site.store() as store:
        await store.expire(site.now_s + 90)
        statuses = [(await store.get_batch(batch.id, None)).status for batch in batches]
        assert statuses == ["cancelled", "expired"]


async def a_cancelled_batch_keeps_what_is_done(site: Site) -> None:
    async with site.store() as store:
        batch = await start(site, store, 5)
        first, second = await store.lease(MODEL, 2)
        await store.finish([result(first)], site.now_s)
        batch = await store.cancel_batch(batch.id, site.now_s + 1)
        assert (batch.status, batch.cancelling_s, batch.cancelled_s) == ("cancelling", site.now_s + 1, None)
        assert await store.cancel_batch(batch.id, site.now_s + 2) == batch
        assert await store.lease(MODEL, 5) == []
        await store.finish([result(second)], site.now_s + 3)
        batch = await store.get_batch(batch.id, None)
        assert (batch.status, batch.cancelled_s) == ("cancelled", site.now_s + 3)
        assert await store.cancel_batch(batch.id, site.now_s + 4) == batch
        assert len(await lines(store, batch.output_file_id)) == 2
        errors = await lines(store, batch.error_file_id)
        assert [line["error"]["code"] for line in errors] == ["batch_cancelled"] * 3
        idle = await start(site, store, 2)
        assert (await store.cancel_batch(idle.id, site.now_s)).status == "cancelled"
        done = await start(site, store, 1)
        await store.finish([result(item) for item in await store.lease(MODEL, 1)], site.now_s)
        with pytest.raises(Conflict, match="completed"):
            await store.cancel_batch(done.id, site.now_s)
        with pytest.raises(NotFound):
            await store.cancel_batch("batch_none", site.now_s)


async def deleted_results_are_never_cut_short_silently(site: Site) -> None:
    async with site.store() as store:
        batch = await start(site, store, 9000)
        while leased := await store.lease(MODEL, 1000):
            ended = [result(item, ok=item.index % 2 == 0, text="x" * 200) for item in leased]
            await store.finish(ended, site.now_s)
        batch = await store.get_batch(batch.id, None)
        assert batch.output_file_id is not None
        reader = aiter(store.read_file(batch.output_file_id, None))
        await anext(reader)
        await store.delete_file(batch.output_file_id, None)
        with pytest.raises(NotFound):
            async for _ in reader:
                pass
        with pytest.raises(NotFound):
            await results(store, batch.id, True)
        for _ in range(20):  # What goes in small steps has gone after these.
            await store.expire(site.now_s)
        assert [line["index"] for line in await lines(store, batch.error_file_id)] == list(range(1, 9000, 2))
        assert (await store.get_batch(batch.id, None)).completed == 4500


async def what_is_old_is_swept(site: Site) -> None:
    async with site.store() as store:
        old = await start(site, store, 10)
        await store.finish([result(item) for item in await store.lease(MODEL, 10)], site.now_s)
        old = await store.get_batch(old.id, None)
        running = await start(site, store, 10, window_s=1e9)
        failed = await submit(site, store, b"oops")
        await store.validate(failed.id, check, LIMITS)
        unused = await upload(store, b"unused")
        assert await store.sweep(site.now_s + site.retention_s - 1) == Swept(batches=0, files=0)
        site.now_s += site.retention_s
        fresh = await upload(store, b"fresh")
        assert await store.sweep(site.now_s) == Swept(batches=2, files=3)
        assert await store.sweep(site.now_s) == Swept(batches=0, files=0)
        assert await store.list_batches(None) == [running]
        assert {file.id for file in await store.list_files(None)} == {running.input_file_id, fresh.id}
        for file_id in (old.output_file_id, old.input_file_id, unused.id):
            with pytest.raises(NotFound):
                await content(store, file_id)
        assert len(await store.lease(MODEL, 20)) == 10


async def an_upload_goes_when_its_time_is_over(site: Site) -> None:
    async with site.store() as store:
        kept = await upload(store, b"kept")
        file = await upload(store, b"short", expires_after_s=3600.0)
        assert (kept.expires_s, file.expires_s) == (None, site.now_s + 3600)
        await store.expire(site.now_s + 3599)
        assert await store.get_file(file.id, None) == file
    site.now_s += 3600
    async with site.store() as store:
        await store.expire(site.now_s)
        with pytest.raises(NotFound):
            await content(store, file.id)
        assert await store.list_files(None) == [kept]
        assert await content(store, kept.id) == b"kept"


async def nothing_promises_to_stay_longer_than_the_retention(site: Site) -> None:
    async with site.store() as store:
        file = await upload(store, b"x", expires_after_s=site.retention_s + 1)
        assert file.expires_s == site.now_s + site.retention_s


async def an_input_outlives_its_time_while_its_batch_runs(site: Site) -> None:
    async with site.store() as store:
        file = await upload(store, lines_of(2), expires_after_s=3600.0)
        batch = await create(site, store, file, window_s=1e6)
        await store.expire(site.now_s + 7200)  # It is validated yet.
        await store.validate(batch.id, check, LIMITS)
        items = await store.lease(MODEL, 1)
        await store.finish([result(items[0])], site.now_s)
        await store.expire(site.now_s + 7200)
        assert await content(store, file.id) == lines_of(2)
        items = await store.lease(MODEL, 1)
        assert indices(items) == [1]
        await store.finish([result(items[0])], site.now_s + 7200)
        assert (await store.get_batch(batch.id, None)).status == "completed"
        await store.expire(site.now_s + 7200)
        with pytest.raises(NotFound):
            await store.get_file(file.id, None)


async def tokens_are_added_up_once_for_each_item(site: Site) -> None:
    usage = TokenUsage(10, 4, 3, 1)
    async with site.store() as store:
        batch = await start(site, store, 3)
        items = await store.lease(MODEL, 3)
        for item in items:
            ended = replace(result(item, ok=item.index > 0), usage=usage)
            await store.finish([ended, ended], site.now_s)
            await store.finish([ended], site.now_s)
            assert (await store.get_batch(batch.id, None)).usage == tuple((item.index + 1) * n for n in usage)
    async with site.store() as store:
        found = await store.get_batch(batch.id, None)
        assert (found.status, found.usage) == ("completed", TokenUsage(30, 12, 9, 3))


async def results_go_when_their_time_is_over(site: Site) -> None:
    async with site.store() as store:
        file = await upload(store, lines_of(4))
        batch = await create(site, store, file, output_expires_after_s=3600.0)
        await store.validate(batch.id, check, LIMITS)
        ended_s = site.now_s + 600
        await store.finish([result(item, ok=item.index > 0) for item in await store.lease(MODEL, 4)], ended_s)
        batch = await store.get_batch(batch.id, None)
        for file_id in (batch.output_file_id, batch.error_file_id):
            assert (await store.get_file(file_id or "", None)).expires_s == ended_s + 3600
        await store.expire(ended_s + 3599)
        assert len(await lines(store, batch.output_file_id)) == 3
        await store.expire(ended_s + 3600)
        for file_id in (batch.output_file_id, batch.error_file_id):
            with pytest.raises(NotFound):
                await content(store, file_id)
        assert await store.list_files(None) == [file]
        assert (await store.get_batch(batch.id, None)).completed == 3


async def results_cannot_be_input(site: Site) -> None:
    async with site.store() as store:
        await start(site, store, 1)
        await store.finish([result(item) for item in await store.lease(MODEL, 1)], site.now_s)
        (batch,) = await store.list_batches(None)
        with pytest.raises(Conflict, match="output"):
            await store.create_batch(
                owner="",
                input_file_id=batch.output_file_id or "",
                endpoint=ENDPOINT,
                completion_window="1h",
                deadline_s=site.now_s + 1,
                metadata={},
                now_s=site.now_s,
            )


async def what_was_learned_is_kept(site: Site) -> None:
    async with site.store() as store:
        assert await store.load_learned("control") is None
        await store.save_learned("control", b"first")
        await store.save_learned("control", Random(3).randbytes(300_000))
        await store.save_learned("other", b"")
        with pytest.raises(ValueError, match="name"):
            await store.save_learned("../control", b"")
        with pytest.raises(ValueError, match="at most"):
            await store.save_learned("control", bytes(LEARNED_BYTES_MAX + 1))
        await asyncio.gather(*(store.save_learned("race", b"%d" % number * 1000) for number in range(8)))
    async with site.store() as store:
        assert await store.load_learned("control") == Random(3).randbytes(300_000)
        assert await store.load_learned("other") == b""
        assert await store.load_learned("race") in [b"%d" % number * 1000 for number in range(8)]


async def a_closed_store_says_so(site: Site) -> None:
    async with site.store() as store:
        pass
    await store.close()
    for call in (store.pending(), store.get_batch("b", None), store.lease(MODEL, 1), store.finish([], 0.0)):
        with pytest.raises(StoreClosed):
            await call


async def any_history_leaves_one_line_per_item(site: Site) -> None:
    """Random leases, results, repeated results, releases and restarts: sums stay exact, nothing is lost or doubled."""
    random = Random("store:history")
    total, open_items = 0, {}
    batches = []
    leased: list[Item] = []
    kept: dict[tuple[str, int], bytes] = {}
    for _ in range(6):
        async with site.store() as store:
            leased = []
            size = random.randrange(1, 120)
            batch = await start(site, store, size, window_s=random.choice([100.0, 200.0, 300.0]))
            batches.append(batch)
            total += size
            open_items.update({(batch.id, index): True for index in range(size)})
            for _ in range(60):
                act = random.random()
                if act < 0.35:
                    new = await store.lease(MODEL, random.randrange(1, 20))
                    assert not set(keys(new)) & set(keys(leased)), "leased twice"
                    assert all(key in open_items for key in keys(new)), "leased though it has ended"
                    leased += new
                elif act < 0.75 and leased:
                    random.shuffle(leased)
                    some = [leased.pop() for _ in range(random.randrange(1, len(leased) + 1))]
                    ended = [result(item, random.random() < 0.8, str(random.random())) for item in some]
                    for one in ended:
                        kept[one.batch_id, one.index] = one.line
                        del open_items[one.batch_id, one.index]
                    await store.finish([*ended, *(result(item, text="again") for item in some[:3])], site.now_s)
                elif leased:
                    random.shuffle(leased)
                    some = [leased.pop() for _ in range(random.randrange(1, len(leased) + 1))]
                    await store.release(keys(some), random.random() < 0.5)
                pending = sum(work.items for work in await store.pending())
                assert pending == len(open_items) - len(leased)
    async with site.store() as store:
        while rest := await store.lease(MODEL, 50):
            for item in rest:
                one = result(item)
                kept[one.batch_id, one.index] = one.line
            await store.finish([result(item) for item in rest], site.now_s)
        found: dict[tuple[str, int], bytes] = {}
        for batch in batches:
            ended_batch = await store.get_batch(batch.id, None)
            assert ended_batch.status == "completed"
            for file_id in (ended_batch.output_file_id, ended_batch.error_file_id):
                for line in (await content(store, file_id)).splitlines() if file_id else ():
                    key = (batch.id, json.loads(line)["index"])
                    assert key not in found
                    found[key] = line
        assert found == kept
        assert len(found) == total


CASES: list[Case] = [
    tokens_are_added_up_once_for_each_item,
    what_never_ran_expires_with_a_line,
    a_batch_whose_last_lease_is_released_ends_at_the_next_look,
    a_batch_that_all_ends_after_the_deadline_is_complete,
    a_process_that_dies_while_a_batch_winds_down_is_no_reason_to_wait,
    a_cancelled_batch_keeps_what_is_done,
    deleted_results_are_never_cut_short_silently,
    what_is_old_is_swept,
    an_upload_goes_when_its_time_is_over,
    nothing_promises_to_stay_longer_than_the_retention,
    an_input_outlives_its_time_while_its_batch_runs,
    results_go_when_their_time_is_over,
    results_cannot_be_input,
    what_was_learned_is_kept,
    a_closed_store_says_so,
    any_history_leaves_one_line_per_item,
]
