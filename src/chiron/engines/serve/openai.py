"""What an engine server understands of OpenAI's API: requests read strictly, answers rendered.

``parse_request`` turns a body into a frozen ``GenerationRequest`` or raises ``RequestError``, which names the field,
its value and what is allowed. Fields that would change the answer in a way an engine of ours cannot deliver (several
choices, tools, log probabilities) are errors rather than ignored; unknown fields are ignored, as clients send many.

``Answer`` renders one request's answer. A stream holds one event per engine step; the first carries the role and the
last the finish reason, so a stream of n steps is n events and the first event is the first token.

Two fields are ours. ``resume_token_ids`` are tokens that this request generated elsewhere: generation goes on after
them, only new text is answered, and limits and usage count from the beginning. ``return_token_ids`` adds ``token_ids``
to each choice, which is what a later resume needs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quote
from typing import Any, Literal

FinishReason = Literal["stop", "length"]

COMPLETION_TOKENS_DEFAULT = 16
"""``max_tokens`` of /v1/completions when absent, as in OpenAI's API; chat has no such default."""
STOPS_MAX = 16
"""Stop strings in one request."""
STOP_CHARS_MAX = 256
"""Length of one stop string: text that could begin one is held back."""
MESSAGES_MAX = 4096
"""Messages in one chat request."""

DONE = b"data: [DONE]\n\n"


class RequestError(Exception):
    """A request that cannot be served, as an HTTP status and OpenAI's error object."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        """Seconds for the Retry-After header; None: no such header."""

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One choice to generate. Either ``messages`` (chat) or ``prompt`` is set."""

    chat: bool
    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] = ""
    """Text, or token ids."""
    max_tokens: int | None = None
    """Tokens to generate, those of ``resume_token_ids`` included; None: what the context has room for."""
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    resume_token_ids: tuple[int, ...] = ()
    return_token_ids: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def fields(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def parse_request(body: bytes, *, chat: bool, served: Collection[str]) -> GenerationRequest:
    """The request in a body; ``served`` are the names the model goes by. Raises RequestError (400 or 404)."""
    fields = _Fields(parse_object(body))
    model = fields.text("model")
    if model not in served:
        raise RequestError(
            f"The model {model!r} does not exist here; served: {', '.join(sorted(served))}.",
            status=404,
            type="not_found_error",
            code="model_not_found",
            param="model",
        )
    fields.refuse_unsupported()
    stream = fields.flag("stream")
    max_tokens = fields.integer("max_completion_tokens", 1) or fields.integer("max_tokens", 1)
    return GenerationRequest(
        chat=chat,
        model=model,
        messages=_messages(fields) if chat else (),
        prompt="" if chat else _prompt(fields),
        max_tokens=max_tokens or (None if chat else COMPLETION_TOKENS_DEFAULT),
        ignore_eos=fields.flag("ignore_eos"),
        stop=_stop(fields),
        temperature=fields.number("temperature", 0.0, 2.0, 1.0),
        top_p=fields.number("top_p", 0.0, 1.0, 1.0),
        frequency_penalty=fields.number("frequency_penalty", -2.0, 2.0, 0.0),
        presence_penalty=fields.number("presence_penalty", -2.0, 2.0, 0.0),
        seed=fields.integer("seed", -(1 << 63), (1 << 63) - 1),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        resume_token_ids=_resume(fields),
        return_token_ids=fields.flag("return_token_ids"),
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises RequestError."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {str(error)[:200]}.") from None
    if not isinstance(data, dict):
        raise RequestError(f"The body is {_shown(data)}; it must be a JSON object.")
    return data


def parse_limit(body: bytes) -> int:
    """The max batch size in ``{"limit": n}``, sequences, at least 1. Raises RequestError."""
    fields = _Fields(parse_object(body))
    limit = fields.integer("limit", 1)
    if limit is None:
        raise fields.error("limit", "a whole number of at least 1")
    return limit


class Answer:
    """Renders the answer to one request: events of a stream, or the whole."""

    __slots__ = ("_after_text", "_before_text", "_first", "_opening", "_request")

    def __init__(self, request: GenerationRequest, *, id: str, created_s: int) -> None:
        """``id`` without its prefix; ``created_s`` is wall time."""
        self._request = request
        self._first = request.chat
        prefix, kind = ("chatcmpl-", "chat.completion") if request.chat else ("cmpl-", "text_completion")
        if request.chat and request.stream:
            kind += ".chunk"
        self._opening = (
            f'{{"id":{quote(prefix + id)},"object":"{kind}","created":{created_s},"model":{quote(request.model)}'
        )
        # All but the text and the tokens is the same in every event, and is rendered once.
        text = '"delta":{"content":' if request.chat else '"text":'
        self._before_text = f'data: {self._opening},"choices":[{{"index":0,{text}'
        self._after_text = "}" if request.chat else ""

    def event(self, text: str, token_ids: Sequence[int] = (), finish_reason: FinishReason | None = None) -> bytes:
        """One event of the stream: what one step generated."""
        before = self._before_text
        if self._first:
            before = before.replace('"delta":{', '"delta":{"role":"assistant",', 1)
            self._first = False
        reason = f'"{finish_reason}"' if finish_reason else "null"
        ids = f',"token_ids":[{",".join(map(str, token_ids))}]' if self._request.return_token_ids else ""
        return f'{before}{quote(text)}{self._after_text},"finish_reason":{reason}{ids}}}]}}\n\n'.encode()

    def end(self, usage: Usage) -> bytes:
        """What follows the last event: usage if asked for, and the end mark."""
        if not self._request.include_usage:
            return DONE
        return f'data: {self._opening},"choices":[],"usage":{json.dumps(usage.fields())}}}\n\n'.encode() + DONE

    def whole(self, text: str, token_ids: Sequence[int], finish_reason: FinishReason, usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""
        request = self._request
        said = {"message": {"role": "assistant", "content": text}} if request.chat else {"text": text}
        choice: dict[str, Any] = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        if request.return_token_ids:
            choice["token_ids"] = list(token_ids)
        rest = json.dumps({"choices": [choice], "usage": usage.fields()})
        return f"{self._opening},{rest[1:]}".encode()


def error_event(error: RequestError) -> bytes:
    """The last event of a stream that failed; no end mark follows it."""
    return b"data: " + error.body() + b"\n\n"


def models_body(names: Sequence[str], *, created_s: int, about: dict[str, Any]) -> bytes:
    """The body of /v1/models; ``about`` adds fields to each model."""
    entries = [{"id": name, "object": "model", "created": created_s, "owned_by": "chiron", **about} for name in names]
    return json.dumps({"object": "list", "data": entries}).encode()


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}
"""Fields that change the answer and that these engines do not implement, with the values that ask for nothing."""


class _Fields:
    """Typed access to a body; null is the same as absent, as in OpenAI's API."""

    __slots__ = ("_data",)

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def get(self, name: str) -> Any:
        return self._data.get(name)

    def error(self, name: str, allowed: str, code: str | None = None) -> RequestError:
        value = self._data.get(name)
        found = f"{name} is {_shown(value)}" if name in self._data else f"{name} is missing"
        return RequestError(f"{found}; it must be {allowed}.", param=name, code=code)

    def text(self, name: str) -> str:
        value = self._data.get(name)
        if not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def flag(self, name: str) -> bool:
        value = self._data.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def integer(self, name: str, least: int, most: int | None = None) -> int | None:
        value = self._data.get(name)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            raise self.error(name, f"a whole number {bounds}")
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        value = self._data.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise self.error(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def refuse_unsupported(self) -> None:
        for name, harmless in _UNSUPPORTED.items():
            value = self._data.get(name)
            # Types are compared too: 0 log probabilities of a completion are a request, false is none.
            if value is None or any(type(value) is type(each) and value == each for each in harmless):
                continue
            allowed = f"absent or {json.dumps(harmless[0])}" if harmless else "absent"
            raise self.error(name, f"{allowed}: this engine does not implement it", code="unsupported_parameter")


def _messages(fields: _Fields) -> tuple[Message, ...]:
    given = fields.get("messages")
    if not isinstance(given, list) or not 1 <= len(given) <= MESSAGES_MAX:
        raise fields.error("messages", f"a list of 1 to {MESSAGES_MAX} messages")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(given))


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise RequestError(f"{where} is {_shown(given)}; it must be an object.", param=where)
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}.role is {_shown(role)}; it must be a string.", param=f"{where}.role")
    return Message(role=role, content=_content(content, f"{where}.content"))


