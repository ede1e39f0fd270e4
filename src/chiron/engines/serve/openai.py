"""What an engine server understands of OpenAI's API: requests, read strictly.

``parse_request`` turns a body into a frozen ``GenerationRequest`` or raises ``RequestError``, which names the field,
its value and what is allowed. Fields that would change the answer in a way that no engine of ours can deliver are
errors rather than ignored, and each engine refuses what it cannot do of the rest. Unknown fields are ignored, as
clients send many, and so are those that only describe a request: ``store``, ``metadata``, ``user``, ``service_tier``,
``reasoning_effort`` and the like.

Two fields are ours. ``resume_token_ids`` are tokens that this request generated elsewhere: generation goes on after
them, only new text is answered, and limits and usage count from the beginning. ``return_token_ids`` adds ``token_ids``
to each choice, which is what a later resume needs; an engine leaves them out where it could not go on with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from chiron.engines.serve.request_error import RequestError, shown
from chiron.engines.serve.schemas.measure import VALUES_MAX
from chiron.engines.serve.schemas.nodes import Schema, SchemaError
from chiron.engines.serve.schemas.schema import ANY_OBJECT, Allowance, read_schema
from chiron.engines.serve.tools import NO_TOOLS, ToolCall, Tools, read_calls, read_tools

FinishReason = Literal["stop", "length", "tool_calls"]

COMPLETION_TOKENS_DEFAULT = 16
"""``max_tokens`` of /v1/completions when absent, as in OpenAI's API; chat has no such default."""
STOPS_MAX = 16
"""Stop strings in one request."""
STOP_CHARS_MAX = 256
"""Length of one stop string: text that could begin one is held back."""
MESSAGES_MAX = 4096
"""Messages in one chat request."""
CHOICES_MAX = 128
"""Sequences of one request: ``n`` times its prompts."""
CHAT_LOGPROBS_MAX = 20
"""``top_logprobs``, as in OpenAI's API."""
TEXT_LOGPROBS_MAX = 5
"""``logprobs`` of /v1/completions, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    """Of an assistant's message."""
    call_id: str = ""
    """Of a message with a tool's result: the call that it answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What to generate. Either ``messages`` (chat) or ``prompts`` is set."""

    chat: bool
    model: str
    messages: tuple[Message, ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Each is text or token ids."""
    n: int = 1
    """Choices for each prompt."""
    echo: bool = False
    """The answer's text begins with the prompt."""
    logprobs: int | None = None
    """Likelihoods of tokens are wanted, and of that many others in their places; None: none are."""
    json: Schema | None = None
    """The text must be JSON that fits this."""
    tools: Tools = NO_TOOLS
    max_tokens: int | None = None
    """Tokens of each choice, those of ``resume_token_ids`` included; None: what the context has room for."""
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Draw among this many of the likeliest tokens; 0: among all. No field of OpenAI's; vLLM's, and only engines that
    can do it heed it."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    resume_token_ids: tuple[int, ...] = ()
    return_token_ids: bool = False
    prompt_bytes_besides: int = field(default=0, compare=False)
    """Of definitions of tools and schemas, which chat templates put into prompts."""

    @property
    def choices(self) -> int:
        """Sequences to generate; those of the first prompt come first."""
        return self.n * max(1, len(self.prompts))

    @property
    def after_tools(self) -> bool:
        """The conversation's last turn is a tool's result."""
        for message in reversed(self.messages):
            if message.role in ("tool", "function"):
                return True
            if message.role != "assistant":
                return False
        return False


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
    allowance = Allowance()
    stream = fields.flag("stream")
    max_tokens = fields.integer("max_completion_tokens", 1) or fields.integer("max_tokens", 1)
    n = fields.integer("n", 1, CHOICES_MAX) or 1
    prompts = () if chat else _prompts(fields, CHOICES_MAX // n)
    form, tools = _json_schema(fields, allowance), _tools(fields, allowance) if chat else NO_TOOLS
    _check_values(fields, form, tools, n * max(1, len(prompts)))
    resume = _resume(fields)
    if resume and n * len(prompts or "1") > 1:
        raise fields.error("resume_token_ids", "absent where an answer has several choices")
    return GenerationRequest(
        chat=chat,
        model=model,
        messages=_messages(fields) if chat else (),
        prompts=prompts,
        n=n,
        echo=not chat and fields.flag("echo"),
        logprobs=_logprobs(fields, chat),
        json=form,
        tools=tools,
        max_tokens=max_tokens or (None if chat else COMPLETION_TOKENS_DEFAULT),
        ignore_eos=fields.flag("ignore_eos"),
        stop=_stop(fields),
        temperature=fields.number("temperature", 0.0, 2.0, 1.0),
        top_p=fields.number("top_p", 0.0, 1.0, 1.0),
        top_k=max(0, fields.integer("top_k", -1, 1 << 20) or 0),
        frequency_penalty=fields.number("frequency_penalty", -2.0, 2.0, 0.0),
        presence_penalty=fields.number("presence_penalty", -2.0, 2.0, 0.0),
        seed=fields.integer("seed", -(1 << 63), (1 << 63) - 1),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        resume_token_ids=resume,
        return_token_ids=fields.flag("return_token_ids"),
        prompt_bytes_besides=sum(len(json.dumps(fields.get(f))) for f in ("tools", "response_format") if fields.get(f)),
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises RequestError."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {str(error)[:200]}.") from None
    if not isinstance(data, dict):
        raise RequestError(f"The body is {shown(data)}; it must be a JSON object.")
    return data


def parse_limit(body: bytes) -> int:
    """The max batch size in ``{"limit": n}``, sequences, at least 1. Raises RequestError."""
    limit = parse_limits(body)[0]
    if limit is None:
        raise RequestError("limit is missing; it must be a whole number of at least 1.", param="limit")
    return limit


def parse_limits(body: bytes) -> tuple[int | None, int | None]:
    """Max batch size (sequences) and token budget of a step in ``{"limit": n, "max_num_batched_tokens": n}``, each at
    least 1, of which one may be missing. Raises RequestError."""
    fields = _Fields(parse_object(body))
    limit, tokens = fields.integer("limit", 1), fields.integer("max_num_batched_tokens", 1)
    if limit is None and tokens is None:
        raise fields.error("limit", "a whole number of at least 1")
    return limit, tokens


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "logit_bias": ({},),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "structured_outputs": (),
}
"""Fields that change the answer and that these engines do not implement, with the values that ask for nothing. Other
engines' names for what ``response_format`` and ``tools`` say are among them."""


class _Fields:
    """Typed access to a body; null is the same as absent, as in OpenAI's API."""

    __slots__ = ("_data",)

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def get(self, name: str) -> Any:
        return self._data.get(name)

    def error(self, name: str, allowed: str, code: str | None = None) -> RequestError:
        value = self._data.get(name)
        found = f"{name} is {shown(value)}" if name in self._data else f"{name} is missing"
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
            if value is None or value in harmless:
                continue
            allowed = f"absent or {json.dumps(harmless[0])}" if harmless else "absent"
            raise self.error(name, f"{allowed}: this engine does not implement it", code="unsupported_parameter")
        best_of = self.integer("best_of", 1)
        if best_of is not None and best_of != (self.integer("n", 1) or 1):
            raise self.error(
                "best_of",
                "absent or equal to n: this engine does not select among choices",
                code="unsupported_parameter",
            )


def _messages(fields: _Fields) -> tuple[Message, ...]:
    given = fields.get("messages")
    if not isinstance(given, list) or not 1 <= len(given) <= MESSAGES_MAX:
        raise fields.error("messages", f"a list of 1 to {MESSAGES_MAX} messages")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(given))


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise RequestError(f"{where} is {shown(given)}; it must be an object.", param=where)
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}.role is {shown(role)}; it must be a string.", param=f"{where}.role")
    call_id = given.get("tool_call_id")
    if not isinstance(call_id, str | None):
        place = f"{where}.tool_call_id"
        raise RequestError(f"{place} is {shown(call_id)}; it must be a string.", param=place)
    return Message(
        role=_unicode(role, f"{where}.role"),
        content=_content(content, f"{where}.content"),
        calls=read_calls(given.get("tool_calls"), f"{where}.tool_calls"),
        call_id=call_id or "",
    )


