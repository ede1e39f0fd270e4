"""Puts a streamed answer together into the object that the same request without streaming gives.

The gateway asks engines for streams even where the client wants none (a batch item, ``stream: false``): only a
stream tells it how far a request is, and only what has been streamed survives an eviction.

A stream is server-sent events of ``chat.completion.chunk`` or ``text_completion`` objects, split anywhere, lines
ended by LF or CRLF. Deltas are merged by the shape of their values, not by a list of known fields, so fields that
an engine adds (``reasoning_content``, say) come through: strings are joined, lists are extended, objects with an
``index`` are merged by it.
"""

from __future__ import annotations

from typing import Any

import orjson

from chiron.engines.claims import CHOICES_MAX, token_ids, usage
from chiron.gateway.relay.body import nested_too_deep
from chiron.gateway.relay.events import EventError, Events

Json = dict[str, Any]

_SET_ONCE = frozenset({"role", "id", "type", "name"})
"""Strings in a delta that name something; some engines repeat them in every chunk."""
_NOT_ENDS = frozenset({"abort", "error"})
"""Finish reasons of vLLM and SGLang for requests that they abort when they pause or stop: a partial answer."""


class CollectError(ValueError):
    """The stream is not what it should be: no JSON, too large, or cut off."""


class Collector:
    """Collects one request's answer, over as many streams as evictions and retries make of it."""

    __slots__ = (
        "_bytes_left",
        "_bytes_max",
        "_chat",
        "_choices",
        "_chunks",
        "_events",
        "_keep_token_ids",
        "_several",
        "_top",
        "done",
        "error",
        "usage",
    )

    def __init__(
        self, chat: bool, *, bytes_max: int = 64 << 20, keep_token_ids: bool = False, several: bool = False
    ) -> None:
        """``bytes_max`` bounds what one answer may hold in memory. ``keep_token_ids``: the client asked for them;
        otherwise they are for resuming only, and left out of the result. ``several`` choices may come: only the
        stream's own end tells that none is missing, and an engine could not go on with them."""
        self._chat = chat
        self._bytes_max = bytes_max
        self._keep_token_ids = keep_token_ids
        self._several = several
        self.reset()

    def reset(self) -> None:
        """Forget everything: the request starts again from its prompt."""
        self.done = False
        """The stream said that it is complete, or that it failed."""
        self.error: Json | None = None
        """The engine's error object, if the stream carried one."""
        self.usage: Json | None = None
        self._events = Events()
        self._bytes_left = self._bytes_max
        self._top: Json = {}
        self._choices: dict[int, _Choice] = {}
        self._chunks = 0

    def resume(self) -> None:
        """Another stream goes on where this one was cut: half an event is dropped, whole ones are kept."""
        self._events.clear()
        self.done = False
        self.error = None

    def feed(self, data: bytes) -> None:
        """Take in the next piece of the stream. Raises CollectError."""
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise CollectError(f"the answer is larger than {self._bytes_max} bytes")
        try:
            events = self._events.feed(data)
        except EventError as error:
            raise CollectError(str(error)) from None
        for event in events:
            chunk = self.read(event)
            if chunk is not None:
                self._take_chunk(chunk)

    def take_chunk(self, chunk: Json, size_bytes: int) -> None:
        """Take in what ``read`` made of an event, or what is left of that, of so many bytes; takes it apart. Raises
        CollectError."""
        self._bytes_left -= size_bytes
        if self._bytes_left < 0:
            raise CollectError(f"the answer is larger than {self._bytes_max} bytes")
        self._take_chunk(chunk)

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens so far: what a resume hands back to an engine. None where there may be several choices."""
        first = self._choices.get(0)
        return first.token_ids if first and not self._several else []

    @property
    def logprobs(self) -> Json:
        """Log probabilities so far, as the engine says them, of the first choice."""
        first = self._choices.get(0)
        return first.logprobs if first is not None else {}

    @property
    def tokens(self) -> int:
        """Output tokens so far: by ids, else by chunks with something in them."""
        return sum(len(choice.token_ids) for choice in self._choices.values()) or self._chunks

    @property
    def finished(self) -> bool:
        """Every choice says why it ended."""
        choices = self._choices.values()
        if self._several and not self.done:
            return False
        return bool(choices) and all(choice.fields.get("finish_reason") for choice in choices)

    def result(self) -> Json:
        """The whole answer. Raises CollectError if the stream was cut off."""
        if self.error is not None:
            raise CollectError(f"the engine reported an error: {self.error.get('message', self.error)}")
        if not self.finished:
            raise CollectError("the engine's stream ended before the answer did")
        if any(choice.fields["finish_reason"] in _NOT_ENDS for choice in self._choices.values()):
            raise CollectError("the engine aborted the answer")
        return self.partial()

    def partial(self) -> Json:
        """The answer so far; ``finish_reason`` is null where a choice has not ended."""
        kind = "chat.completion" if self._chat else "text_completion"
        choices = [
            self._choices[i].plain(i, self._chat, keep_token_ids=self._keep_token_ids) for i in sorted(self._choices)
        ]
        answer = {**self._top, "object": kind, "choices": choices}
        if self.usage is not None:
            answer["usage"] = self.usage
        return answer

    def read(self, event: bytes) -> Json | None:
        """The chunk that an event of the stream is; None: there is nothing in it. Raises CollectError."""
        if event == b"[DONE]":
            self.done = True
            return None
        try:
            chunk = orjson.loads(event)
        except orjson.JSONDecodeError as error:
            raise CollectError(f"an event of the engine's stream is not JSON: {error}") from None
        if chunk is None:
            return None  # llama.cpp begins the answer to a list of prompts with it.
        if not isinstance(chunk, dict):
            raise CollectError("an event of the engine's stream is not a JSON object")
        if nested_too_deep(event, chunk):
            raise CollectError("an event of the engine's stream is nested too deep")
        return chunk

    def _take_chunk(self, chunk: Json) -> None:
        if chunk.get("error"):
            said = chunk["error"]
            self.error = said if isinstance(said, dict) else {"message": str(said)}
            self.done = True
            return
        choices = chunk.pop("choices", None)
        self.usage = usage(chunk.pop("usage", None)) or self.usage
        for name, value in chunk.items():
            if value is not None:
                self._top.setdefault(name, value)
        if isinstance(choices, list):
            for choice in choices:
                self._take_choice(choice)

    def _take_choice(self, chunk: object) -> None:
        index = chunk.get("index", 0) if isinstance(chunk, dict) else None
        if not isinstance(chunk, dict) or not isinstance(index, int) or not 0 <= index < CHOICES_MAX:
            raise CollectError("a choice in the engine's stream is not an object with an index that can be")
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice()
        if choice.take(chunk):
            self._chunks += 1


class _Choice:
    __slots__ = ("fields", "logprobs", "message", "token_ids")

    def __init__(self) -> None:
        self.fields: Json = {}
        self.message: Json = {}
        self.logprobs: Json = {}
        self.token_ids: list[int] = []

    def take(self, chunk: Json) -> bool:
        """Merge a chunk in. Returns whether it held something generated."""
        before = len(self.token_ids)
        something = False
        for name, value in chunk.items():
            if value is None or name == "index":
                continue
            if name == "delta" and isinstance(value, dict):
                something = any(part for key, part in value.items() if key != "role")
                _merge(self.message, value)
            elif name == "text" and isinstance(value, str):
                something = bool(value)
                _merge(self.message, {"text": value})
            elif name == "logprobs" and isinstance(value, dict):
                self._take_logprobs(value)
            elif name == "token_ids" and isinstance(value, list):
                ids = token_ids(value)
                if ids is None:
                    raise CollectError("token_ids in the engine's stream are not ids of tokens")
                self.token_ids.extend(ids)
            elif name == "finish_reason" and not isinstance(value, str):
                raise CollectError("finish_reason in the engine's stream is not text")
            else:
                self.fields[name] = value
        return something or len(self.token_ids) > before

    def _take_logprobs(self, value: Json) -> None:
        """Lists go on; none is merged by ``index``, which may be a token that was said."""
        for name, more in value.items():
            have = self.logprobs.get(name)
            if isinstance(more, list) and isinstance(have, list):
                have.extend(more)
            elif more is not None:
                self.logprobs[name] = list(more) if isinstance(more, list) else more

    def plain(self, index: int, chat: bool, *, keep_token_ids: bool) -> Json:
        said = _plain(self.message)
        logprobs = self.logprobs or None
        answer: Json = {"index": index}
        if chat:
            empty = None if said.get("tool_calls") or said.get("function_call") else ""
            answer["message"] = {"role": "assistant", "content": empty, "refusal": None} | said
        else:
            answer["text"] = said.get("text", "")
        answer |= {"logprobs": logprobs, "finish_reason": None} | self.fields
        if keep_token_ids:
            answer["token_ids"] = list(self.token_ids)
        return answer


class _Text:
    """A string in pieces: joining at the end keeps long answers linear."""

    __slots__ = ("parts",)

    def __init__(self) -> None:
        self.parts: list[str] = []


class _Indexed:
    """A list of objects whose pieces name their place."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: dict[int, Json] = {}