def _content(given: Any, where: str) -> str:
    if given is None:
        return ""
    if isinstance(given, str):
        return _unicode(given, where)
    if not isinstance(given, list):
        raise RequestError(f"{where} is {_shown(given)}; it must be a string or a list of text parts.", param=where)
    texts = []
    for part in given:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise RequestError(f"{where} holds {_shown(part)}; only text parts are understood.", param=where)
        texts.append(_unicode(part["text"], where))
    return "".join(texts)


def _prompt(fields: _Fields) -> str | tuple[int, ...]:
    given = fields.get("prompt")
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], (str, list)):
        given = given[0]
    if isinstance(given, str):
        return _unicode(given, "prompt")
    if not isinstance(given, list) or not given or not _token_ids(given):
        raise fields.error("prompt", "one string or one list of token ids")
    return tuple(given)


def _unicode(text: str, where: str) -> str:
    """The text, if it can be encoded: JSON can escape half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} holds half a surrogate pair at character {error.start}.", param=where) from None
    return text


def _resume(fields: _Fields) -> tuple[int, ...]:
    given = fields.get("resume_token_ids")
    if given is None:
        return ()
    if not isinstance(given, list) or not _token_ids(given):
        raise fields.error("resume_token_ids", "a list of token ids")
    return tuple(given)


def _token_ids(given: list[Any]) -> bool:
    return all(type(token) is int and token >= 0 for token in given)


def _stop(fields: _Fields) -> tuple[str, ...]:
    given = fields.get("stop")
    if given is None:
        return ()
    stops = [given] if isinstance(given, str) else given
    if (
        not isinstance(stops, list)
        or len(stops) > STOPS_MAX
        or not all(isinstance(stop, str) and 1 <= len(stop) <= STOP_CHARS_MAX for stop in stops)
    ):
        raise fields.error("stop", f"a string or up to {STOPS_MAX} strings, each of 1 to {STOP_CHARS_MAX} characters")
    return tuple(stops)


def _include_usage(fields: _Fields, stream: bool) -> bool:
    given = fields.get("stream_options")
    if given is None:
        return False
    if not stream or not isinstance(given, dict):
        raise fields.error("stream_options", "an object, and only when stream is true")
    return _Fields(given).flag("include_usage")


def _shown(value: Any) -> str:
    """A value in an error message: as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, (list, dict)) or len(value) < 20 else ""
    if not text:
        return f"a list of {len(value)}" if isinstance(value, list) else f"an object of {len(value)} fields"
    return text if len(text) <= 80 else text[:77] + "..."
