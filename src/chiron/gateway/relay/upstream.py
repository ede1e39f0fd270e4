"""A relay's connections to one engine, and the requests that it has sent there.

The brain decides when a request starts and when it must leave; this module speaks with the engine. Tokens do not pass
through the brain: it is told (``RunReports``) of the first one and of the end, and counts are two additions. What is
relayed and what is collected is the affair of the request's payload, an ``UpstreamCall``.

Errors: until a client has seen a byte, whatever goes wrong (no connection, a lost one, a status of ``RETRIED``) makes
the request *lost*, and the control plane tries it again, here or elsewhere, a few times.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from chiron.core.mypyc import mypyc_attr
from chiron.core.types import Request
from chiron.engines import claims
from chiron.engines.rows import ENGINES, EngineRow
from chiron.gateway.relay.collect import CollectError
from chiron.gateway.settings import KindSettings
from chiron.net.client import Call, ConnectError, Header, NetError, Origin
from chiron.net.clock import LiveClock

log = logging.getLogger("chiron.upstream")

OF_CDNS = frozenset(range(520, 531))
"""Made up by CDNs, for an engine that they did not reach or that has too much to do: an engine says none of them."""
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504}) | OF_CDNS
"""Statuses that say "not now" or "not me": another try may do. The others, 501 among them, are the engine's answer."""
NOT_THE_CLIENTS = frozenset({401, 402, 403, 407})
"""Statuses that say that the gateway may not ask: its key for the engine is wrong, or something on the way minds."""
ERROR_MAX_BYTES = 64 * 1024
SILENT_S = 5.0
"""A stream that is silent for this long, for an unknown reason, is not counted among those that decode."""
_TAIL_BYTES = 2048
_TAIL_BLOCKS = 16
_FRAMING = re.compile(rb"\r\n[0-9A-Fa-f]{1,7}\r\n")
"""Between two chunks."""


class UpstreamCall(Protocol):
    """What is sent to an engine for one request, and what becomes of its answer: ``Request.payload``."""

    path: bytes
    """``/v1/chat/completions`` or ``/v1/completions``."""
    streams: bool
    """The engine is asked for server-sent events."""
    error: UpstreamFailure | None
    """Why the last try failed."""
    prompt_tokens: int
    """As the engine's usage said at the end; 0: it did not, or not yet."""
    sequences: int
    """Choices of the answer: the engine runs so many sequences for it."""
    output_max: int | None
    """The most output tokens that the request allows; None: it sets no limit."""

    @property
    def visible(self) -> bool:
        """A client has seen a part of the answer: it cannot be tried again."""

    @property
    def held_up(self) -> bool:
        """Nothing is read from the engine, because the client does not read either."""

    def message(self, row: EngineRow, model: str, request: Request) -> bytes:
        """The body to send; ``model`` is what this engine calls it."""

    def headers(self) -> Sequence[Header]:
        """Beyond those that every upstream request has."""

    def begin(self, call: Call, status: int, headers: list[Header]) -> Callable[[bytes], int] | None:
        """An answer with this status begins (not one that will be tried again). Returns what takes whole chunks of it
        with their framing, as ``data`` does without; None: it is to have them without."""

    def data(self, data: bytes) -> int:
        """A piece of its body. Returns how many tokens it holds."""

    def end(self) -> str:
        """The body is complete. Returns "" or, if the answer is not what it should be, why."""

    def cut(self, resumes: bool) -> int:
        """The engine was told to stop. Returns the output tokens that the gateway has (0: start again)."""


