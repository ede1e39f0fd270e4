"""A pipeline on loopback sockets: stages and head on one loop, each stage computing in its own thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from chiron.engines.serve.http import EngineServer
from chiron.engines.staged.head import HeadServer, make_head
from chiron.engines.staged.head_engine import HeadEngine, HeadSettings
from chiron.engines.staged.layers import StageLayers
from chiron.engines.staged.pipeline import PipelineSettings
from chiron.engines.staged.replica import LinkSettings
from chiron.engines.staged.service import StageService
from chiron.engines.staged.split import StageRange, read_range
from chiron.engines.staged.tokenizer import ModelTokenizer
from chiron.engines.staged.weights import read_model_files
from chiron.net.server import HttpServer, serve

PATIENT = LinkSettings(silent_s=60.0, call_s=120.0, connect_s=60.0, retry_s=0.05, ping_s=0.1)
WAIT_S = 60.0


class LocalReplica:
    """One replica of a stage."""

    def __init__(self, service: StageService, listener: asyncio.Server) -> None:
        self.service = service
        self._listener = listener
        self.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        self._dies = threading.Event()

    def hold(self) -> None:
        """It computes nothing more until it dies."""
        self.service._thread.submit(self._dies.wait)

    async def die(self) -> None:
        """Its connections break, as when its process is killed."""
        self._listener.close()
        self._dies.set()
        for head in list(self.service._heads):
            head.wire.abort("killed")
        await self.service.close()


class StagedSite:
    def __init__(self, directory: Path, splits: Sequence[str], pipeline: PipelineSettings, head: HeadSettings) -> None:
        self.files = read_model_files(directory)
        self.ranges = [read_range(each) for each in splits]
        self.replicas: list[list[LocalReplica]] = [[] for _ in splits]
        self._all: list[LocalReplica] = []
        self.engine: HeadEngine = make_head(
            self.files, ModelTokenizer(directory), self.ranges, head, pipeline, dtype="float32"
        )
        self.server: HttpServer | None = None

    async def add(self, stage: int, **settings: Any) -> LocalReplica:
        replica = await start_replica(self.files, self.ranges[stage], **settings)
        self.replicas[stage].append(replica)
        self._all.append(replica)
        return replica

    def tell(self) -> None:
        self.engine.pipeline.set_replicas([[each.address for each in replicas] for replicas in self.replicas])

    async def serve(self) -> None:
        server = EngineServer(self.engine, ["tiny"], {})
        self.server = await serve(HeadServer(self.engine, server).handle)
        self.engine.start()

    async def close(self) -> None:
        await self.engine.close()
        for replica in self._all:
            await replica.die()
        if self.server is not None:
            await self.server.close(0.0)

    async def post(self, path: str, body: dict[str, Any], method: str = "POST") -> tuple[int, bytes]:
        """One request; its status and whole body."""
        assert self.server is not None
        return await request(self.server.port, path, body, method)

    async def complete(self, prompt: list[int], tokens: int, **more: Any) -> list[int]:
        """Greedy tokens of a completion that goes on beyond end tokens."""
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        status, said = await self.post("/v1/completions", {**body, **more})
        assert status == 200, said
        found: list[int] = json.loads(said)["choices"][0]["token_ids"]
        return found


async def start_replica(files: Any, stage: StageRange, *, kv_tokens: int = 50_000, **settings: Any) -> LocalReplica:
    layers = StageLayers(files, stage, dtype="float32")
    given = {"limit": 64, "silent_s": WAIT_S, **settings}
    service = StageService(layers, files.fingerprint, kv_capacity_tokens=kv_tokens, **given)
    service.start()
    listener = await asyncio.get_running_loop().create_server(service.accept, "127.0.0.1", 0)
    return LocalReplica(service, listener)


@asynccontextmanager
async def staged_site(
    directory: Path,
    splits: Sequence[str],
    *,
    pipeline: PipelineSettings | None = None,
    head: HeadSettings | None = None,
    replicas: Sequence[int] = (),
    **settings: Any,
) -> AsyncIterator[StagedSite]:
    site = StagedSite(
        directory,
        splits,
        pipeline or PipelineSettings(link=PATIENT, absent_s=600.0),
        head or HeadSettings(name="tiny", model_len_max=2048),
    )
    try:
        for stage, count in enumerate(replicas or [1] * len(splits)):
            for _ in range(count):
                await site.add(stage, **settings)
        site.tell()
        await site.serve()
        await until(lambda: all(each.up for stage in site.engine.pipeline.replicas for each in stage))
        yield site
    finally:
        await site.close()


async def request(port: int, path: str, body: dict[str, Any] | None, method: str = "POST") -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    said = await reader.read()
    writer.close()
    top, _, rest = said.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in top.lower():
        whole = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            whole += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        rest = whole
    return int(top.split()[1]), rest


async def announce(port: int, length: int) -> tuple[int, bytes]:
    """The answer to a completion that says how long its body is, and sends none of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % length)
    said = await reader.read()
    writer.close()
    top, _, rest = said.partition(b"\r\n\r\n")
    return int(top.split()[1]), rest


async def until(met: Any) -> None:
    """Wait for what must come."""
    async with asyncio.timeout(WAIT_S):
        while not met():
            await asyncio.sleep(0.01)
