"""Requests on their way: what is sent upstream, and what becomes of the answer.

``RelayCall`` passes an interactive client's request on as it came and the answer back as it comes. ``CollectedCall``
asks for a stream and puts the answer together, so that the request can be interrupted and gone on with: for batch
items, and, as ``FlexCall``, for clients that wait for an answer of the batch class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import orjson

from chiron.core.mypyc import mypyc_attr
from chiron.core.types import Request
from chiron.engines.rows import EngineRow
from chiron.gateway.relay.body import Body
from chiron.gateway.relay.collect import CollectError, Collector
from chiron.gateway.relay.ending import Answer, last_word, passed_on, wordless
from chiron.gateway.relay.errors import ApiError
from chiron.gateway.relay.turns import Turn
from chiron.gateway.relay.upstream import ERROR_MAX_BYTES, RETRIED, UpstreamFailure
from chiron.net.client import Call, Header
from chiron.net.server import Incoming

_PASSED = frozenset(
    b"content-type content-encoding content-language content-disposition cache-control etag expires last-modified "
    b"retry-after retry-after-ms vary warning x-accel-buffering".split()
)
"""Headers of an engine's answer that speak of the answer. Others speak of its connection, or for whoever serves this
address: cookies, where else it is served, who may read it, what a proxy should send instead."""
_PASSED_KINDS = (b"x-", b"openai-", b"anthropic-")
_DROPPED = frozenset(b"content-length transfer-encoding connection keep-alive date server".split())
"""Those of nearly every answer that are not passed, seen at once."""
_DROPPED_KINDS = (b"x-request-id", b"x-accel-", b"x-sendfile", b"x-lighttpd-send-", b"x-reproxy-", b"x-forwarded-")
REMIND_S = 15.0
"""Between two signs of life to a client that waits."""
_ANSWER_MAX_BYTES = 1 << 20
"""Of an engine's refusal of a collected request."""
_USUAL_END_MAX_BYTES = 256
_TEXT = re.compile(rb'"(?:content|text|reasoning_content|reasoning|refusal|name|arguments)"\s*:\s*"[^"]')


