"""A small OpenAI endpoint for tests of the load generator: real sockets, scripted answers.

What it does with a request is decided by the model's name, so that one server serves every case.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from typing import Any

from chiron.net.server import Incoming, ServerLimits, serve

EVENTS = [(b"content-type", b"text/event-stream")]


class Endpoint:
    """One token each ``gap_s`` after ``ttft_s``; four bytes are a token, and the template adds ten."""

    def __init__(self, *, ttft_s: float = 0.0, gap_s: float = 0.0, spoil: str = "", holds: bool = False) -> None:
        self.ttft_s = ttft_s
        self.gap_s = gap_s
        self.holds = holds
        """Streams begin only once they are released."""
        self.spoil = spoil
        """What is wrong with batches: ``doubled``, ``missing``, ``failed``, ``stuck``; ``absent``: no batch API."""
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.left = 0
        """Streams whose client went away."""
        self.loop: asyncio.AbstractEventLoop
        """That it is served on."""
        self._streams: list[_Stream] = []
        self._released = 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}

    def release(self, count: int) -> None:
        """Let the first so many streams begin; from any thread, and no harm if they have begun."""
        self.loop.call_soon_threadsafe(self._release, count)

    def _release(self, count: int) -> None:
        begin, self._released = self._released, max(self._released, count)
        for stream in self._streams[begin : self._released]:
            self.loop.call_later(self.ttft_s, stream.step)

    def handle(self, incoming: Incoming) -> None:
        if incoming.path.endswith("completions"):
            self._generate(incoming, json.loads(incoming.body))
        elif incoming.path == "/v1/files" and self.spoil != "absent":
            self._upload(incoming)
        elif incoming.path.startswith("/v1/files/"):
            incoming.respond(200, self.files[incoming.path.split("/")[3]], b"application/jsonl")
        elif incoming.path == "/v1/batches":
            self._create(incoming, json.loads(incoming.body))
        elif incoming.path.startswith("/v1/batches/"):
            batch = self.batches[incoming.path.split("/")[3]]
            if incoming.path.endswith("/cancel"):
                batch["status"] = "cancelled"
            elif self.spoil != "stuck" and batch["status"] not in ("cancelled", "failed"):
                self._advance(batch)
            incoming.respond(200, json.dumps(batch).encode())
        else:
            incoming.respond(404, b'{"error": {"message": "no such path"}}')

    def _generate(self, incoming: Incoming, body: dict[str, Any]) -> None:
        self.bodies.append(body)
        self.headers.append(dict(incoming.headers))
        model = body["model"]
        if model.isdigit() and len(self.bodies) > 2:  # The probes are answered.
            error = {"error": {"message": "too much", "type": "rate_limit_error", "code": "busy"}}
            incoming.respond(int(model), json.dumps(error).encode())
        elif model == "silent":
            pass
        elif model == "strict" and "ignore_eos" in body:
            incoming.respond(422, b'{"error": {"message": "extra field: ignore_eos"}}')
        elif not body.get("stream") or model == "whole":
            incoming.respond(200, json.dumps(answer(body)).encode())
        else:
            self._streams.append(stream := _Stream(self, incoming, body))
            if not self.holds or len(self._streams) <= self._released:
                self.loop.call_later(self.ttft_s, stream.step)

    def _upload(self, incoming: Incoming) -> None:
        head = b"content-type: " + (incoming.header(b"content-type") or b"") + b"\r\n\r\n"
        parts: list[Any] = BytesParser().parsebytes(head + incoming.body).get_payload()  # type: ignore[assignment]
        name = f"file-{len(self.files)}"
        self.files[name] = next(p.get_payload(decode=True) for p in parts if p.get_filename())
        incoming.respond(200, json.dumps({"id": name, "object": "file"}).encode())

    def _create(self, incoming: Incoming, body: dict[str, Any]) -> None:
        count = len(self.files[body["input_file_id"]].splitlines())
        batch = {
            "id": f"batch_{len(self.batches)}",
            "status": "failed" if self.spoil == "failed" else "validating",
            "request_counts": {"total": count, "completed": 0, "failed": 0},
            **body,
        }
        if self.spoil == "failed":
            batch["errors"] = {"data": [{"line": 3, "message": "no such model"}]}
        self.batches[batch["id"]] = batch
        incoming.respond(200, json.dumps(batch).encode())

    def _advance(self, batch: dict[str, Any]) -> None:
        """Half of the items at each look; the last one fails."""
        counts = batch["request_counts"]
        batch["status"] = "in_progress"
        counts["completed"] = min(counts["total"] - 1, counts["completed"] + (counts["total"] + 1) // 2)
        if counts["completed"] < counts["total"] - 1:
            return
        counts["failed"] = 1
        *good, bad = self.files[batch["input_file_id"]].splitlines()
        lines = [self._result(json.loads(line)) for line in reversed(good)]
        if self.spoil == "doubled":
            lines.append(lines[0])
        elif self.spoil == "missing":
            lines.pop()
        failed = {"custom_id": json.loads(bad)["custom_id"], "response": None, "error": {"code": "poisoned"}}
        self.files["file-out"] = b"".join(lines)
        self.files["file-err"] = json.dumps(failed).encode()  # No newline at its end: allowed.
        batch |= {"status": "completed", "output_file_id": "file-out", "error_file_id": "file-err"}

    def _result(self, line: dict[str, Any]) -> bytes:
        response = {"status_code": 200, "body": answer(line["body"])}
        return json.dumps({"custom_id": line["custom_id"], "response": response, "error": None}).encode() + b"\n"


class _Stream:
    """One streamed answer."""

    def __init__(self, endpoint: Endpoint, incoming: Incoming, body: dict[str, Any]) -> None:
        self._endpoint, self._incoming, self._body = endpoint, incoming, body
        self._left = int(body["max_tokens"])
        self._chat = "messages" in body
        incoming.on_close = self._gone

    def _gone(self) -> None:
        self._endpoint.left += 1

    def step(self) -> None:
        incoming, model = self._incoming, self._body["model"]
        if incoming.closed:
            return
        if not incoming.started:
            incoming.start(200, EVENTS)
            if self._chat:
                self._say({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        if model == "cut" and self._left == 1:
            incoming.finish()
            return
        if model == "broken" and self._left == 1:
            incoming.abort()
            return
        if model == "error":
            self._say({"error": {"message": "out of memory", "code": "engine_dead"}})
            incoming.finish()
            return
        self._left -= 1
        piece = {"delta": {"content": "word "}} if self._chat else {"text": "word "}
        self._say({"choices": [{"index": 0, **piece, "finish_reason": None if self._left else "length"}]})
        if self._left:
            self._endpoint.loop.call_later(self._endpoint.gap_s, self.step)
            return
        if model != "uncounted":
            self._say({"choices": [], "usage": usage(self._body)})
        incoming.write(b"data: [DONE]\n\n")
        incoming.finish()

    def _say(self, event: dict[str, Any]) -> None:
        self._incoming.write(b"data: " + json.dumps(event).encode() + b"\n\n")


def usage(body: dict[str, Any]) -> dict[str, int]:
    if "messages" in body:
        prompt = 10 + len(body["messages"][0]["content"]) // 4
    else:
        prompt = len(body["prompt"]) if isinstance(body["prompt"], list) else len(body["prompt"]) // 4
    return {"prompt_tokens": prompt, "completion_tokens": int(body["max_tokens"])}


def answer(body: dict[str, Any]) -> dict[str, Any]:
    message = {"message": {"role": "assistant", "content": "word"}} if "messages" in body else {"text": "word"}
    made: dict[str, Any] = {"choices": [{"index": 0, **message, "finish_reason": "length"}]}
    return made if body["model"] == "uncounted" else made | {"usage": usage(body)}


@contextmanager
def running(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Serve from a thread of its own, on a free port."""
    loop = endpoint.loop = asyncio.new_event_loop()
    server = loop.run_until_complete(serve(endpoint.handle, limits=ServerLimits(body_max_bytes=64 << 20)))
    endpoint.url = f"http://127.0.0.1:{server.port}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield endpoint
    finally:
        asyncio.run_coroutine_threadsafe(server.close(0.0), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()