def _merge(into: Json, delta: Json) -> None:
    for name, value in delta.items():
        have = into.get(name)
        if value is None:
            continue
        if isinstance(value, str) and name not in _SET_ONCE:
            if not isinstance(have, _Text):
                have = into[name] = _Text()
            have.parts.append(value)
        elif isinstance(value, str):
            if not have:
                into[name] = value
        elif isinstance(value, list):
            into[name] = _extend(have, value)
        elif isinstance(value, dict):
            if not isinstance(have, dict):
                have = into[name] = {}
            _merge(have, value)
        else:
            into[name] = value


def _extend(have: object, more: list[Any]) -> object:
    if more and all(isinstance(item, dict) and isinstance(item.get("index"), int) for item in more):
        if not all(0 <= item["index"] < CHOICES_MAX for item in more):
            raise CollectError("an index in the engine's stream cannot be")
        indexed = have if isinstance(have, _Indexed) else _Indexed()
        for item in more:
            _merge(indexed.items.setdefault(item["index"], {}), {k: v for k, v in item.items() if k != "index"})
        return indexed
    if isinstance(have, list):
        have.extend(more)
        return have
    return have if isinstance(have, _Indexed) else list(more)


def _plain(state: Any) -> Any:
    """Plain JSON values of what ``_merge`` built."""
    if isinstance(state, _Text):
        return "".join(state.parts)
    if isinstance(state, _Indexed):
        return [_plain(state.items[index]) for index in sorted(state.items)]
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state
