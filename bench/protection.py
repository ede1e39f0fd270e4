"""Interactive requests beside a batch job on one engine: what each costs the other, with and without Chiron.

    python bench/protection.py [--repeats 3] [--seconds 20] [--json FILE]

One embedded engine (OpenVINO GenAI, a tiny model with random weights), paced: its steps take as long as a profile says
for their batch, context and prefill, so that two noisy cores stand in for a GPU. Queueing, continuous batching, KV,
cancelling and resuming are real. A batch job keeps the engine full; interactive requests come as a Poisson process, at
the same times in every case of a repeat, with prompts of their own, so that no case finds the KV of another. The cases
take turns on the same engine process:

- interactive alone, batch alone: straight to the engine, the ideals;
- both straight: nobody protects anybody, the engine serves first come first served;
- chiron, evict = false: one queue in front of the engine, interactive first, no eviction;
- chiron: the default.

Times are seen by the client, from when a request was to be sent. Batch throughput is the engine's count of generated
tokens less what the interactive clients got.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chiron.engines.metrics import parse_metrics
from chiron.engines.serve.toy import ToySettings, write_toy
from chiron.net.client import Header, NetError, Origin

CHAT = "/v1/chat/completions"
JSON_BODY: list[Header] = [(b"content-type", b"application/json")]
SYLLABLES = [c + v for c in "bdfghklmnprstvz" for v in "aeiou"]
ALONE, BATCH, STRAIGHT, NO_EVICTION, CHIRON = (
    "interactive alone",
    "batch alone",
    "both straight to the engine",
    "chiron, evict = false",
    "chiron",
)
CASES = (ALONE, BATCH, STRAIGHT, NO_EVICTION, CHIRON)
CONFIG = """
policy = "own"

[models.m]
engine = "openvino"
endpoints = ["{engine}"]
max_num_seqs = {slots}
max_num_batched_tokens = 512

[classes.chat]
kind = "interactive"
ttft = "{ttft}s"
itl = "{itl}s"

[classes.batch]
kind = "batch"
deadline = "1h"

[policies.own]
policy = "chiron"
evict = {evict}

[telemetry]
event_log = "off"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent. Tokens, seconds, requests."""

    profile: str = "llama-3.1-70b/a100/tp4"
    slots: int = 64
    per_s: float = 6.0
    chat_in: int = 150
    chat_out: int = 60
    batch_in: int = 200
    batch_out: int = 300
    """Mean; 40 % to 160 % of it."""
    batch_open: int = 128
    """Batch requests open at once where they go straight to the engine: twice what it runs."""
    ttft_s: float = 2.0
    itl_s: float = 0.1
    warm_up_s: float = 10.0
    seconds: float = 20.0


@dataclass
class Stream:
    """Receiver of one answer."""

    due_s: float
    times_s: list[float] = field(default_factory=list)
    status: int = 0
    error: str = ""
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def on_head(self, status: int, headers: list[Header]) -> None:
        self.status = status

    def on_data(self, data: bytes) -> None:
        now_s = time.perf_counter()
        events = data.count(b"data:") - data.count(b"data: [DONE]") - data.count(b'"choices":[]')
        self.times_s += [now_s] * events

    def on_end(self) -> None:
        self.over.set()

    def on_error(self, error: NetError) -> None:
        self.error = str(error)
        self.over.set()


def body(draw: random.Random, tokens_in: int, tokens_out: int, *, stream: bool) -> dict[str, Any]:
    text = " ".join(draw.choice(SYLLABLES) for _ in range(tokens_in))
    return {
        "model": "m",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens_out,
        "temperature": 0,
        "ignore_eos": True,
    } | ({"stream": True} if stream else {})


def item(draw: random.Random, load: Load, *, stream: bool) -> dict[str, Any]:
    """Of a batch job. Lengths differ, so that the job's requests do not all begin and end together."""
    return body(draw, load.batch_in, round(load.batch_out * draw.uniform(0.4, 1.6)), stream=stream)


def arrivals(draw: random.Random, per_s: float, seconds: float) -> list[float]:
    times, at_s = [], 0.0
    while (at_s := at_s + draw.expovariate(per_s)) < seconds:
        times.append(at_s)
    return times


async def interactive(url: str, load: Load, seed: str, case: str) -> list[Stream]:
    """Open loop: requests go out at their times, whatever became of those before."""
    draw = random.Random(f"{seed}:{case}:chat")
    began_s = time.perf_counter()
    origin = Origin(url, idle_max=256)
    streams = []
    for at_s in arrivals(random.Random(f"{seed}:arrivals"), load.per_s, load.seconds):
        await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))
        stream = Stream(began_s + at_s)
        data = json.dumps(body(draw, load.chat_in, load.chat_out, stream=True)).encode()
        origin.send(b"POST", CHAT.encode(), JSON_BODY, data, stream)
        streams.append(stream)
    await asyncio.gather(*(asyncio.wait_for(stream.over.wait(), 120) for stream in streams))
    await origin.close()
    return streams


