"""What any batch store must do with a batch until its input is checked."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from chiron.store.port import InputLimits, ItemSpec, LineError
from store_calls import (
    LIMITS,
    MODEL,
    Case,
    Site,
    check,
    content,
    indices,
    keys,
    line_of,
    lines_of,
    result,
    start,
    submit,
    upload,
)


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


CASES: list[Case] = [
    a_valid_file_becomes_items,
    a_bad_file_fails_with_line_numbers,
    only_the_first_errors_are_kept,
    harmless_oddities_are_tolerated,
    validation_that_was_cut_off_starts_over,
    validation_goes_on_beside_other_work,
    a_batch_can_be_cancelled_while_it_is_validated,
]
