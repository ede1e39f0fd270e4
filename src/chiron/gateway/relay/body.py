"""What the gateway needs of a completion's body, found without building the rest of it.

A body of a few bytes per value costs thirty times its size as Python objects, and seconds of the loop. So it is checked
and skipped over by a parser in C that builds only what steers a request (model, stream, limits) and bounds even that;
the body itself stays the bytes that came. Where an engine must be sent something else (its own name of the model, a
stream where the client wanted none), values are replaced in those bytes.

**How large a request is** is decided here and nowhere else: for limits of keys, admission, placement and batch items
alike. All of the body counts but its frame: messages, tools, schemas, suffixes, documents, whatever a field is called,
because whatever an engine reads it may put into the prompt. Escapes count as the character that they stand for, ids of
tokens are counted, and an image, a sound or a file counts as so much text as its tokens would be, not as its base64.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
import numpy as np
import orjson
from msgspec import UNSET, Struct

from chiron.engines.claims import CHOICES_MAX, output_tokens_max, whole
from chiron.gateway.relay.body_fields import PARTS, STEERING, USUAL, Usual
from chiron.gateway.relay.errors import ApiError, invalid

BYTES_PER_TOKEN: Final = 4.0
"""Of English text, until an engine's usage figures tell better."""
NESTING_MAX: Final = 250
"""Levels of a JSON body."""
FRAME_BYTES: Final = 256
"""Of a body that do not count, as long as more than the prompt is left: the model's name, limits, sampling."""
MESSAGE_BYTES: Final = 28
"""Around the text of a message, in JSON as in a chat template."""
MEDIA_BYTES: Final = 4096
"""Of text that an image, a sound or a file counts as: some thousand tokens."""
MEDIA_VALUE_MIN_BYTES: Final = 1024
"""A text without escapes from here on, where a part of a message has its data, is the data and no text."""
SMALL_BYTES: Final = 64 * 1024
"""Up to this size a body may be built as objects for a moment, where that says more."""
FIELD_MAX_BYTES: Final = 4096
"""Of a field that steers the request; a longer one is not looked at."""
_SLICE_BYTES: Final = 256 * 1024
MEDIA_MAX: Final = 4096
"""Images, sounds and files that are looked for in one request."""
_DATA_KEY: Final = re.compile(rb'"(?:url|data|file_data|image|audio|video)"\s*:\s*"\Z')
_OPENS_TEXT: Final = re.compile(rb'\s*:\s*"')
_IDS: Final = b"0123456789,[] \t\r\n"
_FULL_LIST: Final = re.compile(rb"\[\s*[^\s\]]")
_LIST_OF_OBJECTS: Final = re.compile(rb"\[\s*\{")
_OPENING: Final = re.compile(rb"\[\s*(.)")
_NO_ID: Final = re.compile(rb"[0-9]{11}")


class Long:
    """Stands for a value that is too long to be a right one, and shows its beginning."""

    def __init__(self, text: bytes) -> None:
        self._text = text[:40].decode("utf-8", "replace")

    def __repr__(self) -> str:
        return f"{self._text}..."


class Shape:
    """What is known of a body."""

    __slots__ = ("fields", "has_media", "places", "prompts", "sure_bytes", "text_bytes", "token_ids")

    def __init__(
        self,
        fields: Mapping[str, Any],
        text_bytes: int,
        token_ids: int,
        sure_bytes: int,
        has_media: bool,
        prompts: int,
        places: Mapping[str, tuple[int, int]] | None,
    ) -> None:
        self.fields = fields
        """Those that steer the request, by name; one that is missing or null is not among them."""
        self.text_bytes = text_bytes
        """How long its prompt is as text, tools and all else included."""
        self.token_ids = token_ids
        """Of a prompt that came as ids of tokens; they are not among ``text_bytes``."""
        self.sure_bytes = sure_bytes
        """Of its text, those in the messages or the prompt themselves, without what images count as."""
        self.has_media = has_media
        self.prompts = prompts
        """At most so many answers does it ask for, besides ``n``."""
        self.places = places
        """Where fields are in the body; None: not looked for yet."""

    @property
    def output_tokens_max(self) -> int | None:
        """The most output tokens that it allows; None: it sets no limit."""
        limit = output_tokens_max(self.fields)
        return None if limit is None else limit * self.prompts

    @property
    def several(self) -> bool:
        """Whether its answer may have several choices."""
        return self.prompts > 1 or self.fields.get("n") not in (None, 1)

    @property
    def sequences(self) -> int:
        """How many choices its answer has, as far as can be seen."""
        return min(CHOICES_MAX, (whole(self.fields.get("n"), CHOICES_MAX) or 1) * self.prompts)

    @property
    def learnable_bytes(self) -> int:
        """Bytes to learn from how many tokens they are; 0: they tell nothing, beside ids of tokens or an image."""
        return 0 if self.token_ids or self.has_media else self.text_bytes

    def tokens(self, bytes_per_token: float) -> float:
        """How many tokens its prompt has, as far as can be known before an engine says."""
        return self.token_ids + self.text_bytes / bytes_per_token


