"""An engine behind HTTP as the control plane's ``Engine`` port.

The control plane decides when a request starts and when it must leave; this module speaks with the engine. Tokens do
not pass through the control plane: it is told of the first one, of the end, and of samples. What is relayed and what is
collected is the affair of the request's payload, an ``UpstreamCall``.

Errors: until a client has seen a byte, whatever goes wrong (no connection, a lost one, a status of ``RETRIED``) makes
the request *lost*, and the control plane tries it again, here or elsewhere, a few times. What follows for the engine
is in ``engines.losses``; where that suspects it, the fleet is asked to look at it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from chiron.core.ports import RemoteEngineEvents
from chiron.core.types import Instance, Request
from chiron.engines import claims
from chiron.engines.losses import Losses
from chiron.engines.rows import EngineRow
from chiron.engines.unseen import presumed_first_token_s, presumed_prefill_s
from chiron.gateway.instances.engine_limit import OwnLimit
from chiron.gateway.instances.observer import Begun, EngineObserver
from chiron.gateway.relay.collect import CollectError
from chiron.net.client import Call, ConnectError, Header, NetError, Origin
from chiron.net.clock import LiveClock
from chiron.net.memory import MemoryNetwork

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

    def begin(self, call: Call, status: int, headers: list[Header]) -> None:
        """An answer with this status begins (not one that will be tried again)."""

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


class HttpEngine:
    """One instance's engine; implements the ``Engine`` port. Made when the instance is ready."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        instance: Instance,
        url: str,
        row: EngineRow,
        listener: RemoteEngineEvents,
        suspect: Callable[[Instance], None],
        model: str,
        api_key: str = "",
        learn_usage: Callable[[Request, int], None] | None = None,
        network: MemoryNetwork | None = None,
    ) -> None:
        """``model`` is the model's name inside the engine. ``learn_usage`` hears true prompt lengths. ``network``
        has the engines of this process (``memory:NAME``)."""
        self.instance = instance
        self.row = row
        self.url = url
        self.model = model
        self.origin = Origin(url, keepalive=row.keepalive, idle_max=1024, network=network)
        self.observer = EngineObserver(instance, clock.now_s)
        self.metrics: dict[str, float] = {}
        """The engine's figures at the last scrape, by our names."""
        self.context_tokens: int | None = None
        """Prompt and answer of one request together, as it told; 0: it does not tell, None: not asked yet."""
        self.own_limit = OwnLimit()
        self.runs: dict[int, _Run] = {}
        self.clock = clock
        self.listener = listener
        self.learn_usage = learn_usage
        self.closed = False
        self._suspect = suspect
        self._losses = Losses()
        self._told_404 = False
        self._limit = 0
        self._limit_sent = 0
        self._limit_call: Call | None = None
        self._limit_request = row.limit
        self._retiring: asyncio.Task[None] | None = None
        self.headers = b"content-type: application/json\r\naccept: text/event-stream, application/json\r\n"
        """Of every request, as they go on the wire."""
        self.authorization = {"authorization": f"Bearer {api_key}"} if api_key else {}
        if api_key:
            self.headers += b"authorization: Bearer %b\r\n" % api_key.encode()

    # -- the Engine port ---------------------------------------------------------------------------------------

    def start(self, request: Request) -> None:
        sent: UpstreamCall = request.payload
        if request.tokens_done and not self.row.resumes:
            request.tokens_done = sent.cut(False)
        run = _Run(self, request, sent)
        self.runs[request.id] = run
        self.observer.entered(self.clock.now_s)
        body = sent.message(self.row, self.model, request)
        run.body_bytes = len(body)
        run.call = self.origin.send(b"POST", sent.path, sent.headers(), body, run, lines=self.headers)
        if not sent.streams and request.prefill_cost_s:
            # Its first token cannot be seen. What waits for prefill to end must not wait for the whole answer.
            self.clock.call_later(presumed_prefill_s(self.instance), lambda: self._presume_prefilled(run))

    def evict(self, request: Request) -> None:
        run = self.runs.get(request.id)
        if run is None:
            return  # Its end is under way to the control plane.
        run.over(cancel=True)
        self._leave(run)
        sent: UpstreamCall = request.payload
        request.tokens_done = sent.cut(self.row.resumes) if request.outcome is None else run.tokens
        request.kv_saved_tokens = request.input_tokens + request.tokens_done if request.tokens_done else 0
        request.kv_saved_on = self.instance.id
        self.clock.call_at(self.clock.now_s, lambda: self.listener.evicted(request))

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """The gate in front of the engine holds in any case; engines that can are told, one message at a time."""
        self._limit = max_batch_size
        if self._limit_request is not None and self._limit_call is None and not self.closed:
            self._send_limit()

    # -- the rest ----------------------------------------------------------------------------------------------

    def watch(self, stall_s: float) -> None:
        """Now and then, posted: streams of which nothing has come for ``stall_s`` are lost. An engine that answers its
        health checks may still have forgotten a request. Answers in one piece are silent by nature. A limit that did
        not get through is sent again."""
        now_s = self.clock.now_s
        if self._limit_request is not None and self._limit_call is None and self._limit_sent != self._limit:
            self._send_limit()
        for run in list(self.runs.values()):
            run.watch(now_s)
            if run.silent_s(now_s) > stall_s:
                self.lost(run, UpstreamFailure(f"the engine sent nothing for {stall_s:g} s", 504))

    def close(self) -> None:
        """The instance is gone. What runs is cut; call this before the control plane is told."""
        self.closed = True
        for run in list(self.runs.values()):
            run.over(cancel=True)
            self._note(run, UpstreamFailure("its engine was lost"))
            if run.request.outcome is None:
                run.request.tokens_done = run.sent.cut(self.row.resumes)
        self.runs.clear()
        if self._limit_call is not None:
            self._limit_call.cancel()

    def retire(self) -> None:
        """Close its connections too."""
        self._retiring = asyncio.get_running_loop().create_task(self.origin.close())

    def not_found(self, path: bytes) -> None:
        """It answers 404 to a completion: its operator is told once what that comes from, mostly."""
        if not self._told_404:
            self._told_404 = True
            log.warning(
                "%s answers 404 to POST %s: it may not know the model as %r (served_model_name names it otherwise), "
                "or have no such route (its endpoint is its address without a path; Chiron adds /v1)",
                self.url,
                path.decode("latin-1"),
                self.model,
            )

    def _presume_prefilled(self, run: _Run) -> None:
        if self.holds(run) and run.decoding_s < 0.0:
            run.begin_decoding()
            self.listener.prefilled(run.request)

    def _send_limit(self) -> None:
        assert self._limit_request is not None
        method, path = self._limit_request.method.encode(), self._limit_request.path.encode()
        body, answer = self._limit_request.message(self._limit), _LimitAnswer(self)
        self._limit_sent = self._limit
        self._limit_call = self.origin.send(method, path, (), body, answer, lines=self.headers)

    def limit_answered(self, status: int) -> None:
        self._limit_call = None
        if status in (404, 405):
            self._limit_request = None  # This engine has no such thing; the gate is enough.
        elif status != 200:
            self._limit_sent = 0
        elif self._limit != self._limit_sent and not self.closed:
            self._send_limit()

    def _note(self, run: _Run, failure: UpstreamFailure) -> None:
        failure.at_s = self.clock.elapsed_s()
        run.sent.error = failure

    def _leave(self, run: _Run, *, ran: bool = True) -> None:
        """``ran=False``: what it was presumed to do was nothing."""
        if self.holds(run):
            del self.runs[run.request.id]
            now_s = self.clock.now_s
            if run.begun is not None and not (ran or run.told):
                self.observer.undo(now_s, run.begun)
            self.observer.left(
                now_s,
                run.request.input_tokens,
                run.tokens,
                decoded=run.begun is not None and not run.silent,
                streams=run.sent.streams,
                sequences=run.sent.sequences,
            )

    def holds(self, run: _Run) -> bool:
        """Whether the request is still here. Timers that were due before what is reported count first, and may have
        taken it away, or even have brought it back as another run."""
        return self.runs.get(run.request.id) is run

    def ended(self, run: _Run) -> None:
        """A complete answer."""
        request = run.request
        problem = run.sent.end()
        if problem:
            self.lost(run, UpstreamFailure(problem), sound=False)
            return
        self._losses.answered()

        def report() -> None:
            if not self.holds(run):
                return
            tokens = max(1, run.output_tokens()) if run.status < 400 else 0
            if request.outcome is None:
                request.tokens_done = tokens
                if not run.sent.streams and run.status < 400:
                    request.first_token_s = presumed_first_token_s(request, self.clock.now_s)
            if run.status < 400:
                run.first()
                if not self.holds(run):  # Its prefill is over, and somebody more urgent took the room.
                    return
                run.count(tokens)
            self._leave(run, ran=run.status < 400)
            if blames_client(run.status):
                self.listener.refused(request, f"engine answered {run.status}")
            elif run.status >= 400:
                self.listener.failed(request, f"engine answered {run.status}")
            else:
                run.sent.prompt_tokens = run.prompt_tokens
                if run.prompt_tokens and self.learn_usage is not None:
                    self.learn_usage(request, run.prompt_tokens)
                self.listener.finished(request)

        self.clock.post(report)

    def lost(self, run: _Run, failure: UpstreamFailure, *, connect: bool = False, sound: bool = True) -> None:
        """No answer, or none that counts. ``sound``: what came of it so far can be gone on with."""
        run.over(cancel=True)
        self._note(run, failure)
        log.info("%s: %s", self.url, failure.message)
        suspected, avoid_s = self._losses.lost(status=failure.status, connect=connect)

        def report() -> None:
            if not self.holds(run):
                return
            self._leave(run, ran=False)
            request = run.request
            if request.first_token_s < 0.0 and run.sent.visible:
                self.listener.first_token(request)
            if request.outcome is None:
                request.tokens_done = run.sent.cut(sound and self.row.resumes)
            if suspected:
                self._suspect(self.instance)
            if avoid_s and not self.closed:
                self.listener.avoid(self.instance, avoid_s)
            if not self.closed:
                self.listener.lost(request)

        self.clock.post(report)