class RelayCall:
    """An interactive client's request: bytes in, bytes out. ``Request.payload``; implements ``UpstreamCall``."""

    __slots__ = (
        "_answer_headers",
        "_began",
        "_body",
        "_call",
        "_chat",
        "_done",
        "_first",
        "_length",
        "_reminded_s",
        "_said",
        "_status",
        "_usual_end",
        "error",
        "incoming",
        "key_name",
        "number",
        "output_max",
        "path",
        "program",
        "prompt_bytes",
        "prompt_tokens",
        "refusal",
        "request_id",
        "responded",
        "sequences",
        "streams",
        "turn",
        "wait_max_s",
    )

    def __init__(
        self,
        incoming: Incoming,
        *,
        body: Body,
        stream: bool,
        request_id: str,
        key_name: str,
        responded: Callable[[int], None],
    ) -> None:
        self.incoming = incoming
        self.number = 0
        """Id of its request, once there is one."""
        self.path = incoming.path.encode()
        self.streams = stream
        self.prompt_bytes = body.shape.learnable_bytes
        self.prompt_tokens = 0
        self.output_max = body.shape.output_tokens_max
        self.sequences = body.shape.sequences
        self.request_id = request_id
        self.key_name = key_name
        self.error: UpstreamFailure | None = None
        self.refusal: ApiError | None = None
        """Why the gateway itself ended it."""
        self.responded = responded
        self.turn: Turn | None = None
        """What it is to a cascade, if it is asked for one."""
        self._body = body
        self._chat = incoming.path.endswith("/chat/completions")
        self._first = True
        self._usual_end = b""
        """How the last block with one event that holds text ended, from where it says that there is no reason to end;
        empty: there was none."""
        self._call: Call | None = None
        self._status = 0
        self._length: int | None = None
        self._answer_headers: list[Header] = []
        self._began = False
        """A part of an engine's answer has been passed on."""
        self._said = b""
        """What an engine refused a stream with whose head had been sent before."""
        self._reminded_s = -inf
        self._done = False
        self.wait_max_s = inf
        """How long the client wants it to wait for an instance."""
        self.program = ""
        """Whose call it is; empty: of none."""
        incoming.body = b""
        incoming.on_pause = self._pause
        incoming.on_resume = self._resume

    # -- UpstreamCall ------------------------------------------------------------------------------------------------

    @property
    def peers(self) -> Sequence[str]:
        """Whose shares it counts against."""
        return self.incoming.peers

    @property
    def closed(self) -> bool:
        """Its client has its whole answer, or has left."""
        return self.incoming.closed

    @property
    def body_bytes(self) -> int:
        return len(self._body.raw)

    @property
    def visible(self) -> bool:
        return self._began

    @property
    def held_up(self) -> bool:
        return self.incoming.paused

    def message(self, row: EngineRow, model: str, request: Request) -> bytes:
        body = self._body
        return body.raw if body.shape.fields.get("model") == model else body.with_values({"model": model})

    def headers(self) -> Sequence[Header]:
        return ((b"x-request-id", self.request_id.encode()),)

    def begin(self, call: Call, status: int, headers: list[Header]) -> Callable[[bytes], int] | None:
        self._call = call
        self._first = True
        self._usual_end = b""
        self._status = status
        self._length = None
        for name, value in headers:
            if name == b"content-length" and value.isdigit():
                self._length = int(value)
        self._answer_headers = [(b"x-request-id", self.request_id.encode()), *passed_headers(headers)]
        chunked = status == 200 and self._length is None and self.incoming.version == "1.1"
        return self._pass_chunks if self.streams and chunked else None

    def data(self, data: bytes) -> int:
        incoming = self.incoming
        if not self._began:
            if not self._begin(data):
                return 0
            self._began = True
        incoming.write(data)
        if not self.streams:
            return 0
        return self._tokens(data, data.count(b"\ndata:") + data.startswith(b"data:"))

    def _pass_chunks(self, data: bytes) -> int:
        """Whole chunks, with their framing: also the first event of one comes after a line, that of the length."""
        if not self._began:
            self._began = self._begin(data)
        self.incoming.write_chunks(data)
        events = data.count(b"\ndata:")
        # As nearly always: one event, which ends as the one before did.
        return 1 if events == 1 and self._usual_end and data.endswith(self._usual_end) else self._tokens(data, events)

    def _tokens(self, data: bytes, events: int) -> int:
        """Of so many events, those that hold text."""
        # The first event may be a role alone, the last ones are a reason, usage and [DONE]. All between are tokens.
        at = data.rfind(b'finish_reason":') if events == 1 and not self._first else -1
        if at >= 0:  # With a token it is near the end.
            usual = b'"' not in data[at + 15 : at + 17]
            self._usual_end = data[at:] if usual and len(data) - at <= _USUAL_END_MAX_BYTES else b""
        else:
            usual = not (self._first or b"[DONE]" in data or b'_reason":"' in data or b'_reason": "' in data)
        if usual:
            return events
        self._first = False
        return tokens_in(data)

    def end(self) -> str:
        incoming = self.incoming
        self._call = None  # No cycle is left behind.
        if self._done or incoming.closed:
            return ""
        self._done = True
        if not incoming.started:
            self._whole(b"")
        elif not incoming.closed:
            if not self._began and self._status >= 300:
                incoming.write(Answer(self._status, self._said or wordless(self._status)).event())
            incoming.finish()
        return ""

    def cut(self, resumes: bool) -> int:
        return 0

    # -- the rest ----------------------------------------------------------------------------------------------

    def remind(self, now_s: float, words: str) -> None:
        """Tell a client that reads a stream what it waits for, once in a while."""
        incoming = self.incoming
        if not self.streams or now_s - self._reminded_s < REMIND_S or incoming.closed or incoming.paused:
            return
        self._reminded_s = now_s
        if not incoming.started:
            incoming.start(200, ((b"content-type", b"text/event-stream"), (b"x-request-id", self.request_id.encode())))
            self.responded(200)
        incoming.write(b": waiting: %b\n\n" % words.encode("ascii", "replace"))

    def abandon(self) -> None:
        """Its end cannot be told: cut its client off."""
        self.incoming.abort()

    def ended(self, request: Request) -> None:
        """The control plane is done with it; the client may still wait for a word."""
        incoming = self.incoming
        self._call = None
        if incoming.closed or request.outcome == "finished":
            return
        if request.outcome in ("failed", "rejected") and self._done:
            return  # The engine's own answer was passed on.
        answer = last_word(request, self.refusal, passed_on(self.error), self.error)
        if not incoming.started:
            answer.send(incoming, self.request_id)
            self.responded(answer.status)
        elif self.streams and (self._length is None or not self._began):
            incoming.write(b"\n\n" + answer.event())
            incoming.finish()
        else:
            incoming.abort()

    def _begin(self, data: bytes) -> bool:
        """The first part of an engine's answer. Returns whether it is to be written, and the rest as it comes."""
        incoming = self.incoming
        if incoming.started:  # It was told to wait; its status is 200 already.
            if self._status >= 300:
                self._said = (self._said + data)[:ERROR_MAX_BYTES]
            return self._status < 300
        if self._length == len(data):
            self._whole(data)
            return False
        incoming.start(self._status, self._answer_headers, self._length)
        self.responded(self._status)
        if incoming.paused:
            self._pause()
        return True

    def _whole(self, body: bytes) -> None:
        self._done = self._began = True
        kind = b"application/json"
        headers = []
        for name, value in self._answer_headers:
            if name == b"content-type":
                kind = value
            else:
                headers.append((name, value))
        self.incoming.respond(self._status, body, kind, headers)
        self.responded(self._status)

    def _pause(self) -> None:
        if self._call is not None:
            self._call.pause()

    def _resume(self) -> None:
        if self._call is not None:
            self._call.resume()


