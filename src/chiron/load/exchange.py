"""One request as its client sees it: when content came, how it ended.

Blocks from the socket are what is timed. Events that arrive together were available together, so a gap is the time
between two blocks with content. Every event is parsed: that costs a microsecond and is what a real client does too.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from time import perf_counter
from typing import Any

import orjson

from chiron.core.types import Outcome
from chiron.engines.claims import usage_counts
from chiron.net.client import Call, NetError

EVENT_MAX_BYTES = 1 << 20
"""Longest event, and longest answer that is no stream."""
MESSAGE_MAX = 200
"""Characters of a server's own words that are kept as an example."""

SHED = (429, 503)
"""Statuses of a server that has too much to do."""
REJECTED = (400, 404, 405, 413, 414, 415, 422, 431)
"""Statuses that say that something is wrong with the request."""
_CONTENT = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal", "token_ids")


class Exchange:
    """Receives one answer (``net.client.Receiver``); calls ``ended`` exactly once, unless ``call`` is cancelled."""

    __slots__ = (
        "_bytes",
        "_ended",
        "_events",
        "_tail",
        "call",
        "complete",
        "completion_tokens",
        "error",
        "first_s",
        "gaps",
        "last_s",
        "message",
        "outcome",
        "pieces",
        "prompt_tokens",
        "row",
        "sent_s",
        "status",
        "text_bytes",
    )

    def __init__(self, row: int, sent_s: float, text_bytes: int, ended: Callable[[Exchange], None]) -> None:
        self.row = row
        self.sent_s = sent_s
        """Seconds of ``perf_counter``, as are ``first_s`` and ``last_s`` (0: not yet)."""
        self.text_bytes = text_bytes
        self.call: Call | None = None
        self.status = 0
        """HTTP status; 0 without an answer."""
        self.first_s = 0.0
        self.last_s = 0.0
        self.gaps = array("f")
        """Seconds between blocks with content."""
        self.pieces = 0
        """Events with content: the tokens of a server that sends no usage."""
        self.prompt_tokens = -1
        self.completion_tokens = -1
        """From the server's usage; -1 if it sent none."""
        self.complete = False
        """The stream said that it was over."""
        self.outcome: Outcome | None = None
        self.error = ""
        """Kind of failure, one of few."""
        self.message = ""
        """The server's own words."""
        self._ended = ended
        self._events = False
        self._tail = b""
        self._bytes = 0

    # -- net.client.Receiver -----------------------------------------------------------------------------------

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        self._events = status == 200 and kind.strip().lower().startswith(b"text/event-stream")

    def on_data(self, data: bytes) -> None:
        now_s = perf_counter()
        if not self._events:
            self._collect(data)
            return
        *lines, self._tail = (self._tail + data).split(b"\n")
        before = self.pieces
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:])
        if self.pieces > before:
            if self.first_s:
                self.gaps.append(now_s - self.last_s)
            else:
                self.first_s = now_s
            self.last_s = now_s
        if len(self._tail) > EVENT_MAX_BYTES:
            self._give_up("event too long", f"an event of more than {EVENT_MAX_BYTES} bytes")

    def on_end(self) -> None:
        if self._tail and self._events and self._tail.startswith(b"data:"):
            self._event(self._tail[5:])
        if self.status != 200:
            self._fail(f"http {self.status}")
            self._end("shed" if self.status in SHED else "rejected" if self.status in REJECTED else "failed")
        else:
            if not self._events:
                self._whole()
            if not self.error and not self.complete:
                self.error, self.message = "cut short", "the stream ended without finish_reason or [DONE]"
            self._end("failed" if self.error else "finished")

    def on_error(self, error: NetError) -> None:
        kind = type(error).__name__.removesuffix("Error")
        self.error = "".join(" " + c.lower() if c.isupper() else c for c in kind).strip()
        self.message = str(error)[:MESSAGE_MAX]
        self._end("failed")

    # -- the rest ----------------------------------------------------------------------------------------------

    def abandon(self, outcome: Outcome, error: str, message: str = "") -> None:
        """End it from our side: close its connection and say why."""
        if self.outcome is None:
            if self.call is not None:
                self.call.cancel()
            self.error, self.message = error, message
            self._end(outcome)

    def _event(self, payload: bytes) -> None:
        payload = payload.strip()
        if payload == b"[DONE]":
            self.complete = True
            return
        try:
            self._read(orjson.loads(payload))
        except (ValueError, TypeError, AttributeError, LookupError):
            self.error = self.error or "malformed event"
            self.message = self.message or payload[:MESSAGE_MAX].decode("utf-8", "replace")

    def _read(self, event: Any) -> None:
        usage = event.get("usage")
        if usage:
            counts = usage_counts(usage)
            if counts is None:
                raise ValueError("usage")
            self.prompt_tokens, self.completion_tokens = counts
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or choice.get("message") or choice
            if delta.get("content") or choice.get("text") or any(delta.get(name) for name in _CONTENT):
                self.pieces += 1
            if choice.get("finish_reason"):
                self.complete = True
        if event.get("error"):
            self._read_error(event["error"], "stream error")

    def _read_error(self, error: Any, kind: str) -> None:
        if isinstance(error, dict):
            code = error.get("code") or error.get("type")
            self.error = f"{kind}: {code}"[:80] if code else kind
            self.message = str(error.get("message", ""))[:MESSAGE_MAX]
        else:
            self.error, self.message = kind, str(error)[:MESSAGE_MAX]

    def _collect(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._bytes <= EVENT_MAX_BYTES:
            self._tail += data
        else:
            self._give_up("answer too long", f"an answer of more than {EVENT_MAX_BYTES} bytes")

    def _whole(self) -> None:
        """An answer in one piece although a stream was asked for: its first token is its last."""
        self._event(self._tail)
        if self.pieces or self.complete:
            self.first_s = self.last_s = perf_counter()

    def _fail(self, kind: str) -> None:
        try:
            body = orjson.loads(self._tail)
            self._read_error(body["error"], kind)
        except (ValueError, TypeError, LookupError):
            self.error = kind
            self.message = self._tail[:MESSAGE_MAX].decode("utf-8", "replace")

    def _give_up(self, error: str, message: str) -> None:
        self.abandon("failed", error, message)

    def _end(self, outcome: Outcome) -> None:
        if self.outcome is not None:
            return
        self.outcome = outcome
        self._tail = b""
        if outcome == "finished" and not self.first_s:
            self.first_s = self.last_s = perf_counter()  # No text at all: the model stopped at once.
        self._ended(self)
