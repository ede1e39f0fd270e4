"""A gateway with a cascade of two models, each on an engine that answers as a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from chiron.gateway.service import Service
from chiron.net.client import Origin
from chiron.net.server import Incoming, serve
from live_gateway import serving, until
from scripted_engine import SSE, ScriptedEngine

CONFIG = """
[models.small]
engine = "{engine}"
endpoints = ["{small}"]
max_num_seqs = 2
context_tokens = 4000
[models.large]
engine = "openai"
endpoints = ["{large}"]
[models.chat]
cascade = {{ first = "small", then = "large", after_tokens = 3{rule} }}
aliases = ["gpt"]
"""


def entry(logprob: float, *others: float) -> dict[str, Any]:
    top = [{"token": f"t{i}", "logprob": value, "bytes": None} for i, value in enumerate((logprob, *others))]
    return {"token": "t0", "logprob": logprob, "bytes": None, "top_logprobs": top}


def event(choice: dict[str, Any] | None, **more: Any) -> bytes:
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "small"}
    return b"data: " + json.dumps(head | {"choices": [choice] if choice else []} | more).encode() + b"\n\n"


def token(text: str, logprob: float | None) -> bytes:
    """One of the small model, with its likelihood and those of two others."""
    logprobs = None if logprob is None else {"content": [entry(logprob, logprob - 1.0, logprob - 2.0)]}
    choice = {"index": 0, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}
    return event(choice, usage=None)


def close(tokens: int) -> bytes:
    usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
    end = event({"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"})
    return end + event(None, usage=usage) + b"data: [DONE]\n\n"


def say(incoming: Incoming, *logprobs: float | None) -> None:
    """A whole answer of the small model: a word for each token."""
    incoming.start(200, SSE)
    incoming.write(b"".join(token(f"w{i} ", each) for i, each in enumerate(logprobs)) + close(len(logprobs)))
    incoming.finish()


def text_of(data: bytes) -> str:
    """Of a stream."""
    chunks = [json.loads(each[6:]) for each in data.decode().split("\n\n") if each.startswith("data: {")]
    return "".join(each["choices"][0]["delta"].get("content", "") for each in chunks if each.get("choices"))


async def post(origin: Origin, fields: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
    body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hello"}], **fields}).encode()
    return await origin.fetch("POST", "/v1/chat/completions", body=body, headers=headers, timeout_s=60.0)


async def tally(origin: Origin) -> dict[str, Any]:
    """What the status says of the cascade."""
    status = json.loads((await origin.fetch("GET", "/chiron/status")).body)
    found: dict[str, Any] = next(iter(status["cascades"]), {})
    return found


async def tally_with(origin: Origin, **figures: Any) -> dict[str, Any]:
    """``tally``, once it has these figures: relays tell of ends a moment later."""
    found = await tally(origin)
    with suppress(TimeoutError):
        async with asyncio.timeout(60):
            while not figures.items() <= found.items():
                await asyncio.sleep(0.02)
                found = await tally(origin)
    assert found == found | figures
    return found


@asynccontextmanager
async def cascade(
    directory: Path,
    small: ScriptedEngine,
    large: ScriptedEngine,
    *,
    relays: int = 0,
    rule: str = "",
    engine: str = "openai",
    extra: str = "",
    changes: Sequence[str] = (),
) -> AsyncIterator[tuple[Service, Origin]]:
    async with AsyncExitStack() as stack:
        for each in (small, large):
            each.server = await serve(each.handle, port=each.port)
            stack.push_async_callback(each.close)
        if "first_wait" not in rule:  # However slow the machine is.
            rule += ', first_wait = "60s"'
        text = CONFIG.format(small=small.url, large=large.url, rule=rule, engine=engine) + extra
        service = await stack.enter_async_context(serving(directory, text, relays, changes))
        await until(lambda: len(service.engines.live) == 2, "the engines are ready")
        origin = Origin(service.url, connect_timeout_s=60.0)
        stack.push_async_callback(origin.close)
        yield service, origin