@asynccontextmanager
async def batch_straight(url: str, load: Load, seed: str, case: str) -> AsyncIterator[None]:
    """Closed loop: as a batch client that keeps many requests open."""
    draw = random.Random(f"{seed}:{case}:batch")
    origin = Origin(url, idle_max=load.batch_open)

    async def client() -> None:
        while True:
            stream = Stream(time.perf_counter())
            data = json.dumps(item(draw, load, stream=True)).encode()
            call = origin.send(b"POST", CHAT.encode(), JSON_BODY, data, stream)
            try:
                await stream.over.wait()
            finally:
                call.cancel()

    tasks = [asyncio.create_task(client()) for _ in range(load.batch_open)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await origin.close()


async def submit_batch(url: str, load: Load, seed: str, case: str) -> None:
    """A job that outlasts the measurement."""
    draw = random.Random(f"{seed}:{case}:batch")
    items = int((load.warm_up_s + load.seconds) * 5000 / load.batch_out) + load.batch_open
    lines = [
        json.dumps(
            {
                "custom_id": str(i),
                "method": "POST",
                "url": CHAT,
                "body": item(draw, load, stream=False),
            }
        )
        for i in range(items)
    ]
    mark = "----chiron-bench"
    form = (
        f'--{mark}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{mark}\r\ncontent-disposition: form-data; name="file"; filename="b.jsonl"\r\n\r\n'
        + "\n".join(lines)
        + f"\r\n--{mark}--\r\n"
    )
    headers = {"content-type": f"multipart/form-data; boundary={mark}"}
    origin = Origin(url)
    answer = await origin.fetch("POST", "/v1/files", body=form.encode(), headers=headers)
    assert answer.status == 200, answer.body
    asked = {"input_file_id": json.loads(answer.body)["id"], "endpoint": CHAT, "completion_window": "1h"}
    created = {"content-type": "application/json"}
    answer = await origin.fetch("POST", "/v1/batches", body=json.dumps(asked).encode(), headers=created)
    assert answer.status == 200, answer.body
    await origin.close()


@asynccontextmanager
async def process(command: Sequence[str], log: Path, cwd: Path | None = None) -> AsyncIterator[subprocess.Popen[bytes]]:
    with log.open("wb") as said:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, cwd=cwd)
        try:
            yield running
        finally:
            running.terminate()
            running.wait(30)


@asynccontextmanager
async def gateway(engine: str, load: Load, *, evict: bool, work: Path) -> AsyncIterator[str]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        text = CONFIG.format(
            engine=engine, slots=load.slots, ttft=load.ttft_s, itl=load.itl_s, evict=str(evict).lower()
        )
        (Path(folder) / "chiron.toml").write_text(text)
        command = [sys.executable, "-m", "chiron", "serve", "chiron.toml", "--port", "0", "--set", "server.grace=0.1"]
        log = Path(folder) / "log"
        async with process(command, log, Path(folder)):
            deadline_s = time.monotonic() + 30
            while not (found := [w for w in log.read_text().split() if w.startswith("http://127.0.0.1:")]):
                if time.monotonic() > deadline_s:
                    raise SystemExit(f"chiron serve does not start:\n{log.read_text()}")
                await asyncio.sleep(0.05)
            yield found[0].rstrip(".,;/").removesuffix("/v1")


async def fetch_json(url: str, path: str) -> dict[str, Any]:
    origin = Origin(url)
    answer = await origin.fetch("GET", path)
    await origin.close()
    found: dict[str, Any] = json.loads(answer.body)
    return found


async def totals(engine: str) -> tuple[float, dict[str, float]]:
    """When, and the engine's metrics then."""
    origin = Origin(engine)
    text = (await origin.fetch("GET", "/metrics")).body.decode()
    await origin.close()
    return time.perf_counter(), parse_metrics(text)


async def settle(engine: str, load: Load) -> None:
    """The engine idle, and its own limit what it was."""
    origin = Origin(engine)
    deadline_s = time.monotonic() + 60
    while True:
        answer = await origin.fetch("PUT", "/chiron/limits", body=json.dumps({"limit": load.slots}).encode())
        said = json.loads(answer.body)
        if said["limit"] == load.slots and not said["running"] and not said["waiting"]:
            break
        if time.monotonic() > deadline_s:
            raise SystemExit(f"the engine does not come to rest: {said}")
        await asyncio.sleep(0.1)
    await origin.close()


async def measure(case: str, engine: str, load: Load, seed: str, work: Path) -> dict[str, Any]:
    await settle(engine, load)
    async with AsyncExitStack() as stack:
        url = engine
        if case in (NO_EVICTION, CHIRON):
            url = await stack.enter_async_context(gateway(engine, load, evict=case == CHIRON, work=work))
            await submit_batch(url, load, seed, case)
        elif case != ALONE:
            await stack.enter_async_context(batch_straight(engine, load, seed, case))
        await asyncio.sleep(load.warm_up_s if case != ALONE else 0.5)
        began_s, before = await totals(engine)
        chat = asyncio.create_task(interactive(url, load, seed, case)) if case != BATCH else None
        await asyncio.sleep(load.seconds)
        ended_s, after = await totals(engine)
        streams = await chat if chat else []
        row = figures(streams, load)
        grown = {name: value - before[name] for name, value in after.items() if name in before}
        theirs = sum(at_s <= ended_s for stream in streams for at_s in stream.times_s)
        row["batch_tokens_per_s"] = (grown["vllm:generation_tokens_total"] - theirs) / (ended_s - began_s)
        row["mean_step_s"] = grown["chiron:engine_busy_seconds_total"] / max(1.0, grown["chiron:engine_steps_total"])
        if url != engine:
            row |= of_gateway(await fetch_json(url, "/chiron/status"))
        return row


