"""What the gateway does with a batch store, in short, and the ``Site`` that its tests do it at."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from chiron.store.port import Batch, BatchStore, Ended, InputLimits, Item, ItemSpec, LineError, StoredFile

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
