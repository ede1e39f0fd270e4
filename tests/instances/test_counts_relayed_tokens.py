"""Tokens in a relayed stream, as different engines write it: roles, reasons, usage and [DONE] are none."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from chiron.core.types import Request, RequestClass
from chiron.engines.rows import ENGINES
from chiron.gateway.relay.body import body_of
from chiron.gateway.relay.calls import RelayCall
from chiron.gateway.relay.upstream import EngineAddress, Placement, Upstream

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.5)
WORDS = ["One", " two", " three", " four"]


class Client:
    """A client's connection that takes everything."""

    def __init__(self) -> None:
        self.path = "/v1/chat/completions"
        self.version = "1.1"
        self.body = b"{}"
        self.started = self.paused = self.closed = False
        self.sent = b""
        self.on_pause = self.on_resume = None

    def start(self, *_: object) -> None:
        self.started = True

    def write(self, data: bytes) -> None:
        self.sent += data

    write_chunks = write


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


def framed(block: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(block), block)


def relayed(client: Client) -> tuple[RelayCall, Callable[[bytes], int]]:
    """A call whose stream has begun, and what takes chunks with their framing."""
    call = RelayCall(
        client,  # type: ignore[arg-type]
        body=body_of({}),
        stream=True,
        request_id="r",
        key_name="",
        responded=lambda status: None,
    )
    take = call.begin(SimpleNamespace(pause=None), 200, [])  # type: ignore[arg-type]
    assert take is not None
    return call, take


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_what_holds_text_is_a_token(stream: list[bytes]) -> None:
    client = Client()
    call, _ = relayed(client)
    counts = [call.data(block) for block in stream]
    assert sum(counts) == len(WORDS), counts
    assert client.sent == b"".join(stream)


@pytest.mark.parametrize("together", [1, 2, 9])
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_so_it_is_in_chunks_that_keep_their_framing(stream: list[bytes], together: int) -> None:
    """As they come, or several at once."""
    client = Client()
    _, take = relayed(client)
    chunks = [framed(block) for block in stream]
    blocks = [b"".join(chunks[at : at + together]) for at in range(0, len(chunks), together)]
    counts = [take(block) for block in blocks]
    assert sum(counts) == len(WORDS), counts
    assert client.sent == b"".join(chunks)


def test_what_ends_like_the_block_before_is_looked_at_where_it_may_differ() -> None:
    """Its number of events, whether it is the first one of another try, and what comes before its end."""
    call, take = relayed(Client())
    role, reason = chunk({"role": "assistant", "content": ""}), chunk({}, "stop")
    one, two, three, four = (chunk({"content": word}) for word in WORDS)
    blocks = [role, one, two, three + four, one, reason, two, two + DONE]
    assert [take(framed(block)) for block in blocks] == [0, 1, 1, 2, 1, 0, 1, 1]
    assert take(framed(two) + framed(three)) == 2
    call.begin(SimpleNamespace(pause=None), 200, [])  # type: ignore[arg-type]
    assert [take(framed(block)) for block in (role, one)] == [0, 1]


@pytest.mark.parametrize(
    ("status", "version", "headers"),
    [
        (400, "1.1", []),
        (200, "1.0", []),
        (200, "1.1", [(b"content-length", b"900")]),
    ],
)
def test_other_answers_are_framed_anew(status: int, version: str, headers: list[tuple[bytes, bytes]]) -> None:
    client = Client()
    client.version = version
    call, _ = relayed(Client())
    call.incoming = client  # type: ignore[assignment]
    assert call.begin(SimpleNamespace(pause=None), status, headers) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [1, 9, 40, 60, 75])
def test_usage_counts_also_where_chunks_cut_it(cut: int) -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":5,"total_tokens":17}}\n\n'
    answered: list[tuple[int, int]] = []
    clock = SimpleNamespace(now_s=0.0, elapsed_s=lambda: 1.0)
    reports = SimpleNamespace(
        first_token=lambda placed: None,
        answered=lambda placed, status, tokens, prompt_tokens: answered.append((tokens, prompt_tokens)),
    )
    call, _ = relayed(Client())
    sent = SimpleNamespace(over=False, on_chunks=None)
    upstream = Upstream(
        clock=clock,  # type: ignore[arg-type]
        address=EngineAddress(url="http://127.0.0.1:9", row=ENGINES["openai"], model="m"),
        origin=SimpleNamespace(send=lambda *args, **more: sent),  # type: ignore[arg-type]
        reports=reports,  # type: ignore[arg-type]
        counts=SimpleNamespace(tokens=0, held_tokens=0),  # type: ignore[arg-type]
    )
    run = upstream.carry(Placement(1, Request(1, "m", CHAT, 0.0, 3, call)))
    run.on_head(200, [])
    assert sent.on_chunks is not None
    for block in (*(chunk({"content": word}) for word in WORDS), usage[:cut], usage[cut:], DONE):
        sent.on_chunks(framed(block))
    call.incoming.closed = True
    run.on_end()
    assert answered == [(5, 12)]