def _content(given: Any, where: str) -> str:
    if given is None:
        return ""
    if isinstance(given, str):
        return _unicode(given, where)
    if not isinstance(given, list):
        raise RequestError(f"{where} is {shown(given)}; it must be a string or a list of text parts.", param=where)
    return "".join(_unicode(_part(part, where), where) for part in given)


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(kind) if isinstance(part, dict) and kind in ("text", "refusal") else None
    if isinstance(text, str):
        return text
    if isinstance(kind, str) and kind not in ("text", "refusal"):
        raise RequestError(
            f"{where} holds a part of type {shown(kind)}; this engine supports only text parts.",
            param=where,
            code="unsupported_content",
        )
    raise RequestError(f"{where} holds {shown(part)}; only text parts are supported.", param=where)


def _prompts(fields: _Fields, most: int) -> tuple[str | tuple[int, ...], ...]:
    given = fields.get("prompt")
    several = given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]
    if len(several) > most:
        raise RequestError(
            f"prompt is a list of {len(several)}; with n prompts and choices may be {CHOICES_MAX} together.",
            param="prompt",
        )
    return tuple(_prompt(prompt, fields) for prompt in several)


def _prompt(given: Any, fields: _Fields) -> str | tuple[int, ...]:
    if isinstance(given, str):
        return _unicode(given, "prompt")
    if not isinstance(given, list) or not given or not _token_ids(given):
        raise fields.error("prompt", "a string, a list of token ids, or a list of one or the other")
    return tuple(given)