@mypyc_attr(allow_interpreted_subclasses=True)
class CollectedCall:
    """A request whose answer is put together here, over as many tries and streams as it takes. ``UpstreamCall``."""

    streams = True
    visible = False
    held_up = False
    closed = False
    """Nobody waits for it at the other end of a connection."""

    def __init__(
        self, *, path: bytes, body: Body, request_id: str, key_name: str, answer_max_bytes: int = 64 << 20
    ) -> None:
        self.path = path
        self.request_id = request_id
        self.key_name = key_name
        self.prompt_bytes = body.shape.learnable_bytes
        self.prompt_tokens = 0
        self.output_max = body.shape.output_tokens_max
        self.sequences = body.shape.sequences
        self.error: UpstreamFailure | None = None
        self.status = 0
        """The engine's, of the answer that counts."""
        self.answer = bytearray()
        """Body of a refusal by the engine."""
        self.collector = Collector(
            path.endswith(b"/chat/completions"),
            bytes_max=answer_max_bytes,
            keep_token_ids=bool(body.shape.fields.get("return_token_ids")),
            several=body.shape.several,
        )
        self._body = body
        self._tries = 0

    @property
    def body_bytes(self) -> int:
        return len(self._body.raw)

    def message(self, row: EngineRow, model: str, request: Request) -> bytes:
        self._tries += 1
        values: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        if row.resumes:
            values["return_token_ids"] = True
        if row.resumes and request.tokens_done and self.collector.token_ids:
            self.collector.resume()
            values["resume_token_ids"] = self.collector.token_ids
        else:
            self.collector.reset()  # An engine that died in the middle left a part that nobody cut.
        return self._body.with_values(values)

    def headers(self) -> Sequence[Header]:
        # vLLM makes this its own id, and older ones refuse one that they have. An evicted request may come back before
        # the engine has noticed that it left.
        id = self.request_id if self._tries < 2 else f"{self.request_id}.{self._tries}"
        return ((b"x-request-id", id.encode()),)

    def begin(self, call: Call, status: int, headers: list[Header]) -> None:
        self.status = status
        self.answer = bytearray()

    def data(self, data: bytes) -> int:
        if self.status >= 300:
            if len(self.answer) < _ANSWER_MAX_BYTES:
                self.answer += data
            return 0
        before = self.collector.tokens
        try:
            self.collector.feed(data)
        except CollectError as error:
            raise ValueError(str(error)) from None
        return max(0, self.collector.tokens - before)

    def end(self) -> str:
        if self.status >= 300:
            return ""
        try:
            self.collector.result()
        except CollectError as error:
            return str(error)
        return ""

    def cut(self, resumes: bool) -> int:
        if resumes and self.collector.token_ids:
            self.collector.resume()
            return len(self.collector.token_ids)
        self.collector.reset()
        return 0

    def ended(self, request: Request) -> None:
        """For those who wait for it."""


@mypyc_attr(allow_interpreted_subclasses=True)  # The batch runner's is one.
class ItemCall(CollectedCall):
    """An item of a batch: its answer, or a refusal that would come again, becomes a line of results."""

    def end(self) -> str:
        """A refusal may also come inside the stream; like one with a status of its own it is an answer."""
        said = self.collector.error
        if self.status < 300 and said is not None:
            code = said.get("code")
            if isinstance(code, int) and _is_no(code):
                self.status, self.answer = code, bytearray(orjson.dumps({"error": said}))
        return super().end()

    @property
    def refused(self) -> bool:
        """The engine said no, and would say so again."""
        return _is_no(self.status)

    def outcome(self) -> tuple[int, Any]:
        """Status and body of its answer, be it a refusal. Raises CollectError if there is none."""
        return (self.status, _json(self.answer)) if self.refused else (200, self.collector.result())