class Body:
    """A completion's body and what is known of it."""

    __slots__ = ("raw", "shape")

    def __init__(self, raw: bytes, shape: Shape) -> None:
        self.raw = raw
        self.shape = shape

    def with_values(self, values: Mapping[str, Any], others: Struct | None = None) -> bytes:
        """The body with these values in place of its own, or beside what it has. ``others``: more of its fields, as
        views of it, that may be among them."""
        places = self.shape.places
        if places is None:
            places = _places(self.raw, PARTS.decode(self.raw))
        if others is not None:
            places = {**places, **_places(self.raw, others)}
        written = {name: orjson.dumps(value) for name, value in values.items()}
        replaced = sorted((*places[name], text) for name, text in written.items() if name in places)
        added = [b'"%b":%b' % (name.encode(), text) for name, text in written.items() if name not in places]
        parts: list[bytes] = []
        at = 0
        for start, end, text in replaced:
            parts += (self.raw[at:start], text)
            at = end
        brace = self.raw.rindex(b"}")
        parts.append(self.raw[at:brace].rstrip())
        if added:
            parts += (b"," if not parts[-1].endswith(b"{") else b"", b",".join(added))
        return b"".join((*parts, b"}"))


def read_body(raw: bytes, chat: bool) -> Body:
    """Raises ApiError 400 for what no engine would take."""
    return Body(raw, shape_of(raw, chat))


def body_of(fields: Mapping[str, Any], chat: bool = False) -> Body:
    """A body of these fields, which need not be right."""
    raw = orjson.dumps(dict(fields))
    return Body(raw, Shape(dict(fields), len(raw), 0, len(raw), False, 1, None))