def _logprobs(fields: _Fields, chat: bool) -> int | None:
    if not chat:
        # false is what some send for none.
        return None if fields.get("logprobs") is False else fields.integer("logprobs", 0, TEXT_LOGPROBS_MAX)
    top = fields.integer("top_logprobs", 0, CHAT_LOGPROBS_MAX)
    if fields.flag("logprobs"):
        return top or 0
    if top:
        raise fields.error("top_logprobs", "absent or 0 unless logprobs is true")
    return None


_SCHEMA_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def _json_schema(fields: _Fields, allowance: Allowance) -> Schema | None:
    """What JSON the answer must be, by ``response_format``; None: any text."""
    given = fields.get("response_format")
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        raise fields.error("response_format", "an object of type 'text', 'json_object' or 'json_schema'")
    described = given.get("json_schema")
    where = "response_format.json_schema"
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        raise RequestError(f"{where} is {shown(described)}; it must hold a schema.", param="response_format")
    name = described.get("name", "it")
    if not isinstance(name, str) or not _SCHEMA_NAME.fullmatch(name):
        raise RequestError(
            f"{where}.name is {shown(name)}; it must be 1 to 64 letters, digits, '_', '-' or '.'.",
            param="response_format",
        )
    try:
        return read_schema(described["schema"], f"{where}.schema", allowance)
    except SchemaError as error:
        raise RequestError(str(error), param="response_format", code="invalid_json_schema") from None


def _check_values(fields: _Fields, form: Schema | None, tools: Tools, choices: int) -> None:
    """Raises RequestError if the choices would have to hold too much JSON together."""
    schemas = [tool.arguments for tool in tools.allowed] + ([] if form is None else [form])
    values = choices * max((schema.least_values for schema in schemas), default=0)
    if choices > 1 and values > VALUES_MAX:
        raise fields.error("n", f"smaller for such schemas: all choices together would have {values} values at least")


def _tools(fields: _Fields, allowance: Allowance) -> Tools:
    return read_tools(fields.get("tools"), fields.get("tool_choice"), fields.get("parallel_tool_calls"), allowance)


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
