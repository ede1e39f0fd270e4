"""What any batch store must do: one async function per promise, run against a ``Site`` by the tests of each store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest

from chiron.store.learned import LEARNED_BYTES_MAX
from chiron.store.port import (
    Batch,
    BatchStore,
    Conflict,
    Ended,
    InputLimits,
    Item,
    ItemSpec,
    LineError,
    NotFound,
    StoreClosed,
    StoredFile,
    Swept,
    TokenUsage,
    TooLarge,
)

MODEL = "llama-3.1-8b"
ENDPOINT = "/v1/chat/completions"
LIMITS = InputLimits()


@dataclass
class Site:
    """A place with a store. ``store()`` opens it, and closes it at the end of the block; what it keeps stays."""

    store: Callable[[], AbstractAsyncContextManager[BatchStore]]
    retention_s: float
    now_s: float = field(default=1_000_000.0)
    """The wall clock that the store was given reads this."""


Case = Callable[[Site], Coroutine[Any, Any, None]]


# What the gateway does, in short.


def line_of(custom_id: str, model: str = MODEL, text: str = "hello") -> bytes:
    return json.dumps({"custom_id": custom_id, "body": {"model": model, "text": text}}).encode()


def lines_of(count: int, model: str = MODEL) -> bytes:
    return b"".join(line_of(f"id-{index}", model) + b"\n" for index in range(count))


def check(line: bytes) -> ItemSpec | LineError:
    try:
        value = json.loads(line)
        return ItemSpec(custom_id=value["custom_id"], model=value["body"]["model"], input_bytes=len(line))
    except (ValueError, KeyError, TypeError):
        return LineError(code="invalid_json_line", message="not a request")


async def upload(
    store: BatchStore,
    content: bytes,
    owner: str = "",
    filename: str = "in.jsonl",
    expires_after_s: float | None = None,
) -> StoredFile:
    incoming = await store.begin_file("batch", filename, owner, 1 << 30)
    incoming.expires_after_s = expires_after_s
    for start in range(0, len(content), 1000):
        await incoming.write(content[start : start + 1000])
    return await incoming.commit()


async def submit(site: Site, store: BatchStore, content: bytes, *, owner: str = "", window_s: float = 3600.0) -> Batch:
    """Uploaded and created, not yet validated."""
    return await create(site, store, await upload(store, content, owner), window_s=window_s)


async def create(
    site: Site,
    store: BatchStore,
    file: StoredFile,
    *,
    window_s: float = 3600.0,
    output_expires_after_s: float | None = None,
) -> Batch:
    return await store.create_batch(
        owner=file.owner,
        input_file_id=file.id,
        endpoint=ENDPOINT,
        completion_window=f"{window_s:g}s",
        deadline_s=site.now_s + window_s,
        metadata={"team": "a"},
        now_s=site.now_s,
        output_expires_after_s=output_expires_after_s,
    )


async def start(site: Site, store: BatchStore, items: int, *, owner: str = "", window_s: float = 3600.0) -> Batch:
    batch = await submit(site, store, lines_of(items), owner=owner, window_s=window_s)
    return await store.validate(batch.id, check, LIMITS)


def result(item: Item | Ended, ok: bool = True, text: str = "") -> Ended:
    value = {"index": item.index, "ok": ok, "text": text}
    return Ended(batch_id=item.batch_id, index=item.index, ok=ok, line=json.dumps(value).encode())


def keys(items: Iterable[Item]) -> list[tuple[str, int]]:
    return [(item.batch_id, item.index) for item in items]


def indices(items: Iterable[Item]) -> list[int]:
    return [item.index for item in items]


async def content(store: BatchStore, file_id: str | None) -> bytes:
    assert file_id is not None
    return b"".join([block async for block in store.read_file(file_id, None)])


async def lines(store: BatchStore, file_id: str | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (await content(store, file_id)).splitlines()]


async def results(store: BatchStore, batch_id: str, ok: bool) -> list[int]:
    text = b"".join([block async for block in store.read_results(batch_id, ok)])
    return [json.loads(line)["index"] for line in text.splitlines()]


# Files.


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


# Validation.


async def a_valid_file_becomes_items(site: Site) -> None:
    async with site.store() as store:
        batch = await submit(site, store, lines_of(1201))
        assert (batch.status, batch.total, batch.metadata) == ("validating", 0, {"team": "a"})
        assert await store.lease(MODEL, 10) == []
        assert await store.unvalidated() == [batch]
        site.now_s += 5
        batch = await store.validate(batch.id, check, LIMITS)
        assert (batch.status, batch.total, batch.model) == ("in_progress", 1201, MODEL)
        assert batch.in_progress_s == site.now_s
        assert await store.unvalidated() == []
        assert await store.validate(batch.id, check, LIMITS) == batch
        sizes = [len(line) for line in lines_of(1201).splitlines()]
        (work,) = await store.pending()
        assert (work.batch_id, work.model, work.deadline_s) == (batch.id, MODEL, batch.expires_s)
        assert (work.items, work.input_bytes) == (1201, sum(sizes))
        assert work.input_bytes_square == sum(size * size for size in sizes)


BAD_FILES: list[tuple[str, bytes, list[tuple[int | None, str]]]] = [
    ("empty", b"", [(None, "empty_file")]),
    ("blank lines only", b"\n  \r\n\n", [(None, "empty_file")]),
    ("a byte order mark only", b"\xef\xbb\xbf\n", [(None, "empty_file")]),
    ("not JSON", lines_of(2) + b"{oops\n\n{}\n", [(3, "invalid_json_line"), (5, "invalid_json_line")]),
    ("a torn last line", lines_of(3)[:-9], [(3, "invalid_json_line")]),
    ("not UTF-8", lines_of(1) + b'{"custom_id": "\xff"}\n', [(2, "invalid_json_line")]),
    (
        "too long",
        lines_of(1) + line_of("b", text="x" * 5000) + b"\n" + lines_of(1),
        [(2, "line_too_long"), (3, "duplicate_custom_id")],
    ),
    ("too long without an end", line_of("b", text="x" * 9_000_000), [(1, "line_too_long")]),
    ("half a character", b'{"custom_id": "\\ud800", "body": {"model": "m"}}', [(1, "invalid_json_line")]),
    ("too many", lines_of(12), [(11, "too_many_requests")]),
    (
        "the same id again",
        b"\n" + lines_of(3) + line_of("id-1") + b"\n" + line_of("x") + b"\n" + line_of("id-1"),
        [(5, "duplicate_custom_id"), (7, "duplicate_custom_id")],
    ),
]


async def a_bad_file_fails_with_line_numbers(site: Site) -> None:
    async with site.store() as store:
        for name, data, expected in BAD_FILES:
            batch = await submit(site, store, data)
            batch = await store.validate(batch.id, check, InputLimits(items_max=10, line_bytes_max=4000))
            assert (batch.status, batch.failed_s) == ("failed", site.now_s), name
            assert [(error.line, error.code) for error in batch.errors] == expected, name
            assert all(error.message for error in batch.errors)
            assert (batch.output_file_id, batch.error_file_id) == (None, None)
            assert await store.get_batch(batch.id, None) == batch
            await store.delete_file(batch.input_file_id, None)
        assert await store.pending() == []
        assert await store.lease(MODEL, 10) == []


async def only_the_first_errors_are_kept(site: Site) -> None:
    async with site.store() as store:
        for data in (b"nonsense\n" * 5000, line_of("same") * 1 + b"\n" + (line_of("same") + b"\n") * 5000):
            batch = await submit(site, store, data)
            batch = await store.validate(batch.id, check, InputLimits(errors_max=7))
            assert batch.status == "failed"
            first = 1 if data.startswith(b"nonsense") else 2
            assert [error.line for error in batch.errors] == list(range(first, first + 7))


async def harmless_oddities_are_tolerated(site: Site) -> None:
    odd = "ünï\n".encode()
    data = b"\xef\xbb\xbf" + line_of("a") + b"\r\n\r\n  " + line_of("b", text="é" * 10) + b" \n\t\n" + line_of("ü")

    def find_body(line: bytes) -> ItemSpec | LineError:
        spec = check(line)
        assert isinstance(spec, ItemSpec)
        begin = line.index(b'{"model"')
        return replace(spec, body_offset=begin, body_bytes=len(line) - begin - 1)

    async with site.store() as store:
        batch = await submit(site, store, data)
        batch = await store.validate(batch.id, find_body, InputLimits(items_max=3))
        assert (batch.status, batch.total) == ("in_progress", 3), batch.errors
        leased = await store.lease(MODEL, 10)
        assert [item.custom_id for item in leased] == ["a", "b", "ü"]
        assert [json.loads(item.body)["text"] for item in leased] == ["hello", "é" * 10, "hello"]
        assert all(item.body.startswith(b'{"model"') and item.body.endswith(b'"}') for item in leased)
        await store.expire(batch.expires_s)
        await store.release(keys(leased), False)
        await store.expire(batch.expires_s)
        batch = await store.get_batch(batch.id, None)
        errors = await content(store, batch.error_file_id)
        assert [json.loads(line)["custom_id"] for line in errors.splitlines()] == ["a", "b", "ü"]
        assert (await store.get_file(batch.error_file_id or "", None)).bytes == len(errors)
        assert await content(store, (await upload(store, odd)).id) == odd


async def validation_that_was_cut_off_starts_over(site: Site) -> None:
    class StopError(Exception):
        pass

    def stops(line: bytes) -> ItemSpec | LineError:
        if b"id-1500" in line:
            raise StopError
        return check(line)

    async with site.store() as store:
        batch = await submit(site, store, lines_of(2000))
        with pytest.raises(StopError):
            await store.validate(batch.id, stops, LIMITS)
    async with site.store() as store:
        (again,) = await store.unvalidated()
        assert again == batch
        batch = await store.validate(batch.id, check, LIMITS)
        assert (batch.status, batch.total) == ("in_progress", 2000)
        assert indices(await store.lease(MODEL, 3000)) == list(range(2000))


async def validation_goes_on_beside_other_work(site: Site) -> None:
    async with site.store() as store:
        first = await start(site, store, 50)
        large = await submit(site, store, lines_of(20_000))
        validation = asyncio.create_task(store.validate(large.id, check, LIMITS))
        rounds = 0
        while leased := await store.lease(MODEL, 1):
            await store.finish([result(leased[0])], site.now_s)
            if leased[0].batch_id != first.id:
                break
            rounds += 1
        assert rounds == 50
        assert (await validation).total == 20_000


async def a_batch_can_be_cancelled_while_it_is_validated(site: Site) -> None:
    async with site.store() as store:
        batch = await submit(site, store, lines_of(20_000))
        validation = asyncio.create_task(store.validate(batch.id, check, LIMITS))
        await asyncio.to_thread(lambda: None)
        cancelled = await store.cancel_batch(batch.id, site.now_s)
        assert (cancelled.status, cancelled.cancelled_s) == ("cancelled", site.now_s)
        assert await validation == cancelled
        assert await store.pending() == []
        assert await store.unvalidated() == []


# Items.


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


# Endings.


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
    a_file_comes_back_byte_for_byte,
    tokens_are_added_up_once_for_each_item,
    an_empty_file_is_a_file,
    a_file_exists_only_once_it_is_committed,
    an_upload_that_ends_with_the_store_is_whole_or_not_there,
    a_key_sees_its_own_files_only,
    text_that_is_no_text_does_no_harm,
    lists_are_read_in_pages,
    a_file_in_use_cannot_be_deleted,
    a_valid_file_becomes_items,
    a_bad_file_fails_with_line_numbers,
    only_the_first_errors_are_kept,
    harmless_oddities_are_tolerated,
    validation_that_was_cut_off_starts_over,
    validation_goes_on_beside_other_work,
    a_batch_can_be_cancelled_while_it_is_validated,
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
