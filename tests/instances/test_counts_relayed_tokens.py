"""Tokens in a relayed stream, as different engines write it: roles, reasons, usage and [DONE] are none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from chiron.gateway.relay.body import body_of
from chiron.gateway.relay.calls import RelayCall

WORDS = ["One", " two", " three", " four"]


class Client:
    """A client's connection that takes everything."""

    def __init__(self) -> None:
        self.path = "/v1/chat/completions"
        self.body = b"{}"
        self.started = self.paused = self.closed = False
        self.sent = b""
        self.on_pause = self.on_resume = None

    def start(self, *_: object) -> None:
        self.started = True

    def write(self, data: bytes) -> None:
        self.sent += data


def chunk(delta: dict[str, Any] | None, reason: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
    return b"data: " + orjson.dumps({"object": "chat.completion.chunk", "choices": choices, **more}) + b"\n\n"


USAGE = chunk(None, usage={"prompt_tokens": 3, "completion_tokens": 4})
DONE = b"data: [DONE]\n\n"
STREAMS = {
    "role with the first token's block, the last word has the reason": [
        chunk({"role": "assistant", "content": ""}) + chunk({"content": WORDS[0]}),
        *(chunk({"content": word}) for word in WORDS[1:-1]),
        chunk({"content": WORDS[-1]}, "stop") + DONE,
    ],
    "role alone, reason alone": [
        chunk({"role": "assistant", "content": None}),
        *(chunk({"content": word}) for word in WORDS),
        chunk({}, "stop"),
        USAGE + DONE,
    ],
    "reason with an empty word": [
        chunk({"role": "assistant", "content": WORDS[0]}),
        *(chunk({"content": word}) for word in WORDS[1:]),
        chunk({"content": ""}, "length") + USAGE + DONE,
    ],
    "all at once": [
        chunk({"role": "assistant", "content": ""})
        + b"".join(chunk({"content": word}) for word in WORDS)
        + chunk({}, "stop")
        + DONE
    ],
    "thoughts": [
        chunk({"role": "assistant", "content": "", "reasoning_content": WORDS[0]}),
        *(chunk({"content": None, "reasoning_content": word}) for word in WORDS[1:]),
        chunk({}, "stop") + DONE,
    ],
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_what_holds_text_is_a_token(stream: list[bytes]) -> None:
    client = Client()
    call = RelayCall(
        client,  # type: ignore[arg-type]
        body=body_of({}),
        stream=True,
        request_id="r",
        key_name="",
        responded=lambda status: None,
    )
    call.begin(SimpleNamespace(pause=None), 200, [])  # type: ignore[arg-type]
    counts = [call.data(block) for block in stream]
    assert sum(counts) == len(WORDS), counts
    assert client.sent == b"".join(stream)
