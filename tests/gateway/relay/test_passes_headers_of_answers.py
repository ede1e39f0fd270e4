"""Of an engine's headers clients get those that speak of the answer, and none that speak of a connection or a site."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chiron.net.server import Incoming
from scripted_engine import CHAT, ScriptedEngine, before, body

ANSWERS = {
    "cache-control": "no-cache",
    "content-language": "en",
    "openai-processing-ms": "5",
    "retry-after": "3",
    "x-accel-buffering": "no",
    "x-engine": "a",
    "x-ratelimit-remaining-tokens": "7",
}
NOT_THEIRS = {
    "access-control-allow-origin": "*",
    "alt-svc": 'h3="engine:443"',
    "clear-site-data": '"*"',
    "connection": "x-hop, keep-alive",
    "keep-alive": "timeout=5",
    "location": "http://engine/",
    "proxy-authenticate": "Basic",
    "refresh": "0; url=http://engine/",
    "server": "engine",
    "set-cookie": "a=b",
    "strict-transport-security": "max-age=1",
    "te": "trailers",
    "trailer": "x-a",
    "via": "1.1 engine",
    "www-authenticate": "Basic",
    "x-accel-redirect": "/etc/passwd",
    "x-forwarded-for": "10.0.0.1",
    "x-hop": "1",
    "x-sendfile": "/etc/passwd",
}


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("stream", [False, True])
def test_headers_of_an_engines_answer(tmp_path: Path, status: int, stream: bool) -> None:
    sent = [(name.encode(), value.encode()) for name, value in {**ANSWERS, **NOT_THEIRS}.items()]

    def act(incoming: Incoming) -> None:
        if stream:
            incoming.start(status, [*sent, (b"content-type", b"text/event-stream")])
            incoming.write(b"data: [DONE]\n\n")
            incoming.finish()
        else:
            incoming.respond(status, b'{"choices": []}', headers=sent)

    async def main() -> None:
        async with before(tmp_path, ScriptedEngine(act)) as (_, client):
            answer = await client.fetch("POST", CHAT.decode(), body=body(stream=stream))
            assert answer.status == status
            kind = "text/event-stream" if stream else "application/json"
            theirs = dict(answer.headers)
            assert theirs.pop("content-type") == kind
            for ours in ("date", "x-request-id", "content-length", "transfer-encoding"):
                theirs.pop(ours, None)
            assert theirs == ANSWERS

    asyncio.run(main())