class FlexCall(CollectedCall):
    """A client waits for an answer of the batch class (``service_tier: "flex"``). It comes in one piece, also as a
    stream; until then a stream gets a comment now and then, so that nothing on the way closes it."""

    def __init__(
        self,
        incoming: Incoming,
        *,
        body: Body,
        stream: bool,
        request_id: str,
        key_name: str,
        responded: Callable[[int], None],
    ) -> None:
        super().__init__(path=incoming.path.encode(), body=body, request_id=request_id, key_name=key_name)
        self.incoming = incoming
        self.number = 0
        """Id of its request, once there is one."""
        self.refusal: ApiError | None = None
        self.responded = responded
        self.turn: Turn | None = None
        self.wait_max_s = inf
        self.program = ""
        self._reminded_s = -inf
        self._wants_stream = stream
        self._wants_usage = (
            bool((body.shape.fields.get("stream_options") or {}).get("include_usage")) if stream else True
        )
        incoming.body = b""

    @property
    def peers(self) -> Sequence[str]:
        """Whose shares it counts against."""
        return self.incoming.peers

    @property
    def closed(self) -> bool:  # type: ignore[override]
        """Its client has its whole answer, or has left."""
        return self.incoming.closed

    def remind(self, now_s: float, words: str) -> None:
        """Say that it still waits."""
        if now_s - self._reminded_s < REMIND_S:
            return
        self._reminded_s = now_s
        if self._wants_stream and not self.incoming.closed and not self.incoming.paused:
            self._start_stream()
            self.incoming.write(b": waiting: %b\n\n" % words.encode("ascii", "replace"))

    def abandon(self) -> None:
        """Its end cannot be told: cut its client off."""
        self.incoming.abort()

    def ended(self, request: Request) -> None:
        if self.incoming.closed:
            return
        if request.outcome == "finished":
            self._deliver()
            return
        engine = Answer(self.status, bytes(self.answer) or wordless(self.status)) if self.status >= 300 else None
        self._say(last_word(request, self.refusal, engine, self.error))

    def _deliver(self) -> None:
        answer = self.collector.result()
        if not self._wants_stream:
            self._say(Answer(200, orjson.dumps(answer | {"service_tier": "flex"})))
            return
        self._start_stream()
        usage = answer.pop("usage", None)
        chat = answer["object"] == "chat.completion"
        if chat:
            answer["object"] = "chat.completion.chunk"
            for choice in answer["choices"]:
                choice["delta"] = choice.pop("message")
                tools = choice["delta"].get("tool_calls")
                for i, tool in enumerate(tools if isinstance(tools, list) else ()):
                    if isinstance(tool, dict):
                        tool.setdefault("index", i)
        write = self.incoming.write
        write(b"data: " + orjson.dumps(answer) + b"\n\n")
        if usage is not None and self._wants_usage:
            write(b"data: " + orjson.dumps(answer | {"choices": [], "usage": usage}) + b"\n\n")
        write(b"data: [DONE]\n\n")
        self.incoming.finish()

    def _start_stream(self) -> None:
        if not self.incoming.started:
            head = ((b"content-type", b"text/event-stream"), (b"x-request-id", self.request_id.encode()))
            self.incoming.start(200, head)
            self.responded(200)

    def _say(self, answer: Answer) -> None:
        if self.incoming.started:
            self.incoming.write(answer.event())
            self.incoming.finish()
        else:
            answer.send(self.incoming, self.request_id)
            self.responded(answer.status)


def passed_headers(headers: Sequence[Header]) -> list[Header]:
    """Of an engine's answer, those that its client gets."""
    passed: list[Header] = []
    named: set[bytes] | None = None
    for header in headers:
        name = header[0]
        if name in _DROPPED:
            if name == b"connection":
                named = (named or set()) | {part.strip().lower() for part in header[1].split(b",")}
        elif name in _PASSED or (name.startswith(_PASSED_KINDS) and not name.startswith(_DROPPED_KINDS)):
            passed.append(header)
    return passed if named is None else [header for header in passed if header[0] not in named]


def tokens_in(data: bytes) -> int:
    """Events in a block of a stream that hold text."""
    # Only at the start of a line, where a text that is generated cannot be: JSON has no line breaks inside text.
    return sum(_TEXT.search(event) is not None for event in (b"\n" + data).split(b"\ndata:")[1:])


def _is_no(status: int) -> bool:
    """501: the engine lacks what is asked for."""
    return (400 <= status < 500 or status == 501) and status not in RETRIED


def _json(body: bytes | bytearray) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return {"error": {"message": body.decode("utf-8", "replace")}}
