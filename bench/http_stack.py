"""What the gateway's own HTTP saves: its server beside uvicorn and granian, its client beside aiohttp's.

    pip install --target out/http-libraries -r bench/requirements.txt
    PYTHONPATH=out/http-libraries python bench/http_stack.py [--rounds 3] [--seconds 2] [--json FILE]

Each target (``http_stack_target.py``) is a process on one core; the load and, for relays, a mock engine have the other.
Every round measures every target in turn, so that an hour in which the machine is slow is slow for all of them; the
table gives the median round with the least and the most. CPU is user and system time of the process that serves.

CPU of a small request is taken from 32 clients that send as fast as they are answered. Latency is taken at a fixed rate
that every target can carry, since in a closed loop it would say nothing but the throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from chiron.net.client import Origin
from gateway import (
    HERE,
    PATH,
    SMALL,
    free_port,
    measure_small,
    measure_streams,
    quantile,
    small_by_us,
    start,
    until_up,
)
from http_stack_target import CHUNKS, PACE_S, RELAYS, SERVERS

LIBRARIES = ("uvicorn", "granian", "aiohttp")
RATE_PER_S = 250.0
STREAMS = 64
COLUMNS = {
    "us_per_request": "CPU us/request",
    "latency_p50_ms": "p50 ms",
    "latency_p99_ms": "p99 ms",
    "us_per_chunk": "CPU us/token",
    "ttft_p50_ms": "TTFT p50 ms",
    "ttft_p99_ms": "TTFT p99 ms",
}


async def pid_of(url: str) -> int:
    """Of the process that serves."""
    await until_up(url, "/health")
    origin = Origin(url)
    answer = await origin.fetch("GET", "/health")
    await origin.close()
    return int(answer.body)


async def latencies_s(url: str, rate_per_s: float, seconds: float) -> list[float]:
    """Of small requests that are sent when they are due, whether or not those before them are answered."""
    origin = Origin(url)
    began_s = time.perf_counter()

    async def one(due_s: float) -> float:
        answer = await origin.fetch("POST", PATH.decode(), body=SMALL, headers={"content-type": "application/json"})
        assert answer.status == 200, answer
        return time.perf_counter() - due_s

    sent = []
    for i in range(int(rate_per_s * seconds)):
        due_s = began_s + i / rate_per_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        sent.append(asyncio.ensure_future(one(time.perf_counter())))
    took_s = await asyncio.gather(*sent)
    await origin.close()
    return list(took_s)


async def measure(url: str, pid: int, seconds: float) -> dict[str, float]:
    def small(to: str, for_s: float) -> float:
        return asyncio.run(small_by_us(to, for_s))

    figures = await measure_small(url, pid, small, seconds)
    waited_s = await latencies_s(url, RATE_PER_S, seconds)
    figures["latency_p50_ms"] = statistics.median(waited_s) * 1000
    figures["latency_p99_ms"] = quantile(waited_s, 0.99) * 1000
    return figures | await measure_streams(url, pid, STREAMS)


async def run(rounds: int, seconds: float) -> dict[str, list[dict[str, float]]]:
    with ExitStack() as stack:
        python = sys.executable
        engine = free_port()
        mock = [python, str(HERE / "gateway_mock.py"), str(engine), f"--chunks={CHUNKS}", f"--pace={PACE_S}"]
        start(stack, 0, mock)
        await until_up(f"http://127.0.0.1:{engine}", "/health")
        targets: dict[str, tuple[str, int]] = {}
        for name in (*SERVERS, *RELAYS):
            port = free_port()
            command = [python, str(HERE / "http_stack_target.py"), name, str(port), f"http://127.0.0.1:{engine}"]
            start(stack, 1, command)
            url = f"http://127.0.0.1:{port}"
            targets[name] = (url, await pid_of(url))
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in targets}
        for turn in range(rounds):
            for name, (url, pid) in targets.items():
                rows[name].append(await measure(url, pid, seconds))
                print(f"round {turn + 1}: {name}: {told(rows[name][-1])}", file=sys.stderr, flush=True)
        return rows


def told(row: dict[str, float]) -> str:
    return ", ".join(f"{words} {row[key]:.3g}" for key, words in COLUMNS.items())


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name, measured in rows.items():
        cells = []
        for key in COLUMNS:
            values = [row[key] for row in measured]
            cells.append(f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of small requests, per target and round, twice")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    lacking = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if lacking:
        raise SystemExit(
            f"{', '.join(lacking)}: not installed; this benchmark compares with {', '.join(LIBRARIES)}. Run:\n"
            "    pip install --target out/http-libraries -r bench/requirements.txt\n"
            "and set PYTHONPATH=out/http-libraries, or run: make bench-http"
        )
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {0})
    rows: dict[str, Any] = asyncio.run(run(given.rounds, given.seconds))
    print(table(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
