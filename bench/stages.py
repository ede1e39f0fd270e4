"""What hops between stages cost, and what replicas of the slowest stage bring.

    python bench/stages.py --json out/stages.json

A tiny model (8 layers, hidden 256) in 1, 2, 4 and 8 stage processes behind one head, one sequence and 16 at once: time
per token, CPU time of all processes per token, and what a hop adds, against one stage. Then four stages, of which the
second is paced to 20 ms a step and 5 ms a sequence, with 1, 2 and 3 replicas of it: tokens per second. Figures of one
machine; run it on an idle one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from chiron.engines.staged.tiny import TinySettings, write_tiny

LAYERS = 8
STAGES = (1, 2, 4, 8)


def start(model: Path, stages: list[dict[str, Any]]) -> tuple[subprocess.Popen[str], int]:
    command = [
        sys.executable,
        "-m",
        "chiron.engines.staged.instance",
        "--model",
        str(model),
        "--served-model-name",
        "m",
    ]
    process = subprocess.Popen(
        [*command, "--stages", json.dumps(stages)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "ready port=" in line:
            return process, int(line.rpartition("=")[2])
    raise RuntimeError("the pipeline did not start")


def cpu_s(process: subprocess.Popen[str]) -> float:
    root = psutil.Process(process.pid)
    return float(sum(sum(each.cpu_times()[:2]) for each in [root, *root.children(recursive=True)]))


async def ask(port: int, prompt: list[int], tokens: int) -> None:
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    said = await reader.read()
    writer.close()
    assert said.startswith(b"HTTP/1.1 200"), said[:300]


def load(port: int, sequences: int, tokens: int) -> float:
    """Seconds that so many sequences at once take."""

    async def all_of_them() -> None:
        await asyncio.gather(*(ask(port, [i + 1] * 8, tokens) for i in range(sequences)))

    began_s = time.perf_counter()
    asyncio.run(all_of_them())
    return time.perf_counter() - began_s


def hops(model: Path, tokens: int) -> list[dict[str, float]]:
    found = []
    for count in STAGES:
        size = LAYERS // count
        process, port = start(model, [{"layers": f"{i * size}-{i * size + size - 1}"} for i in range(count)])
        try:
            for sequences in (1, 16):
                load(port, sequences, 8)
                before_s = cpu_s(process)
                took_s = min(load(port, sequences, tokens) for _ in range(3))
                used_s = (cpu_s(process) - before_s) / 3
                found.append(
                    {
                        "stages": count,
                        "sequences": sequences,
                        "ms_per_step": 1e3 * took_s / tokens,
                        "tokens_per_s": sequences * tokens / took_s,
                        "cpu_ms_per_token": 1e3 * used_s / (sequences * tokens),
                    }
                )
        finally:
            process.terminate()
            process.wait()
    return found


def replicas(model: Path, tokens: int) -> list[dict[str, float]]:
    found = []
    for count in (1, 2, 3):
        stages: list[dict[str, Any]] = [{"layers": f"{2 * i}-{2 * i + 1}", "pace_ms": 10} for i in range(4)]
        stages[1] |= {"pace_ms": 20, "pace_sequence_ms": 5, "min": count, "max": count}
        process, port = start(model, stages)
        try:
            load(port, 24, 4)
            while True:  # All replicas take part once they are up.
                load(port, 24, 4)
                if ready(port) == count:
                    break
            load(port, 24, 4)
            found.append({"replicas": count, "tokens_per_s": 24 * tokens / load(port, 24, tokens)})
        finally:
            process.terminate()
            process.wait()
    return found


def ready(port: int) -> int:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/chiron/stages") as answer:
        return int(json.load(answer)["stages"][1]["ready"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        model = write_tiny(Path(directory) / "tiny", TinySettings(layers=LAYERS))
        result = {"hops": hops(model, options.tokens), "replicas": replicas(model, options.tokens)}
    print(f"{os.cpu_count()} cores, load average before {load_before:.1f}\n")
    print("| stages | sequences | ms per step | tokens/s | CPU ms per token |\n|---|---|---|---|---|")
    for row in result["hops"]:
        figures = [f"{row[key]:.2f}" for key in ("ms_per_step", "tokens_per_s", "cpu_ms_per_token")]
        print(f"| {row['stages']} | {row['sequences']} | {' | '.join(figures)} |")
    print("\n| replicas of the slow stage | tokens/s |\n|---|---|")
    for row in result["replicas"]:
        print(f"| {row['replicas']} | {row['tokens_per_s']:.1f} |")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