class UpstreamFailure:
    """One failed try: the error that the client gets if it was the last."""

    __slots__ = ("at_s", "body", "content_type", "message", "status")

    def __init__(self, message: str, status: int = 0, body: bytes = b"", content_type: bytes = b"") -> None:
        self.at_s = 0.0
        """When, by the gateway's clock."""
        self.message = message
        self.status = status
        """The engine's; 0: it gave none."""
        self.body = body
        self.content_type = content_type


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAddress:
    """Where an engine is, and how it is spoken to."""

    url: str
    row: EngineRow
    model: str
    """The model's name inside the engine."""
    api_key: str = field(default="", repr=False)

    @property
    def authorization(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def lines(self) -> bytes:
        """Headers of every request, as they go on the wire."""
        lines = b"content-type: application/json\r\naccept: text/event-stream, application/json\r\n"
        return lines + (b"authorization: Bearer %b\r\n" % self.api_key.encode() if self.api_key else b"")


def address_of(settings: KindSettings, model: str, url: str) -> EngineAddress:
    """Of an engine of this kind that serves ``model`` at ``url``."""
    return EngineAddress(
        url=url,
        row=ENGINES[settings.engine],
        model=settings.served_model_name or model,
        api_key=settings.api_key,
    )


@mypyc_attr(allow_interpreted_subclasses=True)  # The brain's own is one.
class Placement:
    """One placement of a request on an instance, as a relay and the brain both know it: the same record in one process,
    one each in two."""

    __slots__ = ("number", "request", "silent", "tokens", "told")

    def __init__(self, number: int, request: Request) -> None:
        self.number = number
        """Tells it from every other placement, also of the same request."""
        self.request = request
        self.tokens = request.tokens_done
        """Output tokens seen so far."""
        self.told = False
        """The control plane has heard of its first token."""
        self.silent = False
        """It decoded, and it cannot be seen whether it still does."""


class Counts(Protocol):
    """Output tokens of one instance: both are added to with each block of a stream that decodes."""

    tokens: int
    held_tokens: int


class RunReports(Protocol):
    """What a relay tells the brain of the placements at one engine. ``answered``, ``lost`` and ``evicted`` are ends, of
    which each has one."""

    def first_token(self, placed: Any) -> None: ...

    def answered(self, placed: Any, status: int, tokens: int, prompt_tokens: int) -> None:
        """A complete answer, or a refusal that is one. Tokens are as the engine's usage says, if that can be."""

    def lost(self, placed: Any, failure: UpstreamFailure, *, connect: bool, visible: bool, kept: int) -> None:
        """No answer, or none that counts. ``connect``: there was no connection; ``visible``: a client has seen a part;
        ``kept``: output tokens that can be gone on with."""

    def evicted(self, placed: Any, kept: int) -> None:
        """The engine was told to stop. ``kept``: output tokens; of a request that is over those that were seen."""

    def fell_silent(self, placed: Any, since_s: float) -> None:
        """A stream that decodes has said nothing since then."""

    def spoke_again(self, placed: Any) -> None: ...


class Upstream:
    """One engine, as a relay knows it."""

    def __init__(
        self, *, clock: LiveClock, address: EngineAddress, origin: Origin, reports: RunReports, counts: Counts
    ) -> None:
        self.clock = clock
        self.address = address
        self.row = address.row
        self.origin = origin
        self.reports = reports
        self.counts = counts
        self.runs: dict[int, Run] = {}
        """What the engine has not answered yet, by number of placement."""
        self.sequences = 0
        """Of all of that."""
        self._lines = address.lines
        self._told_404 = False

    def carry(self, placed: Placement) -> Run:
        """Send a request."""
        request = placed.request
        sent: UpstreamCall = request.payload
        run = self.runs[placed.number] = Run(self, placed, sent)
        self.sequences += sent.sequences
        body = sent.message(self.row, self.address.model, request)
        run.body_bytes = len(body)
        run.call = self.origin.send(b"POST", sent.path, sent.headers(), body, run, lines=self._lines)
        return run

    def watch(self, stall_s: float) -> None:
        """Now and then, posted: streams of which nothing has come for ``stall_s`` are lost. An engine that answers its
        health checks may still have forgotten a request. Answers in one piece are silent by nature."""
        now_s = self.clock.now_s
        for run in list(self.runs.values()):
            run.watch(now_s)
            if run.silent_s(now_s) > stall_s:
                run.lost(UpstreamFailure(f"the engine sent nothing for {stall_s:g} s", 504))

    def not_found(self, path: bytes) -> None:
        """It answers 404 to a completion: its operator is told once what that comes from, mostly."""
        if not self._told_404:
            self._told_404 = True
            log.warning(
                "%s answers 404 to POST %s: it may not know the model as %r (served_model_name names it otherwise), "
                "or have no such route (its endpoint is its address without a path; Chiron adds /v1)",
                self.address.url,
                path.decode("latin-1"),
                self.address.model,
            )


class Run:
    """One request inside one engine: the receiver of its answer."""

    __slots__ = (
        "_began_s",
        "_began_with",
        "_bytes",
        "_error",
        "_error_type",
        "_heard_bytes",
        "_heard_s",
        "_over",
        "_tail",
        "_take_chunks",
        "_upstream",
        "_watched_bytes",
        "_watched_s",
        "body_bytes",
        "call",
        "placed",
        "sent",
        "status",
    )

    def __init__(self, upstream: Upstream, placed: Placement, sent: UpstreamCall) -> None:
        self._upstream = upstream
        self.placed = placed
        self.sent = sent
        self.call: Call | None = None
        self.status = 0
        self.body_bytes = 0
        """Of the request."""
        self._began_with = placed.tokens
        self._bytes = 0
        """Of the answer, its framing included where it came with that."""
        self._tail: list[bytes] = []
        """Its last blocks."""
        self._take_chunks: Callable[[bytes], int] | None = None
        self._error: list[bytes] | None = None
        self._error_type = b""
        self._over = False
        self._heard_bytes = 0
        """At the last look, and when they had last become more."""
        self._heard_s = self._began_s = upstream.clock.now_s
        self._watched_bytes, self._watched_s = 0, self._began_s

    # -- what the brain asks (Carrier) -------------------------------------------------------------------------

    def evict(self) -> None:
        self.over(cancel=True)
        request = self.placed.request
        kept = self.sent.cut(self._upstream.row.resumes) if request.outcome is None else self.placed.tokens
        self._upstream.reports.evicted(self.placed, kept)

    def drop(self) -> int:
        self.over(cancel=True)
        return self.sent.cut(self._upstream.row.resumes) if self.placed.request.outcome is None else 0

    # -- watching ----------------------------------------------------------------------------------------------

    def silent_s(self, now_s: float) -> float:
        """For how long nothing has come, as exactly as this is asked often."""
        if self._bytes != self._heard_bytes or self.sent.held_up or not self.sent.streams:
            self._heard_bytes, self._heard_s = self._bytes, now_s
        return now_s - self._heard_s

    def watch(self, now_s: float) -> None:
        """Now and then: whether it can be seen to decode."""
        placed = self.placed
        if self._bytes != self._watched_bytes:
            self._watched_bytes, self._watched_s = self._bytes, now_s
        elif placed.told and not placed.silent and self.sent.streams and now_s - self._watched_s >= SILENT_S:
            placed.silent = True
            self._upstream.reports.fell_silent(placed, self._watched_s)

    def over(self, *, cancel: bool) -> None:
        self._over = True
        if self._upstream.runs.pop(self.placed.number, None) is not None:
            self._upstream.sequences -= self.sent.sequences
        if cancel and self.call is not None:
            self.call.cancel()
        self.call = None  # It refers to this run: no cycle is left behind.

    # -- net.client.Receiver -----------------------------------------------------------------------------------

    def on_head(self, status: int, headers: list[Header]) -> None:
        self.status = status
        if status == 404:
            self._upstream.not_found(self.sent.path)
        # A redirect is an error in the engine's configured address.
        if status in RETRIED or 300 <= status < 400 or not claims.is_status(status):
            self._error = []
            self._error_type = next((value for name, value in headers if name == b"content-type"), b"")
            return
        assert self.call is not None
        self._take_chunks = self.sent.begin(self.call, status, headers)
        if self._take_chunks is not None:
            self.call.on_chunks = self._on_chunks

    def on_data(self, data: bytes) -> None:
        if self._error is not None:
            self._bytes += len(data)
            if sum(map(len, self._error)) < ERROR_MAX_BYTES:
                self._error.append(data)
            return
        try:
            tokens = self.sent.data(data)
        except (ValueError, CollectError) as error:
            self._bytes += len(data)
            self.lost(UpstreamFailure(str(error)), sound=False)
            return
        except Exception:
            self._not_taken_in()
            return
        self._passed(data, tokens if self.sent.streams and self.status < 300 else -1)

    def _on_chunks(self, data: bytes) -> None:
        """Whole chunks of a stream, with their framing."""
        assert self._take_chunks is not None
        try:
            tokens = self._take_chunks(data)
        except Exception:
            self._not_taken_in()
            return
        self._passed(data, tokens)

    def _passed(self, data: bytes, tokens: int) -> None:
        """A block of the answer has been taken. ``tokens`` below 0: it is no stream."""
        self._bytes += len(data)
        tail = self._tail
        tail.append(data)
        if len(tail) > _TAIL_BLOCKS or len(data) >= _TAIL_BYTES:
            self._tail = [b"".join(tail)[-_TAIL_BYTES:]]
        if tokens < 0:
            return
        placed = self.placed
        placed.tokens += tokens
        if placed.silent:
            self._upstream.reports.spoke_again(placed)
        elif placed.told:
            counts = self._upstream.counts
            counts.tokens += tokens
            counts.held_tokens += tokens
        elif tokens and not self._over:
            self._upstream.reports.first_token(placed)

    def on_end(self) -> None:
        if self._over:
            return
        if self._error is not None:
            body = b"".join(self._error)
            message = f"the engine answered {self.status}"
            self.lost(UpstreamFailure(message, self.status, body, self._error_type))
            return
        self.over(cancel=False)
        try:
            problem = self.sent.end()
            if problem:
                self.lost(UpstreamFailure(problem), sound=False)
                return
            tokens, prompt_tokens = self._usage() if self.status < 400 else (0, 0)
            self._upstream.reports.answered(self.placed, self.status, tokens, prompt_tokens)
        except Exception:
            self._not_taken_in()

    def on_error(self, error: NetError) -> None:
        self.call = None
        if not self._over:
            # Where engines are is nothing to clients, and in the log already.
            message = str(error).removeprefix(f"{self._upstream.origin.url}: ")
            self.lost(UpstreamFailure(message), connect=isinstance(error, ConnectError))

    def lost(self, failure: UpstreamFailure, *, connect: bool = False, sound: bool = True) -> None:
        """No answer, or none that counts. ``sound``: what came of it so far can be gone on with."""
        self.over(cancel=True)
        upstream, sent = self._upstream, self.sent
        log.info("%s: %s", upstream.address.url, failure.message)
        kept = sent.cut(sound and upstream.row.resumes) if self.placed.request.outcome is None else 0
        upstream.reports.lost(self.placed, failure, connect=connect, visible=sent.visible, kept=kept)

    def _not_taken_in(self) -> None:
        """A bug of ours with an unexpected answer: its client must not wait for ever."""
        log.exception("%s: the answer to %s failed", self._upstream.address.url, self.placed.request.id)
        self.lost(UpstreamFailure("the answer could not be processed"), sound=False)

    def _usage(self) -> tuple[int, int]:
        """Output and prompt tokens as the engine's usage says, if that can be, else output as seen."""
        tail = b"".join(self._tail)
        if self._take_chunks is not None:
            tail = _FRAMING.sub(b"", tail)
        prompt, output = claims.usage_in(tail)
        sent = self.sent
        made = claims.output_tokens(
            output,
            seen=self.placed.tokens,
            before=self._began_with,
            answer_bytes=self._bytes,
            took_s=self._upstream.clock.elapsed_s() - self._began_s,
            most=sent.output_max,
            streams=sent.streams,
        )
        return made, claims.prompt_tokens(prompt, body_bytes=self.body_bytes)


def blames_client(status: int) -> bool:
    """Whether this answer of an engine says that something is wrong with the request itself: it was no work, and nobody
    failed."""
    return 400 <= status < 500 and status not in RETRIED and status not in NOT_THE_CLIENTS