def shape_of(raw: bytes, chat: bool) -> Shape:
    """The shape of a body that is right as far as can be seen from here. Raises ApiError 400."""
    check_text(raw)
    usual = None
    if len(raw) <= SMALL_BYTES:
        try:
            usual = USUAL.decode(raw)
        except msgspec.ValidationError:
            pass  # Looked at field by field, which says what is wrong.
        except (msgspec.DecodeError, RecursionError) as error:
            raise unreadable(error) from None
    if usual is not None:
        return _shape_of_usual(raw, usual, chat)
    try:
        parts = PARTS.decode(raw)
    except msgspec.ValidationError as error:
        raise invalid(f"The body must be a JSON object: {error}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise unreadable(error) from None
    places = _places(raw, parts)
    fields = _steering(raw, places)
    if not chat:
        return _text_shape(raw, fields, places, raw, *places.get("prompt", (0, 0)))
    start, end = places.get("messages", (0, 0))
    if not _LIST_OF_OBJECTS.match(raw, start, end):
        raise _no_message(raw[start + 1 : start + 81]) if _FULL_LIST.match(raw, start, end) else _no_messages()
    return _chat_shape(raw, fields, places, end - start, True)


def nested_too_deep(text: bytes, value: object) -> bool:
    """Whether JSON that could be read is nested deeper than can be written again. Only a text with so many brackets
    can be, so most are not looked at."""
    if text.count(b"[") + text.count(b"{") <= NESTING_MAX:
        return False
    try:
        orjson.dumps(value)
    except TypeError:
        return True
    return False


def check_text(raw: bytes) -> None:
    """Raises ApiError 400 for a body that is not UTF-8, or is nested too deep, which a parser would skip over."""
    if not raw.isascii():
        decoder = getincrementaldecoder("utf-8")()
        try:
            for at in range(0, len(raw), _SLICE_BYTES):
                decoder.decode(raw[at : at + _SLICE_BYTES], at + _SLICE_BYTES >= len(raw))
        except UnicodeDecodeError as error:
            raise invalid(f"The body is not valid JSON: it is not UTF-8: {error.reason}") from None
    # Longer ones may be nested as deep as the parser goes, some hundred levels more: nothing here builds them.
    # In one that is shorter than its brackets would be there cannot be so many levels, unless it is no JSON.
    if 2 * NESTING_MAX < len(raw) <= SMALL_BYTES and raw.count(b"[") + raw.count(b"{") > NESTING_MAX:
        try:
            if nested_too_deep(raw, orjson.loads(raw)):
                raise invalid(f"The body is nested deeper than {NESTING_MAX} levels")
        except orjson.JSONDecodeError as error:
            raise invalid(f"The body is not valid JSON: {error}") from None


def unreadable(error: Exception) -> ApiError:
    if isinstance(error, RecursionError):
        return invalid(f"The body is nested deeper than {NESTING_MAX} levels")
    return invalid(f"The body is not valid JSON: {error}")


def _shape_of_usual(raw: bytes, usual: Usual, chat: bool) -> Shape:
    fields = _fields_of(usual)
    if not chat:
        prompt = b"" if usual.prompt is UNSET else bytes(usual.prompt)
        return _text_shape(raw, fields, None, prompt, 0, len(prompt))
    messages = usual.messages
    if messages is UNSET or not messages:
        raise _no_messages()
    length = 0
    parts = False
    for message in messages:
        content = message.content
        length += MESSAGE_BYTES
        if isinstance(content, str):
            length += len(content)
        elif content:
            parts = True
            length += sum([len(memoryview(part)) for part in content])
    return _chat_shape(raw, fields, None, length, parts)


def _fields_of(usual: Usual) -> dict[str, Any]:
    """One by one, as this is done for each request."""
    fields: dict[str, Any] = {"model": usual.model}
    if (stream := usual.stream) is not None:
        fields["stream"] = stream
    if (options := usual.stream_options) is not None:
        fields["stream_options"] = {"include_usage": options.include_usage}
    if (tier := usual.service_tier) is not None:
        fields["service_tier"] = tier
    if (most := usual.max_tokens) is not None:
        fields["max_tokens"] = most
    if (most := usual.max_completion_tokens) is not None:
        fields["max_completion_tokens"] = most
    if (choices := usual.n) is not None:
        fields["n"] = choices
    if (choices := usual.best_of) is not None:
        fields["best_of"] = choices
    if (ids := usual.return_token_ids) is not None:
        fields["return_token_ids"] = ids
    return fields


def _chat_shape(
    raw: bytes, fields: dict[str, Any], places: Mapping[str, tuple[int, int]] | None, prompt_length: int, parts: bool
) -> Shape:
    """``parts``: some message is not plain text, so that there may be an image in it."""
    media, media_bytes = _media(raw, places) if parts else (0, 0)
    escaped = _escaped_bytes(raw)
    text_bytes = max(prompt_length, len(raw) - FRAME_BYTES) - escaped - media_bytes + media * MEDIA_BYTES
    sure_bytes = prompt_length - escaped - media_bytes
    return Shape(fields, max(1, text_bytes), 0, max(1, sure_bytes), media > 0, 1, places)


def _text_shape(
    raw: bytes, fields: dict[str, Any], places: Mapping[str, tuple[int, int]] | None, text: bytes, start: int, end: int
) -> Shape:
    token_ids, prompts = _prompt(text, start, end)
    sure_bytes = 0 if token_ids else max(1, end - start - _escaped_bytes(raw))
    text_bytes = max(end - start, len(raw) - FRAME_BYTES) - _escaped_bytes(raw) - (end - start if token_ids else 0)
    return Shape(fields, max(0 if token_ids else 1, text_bytes), token_ids, sure_bytes, False, prompts, places)


def _escaped_bytes(raw: bytes) -> int:
    """By how much escapes are longer than what they stand for: three bytes or fewer, each."""
    return 3 * raw.count(b"\\u") if b"\\" in raw else 0


def _prompt(text: bytes, start: int, end: int) -> tuple[int, int]:
    """How many ids of tokens it is (0: it is text), and at most how many prompts."""
    if text.startswith(b'"', start, end):
        return 0, 1
    opening = _OPENING.match(text, start, end)
    first = b"]" if opening is None else opening[1]
    if first == b'"':
        return 0, max(1, text.count(b'"', start, end) // 2)
    # Deleting is done in C, also where it deletes all.
    ids = (first == b"[" or first.isdigit()) and not text[start:end].translate(None, _IDS)
    if ids and not _NO_ID.search(text, start, end):
        return text.count(b",", start, end) + 1, max(1, text.count(b"[", start, end) - 1)
    raise invalid("prompt: text, a list of texts or a list of token ids is required", param="prompt")


def _media(raw: bytes, places: Mapping[str, tuple[int, int]] | None) -> tuple[int, int]:
    """Images, sounds and files in the messages: how many, and the bytes of their data. Sought where a key says so, or a
    data URL; in a tool's schema, say, the same would be text for the engine."""
    found: dict[int, int] = {}
    for at in _places_of(raw, b'"url"', b'"data"'):
        opening = _OPENS_TEXT.match(raw, raw.index(b'"', at + 1) + 1)
        if opening is not None:
            found[opening.end()] = raw.find(b'"', opening.end())
    for at in _places_of(raw, b";base64,"):
        start = raw.rfind(b'"', max(0, at - 100), at) + 1
        if start and raw.startswith(b"data:", start) and _DATA_KEY.search(raw, max(0, start - 40), start):
            found[start] = raw.find(b'"', at)
    if not found:
        return 0, 0
    first, last = (places or _places(raw, PARTS.decode(raw))).get("messages", (0, 0))
    lengths = [end - start for start, end in found.items() if first <= start and end <= last]
    return len(lengths), sum(length for length in lengths if length >= MEDIA_VALUE_MIN_BYTES)


def _places_of(raw: bytes, *texts: bytes) -> Iterator[int]:
    """Where these stand, the first ``MEDIA_MAX`` of each: whatever comes after them counts as text."""
    for text in texts:
        at = -1
        for _ in range(MEDIA_MAX):
            at = raw.find(text, at + 1)
            if at < 0:
                break
            yield at


def _places(raw: bytes, parts: Struct) -> dict[str, tuple[int, int]]:
    """Each part is a view of the body, so that its address says where it is."""
    origin = _address(raw)
    found = {}
    for name in parts.__struct_fields__:
        part = getattr(parts, name)
        if part is not UNSET:
            start = _address(part) - origin
            found[name] = (start, start + len(memoryview(part)))
    return found


def _address(part: Any) -> int:
    address: int = np.frombuffer(part, np.uint8).__array_interface__["data"][0]
    return address


def steering_of(raw: bytes) -> dict[str, Any]:
    """The fields that steer the request, of a body that is JSON but else perhaps not right."""
    try:
        return _steering(raw, _places(raw, PARTS.decode(raw)))
    except (msgspec.DecodeError, RecursionError):
        return {}


def _steering(raw: bytes, places: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in STEERING:
        if name in places:
            start, end = places[name]
            found[name] = small_value(raw[start:end])
    return {name: value for name, value in found.items() if value is not None}


def small_value(text: bytes) -> Any:
    """The value of a field that ought to be short."""
    if len(text) > FIELD_MAX_BYTES:
        return Long(text)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:  # Nested too deep, or no number that there is.
        return Long(text)


def _no_messages() -> ApiError:
    return invalid("messages: a list with at least one message is required", param="messages")


def _no_message(text: bytes) -> ApiError:
    shown = text[:80].decode("utf-8", "replace")
    return invalid(f"messages: {shown} is not an object with role and content", param="messages")


PLACES_MAX: Final = 4
"""Of an instance, what one request may book. One for more choices than that would hold up all requests behind it until
an instance is nearly empty; its further choices wait inside the engine."""


def places(sequences: int) -> int:
    """How many places on an instance a request with so many choices books."""
    return min(sequences, PLACES_MAX)
