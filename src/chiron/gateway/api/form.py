"""multipart/form-data, read as it comes: the file goes on in pieces, only short fields are kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from chiron.gateway.relay.errors import invalid, timed_out

FIELD_MAX_BYTES = 4096
PARTS_MAX = 32


@dataclass(slots=True)
class Part:
    """One part of a form. ``filename`` is None for a plain field."""

    name: str
    filename: str | None
    value: bytearray = field(default_factory=bytearray)
    """Of a plain field, once it is complete."""


Event = tuple[Part, bytes | None]
"""A part and a piece of its content; None at its end."""


class FormReader:
    """Bytes in, events out."""

    def __init__(self, boundary: bytes) -> None:
        self.complete = False
        self._events: list[Event] = []
        self._header = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._part = Part("", None)
        self._parts = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> list[Event]:
        """Raises ApiError 400."""
        self._events = []
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise invalid(f"The form cannot be read: {error}.") from None
        return self._events

    def _begin(self) -> None:
        self._headers = {}
        self._parts += 1
        if self._parts > PARTS_MAX:
            raise invalid(f"The form has more than {PARTS_MAX} parts.")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name")
        if name is None:
            raise invalid("A part of the form has no name.")
        filename = options.get(b"filename")
        self._part = Part(_text(name), None if filename is None else _text(filename))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.filename is None:
            part.value += data[start:end]
            if len(part.value) > FIELD_MAX_BYTES:
                raise invalid(f"{part.name[:100]} is longer than {FIELD_MAX_BYTES} bytes.", param=part.name[:100])
        else:
            self._events.append((part, data[start:end]))

    def _on_part_end(self) -> None:
        self._events.append((self._part, None))

    def _on_end(self) -> None:
        self.complete = True


async def read_form(request: Request, stall_s: float) -> AsyncIterator[Event]:
    """The events of a request's form. Raises ApiError 400 or 408, and ClientDisconnect."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary or len(boundary) > 200:
        raise invalid("The content-type must be multipart/form-data with a boundary.")
    try:
        reader = FormReader(boundary)
    except FormParserError as error:
        raise invalid(f"The form cannot be read: {error}.") from None
    pieces = aiter(request.stream())
    while not reader.complete:
        try:
            async with asyncio.timeout(stall_s):
                piece = await anext(pieces, None)
        except TimeoutError:
            raise timed_out(f"Nothing of the file came for {stall_s:g} s.", status=408) from None
        if piece is None:
            raise invalid("The form ends before its last boundary.")
        for event in reader.feed(piece):
            yield event


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
