"""A request to a cascade: the small model is asked first, the large one where that is unsure or cannot answer.

Both calls are requests like any other, with queue, placement, limits and SLOs of their own models. The first one
(``FirstCall``) asks for the log-probabilities of its tokens, and nothing of its answer goes to the client before it
will do (``policies.cascade``). Where it will not, that call is taken back and the client's own request is sent to the
second model (a ``RelayCall``), with what is left of its TTFT SLO. What the client did not ask for is taken out of the
first model's answer: log-probabilities, the usage at a stream's end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

import msgspec
import orjson
from msgspec import UNSET, Raw, Struct, UnsetType

from chiron.core.types import Request
from chiron.engines.rows import EngineRow
from chiron.gateway.relay.admission import Admitted, Models, ServedModel, check_fits, is_chat, with_slos
from chiron.gateway.relay.body import Body, small_value
from chiron.gateway.relay.calls import RelayCall, passed_headers
from chiron.gateway.relay.collect import CollectError, Collector
from chiron.gateway.relay.ending import Answer, last_word, passed_on
from chiron.gateway.relay.errors import ApiError
from chiron.gateway.relay.events import EventError, Events
from chiron.gateway.relay.keys import Key
from chiron.gateway.relay.turns import FAILED, TOO_LONG, UNJUDGED, UNSURE, Turn
from chiron.gateway.relay.upstream import UpstreamFailure
from chiron.net.client import Call, Header
from chiron.net.incoming import Incoming
from chiron.policies.cascade import CascadeRule

if TYPE_CHECKING:
    from chiron.gateway.relay.front import Desk

log = logging.getLogger("chiron.cascade")

Json = dict[str, Any]

TTFT_LEFT_MIN_S = 0.001
"""Of a TTFT SLO that is over nothing is left to aim at: the second call then has all of the class's again."""
UNJUDGED_AFTER = 16
"""Pieces of text, at least, without a log-probability to judge: the rest of such an answer is not waited for."""
_DONE = b"[DONE]"


class _Logprobs(Struct, gc=False):
    """What of a body is replaced for the first call, beside what is for every call."""

    logprobs: Raw | UnsetType = UNSET
    top_logprobs: Raw | UnsetType = UNSET


class _Asked(_Logprobs, gc=False):
    """What a body asks for that decides how its answer is judged, and what of it is passed on."""

    tools: Raw | UnsetType = UNSET
    functions: Raw | UnsetType = UNSET
    tool_choice: Raw | UnsetType = UNSET
    echo: Raw | UnsetType = UNSET
    best_of: Raw | UnsetType = UNSET


_LOGPROBS = msgspec.json.Decoder(_Logprobs)
_ASKED = msgspec.json.Decoder(_Asked)


class Wanted(Struct, frozen=True, gc=False):
    """What the client asked for."""

    logprobs: int | None
    """Log-probabilities, with so many of the likeliest tokens; None: it did not."""
    usage: bool
    """At the end of a stream, too."""
    stream: bool
    judged: bool
    """Its answer can be judged by log-probabilities."""


def wanted(body: Body, chat: bool, stream: bool) -> Wanted:
    """Values that no engine takes are left to the engine to refuse."""
    asked, fields = _ASKED.decode(body.raw), body.shape.fields
    top: Any = _value(asked.top_logprobs if chat else asked.logprobs)
    asks = _value(asked.logprobs) is True if chat else type(top) is int
    options = fields.get("stream_options")
    tools = bool(_value(asked.tools) or _value(asked.functions)) and _value(asked.tool_choice) != "none"
    several = body.shape.several or _value(asked.best_of) not in (None, 1)
    return Wanted(
        logprobs=(top if type(top) is int and top >= 0 else 0) if asks else None,
        usage=not stream or (isinstance(options, dict) and options.get("include_usage") is True),
        stream=stream,
        judged=not (tools or several or _value(asked.echo)),
    )


