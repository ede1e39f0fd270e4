"""What the gateway costs: requests per second, CPU per request and per streamed chunk, added time to first token.

    python bench/gateway.py [--seconds 4] [--workers 1,2] [--rounds 3] [--json FILE] [--set PATH=VALUE]
        [--router vllm-router=PYTHON] [--router sglang-router=PYTHON] [--compiled FOLDER]

A mock engine and the load share one core, what is measured has the other to itself. Side by side in one run: straight
to the engine, a bare relay (``net.server`` and ``net.client`` and nothing else), and ``chiron serve`` as it ships, with
its event log, metrics, queue and policy; also with relays in processes of their own (``--workers``), which have all
cores but the first. Other routers run beside them, if an interpreter is given that has them (``pip install vllm-router
sglang-router`` into a virtual environment of its own), and so does a compiled build of this one, by the folder that
has it (``make out/compiled/.built`` makes ``out/compiled/src``). With ``--rounds`` every target has its turn so often,
one after the other, and the medians are shown, ratios of each round apart; what else the machine does then hits all of
them. CPU is that of all threads of the measured processes, of relays and of the brain apart, as the scheduler counts.

Small requests and the many streams are sent by ``wrk`` if it is installed: it takes so little of the load's core that
the measured one has to carry more than 30,000 chunks a second. Else, and for the time to first token, by a client here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from chiron.net.client import Header, NetError, Origin

HERE = Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")
PATH = b"/v1/chat/completions"
PROMPT = "word " * 70
SMALL = json.dumps({"model": "m", "max_tokens": 16, "messages": [{"role": "user", "content": PROMPT}]}).encode()
STREAM = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": PROMPT}]}).encode()
JSON_BODY: list[Header] = [(b"content-type", b"application/json")]
CONFIG = """
policy = "open"
# Nothing waits for a max batch size to be learned: what is measured is the gateway, not its queue.
[policies.open]
policy = "chiron"
initial_max_batch_size = 4096
tune_batch_size = false
[server]
port = {port}
data = "data"
[models.m]
instances = [{{ engine = "openai", endpoints = ["http://127.0.0.1:{engine}"], max_num_seqs = 4096 }}]

