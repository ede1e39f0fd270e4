"""The fields of a completion's body that are read at all, as a parser in C finds them.

Apart from what is made of them (``body``), which the compiled build compiles: it knows no classes with keywords.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType


class Options(Struct, gc=False):
    """Of a stream."""

    include_usage: bool | None = None


class Message(Struct, gc=False):
    """Of a chat."""

    content: str | list[Raw] | None = None


class Usual(Struct, gc=False):
    """A body as it nearly always is; one that is not is looked at field by field."""

    model: str
    messages: list[Message] | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    stream: bool | None = None
    stream_options: Options | None = None
    service_tier: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    return_token_ids: bool | None = None


class Parts(Struct, gc=False):
    """Where the fields are; of one that is given twice the last counts, as it does for engines."""

    model: Raw | UnsetType = UNSET
    messages: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    stream: Raw | UnsetType = UNSET
    stream_options: Raw | UnsetType = UNSET
    service_tier: Raw | UnsetType = UNSET
    max_tokens: Raw | UnsetType = UNSET
    max_completion_tokens: Raw | UnsetType = UNSET
    n: Raw | UnsetType = UNSET
    best_of: Raw | UnsetType = UNSET
    return_token_ids: Raw | UnsetType = UNSET
    resume_token_ids: Raw | UnsetType = UNSET


USUAL = msgspec.json.Decoder(Usual)
PARTS = msgspec.json.Decoder(Parts)
STEERING = tuple(name for name in Usual.__struct_fields__ if name not in ("messages", "prompt"))
