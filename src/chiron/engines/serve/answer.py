"""Answers of an engine server in OpenAI's form.

``Answer`` renders what one request gets: events of a stream, or the whole. A stream holds one event per choice and
engine step; a choice's first event carries the role and its last the finish reason, so a choice of n steps is n events
and its first event is its first token.

A call of a tool comes in pieces like text: the first opens it with its id and name, the others go on with its
arguments.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quote
from typing import Any, NamedTuple

from chiron.engines.serve.openai import FinishReason, GenerationRequest, Usage
from chiron.engines.serve.request_error import RequestError

DONE = b"data: [DONE]\n\n"
_LOGPROB_MIN = -9999.0
"""Stands for the logarithm of nothing, as in OpenAI's API: JSON has no infinity."""


class CallPiece(NamedTuple):
    """A part of a call of a tool."""

    call: int
    """Which call of the answer."""
    arguments: str = ""
    id: str = ""
    name: str = ""
    """Of the piece that opens the call."""


class TokenLogprob(NamedTuple):
    """How likely a token was, and what else might have come."""

    token: bytes
    logprob: float | None
    """None: of the first token of a prompt, which nothing comes before."""
    top: tuple[tuple[bytes, float], ...] = ()


class Part(NamedTuple):
    """What one choice has to say at once."""

    text: str = ""
    token_ids: Sequence[int] = ()
    calls: Sequence[CallPiece] = ()
    logprobs: Sequence[TokenLogprob] = ()