"""
ROUTERS = {"vllm-router": "vllm_router.launch_router", "sglang-router": "sglang_router.launch_router"}
"""Modules that start the others."""
COMPILED = " (compiled)"
BASE = "vllm-router"
"""What ratios are to, where it runs; else to the bare relay."""
CLIENTS_MAX = 64
"""More streams than this need ``wrk``, if it is there: the client here would be the bottleneck."""
DONE = """
done = function(summary) io.write(string.format("bytes %d us %d\\n", summary.bytes, summary.duration)) end
"""
LUA = 'wrk.method="POST"; wrk.path="{path}"; wrk.headers["content-type"]="application/json"; wrk.body=[[{body}]]'


@dataclass
class Stream:
    """Receiver of one stream."""

    sent_s: float
    first_s: float = 0.0
    chunks: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)
    error: str = ""

    def on_head(self, status: int, headers: list[Header]) -> None:
        if status != 200:
            self.error = f"status {status}"

    def on_data(self, data: bytes) -> None:
        if not self.first_s:
            self.first_s = time.perf_counter()
        self.chunks += data.count(b"data:")

    def on_end(self) -> None:
        self.done.set()

    def on_error(self, error: NetError) -> None:
        self.error = str(error)
        self.done.set()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and of its threads: by the scheduler's count, where there is one, else by ticks."""
    try:
        counts = [each.read_text().split() for each in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    except OSError:  # A thread has just ended.
        return cpu_s(pid)
    if counts:
        return sum(int(count[0]) for count in counts) / 1e9
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Used:
    """CPU of processes from now on."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.began_s = time.perf_counter()
        self.cpu_s = {pid: cpu_s(pid) for pid in pids}

    def shares(self) -> list[float]:
        """CPU seconds per second, of each."""
        passed_s = time.perf_counter() - self.began_s
        return [(cpu_s(pid) - before_s) / passed_s for pid, before_s in self.cpu_s.items()]


def us(shares: Sequence[float], rate: float, what: str) -> dict[str, float]:
    """CPU for each ``what`` at this rate: of all processes, and where there are several of the first (the brain) and of
    the others (relays) apart."""
    parts = [share / rate * 1e6 for share in shares]
    found = {f"us_per_{what}": sum(parts)}
    if len(parts) > 1:
        found |= {f"brain_us_per_{what}": parts[0], f"relay_us_per_{what}": sum(parts[1:])}
    return found


def rss_mb(pids: Sequence[int]) -> float:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def on_core(core: int | str, command: list[str]) -> list[str]:
    return ["taskset", "-c", str(core), *command] if shutil.which("taskset") and (os.cpu_count() or 1) > 1 else command


def start(stack: ExitStack, core: int | str, command: list[str], **kwargs: Any) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(on_core(core, command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kwargs)

    def stop() -> None:
        process.terminate()
        process.wait(30)

    stack.callback(stop)
    return process


async def until_up(url: str, path: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        origin = Origin(url)
        try:
            answer = await origin.fetch("GET", path, timeout_s=1.0)
            if answer.status == 200:
                return
        except NetError:
            pass
        finally:
            await origin.close()
        if time.monotonic() > deadline:
            raise SystemExit(f"{url}{path} does not answer")
        await asyncio.sleep(0.05)


def small_by_wrk(url: str, seconds: float, work: Path) -> float:
    script = work / "post.lua"
    script.write_text(LUA.format(path=PATH.decode(), body=SMALL.decode()))
    command = on_core(0, ["wrk", "-t1", "-c32", f"-d{seconds:g}s", "-s", str(script), url])
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said:
        raise SystemExit(f"{url}: errors:\n{said}")
    return float(next(line.split()[1] for line in said.splitlines() if line.startswith("Requests/sec")))


def streams_by_wrk(url: str, count: int, seconds: float, work: Path) -> float:
    """Bytes that arrive per second in ``count`` streams, which begin again as they end."""
    script = work / "stream.lua"
    script.write_text(LUA.format(path=PATH.decode(), body=STREAM.decode()) + DONE)
    command = ["wrk", "-t1", f"-c{count}", f"-d{seconds:g}s", "--timeout=60s", "-s", str(script), url]
    said = subprocess.run(on_core(0, command), capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(f"{url}: errors:\n{said}")
    _, arrived, _, took_us = next(line.split() for line in said.splitlines() if line.startswith("bytes"))
    return int(arrived) / (int(took_us) / 1e6)


def stream_bytes(url: str) -> int:
    """Of one whole answer, head and framing included: they differ a little between targets."""
    host, _, port = url.removeprefix("http://").partition(":")
    head = f"POST {PATH.decode()} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}content-length: {len(STREAM)}\r\n\r\n".encode() + STREAM)
        answer = b""
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            answer += connection.recv(1 << 16)
    return len(answer)


async def small_by_us(url: str, seconds: float) -> float:
    origin = Origin(url)
    end_s = time.perf_counter() + seconds
    headers = {"content-type": "application/json"}

    async def client() -> int:
        count = 0
        while time.perf_counter() < end_s:
            answer = await origin.fetch("POST", PATH.decode(), body=SMALL, headers=headers)
            assert answer.status == 200, answer
            count += 1
        return count

    counts = await asyncio.gather(*(client() for _ in range(32)))
    await origin.close()
    return sum(counts) / seconds


async def streams(url: str, count: int) -> tuple[list[Stream], float]:
    """``count`` streams at once, their starts spread over a second. Returns them and the seconds they took."""
    origin = Origin(url, idle_max=count)
    made = []
    began_s = time.perf_counter()
    for i in range(count):
        due_s = began_s + i / count
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        stream = Stream(time.perf_counter())
        origin.send(b"POST", PATH, JSON_BODY, STREAM, stream)
        made.append(stream)
    await asyncio.gather(*(stream.done.wait() for stream in made))
    took_s = time.perf_counter() - began_s
    await origin.close()
    failed = [stream.error for stream in made if stream.error]
    if failed:
        raise SystemExit(f"{url}: {len(failed)} streams failed: {failed[0]}")
    return made, took_s


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def measure_small(
    url: str, pids: Sequence[int], small: Callable[[str, float], float], seconds: float
) -> dict[str, float]:
    await asyncio.to_thread(small, url, 1.0)
    used = Used(pids)
    rate = await asyncio.to_thread(small, url, seconds)
    return {"small_per_s": rate, **us(used.shares(), rate, "request")}


async def measure_streams(url: str, pids: Sequence[int], count: int) -> dict[str, float]:
    used = Used(pids)
    made, took_s = await streams(url, count)
    rate = sum(stream.chunks for stream in made) / took_s
    ttft = [stream.first_s - stream.sent_s for stream in made]
    return {
        "chunks_per_s": rate,
        **us(used.shares(), rate, "chunk"),
        "ttft_p50_ms": statistics.median(ttft) * 1000,
        "ttft_p99_ms": quantile(ttft, 0.99) * 1000,
    }


async def measure_chunks(
    url: str, pids: Sequence[int], count: int, chunks: int, seconds: float, work: Path
) -> dict[str, float]:
    """As many chunks as they offer; times to first token are not seen."""
    per_chunk = stream_bytes(url) / chunks
    used = Used(pids)
    rate = await asyncio.to_thread(streams_by_wrk, url, count, seconds, work) / per_chunk
    return {"chunks_per_s": rate, **us(used.shares(), rate, "chunk")}


async def relays_of(url: str) -> list[int]:
    """Process ids of a gateway's relays."""
    origin = Origin(url)
    try:
        answer = await origin.fetch("GET", "/chiron/status", timeout_s=10.0)
    finally:
        await origin.close()
    return [relay["pid"] for relay in json.loads(answer.body)["relays"]]


def brain_of(pid: int, relays: Sequence[int]) -> int:
    """Process id of what decides in the gateway that was started as this one."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return next(child for child in children if child not in relays) if relays else pid


async def run(
    seconds: float,
    plan: list[tuple[int, int, float]],
    changes: list[str],
    workers: list[int],
    routers: dict[str, str],
    compiled: Path | None,
    rounds: int,
) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        python = sys.executable
        targets: dict[str, dict[int, str]] = {}
        pids: dict[tuple[str, int], list[int]] = {}
        engines = {}
        for count, chunks, pace_s in plan:
            port = free_port()
            mock = start(
                stack, 0, [python, str(HERE / "gateway_mock.py"), str(port), f"--chunks={chunks}", f"--pace={pace_s}"]
            )
            engines[count] = port
            targets.setdefault("straight to the engine", {})[count] = f"http://127.0.0.1:{port}"
            pids["straight to the engine", count] = [mock.pid]
            await until_up(f"http://127.0.0.1:{port}", "/health")
        # Whatever is measured sees one engine at a time: one process for each.
        for count, _, _ in plan:
            relay = free_port()
            engine = f"http://127.0.0.1:{engines[count]}"
            process = start(stack, 1, [python, str(HERE / "gateway_relay.py"), str(relay), engine])
            targets.setdefault("bare relay", {})[count] = f"http://127.0.0.1:{relay}"
            pids["bare relay", count] = [process.pid]
            await until_up(f"http://127.0.0.1:{relay}", "/health")
            for name, interpreter in routers.items():
                port, metrics = free_port(), free_port()
                command = [
                    interpreter,
                    "-m",
                    ROUTERS[name],
                    "--host=127.0.0.1",
                    f"--port={port}",
                    "--worker-urls",
                    engine,
                ]
                command += ["--policy=round_robin", f"--prometheus-port={metrics}", "--log-level=error"]
                process = start(stack, 1, command)
                targets.setdefault(name, {})[count] = url = f"http://127.0.0.1:{port}"
                pids[name, count] = [process.pid]
                await until_up(url, "/readiness", 60.0)
            builds = ["", *([COMPILED] if compiled is not None else [])]
            for build, number in product(builds, workers):
                name = f"chiron serve{f', {number} relays' if number > 1 else ''}{build}"
                gate = free_port()
                folder = work / f"{name} {count}"
                folder.mkdir()
                env = dict(os.environ, PYTHONPATH=str(compiled)) if build else None
                (folder / "chiron.toml").write_text(CONFIG.format(port=gate, engine=engines[count]))
                serve = [python, "-m", "chiron", "serve", "chiron.toml", *(f"--set={change}" for change in changes)]
                cores = 1 if number == 1 else f"1-{max(1, (os.cpu_count() or 1) - 1)}"
                process = start(stack, cores, [*serve, f"--workers={number}"], cwd=folder, env=env)
                targets.setdefault(name, {})[count] = url = f"http://127.0.0.1:{gate}"
                await until_up(url, "/ready")
                relays = await relays_of(url)
                pids[name, count] = [brain_of(process.pid, relays), *relays]
        by_wrk = shutil.which("wrk") is not None

        def small(url: str, for_s: float) -> float:
            return small_by_wrk(url, for_s, work) if by_wrk else asyncio.run(small_by_us(url, for_s))

        found: dict[str, list[dict[str, Any]]] = {name: [] for name in targets}
        for _ in range(rounds):
            for name, urls in targets.items():
                first, *_ = plan
                row: dict[str, Any] = {"target": name}
                row |= await measure_small(urls[first[0]], pids[name, first[0]], small, seconds)
                for count, chunks, pace_s in plan:
                    url, own = urls[count], pids[name, count]
                    if by_wrk and count > CLIENTS_MAX:
                        part = await measure_chunks(url, own, count, chunks, 2 * seconds, work)
                    else:
                        part = await measure_streams(url, own, count)
                    row[f"{count}x{chunks}@{pace_s * 1000:g}ms"] = part
                    row["rss_mb"] = rss_mb(own)
                found[name].append(row)
        rows = [medians(each) for each in found.values()]
        for row in rows:
            print_row(row, plan)
        print_ratios(found, plan)
        return rows


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of rows of one target, figure by figure."""
    first, *_ = rows
    return {
        name: medians([row[name] for row in rows])
        if isinstance(value, dict)
        else statistics.median(row[name] for row in rows)
        if isinstance(value, int | float)
        else value
        for name, value in first.items()
    }


def print_ratios(rounds: dict[str, list[dict[str, Any]]], plan: list[tuple[int, int, float]]) -> None:
    """CPU over that of the base in the same round, without the brain's part where it is known."""
    base = BASE if BASE in rounds else "bare relay"
    parts = [f"{count}x{chunks}@{pace_s * 1000:g}ms" for count, chunks, pace_s in plan]
    print(f"CPU over that of {base} in the same round, of relays alone where they have processes of their own:")
    for name, rows in rounds.items():
        if name == base or name.startswith("straight"):
            continue
        pairs = list(zip(rows, rounds[base], strict=True))
        request = [over(row, by, "request") for row, by in pairs]
        chunks = [[over(row[part], by[part], "chunk") for row, by in pairs] for part in parts]
        print(f"{name:36} {spread(request)} a request, {', '.join(map(spread, chunks))} a chunk")


def over(row: dict[str, float], base: dict[str, float], what: str) -> float:
    return row.get(f"relay_us_per_{what}", row[f"us_per_{what}"]) / base[f"us_per_{what}"]


def spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


def print_row(row: dict[str, Any], plan: list[tuple[int, int, float]]) -> None:
    cells = [f"{row['target']:36}", f"{row['small_per_s']:8,.0f} req/s", f"{row['us_per_request']:5.0f} us/req"]
    if "brain_us_per_request" in row:
        cells.append(f"({row['relay_us_per_request']:.0f} relays, {row['brain_us_per_request']:.0f} brain)")
    for count, chunks, pace_s in plan:
        part = row[f"{count}x{chunks}@{pace_s * 1000:g}ms"]
        cells.append(f"{count} streams: {part['chunks_per_s']:7,.0f} chunks/s {part['us_per_chunk']:4.0f} us/chunk")
        if "brain_us_per_chunk" in part:
            cells.append(f"({part['relay_us_per_chunk']:.1f} relays, {part['brain_us_per_chunk']:.1f} brain)")
        if "ttft_p50_ms" in part:
            cells.append(f"TTFT {part['ttft_p50_ms']:5.1f}/{part['ttft_p99_ms']:5.1f} ms")
    print("  ".join([*cells, f"{row['rss_mb']:.0f} MB"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of small requests, per target")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 16 streams, one second")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="for chiron serve")
    parser.add_argument("--workers", default="1", metavar="N,N", help="chiron serve with so many workers, each in turn")
    parser.add_argument("--rounds", type=int, default=1, help="every target has its turn so often")
    parser.add_argument(
        "--router", action="append", default=[], metavar="NAME=PYTHON", help=f"also measure one of {', '.join(ROUTERS)}"
    )
    parser.add_argument("--compiled", type=Path, metavar="FOLDER", help="chiron serve with this source, too")
    given = parser.parse_args()
    if given.compiled is not None and not list(given.compiled.glob("chiron__mypyc*")):
        parser.error(f"--compiled is {given.compiled}; it must be a folder with a compiled build of chiron")
    routers = dict(each.split("=", 1) for each in given.router if "=" in each)
    if len(routers) != len(given.router) or not routers.keys() <= ROUTERS.keys():
        parser.error(f"--router is {given.router}; it must be NAME=PYTHON with a NAME of {', '.join(ROUTERS)}")
    workers = [int(number) for number in given.workers.split(",")]
    plan = [(16, 20, 0.010)] if given.quick else [(64, 200, 0.010), (512, 150, 0.015)]
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {0})
    seconds, compiled = 1.0 if given.quick else given.seconds, given.compiled and given.compiled.resolve()
    print("load before: {:.1f} {:.1f} {:.1f}".format(*os.getloadavg()))
    rows = asyncio.run(run(seconds, plan, given.set, workers, routers, compiled, given.rounds))
    print("load after: {:.1f} {:.1f} {:.1f}".format(*os.getloadavg()))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
