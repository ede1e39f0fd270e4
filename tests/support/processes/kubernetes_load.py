"""Pods that stream an answer, and clients that want one after another."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiron.fleet.kubernetes.testing.kubelet import Container, Run, run_process
from chiron.net.client import Header, NetError, Origin
from chiron.net.server import Incoming, serve
from kubernetes_site import PORT, LoopContainer

CHUNKS, CHUNK_S = 10, 0.02


async def run_engine_on_loop(pod: Mapping[str, Any], address: str) -> Container:
    """Streams ten chunks, one each 20 ms."""

    def handle(incoming: Incoming) -> None:
        if incoming.method != b"POST":
            incoming.respond(200, b"{}")
            return
        incoming.start(200, [(b"content-type", b"text/event-stream")])
        loop = asyncio.get_running_loop()

        def write(number: int) -> None:
            if incoming.closed:
                return
            if number == CHUNKS:
                incoming.write(b"data: [DONE]\n\n")
                incoming.finish()
                return
            choice = {"index": 0, "delta": {"content": "x"}, "finish_reason": "stop" if number == CHUNKS - 1 else None}
            head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            incoming.write(b"data: " + json.dumps(head).encode() + b"\n\n")
            loop.call_later(CHUNK_S, write, number + 1)

        write(0)

    return LoopContainer(await serve(handle, host=address, port=PORT))


class _Stream:
    """The answer to one request."""

    def __init__(self) -> None:
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._data = b""

    def on_head(self, status: int, headers: list[Header]) -> None:
        self._status = status

    def on_data(self, data: bytes) -> None:
        self._data += data

    def on_end(self) -> None:
        good = self._status == 200 and b"[DONE]" in self._data and b'"error"' not in self._data
        self.over.set_result("" if good else f"{self._status}: {self._data[-300:]!r}")

    def on_error(self, error: NetError) -> None:
        self.over.set_result(str(error))


class Load:
    """So many clients, each with one streamed request after another."""

    def __init__(self, url: str, clients: int, **body: Any) -> None:
        self.sent = 0
        self.failures: list[str] = []
        self._origin = Origin(url)
        messages = [{"role": "user", "content": "hello"}]
        self._body = json.dumps({"model": "m", "messages": messages, "stream": True, **body}).encode()
        self._stopping = False
        self._tasks = [asyncio.get_running_loop().create_task(self._run()) for _ in range(clients)]

    async def _run(self) -> None:
        while not self._stopping:
            stream = _Stream()
            headers = [(b"content-type", b"application/json")]
            self._origin.send(b"POST", b"/v1/chat/completions", headers, self._body, stream)
            if failure := await stream.over:
                self.failures.append(failure)
            self.sent += 1

    async def stop(self) -> None:
        """After the requests that run."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        await self._origin.close()


def emulated_pods(directory: Path) -> tuple[dict[str, Any], Run]:
    words = (sys.executable, "-m", "chiron.engines.serve.emulated", "--host", "$(POD_IP)", "--port", str(PORT))
    more = ("--profile", "llama-3.1-8b/a100/tp1", "--served-model-name", "m", "--output-mean", "60")
    container = {
        "command": [*words, *more],
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": PORT}},
    }
    return container, run_process(directory)