def _value(raw: Raw | UnsetType) -> Any:
    """A long one is something, and no more is asked of it."""
    return None if raw is UNSET else small_value(bytes(raw))


class Judge:
    """Confidence of an answer as it comes, from an engine's log-probabilities, which may be anything."""

    def __init__(self, rule: CascadeRule) -> None:
        self._rule = rule
        self._sum = 0.0
        self.tokens = 0
        """That could be judged."""

    def take(self, logprobs: object, chat: bool) -> None:
        """Those of one event, as far as they are judged: how a stream is cut into events decides nothing."""
        if not isinstance(logprobs, dict):
            return
        for chosen, likeliest in (_chat_tokens if chat else _text_tokens)(logprobs):
            if self.full:
                return
            found = self._rule.confidence(chosen, likeliest)
            if found is not None:
                self._sum += found
                self.tokens += 1

    @property
    def full(self) -> bool:
        """It is decided before the answer's end."""
        return 0 < self._rule.after_tokens <= self.tokens

    @property
    def sure(self) -> bool:
        return self.tokens > 0 and self._rule.sure(self._sum / self.tokens)


def _chat_tokens(logprobs: Json) -> list[tuple[float, list[float]]]:
    content = logprobs.get("content")
    return [
        (number, _numbers([each.get("logprob") for each in _dicts(entry.get("top_logprobs"))]))
        for entry in _dicts(content)
        for number in _numbers([entry.get("logprob")])
    ]


def _text_tokens(logprobs: Json) -> list[tuple[float, list[float]]]:
    """llama.cpp says them as for chats."""
    chosen, top = logprobs.get("token_logprobs"), logprobs.get("top_logprobs")
    if not isinstance(chosen, list):
        return _chat_tokens(logprobs)
    tops = top if isinstance(top, list) else []
    return [
        (number, _numbers(list(tops[i].values())) if i < len(tops) and isinstance(tops[i], dict) else [])
        for i, value in enumerate(chosen)
        for number in _numbers([value])
    ]


def _dicts(value: object) -> list[Json]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _numbers(values: list[Any]) -> list[float]:
    return [float(each) for each in values if isinstance(each, int | float) and not isinstance(each, bool)]


