"""What any batch store must do with files."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from chiron.store.port import Conflict, NotFound, StoreClosed, StoredFile, TooLarge
from store_calls import (
    ENDPOINT,
    LIMITS,
    MODEL,
    Case,
    Site,
    check,
    content,
    line_of,
    lines,
    lines_of,
    result,
    start,
    submit,
    upload,
)


async def a_file_comes_back_byte_for_byte(site: Site) -> None:
    data = Random(1).randbytes(3_000_000)
    async with site.store() as store:
        file = await upload(store, data, "team-a", "data.bin")
        assert (file.bytes, file.filename, file.owner, file.created_s) == (3_000_000, "data.bin", "team-a", site.now_s)
        assert file.id.startswith("file-")
        assert await content(store, file.id) == data
    async with site.store() as store:
        assert await store.get_file(file.id, "team-a") == file
        assert await content(store, file.id) == data


async def an_empty_file_is_a_file(site: Site) -> None:
    async with site.store() as store:
        file = await upload(store, b"")
        assert file.bytes == 0
        assert await content(store, file.id) == b""


async def a_file_exists_only_once_it_is_committed(site: Site) -> None:
    async with site.store() as store:
        incoming = await store.begin_file("batch", "x", "", 10)
        await incoming.write(b"12345")
        assert await store.list_files(None) == []
        with pytest.raises(TooLarge, match="10 bytes"):
            await incoming.write(b"678901")
        with pytest.raises(StoreClosed, match="failed"):
            await incoming.commit()
        await incoming.abort()
        await incoming.abort()
        with pytest.raises(StoreClosed):
            await incoming.write(b"1")
        with pytest.raises(StoreClosed):
            await incoming.commit()
        forgotten = await store.begin_file("batch", "y", "", 1 << 30)
        await forgotten.write(bytes(2 << 20))
    async with site.store() as store:
        assert await store.list_files(None) == []


async def an_upload_that_ends_with_the_store_is_whole_or_not_there(site: Site) -> None:
    for turns in range(24):
        async with site.store() as store:
            incoming = await store.begin_file("batch", "x", "", 1 << 30)
            await incoming.write(b"x" * 3000)
            commit = asyncio.create_task(incoming.commit())
            for _ in range(turns % 6):
                await asyncio.to_thread(lambda: None)
        (outcome,) = await asyncio.gather(commit, return_exceptions=True)
        assert isinstance(outcome, StoredFile | StoreClosed)
        async with site.store() as store:
            files = await store.list_files(None)
            if isinstance(outcome, StoredFile):
                assert files == [outcome]
            for file in files:
                assert len(await content(store, file.id)) == 3000
                await store.delete_file(file.id, None)


async def a_key_sees_its_own_files_only(site: Site) -> None:
    async with site.store() as store:
        mine = await upload(store, b"1", "me")
        with pytest.raises(NotFound):
            await store.get_file(mine.id, "you")
        with pytest.raises(NotFound):
            await store.delete_file(mine.id, "you")
        with pytest.raises(NotFound):
            [block async for block in store.read_file(mine.id, "you")]
        assert await store.list_files("you") == []
        assert await store.list_files("me") == await store.list_files(None) == [mine]
        batch = await start(site, store, 1, owner="me")
        with pytest.raises(NotFound):
            await store.get_batch(batch.id, "you")
        with pytest.raises(NotFound):
            await store.cancel_batch(batch.id, site.now_s, "you")
        with pytest.raises(NotFound):
            [block async for block in store.read_results(batch.id, True, "you")]
        assert await store.list_batches("you") == []
        assert await store.get_batch(batch.id, None) == batch
        with pytest.raises(NotFound):
            await store.create_batch(
                owner="you",
                input_file_id=mine.id,
                endpoint=ENDPOINT,
                completion_window="1h",
                deadline_s=site.now_s + 1,
                metadata={},
                now_s=site.now_s,
            )


async def text_that_is_no_text_does_no_harm(site: Site) -> None:
    half = "\ud800"
    async with site.store() as store:
        incoming = await store.begin_file(half, half, "", 10)
        file = await incoming.commit()
        assert (await store.get_file(file.id, None)).filename == "?"
        assert await store.list_files(None, purpose=half) == [file]
        for call in (store.get_file(half, None), store.get_batch(half, None), store.list_files(None, after=half)):
            with pytest.raises(NotFound):
                await call
        assert await store.list_files(None, limit=-1) == []
        named = await (await store.begin_file("batch", "a\0b", "", 10)).commit()
        assert (await store.get_file(named.id, None)).filename == "a\ufffdb"
        with pytest.raises(NotFound):
            await store.get_file("\0", None)
        batch = await submit(site, store, line_of("a\0b") + b"\n" + line_of("b"))
        assert (await store.validate(batch.id, check, LIMITS)).status == "in_progress"
        assert [item.custom_id for item in await store.lease(MODEL, 2)] == ["a\0b", "b"]
        odd = await submit(site, store, line_of("a", "m\0"))
        assert (await store.validate(odd.id, check, LIMITS)).status == "failed"


async def lists_are_read_in_pages(site: Site) -> None:
    async with site.store() as store:
        files = [await upload(store, b"", filename=f"{index}") for index in range(5)]
        other = await store.begin_file("user_data", "other", "", 1)
        other_file = await other.commit()
        newest = [other_file, *reversed(files)]
        assert await store.list_files(None) == newest
        assert await store.list_files(None, limit=2) == newest[:2]
        assert await store.list_files(None, after=newest[1].id, limit=3) == newest[2:5]
        assert await store.list_files(None, after=files[1].id, limit=2, order="asc") == files[2:4]
        assert await store.list_files(None, purpose="batch", limit=2) == newest[1:3]
        with pytest.raises(NotFound, match="file-none"):
            await store.list_files(None, after="file-none")
        batches = [await start(site, store, 1) for _ in range(3)]
        assert await store.list_batches(None, limit=2) == [batches[2], batches[1]]
        assert await store.list_batches(None, after=batches[1].id) == [batches[0]]


async def a_file_in_use_cannot_be_deleted(site: Site) -> None:
    async with site.store() as store:
        batch = await submit(site, store, lines_of(1))
        with pytest.raises(Conflict, match=batch.id):
            await store.delete_file(batch.input_file_id, None)
        await store.validate(batch.id, check, LIMITS)
        with pytest.raises(Conflict):
            await store.delete_file(batch.input_file_id, None)
        await store.finish([result(item) for item in await store.lease(MODEL, 1)], site.now_s)
        await store.delete_file(batch.input_file_id, None)
        with pytest.raises(NotFound):
            await store.get_file(batch.input_file_id, None)
        with pytest.raises(NotFound):
            await store.delete_file(batch.input_file_id, None)
        done = await store.get_batch(batch.id, None)
        assert len(await lines(store, done.output_file_id)) == 1


CASES: list[Case] = [
    a_file_comes_back_byte_for_byte,
    an_empty_file_is_a_file,
    a_file_exists_only_once_it_is_committed,
    an_upload_that_ends_with_the_store_is_whole_or_not_there,
    a_key_sees_its_own_files_only,
    text_that_is_no_text_does_no_harm,
    lists_are_read_in_pages,
    a_file_in_use_cannot_be_deleted,
]
