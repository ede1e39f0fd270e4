"""The HTTP interface of an engine server, whatever runs behind it, and the life of its process.

An engine takes requests through ``submit``, raises ``RequestError`` for those it cannot serve, and answers the others
through a ``Reply``, one call per step.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

from chiron.engines.serve.answer import Answer, CallPiece, Part, TokenLogprob, error_event, joined, models_body
from chiron.engines.serve.openai import FinishReason, GenerationRequest, Usage, parse_limits, parse_request
from chiron.engines.serve.request_error import RequestError
from chiron.net.limits import ServerLimits
from chiron.net.server import HttpServer, Incoming, serve

log = logging.getLogger("chiron.engine")

_STREAM_HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
_STOP_GRACE_S = 0.5
"""For answers that are nearly complete when the process is told to stop."""


class ServedEngine(Protocol):
    """What the front asks of an engine."""

    def submit(self, request: GenerationRequest, incoming: Incoming) -> None:
        """Answer it, now or step by step. Raises RequestError before anything is answered."""

    def set_limit(self, limit: int) -> None: ...

    def limits(self) -> dict[str, int]: ...

    def metrics_text(self) -> str: ...


@runtime_checkable
class TakesTokenBudget(Protocol):
    """An engine that takes another token budget while it runs."""

    def set_token_budget(self, tokens: int) -> None: ...


class HasHandle(Protocol):
    """Whatever answers requests."""

    def handle(self, incoming: Incoming) -> None: ...


class EngineServer:
    """Routes of one engine."""

    def __init__(
        self,
        engine: ServedEngine,
        names: Sequence[str],
        about: dict[str, Any],
        routes: Mapping[str, Mapping[bytes, Callable[[Incoming], None]]] | None = None,
    ) -> None:
        """``routes``: further ones of this engine, by path and method."""
        self._engine = engine
        self._names = tuple(names)
        self._about = about
        self._created_s = int(time.time())
        self._routes: dict[str, Mapping[bytes, Callable[[Incoming], None]]] = {
            "/health": {b"GET": self._health},
            "/v1/models": {b"GET": self._models},
            "/v1/chat/completions": {b"POST": partial(self._generate, chat=True)},
            "/v1/completions": {b"POST": partial(self._generate, chat=False)},
            "/metrics": {b"GET": self._metrics},
            "/chiron/limits": {b"GET": self._limits, b"PUT": self._set_limit},
            **(routes or {}),
        }

    def handle(self, incoming: Incoming) -> None:
        try:
            self._route(incoming)(incoming)
        except RequestError as error:
            respond_error(incoming, error)

    def _route(self, incoming: Incoming) -> Callable[[Incoming], None]:
        methods = self._routes.get(incoming.path)
        if methods is None:
            known = ", ".join(self._routes)
            raise RequestError(f"No such path: {incoming.path[:200]}; known: {known}.", status=404, code="not_found")
        route = methods.get(b"GET" if incoming.method == b"HEAD" else incoming.method)
        if route is None:
            allowed = " or ".join(name.decode() for name in methods)
            raise RequestError(f"{incoming.path} takes {allowed}.", status=405, code="method_not_allowed")
        return route

    def _generate(self, incoming: Incoming, *, chat: bool) -> None:
        self._engine.submit(parse_request(incoming.body, chat=chat, served=self._names), incoming)

    def _health(self, incoming: Incoming) -> None:
        incoming.respond(200, b"{}")

    def _models(self, incoming: Incoming) -> None:
        incoming.respond(200, models_body(self._names, created_s=self._created_s, about=self._about))

    def _set_limit(self, incoming: Incoming) -> None:
        limit, tokens = parse_limits(incoming.body)
        if tokens is not None:
            if not isinstance(self._engine, TakesTokenBudget):
                raise RequestError(
                    "max_num_batched_tokens cannot be changed here while the engine runs; start it anew."
                )
            self._engine.set_token_budget(tokens)
        if limit is not None:
            self._engine.set_limit(limit)
        self._limits(incoming)

    def _limits(self, incoming: Incoming) -> None:
        incoming.respond(200, json.dumps(self._engine.limits()).encode())

    def _metrics(self, incoming: Incoming) -> None:
        text = self._engine.metrics_text()
        incoming.respond(200, text.encode(), content_type=b"text/plain; version=0.0.4; charset=utf-8")


class Reply:
    """The answer to one client: ``choices`` take what is generated, and are sent as they come or all at the end."""

    __slots__ = ("_answer", "_incoming", "_open", "_request", "_tokens", "_usage", "choices", "failed")

    def __init__(
        self, request: GenerationRequest, incoming: Incoming, *, id: str, prompt_tokens: int, offset: int = 0
    ) -> None:
        """``prompt_tokens``: of all prompts together. ``offset``: characters answered before this was resumed."""
        self._request = request
        self._incoming = incoming
        self._answer = Answer(request, id=id, created_s=int(time.time()), offset=offset)
        self._usage = prompt_tokens
        self._tokens = 0
        self._open = request.choices
        self.failed = False
        self.choices = [Choice(self, index) for index in range(request.choices)]

    def fail(self, error: RequestError) -> None:
        """It cannot be completed: an error status, or an error event where the stream has begun."""
        if self.failed:
            return
        self.failed = True
        if self._incoming.started:
            self._incoming.write(error_event(error))
            self._incoming.finish()
        else:
            respond_error(self._incoming, error)

    def abort(self) -> None:
        self.failed = True
        self._incoming.abort()

    @property
    def busy(self) -> bool:
        """What is generated must wait: for the end, or for a client that reads slowly."""
        return not self._request.stream or self._incoming.paused or self.failed

    def event(self, index: int, part: Part) -> bool:
        """Send what a step generated, if it can be sent now."""
        incoming = self._incoming
        if self.busy:
            return False
        if not incoming.started:
            incoming.start(200, _STREAM_HEADERS)
        incoming.write(self._answer.event(index, part))
        return True

    def finished(self, choice: Choice, reason: FinishReason, tokens: int) -> None:
        self._tokens += tokens
        self._open -= 1
        incoming, answer = self._incoming, self._answer
        if self.failed:
            return
        usage = Usage(prompt_tokens=self._usage, completion_tokens=self._tokens)
        if not self._request.stream:
            choice.reason = reason
            if not self._open:
                parts = [(each.take(), each.reason) for each in self.choices]
                incoming.respond(200, answer.whole(parts, usage))
            return
        if not incoming.started:
            incoming.start(200, _STREAM_HEADERS)
        data = answer.event(choice.index, choice.take(), reason)
        if self._open:
            incoming.write(data)
            return
        incoming.write(data + answer.end(usage))
        incoming.finish()


class Choice:
    """One sequence of an answer: an event per step, or everything at the end.

    A client that reads slowly gets what it missed in one event, later, so what waits for it is text and not events.
    """

    __slots__ = ("_calls", "_held", "_ids", "_logprobs", "_reply", "_text", "index", "reason")

    def __init__(self, reply: Reply, index: int) -> None:
        self.index = index
        self.reason: FinishReason = "stop"
        self._reply = reply
        self._held = False
        """Something waits to be sent."""
        self._text: list[str] = []
        self._ids: list[int] = []
        self._calls: list[CallPiece] = []
        self._logprobs: list[TokenLogprob] = []

    def add(
        self,
        text: str,
        token_ids: Sequence[int] = (),
        calls: Sequence[CallPiece] = (),
        logprobs: Sequence[TokenLogprob] = (),
    ) -> None:
        """What belongs before the next step: a prompt that is echoed."""
        self._held = True
        self._text.append(text)
        self._ids += token_ids
        self._calls += calls
        self._logprobs += logprobs

    def step(
        self,
        text: str,
        token_ids: Sequence[int],
        calls: Sequence[CallPiece] = (),
        logprobs: Sequence[TokenLogprob] = (),
    ) -> None:
        """What one step generated; ``text`` may be empty while a character is incomplete."""
        reply = self._reply
        if not self._held:
            if reply.event(self.index, Part(text, token_ids, calls, logprobs)):
                return
            self.add(text, token_ids, calls, logprobs)
            return
        self.add(text, token_ids, calls, logprobs)
        if not reply.busy:
            reply.event(self.index, self.take())

    def finish(
        self,
        text: str,
        token_ids: Sequence[int],
        reason: FinishReason,
        tokens: int,
        calls: Sequence[CallPiece] = (),
        logprobs: Sequence[TokenLogprob] = (),
    ) -> None:
        """The last step's tokens and the end; ``tokens`` in all, from the very beginning."""
        self.add(text, token_ids, calls, logprobs)
        self._reply.finished(self, reason, tokens)

    def fail(self, error: RequestError) -> None:
        """Ends the whole answer."""
        self._reply.fail(error)

    def abort(self) -> None:
        """The connection breaks off in the middle of the answer, or before it."""
        self._reply.abort()

    def take(self) -> Part:
        self._held = False
        part = Part("".join(self._text), self._ids, joined(self._calls), self._logprobs)
        self._text, self._ids, self._calls, self._logprobs = [], [], [], []
        return part


