"""A process that works on a store: ``python store_worker.py PLACE ACKNOWLEDGED SEED BATCHES KILL_AFTER_S``.

PLACE is a directory, or ``URL SCHEMA PASSWORD_FILE DIRECTORY NAME`` in one argument: a gateway's name on PostgreSQL.

The kernel kills it once it has used so much CPU time after opening the store (0: never), which a busy machine does not
change.
It uploads and submits batches, validates, leases, finishes and releases, all at once, and writes down what the store
has acknowledged: one line per batch and per result, after the call has returned.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import TextIO

from chiron.store.port import ENDED, BatchStore, Conflict, Ended
from chiron.store.settings import StoreSettings
from chiron.store.sqlite.store import SqliteStore
from store_calls import LIMITS, MODEL, check, keys, lines_of

ITEMS = 1200


def store_at(place: str) -> BatchStore:
    if not place.startswith("postgresql://"):
        return SqliteStore(Path(place), wall=time.time, settings=StoreSettings(reserve_bytes=0))
    from chiron.store.postgres.settings import PostgresSettings
    from chiron.store.postgres.store import PostgresStore

    url, schema, password_file, directory, name = place.split()
    settings = PostgresSettings(url=url, schema=schema, password_file=password_file, lease_s=120.0)
    return PostgresStore(Path(directory), wall=time.time, settings=settings, name=name)


async def work(place: str, acknowledged: TextIO, seed: str, count: int, kill_after_s: float) -> None:
    random = Random(seed)
    store = store_at(place)
    await store.open()
    signal.setitimer(signal.ITIMER_PROF, kill_after_s)  # Nobody handles its signal.

    def note(*words: object) -> None:
        acknowledged.write(" ".join(map(str, words)) + "\n")
        acknowledged.flush()

    async def submit() -> None:
        for batch in await store.unvalidated():
            with suppress(Conflict):  # Another process has just begun.
                await store.validate(batch.id, check, LIMITS)
        while len(await store.list_batches(None, limit=count)) < count:
            upload = await store.begin_file("batch", "in.jsonl", "", 1 << 30)
            for block in (lines_of(ITEMS)[start : start + 20_000] for start in range(0, 1 << 30, 20_000)):
                if not block:
                    break
                await upload.write(block)
            file = await upload.commit()
            now_s = time.time()
            batch = await store.create_batch(
                owner="",
                input_file_id=file.id,
                endpoint="/v1/completions",
                completion_window="1h",
                deadline_s=now_s + 3600,
                metadata={},
                now_s=now_s,
            )
            note("batch", batch.id)
            with suppress(Conflict):  # Another process has just begun.
                await store.validate(batch.id, check, LIMITS)

    async def unfinished() -> bool:
        batches = await store.list_batches(None, limit=count)
        return len(batches) < count or any(batch.status not in ENDED for batch in batches)

    async def run() -> None:
        while await unfinished():
            leased = await store.lease(MODEL, random.randrange(1, 40))
            if not leased:
                await store.expire(time.time())
                for batch in await store.unvalidated() if place.startswith("postgresql://") else ():
                    with suppress(Conflict):
                        await store.validate(batch.id, check, LIMITS)
            if leased and random.random() < 0.1:
                await store.release(keys(leased), random.random() < 0.5)
                continue
            tokens = [f"{seed}.{random.random()}" for _ in leased]
            ended = [
                Ended(
                    batch_id=item.batch_id,
                    index=item.index,
                    ok=random.random() < 0.9,
                    line=json.dumps({"index": item.index, "token": token}).encode(),
                )
                for item, token in zip(leased, tokens, strict=True)
            ]
            await store.finish(ended, time.time())
            for one, token in zip(ended, tokens, strict=True):
                note("result", one.batch_id, one.index, one.ok, token)

    await asyncio.gather(submit(), *(run() for _ in range(3)))
    await store.close()
    print("done", flush=True)


if __name__ == "__main__":
    with open(sys.argv[2], "a") as opened:
        asyncio.run(work(sys.argv[1], opened, sys.argv[3], int(sys.argv[4]), float(sys.argv[5])))
