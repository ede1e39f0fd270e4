"""A batch job from its upload to the last line of its results, in SQLite: ``python store_job.py DIRECTORY ITEMS``
prints by how much the most memory that the process had has grown by it, in KiB."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from chiron.store.port import BatchStore, Ended
from store_calls import LIMITS, MODEL, check, line_of
from store_sites import sqlite_site


async def whole_job(site_path: Path, items: int) -> None:
    site = sqlite_site(site_path)
    async with site.store() as store:
        incoming = await store.begin_file("batch", "in.jsonl", "", 1 << 34)
        for index in range(items):
            await incoming.write(line_of(f"id-{index}", text="x" * 2000) + b"\n")
        file = await incoming.commit()
        batch = await store.create_batch(
            owner="",
            input_file_id=file.id,
            endpoint="/v1/completions",
            completion_window="1h",
            deadline_s=site.now_s + 3600,
            metadata={},
            now_s=site.now_s,
        )
        await store.validate(batch.id, check, LIMITS)
        await finish_all(store, site.now_s)
        batch = await store.get_batch(batch.id, None)
        assert batch.output_file_id is not None
        lines = 0
        async for block in store.read_file(batch.output_file_id, None):
            lines += block.count(b"\n")
        assert lines == items


async def finish_all(store: BatchStore, now_s: float) -> None:
    while leased := await store.lease(MODEL, 256):
        line = b"y" * 1000
        ended = [Ended(batch_id=item.batch_id, index=item.index, ok=True, line=line) for item in leased]
        await store.finish(ended, now_s)


def memory_max_kib() -> int:
    """Since the program began: ``ru_maxrss`` also knows what the process had that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


if __name__ == "__main__":
    before_kib = memory_max_kib()
    asyncio.run(whole_job(Path(sys.argv[1]), int(sys.argv[2])))
    print(memory_max_kib() - before_kib)