def respond_error(incoming: Incoming, error: RequestError) -> None:
    headers = [] if error.retry_after_s is None else [(b"retry-after", b"%d" % error.retry_after_s)]
    incoming.respond(error.status, error.body(), headers=headers)


async def serve_until_stopped(
    *fronts: HasHandle,
    host: str,
    port: int,
    failed: asyncio.Event,
    drain: Callable[[], Coroutine[Any, Any, None]] | None = None,
    grace_s: float = 0.0,
    limits: ServerLimits | None = None,
) -> None:
    """Listen, print the ready line, and serve until SIGTERM, SIGINT or until the engine has ``failed``.

    After a signal it serves on while it ``drain``s, or until a second one. What is left of ``grace_s`` then is for
    clients that have not read their answers to the end. Several engines get a port each, from ``port`` upwards unless
    it is 0.
    """
    loop = asyncio.get_running_loop()
    stop, again = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (again if stop.is_set() else stop).set())
    servers = []
    for index, front in enumerate(fronts):
        servers.append(await serve(front.handle, host=host, port=port + index if port else 0, limits=limits))
    print(f"chiron-engine ready port={','.join(str(server.port) for server in servers)}", flush=True)
    await _first(stop.wait(), failed.wait())
    until_s = loop.time() + grace_s
    if drain is not None and not failed.is_set():
        await _first(drain(), again.wait(), failed.wait())
        if (left_s := until_s - loop.time()) > _STOP_GRACE_S:
            await _first(_close(servers, left_s), again.wait(), failed.wait())
    await _close(servers, _STOP_GRACE_S)


async def _close(servers: Iterable[HttpServer], grace_s: float) -> None:
    await asyncio.gather(*(server.close(grace_s) for server in servers))


async def _first(*waits: Coroutine[Any, Any, Any]) -> None:
    """Until one of them is over; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