class FirstCall:
    """The call of a cascade's first model: held back until its answer will do. ``Request.payload``; implements
    ``UpstreamCall`` and ``ClientCall``."""

    streams = True
    """The engine is asked for a stream, also where the client wants none: so it is seen how far it is."""
    sequences = 1

    def __init__(self, whole: Cascaded, incoming: Incoming, body: Body, wants: Wanted, rule: CascadeRule) -> None:
        self.incoming = incoming
        self.number = 0
        self.path = incoming.path.encode()
        self.request_id = whole.request_id
        self.key_name = whole.key.name
        self.prompt_bytes = body.shape.learnable_bytes
        self.prompt_tokens = 0
        self.output_max = body.shape.output_tokens_max
        self.error: UpstreamFailure | None = None
        self.refusal: ApiError | None = None
        self.wait_max_s = inf
        self.program = whole.program
        self.turn: Turn | None = None
        self._whole = whole
        self._body = body
        self._wants = wants
        self._rule = rule
        self._chat = is_chat(incoming.path)
        self._call: Call | None = None
        self._status = 0
        self._headers: list[Header] = []
        self._given_up = False
        """The second model is asked instead."""
        self._released = False
        """It will do, and its client reads it."""
        self._over = False
        self._wait: asyncio.TimerHandle | None = None
        self._reset()

    def _reset(self) -> None:
        self._events = Events()
        keep = bool(self._body.shape.fields.get("return_token_ids"))
        self._collector = Collector(self._chat, keep_token_ids=keep)
        self._judge = Judge(self._rule)
        self._unjudged = 0
        """Pieces of text without anything to judge."""
        self._held: list[bytes] = []
        self._released = self.visible
        """Another try says something else, which is judged anew."""

    # -- UpstreamCall ------------------------------------------------------------------------------------------------

    @property
    def peers(self) -> Sequence[str]:
        """Whose shares it counts against."""
        return self.incoming.peers

    @property
    def closed(self) -> bool:
        """Nobody waits for it any more."""
        return self._given_up or self.incoming.closed

    @property
    def body_bytes(self) -> int:
        return len(self._body.raw)

    @property
    def visible(self) -> bool:
        return self._released and self._wants.stream

    @property
    def held_up(self) -> bool:
        return self.visible and self.incoming.paused

    def message(self, row: EngineRow, model: str, request: Request) -> bytes:
        self.wait_no_more()
        self._reset()
        asked = max(self._rule.top, self._wants.logprobs or 0, 0 if self._chat else row.text_logprobs_min)
        values: Json = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        values |= {"logprobs": True, "top_logprobs": asked} if self._chat else {"logprobs": asked}
        return self._body.with_values(values, _LOGPROBS.decode(self._body.raw))

    def headers(self) -> Sequence[Header]:
        # Not the name of the second call: one engine may serve both models, and older vLLM refuse an id that they have.
        return ((b"x-request-id", b"%b.first" % self.request_id.encode()),)

    def begin(self, call: Call, status: int, headers: list[Header]) -> None:
        self._call, self._status = call, status
        self._headers = [
            (b"content-type", b"text/event-stream"),
            (b"x-request-id", self.request_id.encode()),
            *(header for header in passed_headers(headers) if header[0] != b"content-type"),
        ]

    def data(self, data: bytes) -> int:
        if self._status >= 300 or self._given_up:
            return 0
        before = self._collector.tokens
        try:
            for event in self._events.feed(data):
                if not self._given_up:
                    self._take(event)
        except EventError as error:
            raise ValueError(str(error)) from None
        return max(0, self._collector.tokens - before)

    def _take(self, event: bytes) -> None:
        """Raises CollectError. Log-probabilities are judged and cut before anything is kept: they are most of an event,
        and many times its size as objects."""
        chunk = self._collector.read(event)
        if chunk is None:
            said = b"data: [DONE]\n\n" if event == _DONE else b""
        else:
            for choice in _dicts(chunk.get("choices")):
                if not self._released:
                    self._judge_choice(choice)
                cut_logprobs(choice, self._wants.logprobs, self._chat)
            said = self._passed(chunk)
            if self._wants.stream:  # Its client gets the events themselves.
                for choice in _dicts(chunk.get("choices")):
                    choice.pop("logprobs", None)
            self._collector.take_chunk(chunk, len(said or event))
            if not self._released and (self._judge.full or self._cannot_be_judged):
                self._decide()
        if not said or not self._wants.stream or self._given_up:
            return
        if self._released:
            self.incoming.write(said)
        else:
            self._held.append(said)

    def _judge_choice(self, choice: Json) -> None:
        self._judge.take(choice.get("logprobs"), self._chat)
        delta = choice.get("delta")
        if not self._judge.tokens and (choice.get("text") or (isinstance(delta, dict) and delta.get("content"))):
            self._unjudged += 1

    @property
    def _cannot_be_judged(self) -> bool:
        return not self._judge.tokens and self._unjudged >= max(self._rule.after_tokens, UNJUDGED_AFTER)

    def _passed(self, chunk: Json) -> bytes:
        """What the client gets of an event; nothing of one that tells only what it did not ask for."""
        if chunk.get("error"):
            return b""  # The collector has it, and tells.
        if not self._wants.usage and "usage" in chunk:
            if not chunk.get("choices"):
                return b""
            chunk = {name: value for name, value in chunk.items() if name != "usage"}
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def end(self) -> str:
        self._call = None
        if self._status >= 300 or self._given_up:
            return ""
        try:
            answer = self._collector.result()
        except CollectError as error:
            return str(error)
        if not self._released:
            self._decide()
        if self._given_up or self._over:
            return ""
        self._over = True
        if self._wants.stream:
            self.incoming.finish()
        else:
            self._answer(answer)
        return ""

    def cut(self, resumes: bool) -> int:
        return 0

    # -- the rest ----------------------------------------------------------------------------------------------

    def wait(self, wait_s: float) -> None:
        """For so long for an instance, the first time. Whoever looks at ``wait_max_s`` does so once a second."""
        self._wait = asyncio.get_running_loop().call_later(wait_s, self._waited)

    def wait_no_more(self) -> None:
        """It has an instance, or needs none."""
        if self._wait is not None:
            self._wait.cancel()
            self._wait = None

    def _waited(self) -> None:
        self._wait = None
        if not (self.closed or self._over):
            self._given_up = True
            self._whole.go_on(self, FAILED, True)  # At once: it might be placed meanwhile.

    def _decide(self) -> None:
        """Whether its answer will do, from what there is of it."""
        if self._judge.sure:
            self._release()
        else:
            self._given_up = True
            self._whole.ask_then(self, UNSURE if self._judge.tokens else UNJUDGED, counted=True)

    def _release(self) -> None:
        self._released = True
        self._whole.shown(self)
        incoming = self.incoming
        if not self._wants.stream:
            return
        incoming.on_pause, incoming.on_resume = self._pause, self._resume
        incoming.start(200, self._headers)
        self._whole.responded(200)
        incoming.write(b"".join(self._held))
        self._held.clear()
        if incoming.paused:
            self._pause()

    def _answer(self, answer: Json) -> None:
        for choice in answer["choices"]:
            logprobs = choice.setdefault("logprobs", None)
            if isinstance(logprobs, dict) and "token_logprobs" in logprobs:
                logprobs.setdefault("top_logprobs", None)  # Cut from each event, where none was asked for.
        Answer(200, orjson.dumps(answer), tuple(self._headers[2:])).send(self.incoming, self.request_id)
        self._whole.responded(200)

    def remind(self, now_s: float, words: str) -> None:
        """The second model is asked before anybody has waited for long."""

    def abandon(self) -> None:
        """Its end cannot be told: cut its client off."""
        self.incoming.abort()

    def ended(self, request: Request) -> None:
        """The control plane is done with it."""
        self._call = None
        self.wait_no_more()
        if self.closed or self._over or request.outcome == "finished":
            return
        if not self.visible:  # Also of an answer that would do: nothing of it has gone to the client.
            self._given_up = True
            # A limit of its key's would be met again, and has not counted it.
            self._whole.ask_then(self, FAILED, counted=str(request.outcome) != "refused")
            return
        self._over = True
        answer = last_word(request, self.refusal, passed_on(self.error), self.error)
        if self.incoming.started:
            self.incoming.write(answer.event())
            self.incoming.finish()
        else:
            answer.send(self.incoming, self.request_id)
            self._whole.responded(answer.status)

    def _pause(self) -> None:
        if self._call is not None:
            self._call.pause()

    def _resume(self) -> None:
        if self._call is not None:
            self._call.resume()