def of_gateway(status: dict[str, Any]) -> dict[str, Any]:
    instance = status["models"][0]["instances"][0]
    return {"evictions": status["evictions"], "max_batch_size": instance["max_batch_size"]}


def figures(streams: list[Stream], load: Load) -> dict[str, Any]:
    """Of interactive requests; empty if there were none."""
    if not streams:
        return {}
    bad = [stream for stream in streams if stream.error or stream.status != 200 or len(stream.times_s) < 2]
    good = [stream for stream in streams if stream not in bad]
    ttft = [stream.times_s[0] - stream.due_s for stream in good]
    itl = [(s.times_s[-1] - s.times_s[0]) / (len(s.times_s) - 1) for s in good]
    gaps = [b - a for s in good for a, b in zip(s.times_s, s.times_s[1:], strict=False)]
    in_slo = sum(a <= load.ttft_s and b <= load.itl_s for a, b in zip(ttft, itl, strict=True))
    return {
        "requests": len(streams),
        "failed": len(bad),
        "ttft_p50_s": quantile(ttft, 0.5),
        "ttft_p99_s": quantile(ttft, 0.99),
        "itl_p50_s": quantile(itl, 0.5),
        "itl_p99_s": quantile(itl, 0.99),
        "gap_p99_s": quantile(gaps, 0.99),
        "in_slo": in_slo / len(streams),
    }


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: medians over repeats, and the least and the most where they differ."""
    ideal = statistics.median(row["batch_tokens_per_s"] for row in rows[BATCH])
    lines = [
        "| case | TTFT p50 | TTFT p99 | ITL p50 | ITL p99 | in SLO | batch tokens/s | of batch alone | evictions |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case, repeats in rows.items():

        def cell(name: str, scale: float, unit: str, repeats: list[dict[str, Any]] = repeats) -> str:
            values = [row[name] * scale for row in repeats if name in row]
            return spread(values, unit) if values else ""

        tokens = "" if case == ALONE else cell("batch_tokens_per_s", 1, "")
        share = "" if case == ALONE else cell("batch_tokens_per_s", 100 / ideal, " %")
        cells = [cell(name, 1000, " ms") for name in ("ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s")]
        cells += [cell("in_slo", 100, " %"), tokens, share, cell("evictions", 1, "")]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float], unit: str) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    ends = "" if f"{least:,.0f}" == f"{most:,.0f}" else f" ({least:,.0f}-{most:,.0f})"
    return f"{middle:,.0f}{unit}{ends}"


async def run(load: Load, repeats: int, cases: Sequence[str], model: Path | None) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        path = model or work / "small.gguf"
        if model is None:
            write_toy(path, ToySettings(hidden=64, layers=1))
        command = [sys.executable, "-m", "chiron.engines.serve.openvino", "--port", "0", "--model", str(path)]
        command += ["--served-model-name", "m", "--threads", "1", "--max-num-seqs", str(load.slots)]
        command += ["--max-num-batched-tokens", "512", "--kv-capacity-tokens", str(load.slots * 2000)]
        if load.profile:
            command += ["--pace", load.profile]
        async with process(command, work / "engine.log") as running:
            assert running.stdout is not None
            line = await asyncio.to_thread(running.stdout.readline)
            if b"ready port=" not in line:
                raise SystemExit(f"the engine does not start:\n{(work / 'engine.log').read_text()}")
            engine = f"http://127.0.0.1:{int(line.rpartition(b'=')[2])}"
            for repeat in range(repeats):
                for case in cases:
                    row = await measure(case, engine, load, str(repeat), work)
                    rows[case].append(row)
                    print(f"{repeat + 1}/{repeats} {case}: {json.dumps(row)}", file=sys.stderr, flush=True)
            await settle(engine, load)
    return rows


def main() -> None:
    default = Load()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="each with a seed of its own")
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of interactive arrivals in each case")
    parser.add_argument("--per-s", type=float, default=default.per_s, help="interactive requests per second")
    parser.add_argument("--profile", default=default.profile, help="that paces the engine; '': none, as fast as it can")
    parser.add_argument("--model", type=Path, help="a GGUF file; default: a very small one with random weights")
    parser.add_argument("--case", action="append", choices=CASES, help="only these, beside batch alone")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    load = Load(seconds=given.seconds, per_s=given.per_s, profile=given.profile)
    cases = [case for case in CASES if not given.case or case in given.case or case == BATCH]
    rows = asyncio.run(run(load, given.repeats, cases, given.model))
    print(table(rows))
    if given.json:
        given.json.write_text(json.dumps({"load": asdict(load), "cases": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
