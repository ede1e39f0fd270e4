"""Lines of an event log that is not grouped, as values that are made and encoded quickly."""

from __future__ import annotations

import msgspec


class ArrivalLine(msgspec.Struct, gc=False):
    """A request arrives."""

    t: float
    event: str
    request: str
    model: str
    cls: str = msgspec.field(name="class")
    input_tokens: int
    key: str


class RequestLine(msgspec.Struct, gc=False):
    """Something happens to a request on its way."""

    t: float
    event: str
    request: str
    instance: int | None


class EndLine(msgspec.Struct, gc=False):
    """A request has ended."""

    t: float
    event: str
    request: str
    model: str
    cls: str = msgspec.field(name="class")
    key: str
    outcome: str | None
    reason: str | None
    instance: int | None
    input_tokens: int
    output_tokens: int
    queue_s: float | None
    ttft_s: float | None
    itl_s: float | None
    duration_s: float
    evictions: int
    retries: int


Line = ArrivalLine | RequestLine | EndLine