def cut_logprobs(choice: Json, asked: int | None, chat: bool) -> None:
    """Leave the log-probabilities that were asked for."""
    logprobs = choice.get("logprobs")
    if asked is None:
        choice.pop("logprobs", None)
    elif not isinstance(logprobs, dict):
        return
    elif chat or "content" in logprobs:
        for entry in _dicts(logprobs.get("content")):
            top = entry.get("top_logprobs")
            entry["top_logprobs"] = top[:asked] if isinstance(top, list) else []
    elif isinstance(tops := logprobs.get("top_logprobs"), list):
        logprobs["top_logprobs"] = [_likeliest(each, asked) for each in tops] if asked else None


def _likeliest(top: object, count: int) -> Any:
    if not isinstance(top, dict) or len(top) <= count:
        return top
    found = sorted(top.items(), key=lambda each: -each[1] if isinstance(each[1], int | float) else inf)
    return dict(found[:count])


class Cascaded:
    """A client's request to a cascade. ``begin`` asks the first model, or at once the second one."""

    def __init__(
        self,
        incoming: Incoming,
        *,
        admitted: Admitted,
        key: Key,
        desk: Desk,
        models: Models,
        request_id: str,
        wait_s: float | None,
        responded: Callable[[int], None],
        refuse: Callable[[Incoming, ApiError], None],
    ) -> None:
        """Raises ApiError if one of its models is served no more."""
        settings = admitted.model.settings.cascade
        assert settings is not None
        self.incoming = incoming
        self.key = key
        self.request_id = request_id
        self.responded = responded
        self._name = admitted.model.settings.name
        self._settings = settings
        self._cls = admitted.cls
        self.program = admitted.program
        self._body = admitted.body
        self._wants = wanted(admitted.body, is_chat(incoming.path), admitted.stream)
        self._desk = desk
        self._first = models.part(settings.first)
        self._then = models.part(settings.then)
        self._wait_s = wait_s
        self._refuse = refuse
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()

    def begin(self) -> None:
        """Raises ApiError where neither is asked."""
        if not self._wants.judged:
            self._send_then(UNJUDGED, counted=False)
        elif not self._fits(self._first):
            self._send_then(TOO_LONG, counted=False)
        else:
            self._send_first()

    def shown(self, call: FirstCall) -> None:
        self._desk.shown(call)

    def ask_then(self, call: FirstCall, reason: str, *, counted: bool) -> None:
        """Soon: whoever says so may be in the middle of the first call's answer."""
        self._loop.call_soon(self.go_on, call, reason, counted)

    def go_on(self, call: FirstCall, reason: str, counted: bool) -> None:
        self._desk.left(call)  # Harmless if it has ended.
        if self.incoming.closed:
            return
        try:
            self._send_then(reason, counted=counted)
        except ApiError as error:
            self._refuse(self.incoming, error.with_traceback(None))

    def _fits(self, served: ServedModel) -> bool:
        try:
            check_fits(served, self._body.shape, is_chat(self.incoming.path))
        except ApiError:
            return False
        return True

    def _send_first(self) -> None:
        call = FirstCall(self, self.incoming, self._body, self._wants, self._settings.rule)
        call.turn = Turn(self._name, "", 0.0, False, self._cls.ttft_s, self._wants.stream)
        wait_s = self._cls.ttft_s / 2 if self._settings.first_wait_s is None else self._settings.first_wait_s
        call.wait_max_s = wait_s if self._wait_s is None else min(wait_s, self._wait_s)
        desk, served = self._desk, self._first

        def left() -> None:
            call.wait_no_more()
            desk.left(call)

        self.incoming.on_close = left
        self.incoming.body = b""
        if wait_s < inf:
            call.wait(wait_s)
        try:
            desk.arrive(call, served.settings.name, self._cls, self.key, served.tokens_of(self._body.shape))
        except ApiError:
            call.wait_no_more()
            self._send_then(FAILED, counted=False)

    def _send_then(self, reason: str, *, counted: bool) -> None:
        """Raises ApiError."""
        served, desk, incoming = self._then, self._desk, self.incoming
        check_fits(served, self._body.shape, is_chat(incoming.path))
        before_s = self._loop.time() - self._began_s
        call = RelayCall(
            incoming,
            body=self._body,
            stream=self._wants.stream,
            request_id=self.request_id,
            key_name=self.key.name,
            responded=self.responded,
        )
        call.program = self.program
        call.turn = Turn(self._name, reason, before_s, counted, self._cls.ttft_s, self._wants.stream)
        if self._wait_s is not None:
            call.wait_max_s = max(0.0, self._wait_s - before_s)
        incoming.on_close = lambda: desk.left(call)
        left_s = self._cls.ttft_s - before_s
        cls = self._cls
        if reason and before_s > 0.0 and left_s >= TTFT_LEFT_MIN_S:
            cls = with_slos(cls, round(left_s, 3), None)
        desk.arrive(call, served.settings.name, cls, self.key, served.tokens_of(self._body.shape))
