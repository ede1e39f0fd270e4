"""A large batch job through the durable store: uploaded, validated, leased, finished, read back.

    python bench/store.py [--items 700000] [--input-bytes 2048] [--postgres URL|here] [--json FILE]

Each stage prints items per second, CPU seconds of the process (all threads), the peak of its memory so far, and how
late the event loop was meanwhile (p50, p99, most): a task that asks to be woken every 10 ms measures it, since
interactive requests would wait as long. ``--switch-interval`` is how long Python lets another thread wait. Leasing and
finishing go in groups of ``--group`` items with four groups under way, as the gateway does it; ``--single`` more items
are finished one by one by ``--callers`` callers at a time, which is what group commit is for. Results are words and
numbers, not one repeated byte.

``--postgres`` puts PostgreSQL beside SQLite in the same run, with the items per second of the one over those of the
other: at a URL (in a schema of its own; the password in PGPASSWORD), or ``here``, on a server that it starts from
Debian's package, with everything on the disk at a commit. The CPU seconds are this process's; the server has its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import orjson

from chiron.store.port import BatchStore, Ended, InputLimits, Item, ItemSpec, LineError
from chiron.store.postgres.settings import PostgresSettings
from chiron.store.postgres.store import PostgresStore
from chiron.store.sqlite.store import SqliteStore

WAKE_S = 0.01
GROUPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    name: str
    items: int
    wall_s: float
    cpu_s: float
    items_per_s: float
    peak_mib: float
    loop_late_p50_ms: float
    loop_late_p99_ms: float
    loop_late_max_ms: float


class Lateness:
    """How late the event loop wakes a task that sleeps."""

    def __init__(self) -> None:
        self.late_s: list[float] = []

    async def watch(self) -> None:
        while True:
            asked = time.perf_counter()
            await asyncio.sleep(WAKE_S)
            self.late_s.append(time.perf_counter() - asked - WAKE_S)


async def measure(name: str, items: int, work: Awaitable[None]) -> Stage:
    lateness = Lateness()
    watcher = asyncio.create_task(lateness.watch())
    wall, cpu = time.perf_counter(), time.process_time()
    await work
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    watcher.cancel()
    late = sorted(lateness.late_s) or [0.0]
    stage = Stage(
        name=name,
        items=items,
        wall_s=round(wall, 3),
        cpu_s=round(cpu, 3),
        items_per_s=round(items / wall),
        peak_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        loop_late_p50_ms=round(late[len(late) // 2] * 1e3, 2),
        loop_late_p99_ms=round(late[int(0.99 * (len(late) - 1))] * 1e3, 2),
        loop_late_max_ms=round(late[-1] * 1e3, 2),
    )
    print(
        f"{name:<28}{stage.items_per_s:>9,} items/s {wall:>7.1f} s {cpu:>7.1f} s CPU {stage.peak_mib:>6.0f} MiB "
        f"{stage.loop_late_p50_ms:>6.1f} {stage.loop_late_p99_ms:>6.1f} {stage.loop_late_max_ms:>6.1f} ms late",
        flush=True,
    )
    return stage


def texts(size: int) -> Callable[[int], str]:
    """Text of about ``size`` bytes by index, cut from one pool of made-up words."""
    random = Random("bench:store")
    words = ["".join(random.choices("etaoinshrdlucmfwypvbgk", k=random.randint(2, 9))) for _ in range(4_000)]
    pool = " ".join(random.choices(words, k=60_000))
    return lambda index: pool[(start := index * 7919 % (len(pool) - size)) : start + size]


def check(line: bytes) -> ItemSpec | LineError:
    """What the gateway's check costs, about: parse the line, look at its fields."""
    try:
        value = orjson.loads(line)
        body = value["body"]
        return ItemSpec(custom_id=value["custom_id"], model=body["model"], input_bytes=len(line))
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        return LineError(code="invalid_json_line", message=str(error))


