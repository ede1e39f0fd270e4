"""One answer, however the network cuts it."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron.load.exchange import EVENT_MAX_BYTES, Exchange

USAGE = {"prompt_tokens": 7, "completion_tokens": 3}


def events(*bodies: Any, end: bytes = b"\n\n", done: bool = True) -> bytes:
    made = b"".join(b"data: " + json.dumps(body).encode() + end for body in bodies)
    return made + b"data: [DONE]" + end if done else made


def chat(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


def read(pieces: list[bytes], status: int = 200, kind: bytes = b"text/event-stream; charset=utf-8") -> Exchange:
    ended: list[Exchange] = []
    exchange = Exchange(0, 0.0, 0, ended.append)
    exchange.on_head(status, [(b"content-type", kind)])
    for piece in pieces:
        if exchange.outcome is None:
            exchange.on_data(piece)
    if exchange.outcome is None:
        exchange.on_end()
    assert ended == [exchange]
    return exchange


WHOLE = events(chat(""), chat("a"), chat("b"), chat("é", "stop"), {"choices": [], "usage": USAGE})


@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=8), st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_cuts_anywhere_change_nothing(cuts: list[int], end: bytes) -> None:
    whole = WHOLE.replace(b"\n\n", end)
    edges = [0, *sorted(set(cuts)), len(whole)]
    exchange = read([whole[a:b] for a, b in pairwise(edges)])
    assert (exchange.outcome, exchange.error) == ("finished", "")
    assert (exchange.pieces, exchange.prompt_tokens, exchange.completion_tokens) == (3, 7, 3)
    assert exchange.first_s > 0
    assert len(exchange.gaps) <= 2


def test_the_role_is_no_token_and_reasoning_tools_and_plain_text_are() -> None:
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    assert read([events(role)]).pieces == 0
    for delta in ({"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}, {"content": "x"}):
        assert read([events({"choices": [{"delta": delta}]})]).pieces == 1
    assert read([events({"choices": [{"text": "x"}]})]).pieces == 1


def test_gaps_are_between_blocks() -> None:
    exchange = read([events(chat("a"), done=False), events(chat("b"), chat("c"), done=False), events(chat("d"))])
    assert (exchange.pieces, len(exchange.gaps)) == (4, 2)


@pytest.mark.parametrize(("pieces", "error"), [
    ([events(chat("a"), done=False)], "cut short"),
    ([b"data: {oops\n\n", events()], "malformed event"),
    ([b"data: [1]\n\n", events()], "malformed event"),
    ([b'data: {"choices": [7]}\n\n', events()], "malformed event"),
    ([b'data: {"usage": {"prompt_tokens": null}}\n\n', events()], "malformed event"),
    ([events({"error": {"message": "m", "type": "server_error"}}, done=False)], "stream error: server_error"),
    ([events({"error": "words"}, done=False)], "stream error"),
    ([b"data: " + b"x" * (EVENT_MAX_BYTES + 1)], "event too long"),
])  # fmt: skip
def test_what_is_no_good_stream_fails_by_name(pieces: list[bytes], error: str) -> None:
    exchange = read(pieces)
    assert (exchange.outcome, exchange.error) == ("failed", error)


def test_a_finish_reason_ends_a_stream_as_well_as_done_does() -> None:
    assert read([events(chat("a", "length"), done=False)]).outcome == "finished"
    assert read([events(chat("a"), done=False) + b"data: [DONE]"]).outcome == "finished"  # no newline at the end


@pytest.mark.parametrize(("status", "body", "outcome", "error"), [
    (429, b'{"error": {"code": "rate_limit_exceeded", "message": "m"}}', "shed", "http 429: rate_limit_exceeded"),
    (503, b"<html>", "shed", "http 503"),
    (400, b'{"error": {"code": "bad_length", "message": "m"}}', "rejected", "http 400: bad_length"),
    (422, b"", "rejected", "http 422"),
    (401, b"", "failed", "http 401"),
    (500, b"", "failed", "http 500"),
    (404, b'{"detail": "x"}', "rejected", "http 404"),
    (204, b"", "failed", "http 204"),
    (200, b"", "failed", "malformed event"),
    (200, b"{}", "failed", "cut short"),
    (500, b"x" * (EVENT_MAX_BYTES + 1), "failed", "answer too long"),
])  # fmt: skip
def test_answers_that_are_no_stream(status: int, body: bytes, outcome: str, error: str) -> None:
    exchange = read([body], status, b"application/json")
    assert (exchange.outcome, exchange.error) == (outcome, error)