class _Run:
    """One request inside one engine: the receiver of its answer."""

    __slots__ = (
        "_began_s",
        "_bytes",
        "_engine",
        "_error",
        "_heard",
        "_heard_s",
        "_over",
        "_tail",
        "_watched",
        "_watched_s",
        "began_with",
        "begun",
        "body_bytes",
        "call",
        "decoding_s",
        "prompt_tokens",
        "request",
        "sent",
        "silent",
        "status",
        "tokens",
        "told",
    )

    def __init__(self, engine: HttpEngine, request: Request, sent: UpstreamCall) -> None:
        self._engine = engine
        self.request = request
        self.sent = sent
        self.call: Call | None = None
        self.status = 0
        self.told = False
        """The control plane has heard of its first token."""
        self.decoding_s = -1.0
        """When it began to decode, as far as can be seen."""
        self.began_with = request.tokens_done
        self.tokens = request.tokens_done
        """Output tokens seen so far."""
        self.prompt_tokens = 0
        self.body_bytes = 0
        """Of the request."""
        self._bytes = 0
        """Of the answer."""
        self._tail = b""
        self._error: list[bytes] | None = None
        self._over = False
        self._heard = self._tail
        """The tail at the last look, and when it had last changed."""
        self._heard_s = self._began_s = engine.clock.now_s
        self.begun: Begun | None = None
        """What its beginning was counted as, once it decodes."""
        self.silent = False
        """It decoded, and it cannot be seen whether it still does."""
        self._watched, self._watched_s = self._tail, self._began_s

    def silent_s(self, now_s: float) -> float:
        """For how long nothing has come, as exactly as this is asked often."""
        if self._tail is not self._heard or self.sent.held_up or not self.sent.streams:
            self._heard, self._heard_s = self._tail, now_s
        return now_s - self._heard_s

    def watch(self, now_s: float) -> None:
        """Now and then: whether it can be seen to decode."""
        if self._tail is not self._watched:
            self._watched, self._watched_s = self._tail, now_s
        elif self.told and not self.silent and self.sent.streams and now_s - self._watched_s >= SILENT_S:
            self.silent = True
            self._engine.observer.fell_silent(
                now_s, self._watched_s, self.request.input_tokens, self.tokens, self.sent.sequences
            )

    def _speak_again(self) -> None:
        """Over how long it made these tokens is not known."""
        if self._engine.holds(self):
            self.silent = False
            now_s = self._engine.clock.elapsed_s()
            sequences = self.sent.sequences
            self._engine.observer.spoke_again(now_s, self.request.input_tokens, self.tokens, sequences)

    def over(self, *, cancel: bool) -> None:
        self._over = True
        if cancel and self.call is not None:
            self.call.cancel()
        self.call = None  # It refers to this run: no cycle is left behind.

    # -- net.client.Receiver -----------------------------------------------------------------------------------

    def on_head(self, status: int, headers: list[Header]) -> None:
        self.status = status
        if status == 404:
            self._engine.not_found(self.sent.path)
        # A redirect is an error in the engine's configured address.
        if status in RETRIED or 300 <= status < 400 or not claims.is_status(status):
            self._error = []
            self._tail = next((value for name, value in headers if name == b"content-type"), b"")
            return
        assert self.call is not None
        self.sent.begin(self.call, status, headers)

    def on_data(self, data: bytes) -> None:
        if self._error is not None:
            if sum(map(len, self._error)) < ERROR_MAX_BYTES:
                self._error.append(data)
            return
        self._bytes += len(data)
        try:
            tokens = self.sent.data(data)
        except (ValueError, CollectError) as error:
            self._engine.lost(self, UpstreamFailure(str(error)), sound=False)
            return
        except Exception:
            self._not_taken_in()
            return
        if self.sent.streams and self.status < 300:
            self.tokens += tokens
            if self.silent:
                self._speak_again()
            elif self.told:
                observer = self._engine.observer
                observer.tokens += tokens
                observer.held_tokens += tokens
            elif tokens and not self._over:
                self._engine.clock.post(self.first)
        self._tail = data if len(data) >= _TAIL_BYTES else (self._tail + data)[-_TAIL_BYTES:]

    def on_end(self) -> None:
        if self._over:
            return
        if self._error is not None:
            body = b"".join(self._error)
            message = f"the engine answered {self.status}"
            self._engine.lost(self, UpstreamFailure(message, self.status, body, self._tail))
            return
        self.over(cancel=False)
        try:
            self._engine.ended(self)
        except Exception:
            self._not_taken_in()

    def _not_taken_in(self) -> None:
        """A bug of ours with an unexpected answer: its client must not wait for ever."""
        log.exception("%s: the answer to %s failed", self._engine.url, self.request.id)
        self._engine.lost(self, UpstreamFailure("the answer could not be processed"), sound=False)

    def on_error(self, error: NetError) -> None:
        self.call = None
        if not self._over:
            # Where engines are is nothing to clients, and in the log already.
            message = str(error).removeprefix(f"{self._engine.origin.url}: ")
            self._engine.lost(self, UpstreamFailure(message), connect=isinstance(error, ConnectError))

    # -- progress ----------------------------------------------------------------------------------------------

    def first(self) -> None:
        """The first token is here (posted)."""
        if self.told or not self._engine.holds(self):
            return
        self.told = True
        if self.decoding_s < 0.0:
            self.begin_decoding()
        self._engine.listener.first_token(self.request)

    def begin_decoding(self) -> None:
        engine, tokens = self._engine, self.request.input_tokens
        self.decoding_s = engine.clock.now_s
        prefilled = 0 if self.request.kv_saved_tokens else tokens + self.began_with
        sent = self.sent
        self.begun = engine.observer.first_token(
            self.decoding_s,
            tokens,
            entered_s=self._began_s,
            prefilled=prefilled,
            streams=sent.streams,
            sequences=sent.sequences,
        )
        engine.observer.held_tokens += self.tokens

    def count(self, tokens: int) -> None:
        """It ended with this many output tokens: put right what was counted in passing."""
        observer = self._engine.observer
        if self.sent.streams:
            observer.tokens += tokens - self.tokens
        else:
            sequences = self.sent.sequences
            observer.answered(tokens - sequences, (self._engine.clock.now_s - self.decoding_s) * sequences)

    def output_tokens(self) -> int:
        """As the engine's usage says, if that can be, else as seen. Also notes the prompt's true length."""
        prompt, output = claims.usage_in(self._tail)
        self.prompt_tokens = claims.prompt_tokens(prompt, body_bytes=self.body_bytes)
        return claims.output_tokens(
            output,
            seen=self.tokens,
            before=self.began_with,
            answer_bytes=self._bytes,
            took_s=self._engine.clock.now_s - self._began_s,
            most=self.sent.output_max,
            streams=self.sent.streams,
        )


class _LimitAnswer:
    """Receiver of the answer to a new limit."""

    def __init__(self, engine: HttpEngine) -> None:
        self._engine = engine
        self._status = 0

    def on_head(self, status: int, headers: list[Header]) -> None:
        self._status = status

    def on_data(self, data: bytes) -> None:
        pass

    def on_end(self) -> None:
        self._engine.limit_answered(self._status)

    def on_error(self, error: NetError) -> None:
        self._engine.limit_answered(0)


def blames_client(status: int) -> bool:
    """Whether this answer of an engine says that something is wrong with the request itself: it was no work, and nobody
    failed."""
    return 400 <= status < 500 and status not in RETRIED and status not in NOT_THE_CLIENTS