def input_blocks(items: int, line_bytes: int) -> AsyncIterator[bytes]:
    text = texts(max(1, line_bytes - 190))

    def line(index: int) -> bytes:
        body = {"model": "llama-3.1-8b", "messages": [{"role": "user", "content": text(index)}], "max_tokens": 256}
        value = {"custom_id": f"request-{index:07d}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        return orjson.dumps(value) + b"\n"

    async def blocks() -> AsyncIterator[bytes]:
        for start in range(0, items, 100):
            yield b"".join(line(index) for index in range(start, min(items, start + 100)))

    return blocks()


async def run(arguments: argparse.Namespace, directory: Path, store: BatchStore) -> dict[str, Any]:
    items, group = arguments.items, arguments.group
    single, leased_only = min(arguments.single, items // 2), min(arguments.leased, items)
    stages = []
    file_id = batch_id = ""
    read_bytes = 0
    await store.open()

    async def upload() -> None:
        nonlocal file_id
        incoming = await store.begin_file("batch", "bench.jsonl", "", 1 << 40)
        async for block in input_blocks(items, arguments.input_bytes):
            await incoming.write(block)
        file_id = (await incoming.commit()).id

    async def validate() -> None:
        nonlocal batch_id
        now_s = time.time()
        batch = await store.create_batch(
            owner="",
            input_file_id=file_id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            deadline_s=now_s + 86_400,
            metadata={},
            now_s=now_s,
        )
        batch_id = batch.id
        batch = await store.validate(batch_id, check, InputLimits(items_max=max(items, 1)))
        assert (batch.status, batch.total) == ("in_progress", items), batch

    result_text = texts(max(1, arguments.result_bytes - 130))

    def ended(item: Item) -> Ended:
        line = b'{"id":"batch_req_%08x","custom_id":"%b","response":{"status_code":200,"body":"%b"},"error":null}' % (
            item.index,
            item.custom_id.encode(),
            result_text(item.index).encode(),
        )
        return Ended(batch_id=item.batch_id, index=item.index, ok=True, line=line)

    async def lease_and_finish(items_max: int) -> None:
        left = items_max

        async def one() -> None:
            nonlocal left
            while left > 0:
                wanted = min(group, left)
                left -= wanted
                leased = await store.lease("llama-3.1-8b", wanted)
                await store.finish([ended(item) for item in leased], time.time())

        await asyncio.gather(*(one() for _ in range(GROUPS)))

    async def lease_only() -> None:
        left = leased_only
        while left > 0:
            left -= len(await store.lease("llama-3.1-8b", min(group, left)))
        await store.close()  # The process is gone: all of them are pending again.
        await store.open()

    async def finish_one_by_one() -> None:
        leased = iter(await store.lease("llama-3.1-8b", single))

        async def one() -> None:
            for item in leased:
                await store.finish([ended(item)], time.time())

        await asyncio.gather(*(one() for _ in range(arguments.callers)))

    async def status() -> None:
        for _ in range(200):
            await store.get_batch(batch_id, None)
            await store.pending()

    async def read_back() -> None:
        nonlocal read_bytes
        batch = await store.get_batch(batch_id, None)
        assert (batch.status, batch.completed) == ("completed", items), batch
        assert batch.output_file_id is not None
        lines = 0
        async for block in store.read_file(batch.output_file_id, None):
            lines += block.count(b"\n")
            read_bytes += len(block)
        assert lines == items, lines

    stages.append(await measure("uploaded", items, upload()))
    stages.append(await measure("validated", items, validate()))
    stages.append(await measure("leased, store reopened", leased_only, lease_only()))
    stages.append(await measure("finished one by one", single, finish_one_by_one()))
    stages.append(await measure("leased and finished", items - single, lease_and_finish(items - single)))
    stages.append(await measure("status and pending asked", 200, status()))
    stages.append(await measure("output read", items, read_back()))
    await store.close()
    sizes = {path.name: path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()}
    for name, size in sizes.items():
        print(f"{size / 1e6:>10,.1f} MB  {name}")
    return {
        "machine": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "system": platform.platform(),
        },
        "items": items,
        "output_bytes": read_bytes,
        "stages": [asdict(stage) for stage in stages],
        "file_bytes": sizes,
    }


@contextmanager
def postgres_url(where: str, scratch: Path) -> Iterator[PostgresSettings]:
    """Settings with a schema that is gone at the end."""
    limits = {"schema": f"bench_{os.getpid()}", "file_bytes_max": 1 << 40}
    if where != "here":
        yield PostgresSettings(url=where, **limits)
        return
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
    from postgres_server import postgres_server

    # As a server is run: on the disk at a commit, with memory for more than a test.
    with postgres_server(settings=("shared_buffers=512MB", "max_wal_size=4GB")) as server:
        os.environ["PGPASSWORD"] = server.password
        yield PostgresSettings(url=server.url, **limits)


def show_ratios(sqlite_stages: list[dict[str, Any]], postgres_stages: list[dict[str, Any]]) -> None:
    print(f"\n{'items/s':<28}{'SQLite':>10}{'PostgreSQL':>12}{'ratio':>8}{'CPU ratio':>11}")
    for one, other in zip(sqlite_stages, postgres_stages, strict=True):
        a, b = one["items_per_s"], other["items_per_s"]
        cpu = (other["cpu_s"] / other["items"]) / max(1e-9, one["cpu_s"] / one["items"])
        print(f"{one['name']:<28}{a:>10,}{b:>12,}{b / max(1, a):>8.2f}{cpu:>11.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=700_000)
    parser.add_argument("--input-bytes", type=int, default=2048, help="bytes per line of the input file")
    parser.add_argument("--result-bytes", type=int, default=1024, help="bytes per result line")
    parser.add_argument("--group", type=int, default=256, help="items per lease and per finish")
    parser.add_argument("--leased", type=int, default=50_000, help="items leased and left by a process that dies")
    parser.add_argument("--single", type=int, default=20_000, help="items finished one by one")
    parser.add_argument("--callers", type=int, default=64, help="callers that finish one by one")
    parser.add_argument("--switch-interval", type=float, default=0.005, help="seconds (Python's default: 0.005)")
    parser.add_argument("--directory", type=Path, help="where to put the store (default: a temporary directory)")
    parser.add_argument("--postgres", metavar="URL|here", default="", help="measure PostgreSQL beside it")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    sys.setswitchinterval(arguments.switch_interval)
    directory = Path(tempfile.mkdtemp(prefix="bench-store-", dir=arguments.directory))
    try:
        result = asyncio.run(run(arguments, directory, SqliteStore(directory, wall=time.time)))
        if arguments.postgres:
            with postgres_url(arguments.postgres, directory.parent) as settings:
                print(f"\nPostgreSQL at {settings.url.rpartition('@')[2]}")
                beside = PostgresStore(directory / "postgres", wall=time.time, settings=settings, name="bench")
                result["postgres"] = asyncio.run(run(arguments, directory / "postgres", beside))
            show_ratios(result["stages"], result["postgres"]["stages"])
    finally:
        shutil.rmtree(directory)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