class Answer:
    """Renders the answer to one request."""

    __slots__ = ("_after_text", "_before_text", "_begun", "_calling", "_offsets", "_opening", "_request")

    def __init__(self, request: GenerationRequest, *, id: str, created_s: int, offset: int = 0) -> None:
        """``id`` without its prefix; ``created_s`` is wall time. ``offset``: characters that were answered before it
        was resumed."""
        self._request = request
        self._begun = [not request.chat] * request.choices
        self._calling: set[int] = set()
        """Choices that call a tool: they have no text, not even an empty one."""
        self._offsets = [offset] * request.choices
        prefix, kind = ("chatcmpl-", "chat.completion") if request.chat else ("cmpl-", "text_completion")
        if request.chat and request.stream:
            kind += ".chunk"
        self._opening = (
            f'{{"id":{quote(prefix + id)},"object":"{kind}","created":{created_s},"model":{quote(request.model)}'
        )
        # All but the text and the tokens is the same in every event, and is rendered once.
        text = '"delta":{"content":' if request.chat else '"text":'
        self._before_text = [
            f'data: {self._opening},"choices":[{{"index":{index},{text}' for index in range(request.choices)
        ]
        self._after_text = "}" if request.chat else ""

    def event(self, index: int, part: Part, finish_reason: FinishReason | None = None) -> bytes:
        """One event of the stream: what one step generated for one choice."""
        text, token_ids, calls, _ = part
        request = self._request
        reason = f'"{finish_reason}"' if finish_reason else "null"
        ids = f',"token_ids":[{",".join(map(str, token_ids))}]' if request.return_token_ids else ""
        if request.logprobs is not None:
            ids = f',"logprobs":{json.dumps(self._logprobs(index, part.logprobs))}{ids}'
        if calls or index in self._calling:
            self._calling.add(index)
            return self._call_event(index, calls, f'"finish_reason":{reason}{ids}')
        before = self._before_text[index]
        if not self._begun[index]:
            before = before.replace('"delta":{', '"delta":{"role":"assistant",', 1)
            self._begun[index] = True
        return f'{before}{quote(text)}{self._after_text},"finish_reason":{reason}{ids}}}]}}\n\n'.encode()

    def end(self, usage: Usage) -> bytes:
        """What follows the last event: usage if asked for, and the end mark."""
        if not self._request.include_usage:
            return DONE
        return f'data: {self._opening},"choices":[],"usage":{json.dumps(usage.fields())}}}\n\n'.encode() + DONE

    def whole(self, parts: Sequence[tuple[Part, FinishReason]], usage: Usage) -> bytes:
        """The body of an answer that is not streamed: each choice and why it ended."""
        choices = [self._whole(index, part, reason) for index, (part, reason) in enumerate(parts)]
        rest = json.dumps({"choices": choices, "usage": usage.fields()})
        return f"{self._opening},{rest[1:]}".encode()

    def _whole(self, index: int, part: Part, finish_reason: FinishReason) -> dict[str, Any]:
        request = self._request
        choice: dict[str, Any] = {"index": index}
        if request.chat:
            message: dict[str, Any] = {"role": "assistant", "content": part.text, "refusal": None}
            if part.calls:
                message["content"] = None
                message["tool_calls"] = [
                    {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                    for c in part.calls
                ]
            choice["message"] = message
        else:
            choice["text"] = part.text
        choice["logprobs"] = None if request.logprobs is None else self._logprobs(index, part.logprobs)
        choice["finish_reason"] = finish_reason
        if request.return_token_ids:
            choice["token_ids"] = list(part.token_ids)
        return choice

    def _call_event(self, index: int, pieces: Sequence[CallPiece], rest: str) -> bytes:
        calls = []
        for piece in joined(pieces):
            function: dict[str, str] = {"arguments": piece.arguments}
            call: dict[str, Any] = {"index": piece.call, "function": function}
            if piece.name:
                function["name"] = piece.name
                call |= {"id": piece.id, "type": "function"}
            calls.append(call)
        delta: dict[str, Any] = {"tool_calls": calls} if calls else {}
        if not self._begun[index]:
            delta = {"role": "assistant", "content": None} | delta
            self._begun[index] = True
        return (
            f'data: {self._opening},"choices":[{{"index":{index},"delta":{json.dumps(delta)},{rest}}}]}}\n\n'.encode()
        )

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._request.chat:
            return {"content": [_chat_logprob(each) for each in logprobs], "refusal": None} if logprobs else None
        texts = [_text(each.token) for each in logprobs]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        top = [None if each.logprob is None else {_text(t): _real(p) for t, p in each.top} for each in logprobs]
        return {
            "tokens": texts,
            "token_logprobs": [_real(each.logprob) for each in logprobs],
            "top_logprobs": top if self._request.logprobs else None,
            "text_offset": offsets,
        }


def joined(pieces: Sequence[CallPiece]) -> list[CallPiece]:
    """One piece per call, in order."""
    calls: dict[int, CallPiece] = {}
    arguments: dict[int, list[str]] = {}
    for piece in pieces:
        first = calls.setdefault(piece.call, piece)
        if piece.name and not first.name:
            calls[piece.call] = piece
        arguments.setdefault(piece.call, []).append(piece.arguments)
    return [call._replace(arguments="".join(arguments[index])) for index, call in calls.items()]


def error_event(error: RequestError) -> bytes:
    """The last event of a stream that failed; no end mark follows it."""
    return b"data: " + error.body() + b"\n\n"


def models_body(names: Sequence[str], *, created_s: int, about: dict[str, Any]) -> bytes:
    """The body of /v1/models; ``about`` adds fields to each model."""
    entries = [{"id": name, "object": "model", "created": created_s, "owned_by": "chiron", **about} for name in names]
    return json.dumps({"object": "list", "data": entries}).encode()


def _chat_logprob(each: TokenLogprob) -> dict[str, Any]:
    return _named(each.token, each.logprob) | {"top_logprobs": [_named(token, p) for token, p in each.top]}


def _named(token: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _text(token), "logprob": _real(logprob), "bytes": list(token)}


def _real(logprob: float | None) -> float | None:
    if logprob is None:
        return None
    return logprob if logprob > _LOGPROB_MIN else _LOGPROB_MIN  # Not a number is below everything too.


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
